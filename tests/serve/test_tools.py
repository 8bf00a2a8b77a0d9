"""Calls of tools and reasoning in the answers of models whose form transformers knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress.serve.limits import Limits
from moepress.serve.parsing import Message, Parser, answer_template
from tests.conftest import make_model
from tests.serve.conftest import Here, serving  # skips without the server's libraries

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}"
    "\n{{ m.content }}{% for call in m.tool_calls or () %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
WRITTEN = (
    "<think>\nhm</think>\n\nI ask.\n"
    '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
)
PROMPT = "<|im_start|>assistant\n"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@dataclass
class Scripted(Here):
    """A server whose model writes a script, whatever it reads, and then ends."""

    script: list[int] = field(default_factory=list)

    def write(self, text: str) -> None:
        tokenizer = self.served.prompts.tokenizer
        ids = tokenizer(text, add_special_tokens=False).input_ids
        self.script[:] = [*ids, tokenizer.eos_token_id]

    def follow(self) -> None:
        stepper = self.served.engine.stepper
        prefill, decode = stepper.prefill, stepper.decode
        read: dict[int, int] = {}

        def scripted(state: Any, logits: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(logits)
            out[..., self.script[state.length - read[id(state)]]] = 9
            return out

        def after_prompt(state: Any, *args: Any, **options: Any) -> torch.Tensor:
            logits = prefill(state, *args, **options)
            read[id(state)] = state.length
            return scripted(state, logits)

        def after_step(states: Any, ids: Any) -> torch.Tensor:
            rows = decode(states, ids)
            return torch.stack([scripted(*pair) for pair in zip(states, rows, strict=True)])

        stepper.prefill = after_prompt  # type: ignore[method-assign]
        stepper.decode = after_step  # type: ignore[method-assign]

    def message(self, **fields: Any) -> dict[str, Any]:
        return dict(self.chat(**{"max_tokens": 150, **fields})["choices"][0]["message"])


@pytest.fixture(scope="module")
def qwen_server(
    tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scripted]:
    folder = tmp_path_factory.mktemp("tools") / "model"
    few = {
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 2048,
    }
    model: Any = make_model("qwen3_moe", **few)
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    here = serving(folder, Limits())
    made = Scripted(here.served, here.client)
    made.follow()
    yield made
    assert made.served.engine.stop(30)


@pytest.fixture
def qwen(qwen_server: Scripted) -> Scripted:
    """A Qwen3-MoE that writes `WRITTEN`, or another script."""
    qwen_server.write(WRITTEN)
    return qwen_server


def test_calls_and_reasoning_are_told_apart(qwen: Scripted) -> None:
    choice = qwen.chat(tools=[TOOL], max_tokens=150)["choices"][0]
    message = choice["message"]
    assert message["content"].strip() == "I ask." and message["reasoning_content"].strip() == "hm"
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"x": 1}
    assert choice["finish_reason"] == "tool_calls"


def test_a_stream_says_the_same(qwen: Scripted) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "stream": True}
    answer = qwen.client.post("/v1/chat/completions", json={**body, "max_tokens": 150})
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas).strip() == "I ask."
    assert "".join(delta.get("reasoning_content", "") for delta in deltas).strip() == "hm"
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "add")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_and_variables_reach_the_template(qwen: Scripted) -> None:
    from moepress.serve.schema import Chat, parsed

    def prompt(**fields: Any) -> str:
        body = {"messages": [{"role": "user", "content": "x"}], **fields}
        return qwen.served.prompts.of_chat(parsed(Chat, json.dumps(body).encode())).text

    assert '"name": "add"' in prompt(tools=[TOOL])
    assert "add" not in prompt(tools=[TOOL], tool_choice="none")
    assert prompt(chat_template_kwargs={"enable_thinking": False}).endswith("</think>\n\n")
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{bad"}}
    status, error = qwen.refused(
        "/v1/chat/completions", messages=[{"role": "assistant", "tool_calls": [call]}]
    )
    assert (status, error["param"]) == (400, "messages") and "JSON" in error["message"]


def parser(qwen: Here, tools: Any, prompt: str = PROMPT) -> Parser:
    template = answer_template(qwen.served.prompts.processor, qwen.served.engine.stepper.model)
    assert template is not None
    return Parser(template, prompt, tools)


def test_an_answer_cut_inside_a_call_keeps_the_rest(qwen: Scripted) -> None:
    reads = parser(qwen, [TOOL])
    text = "".join(reads.feed(piece).text for piece in ("I a", 'sk.\n<tool_call>\n{"name"'))
    last = reads.end()
    assert (text + last.text).strip() == "I ask." and last.calls == []
    reads = parser(qwen, [TOOL])  # the model ended there by itself
    assert reads.feed("I ask.\n<tool_call>oh").text + reads.end(cut=False).text == (
        "I ask.\n<tool_call>oh"
    )


def test_half_a_call_is_none(qwen: Scripted) -> None:
    """Arguments between tags, as Qwen3.5 writes them, can be read at any place of a cut."""
    template = {
        "start_anchor": PROMPT,
        "fields": {
            "content": {},
            "tool_calls": {
                "open_pattern": r"<function=(?P<name>\w+)>", "close": "</function>",
                "repeats": True, "content": "xml-inline",
                "content_args": {"tag_pattern": r"<(?P<key>\w)>(?P<value>.*?)</\w>"},
                "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
            },
        },
    }  # fmt: skip
    for end, made in (("", 0), ("</function>", 1)):
        reads = Parser(template, PROMPT, [TOOL])
        found = reads.feed("yes<function=add><x>1</x>" + end)
        found.add(reads.end(cut=True))
        assert (found.text, len(found.calls)) == ("yes", made)


UNREADABLE = [
    '\n{"name": <function-name>, "arguments": <args-json-object>}\n', "[1,2]", "5", "null", '"add"',
    "{}", '{"name": 3}', '{"name": ""}', '{"name": "add", "arguments": [1]}', "[" * 99999,
    '{"name": "add", "arguments": {"x": NaN}}', '{"name": "\\ud800"}', "", "{1}",
    '{"arguments": {}}',
]  # fmt: skip


@pytest.mark.parametrize("inside", UNREADABLE)
def test_a_call_that_cannot_be_read_is_text(qwen: Scripted, inside: str) -> None:
    raw = f"Now:\n<tool_call>{inside}</tool_call>\n"
    good = '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
    for pieces in ([raw, good], [*raw[:90], raw[90:], *good]):
        reads = parser(qwen, [TOOL])
        found = Message()
        for piece in pieces:
            found.add(reads.feed(piece))
        found.add(reads.end(cut=False))
        assert found == Message(raw.rstrip(), "", [{"name": "add", "arguments": '{"x": 1}'}])


def test_a_call_without_arguments(qwen: Scripted) -> None:
    for arguments in ("", ', "arguments": {}', ', "arguments": null'):
        qwen.write(f'<tool_call>{{"name": "add"{arguments}}}</tool_call>')
        (call,) = qwen.message(tools=[TOOL])["tool_calls"]
        assert call["function"] == {"name": "add", "arguments": "{}"}


def test_the_other_answers_go_on(qwen: Scripted) -> None:
    text = "a\n<tool_call>{1}</tool_call> b"
    qwen.write(text)
    choices = qwen.chat(tools=[TOOL], n=3, max_tokens=150)["choices"]
    assert [choice["message"]["content"] for choice in choices] == [text] * 3
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 3


@pytest.mark.parametrize("fields", [{}, {"tools": [TOOL], "tool_choice": "none"}, {"tools": []}])
def test_without_tools_a_call_is_text(qwen: Scripted, fields: dict[str, Any]) -> None:
    call = WRITTEN.partition("</think>")[2]
    message = qwen.message(**fields)
    assert message["content"] == call and "tool_calls" not in message
    assert message["reasoning_content"] == "\nhm"
    cut = qwen.message(**fields, max_tokens=60)["content"]
    assert call.startswith(cut) and "<tool_call>" in cut and len(cut) < len(call)


def test_calls_in_a_form_without_other_text(qwen: Scripted) -> None:
    """Every field has its marks, as in the answers of gpt-oss; what stands outside is left out."""
    template = {
        "start_anchor": "[assistant]",
        "fields": {
            "content": {"open": "[final]", "close": "[end]"},
            "tool_calls": {
                "open_pattern": r"\[to=(?P<name>\w+)\]", "close": "[call]", "repeats": True,
                "content": "json",
                "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
            },
        },
    }  # fmt: skip
    answer = 'x[to=add]{"x": 1}[call][final]yes[end]'
    found = {}
    for tools in ([TOOL], None):
        reads = Parser(template, "[assistant]", tools)
        found[bool(tools)] = reads.feed(answer)
        found[bool(tools)].add(reads.end(cut=False))
    assert found[True] == Message("yes", "", [{"name": "add", "arguments": '{"x": 1}'}])
    assert found[False] == Message('{"x": 1}yes')


def test_what_the_prompt_begins_is_not_sent(qwen: Scripted) -> None:
    qwen.write("I ask.")
    message = qwen.message(chat_template_kwargs={"enable_thinking": False})
    assert message["content"] == "I ask." and "reasoning_content" not in message
    for tools in ([TOOL], None):
        reads = parser(qwen, tools, PROMPT + "<think>\n")  # it ends inside the reasoning
        assert reads.feed("hm</think>yes") == Message("yes", "hm")
        reads = parser(qwen, tools, PROMPT + "<think>\n\n</think>\n\n")
        assert [reads.feed("\n"), reads.feed("yes")] == [Message(), Message("\nyes")]


def test_the_end_token_is_no_reasoning(qwen: Scripted) -> None:
    qwen.write("<think>\nhm")
    assert qwen.message() == {
        "role": "assistant", "content": "", "refusal": None, "reasoning_content": "\nhm",
    }  # fmt: skip
