"""Calls of tools and reasoning in the answers of models whose form transformers knows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress.serve.limits import Limits
from moepress.serve.parsing import Parser, answer_template
from tests.conftest import make_model
from tests.serve.conftest import Here, serving  # skips without the server's libraries

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}"
    "\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
WRITTEN = (
    "<think>\nhm</think>\n\nI ask.\n"
    '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>'
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def qwen(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """A Qwen3-MoE that writes `WRITTEN`, whatever it reads."""
    folder = tmp_path_factory.mktemp("tools") / "model"
    few = {
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
    }
    model: Any = make_model("qwen3_moe", **few)
    model.save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    made = serving(folder, Limits())
    tokenizer = made.served.prompts.tokenizer
    script = [*tokenizer(WRITTEN, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    stepper = made.served.engine.stepper
    prefill, decode, new = stepper.prefill, stepper.decode, stepper.new
    states: list[Any] = []

    def begun() -> Any:
        states[:] = [new()]
        at[0] = 0
        return states[0]

    def following(logits: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(logits)
        out[..., script[at[0]]] = 9
        at[0] += 1
        return out

    at = [0]
    stepper.new = begun  # type: ignore[method-assign]
    stepper.prefill = lambda *a, **o: following(prefill(*a, **o))  # type: ignore[method-assign]
    stepper.decode = lambda *a: following(decode(*a))  # type: ignore[method-assign]
    yield made
    assert made.served.engine.stop(30)


def test_calls_and_reasoning_are_told_apart(qwen: Here) -> None:
    choice = qwen.chat(tools=[TOOL], max_tokens=150)["choices"][0]
    message = choice["message"]
    assert message["content"].strip() == "I ask." and message["reasoning_content"].strip() == "hm"
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"x": 1}
    assert choice["finish_reason"] == "tool_calls"


def test_a_stream_says_the_same(qwen: Here) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "stream": True}
    answer = qwen.client.post("/v1/chat/completions", json={**body, "max_tokens": 150})
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas).strip() == "I ask."
    assert "".join(delta.get("reasoning_content", "") for delta in deltas).strip() == "hm"
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "add")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_and_variables_reach_the_template(qwen: Here) -> None:
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


def test_an_answer_cut_inside_a_call_keeps_the_rest(qwen: Here) -> None:
    template = answer_template(qwen.served.prompts.processor, qwen.served.engine.stepper.model)
    assert template is not None
    parser = Parser(template, "<|im_start|>assistant\n", None)
    text = "".join(parser.feed(piece).text for piece in ("I a", 'sk.\n<tool_call>\n{"name"'))
    last = parser.end()
    assert (text + last.text).strip() == "I ask." and last.calls == []
