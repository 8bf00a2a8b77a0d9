"""Calls of tools that are held to the schemas of their parameters."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from transformers import AutoTokenizer

from moepress.serve import calling, grammar
from moepress.serve.calling import CallReader
from moepress.serve.forms import CallForm, form_of
from moepress.serve.parsing import Message
from moepress.serve.schema import Chat, RefusedError, parsed
from moepress.serve.thinking import TAGS, Split, UnknownFormError
from tests.llama_tokenizer import llama_tokenizer
from tests.serve.conftest import NAME
from tests.serve.test_grammar import CODE, PERSON, THOUGHT, fits, script
from tests.serve.test_tools import TOOL, Scripted, qwen_server  # noqa: F401  # a fixture

pytest.importorskip("llguidance")

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "x"}]
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 3, "maximum": 40}, "code": CODE},
    "required": ["x", "code"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = POINT, **more: Any) -> dict[str, Any]:
    own = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **own, **more}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


# Led away from what it wants, the model takes to thinking, without end.
NOT_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


def strict(name: str, parameters: Any = POINT) -> dict[str, Any]:
    return tool(name, parameters, strict=True)


@pytest.fixture
def model(qwen_server: Scripted) -> Scripted:  # noqa: F811
    return qwen_server


def answer(model: Scripted, text: str, **fields: Any) -> dict[str, Any]:
    """The first answer of a model that wants to write a text."""
    script(model, text)
    return dict(model.chat(**{"max_tokens": 200, **fields})["choices"][0])


def calls(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    made = choice["message"].get("tool_calls", [])
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in made)
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in made]


def streamed(model: Scripted, text: str, **fields: Any) -> tuple[Message, str, list[Any]]:
    """The answer in one, why it ended, and its logprobs."""
    script(model, text)
    body = {"messages": HELLO, "temperature": 0, "stream": True, "max_tokens": 200, **fields}
    sent = model.client.post(PATH, json=body)
    assert sent.status_code == 200, sent.text
    chunks = [json.loads(line[6:])["choices"][0] for line in sent.text.split("\n\n")[:-2]]
    made, logprobs = Message(), []
    for chunk in chunks:
        delta = chunk["delta"]
        made.add(Message(delta.get("content", ""), delta.get("reasoning_content", "")))
        made.calls += [call["function"] for call in delta.get("tool_calls", ())]
        logprobs += (chunk["logprobs"] or {}).get("content", [])
    return made, chunks[-1]["finish_reason"], logprobs


@pytest.mark.parametrize("text", ["Sure, I add", THOUGHT + "Sure, I add", ""])
@pytest.mark.parametrize("choice, finish", [(named("add"), "stop"), ("required", "tool_calls")])
def test_a_forced_answer_is_one_call(model: Scripted, text: str, choice: Any, finish: str) -> None:
    """It ends as OpenAI's do: a call of the function that the request names is no reason."""
    more = {} if text.startswith("<think>") else NOT_THINKING
    fields = {"tools": [tool("add"), tool("sub", None)], "tool_choice": choice, **more}
    got = answer(model, text, **fields)
    ((name, arguments),) = calls(got)
    assert fits(arguments, POINT if name == "add" else {"const": {}})
    assert name == "add" or choice == "required"
    assert got["finish_reason"] == finish and got["message"]["content"] is None
    thought = THOUGHT[7:-10] if text.startswith("<think>") else None
    assert got["message"].get("reasoning_content") == thought
    made, ended, _ = streamed(model, text, **fields)
    assert made.text == "" and made.reasoning == (thought or "") and ended == finish
    (call,) = made.calls
    assert (call["name"], json.loads(call["arguments"])) == (name, arguments)


def test_the_model_chooses_the_function_and_what_fits(model: Scripted) -> None:
    text = '<tool_call>\n{"name": "sub", "arguments": {"x": 12, "code": "ab-120"}}\n</tool_call>'
    tools = [tool("add", PERSON), tool("sub")]
    got = answer(model, THOUGHT + text, tools=tools, tool_choice="required")
    assert calls(got) == [("sub", {"x": 12, "code": "ab-120"})]
    got = answer(model, THOUGHT + text, tools=tools, tool_choice=named("add"))
    ((name, arguments),) = calls(got)
    assert name == "add" and fits(arguments, PERSON)


def test_marks_inside_of_arguments_end_no_call(model: Scripted) -> None:
    value = "</tool_call> <tool_call> <think> }\n"
    arguments = {"a": value}
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    call = json.dumps({"name": "add", "arguments": arguments})
    text = f"<tool_call>\n{call}\n</tool_call>"
    for fields in (
        {"tools": [tool("add", schema)], "tool_choice": named("add")},
        {"tools": [strict("add", schema)]},
    ):
        got = answer(model, text, **fields)
        assert calls(got) == [("add", arguments)] and got["message"]["content"] is None
        made, _, _ = streamed(model, text, **fields)
        assert made.calls == [{"name": "add", "arguments": json.dumps(arguments)}]
        assert made.text == ""


@pytest.mark.parametrize(
    "parameters, expected",
    [
        (None, {"const": {}}),
        ({"properties": {}, "additionalProperties": False}, {"const": {}}),
        ({"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"],
          "additionalProperties": False}, {"const": {"x": 1}}),
        ({"$ref": "#/$defs/P", "$defs": {"P": POINT}}, POINT),
    ],
)  # fmt: skip
def test_parameters_of_several_kinds(model: Scripted, parameters: Any, expected: Any) -> None:
    got = answer(
        model, "no", tools=[tool("add", parameters)], tool_choice="required", **NOT_THINKING
    )
    ((_, arguments),) = calls(got)
    assert fits(arguments, expected)


def test_several_answers(model: Scripted) -> None:
    script(model, "no")
    fields = {"tools": [tool("add"), tool("sub")], "tool_choice": "required", "n": 3}
    choices = model.chat(**fields, max_tokens=200, temperature=1.5, seed=3)["choices"]
    found = [calls(choice) for choice in choices]
    assert all(len(one) == 1 and fits(one[0][1], POINT) for one in found)
    ids = [choice["message"]["tool_calls"][0]["id"] for choice in choices]
    assert len(set(ids)) == 3


def test_logprobs_are_those_of_the_answer(model: Scripted) -> None:
    fields = {"tools": [tool("add")], "tool_choice": named("add"), "logprobs": True, **NOT_THINKING}
    whole = answer(model, "no", **fields)
    names = [one["token"] for one in whole["logprobs"]["content"]]
    text = "".join(names)
    arguments = whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert text == f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call>'
    assert [one["token"] for one in streamed(model, "no", **fields)[2]] == names


def test_an_answer_cut_inside_of_a_call_has_none(model: Scripted) -> None:
    fields = {"tools": [tool("add")], "tool_choice": named("add")}
    got = answer(model, "<think>hm</think>no", **fields, max_tokens=40)
    assert got["finish_reason"] == "length" and calls(got) == []
    assert got["message"]["content"] == "" and got["message"]["reasoning_content"] == "hm"
    got = answer(model, "no", **fields, **NOT_THINKING, stop=["arguments"])
    assert got["finish_reason"] == "stop" and calls(got) == []
    assert got["message"]["content"] == '<tool_call>\n{"name": "add", "'


CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 5, "code": "ab-123"}}\n</tool_call>'
MADE = ("add", {"x": 5, "code": "ab-123"})


@pytest.mark.parametrize(
    "text, content, made",
    [
        ("I do not know.", "I do not know.", 0),
        ("a <tool_call", "a <tool_call", 0),
        (THOUGHT + "I add.\n" + CALL, "\n\nI add.", 1),
        (CALL + "\n" + CALL + "\n", None, 2),
        (CALL + "\n" + CALL + " So.", " So.", 2),
        ("<think><tool_call>no</think>" + CALL, None, 1),
    ],
)
def test_a_free_answer_may_call(model: Scripted, text: str, content: str | None, made: int) -> None:
    """With `strict`, as without it."""
    tools = [strict("add"), tool("sub")]
    got = answer(model, text, tools=tools)
    assert calls(got) == [MADE] * made and got["message"]["content"] == content
    assert got["finish_reason"] == ("tool_calls" if made else "stop")
    whole, finish, _ = streamed(model, text, tools=tools)
    assert (whole.text or None, finish) == (content, got["finish_reason"])
    assert len(whole.calls) == made
    unbound = answer(model, text, tools=[tool("add"), tool("sub")])
    assert calls(unbound) == [MADE] * made


def test_a_strict_call_fits_and_others_are_objects(model: Scripted) -> None:
    tools = [strict("add"), tool("sub")]
    got = answer(model, 'I: <tool_call>\n{"name": "add", "arguments": {"y": 1', tools=tools)
    ((name, arguments),) = calls(got)
    assert name == "add" and fits(arguments, POINT) and got["message"]["content"] == "I:"
    text = '<tool_call>\n{"name": "sub", "arguments": {"y": [1]}}\n</tool_call>'
    assert calls(answer(model, text, tools=tools)) == [("sub", {"y": [1]})]
    unknown = answer(model, '<tool_call>\n{"name": "mul", "arguments": {}}', tools=tools)
    assert calls(unknown)[0][0] in ("add", "sub")


@pytest.mark.parametrize("own", [strict, tool])
def test_one_call_at_a_time(model: Scripted, own: Callable[[str], Any]) -> None:
    text = "I add.\n" + CALL + "\n" + CALL
    fields: dict[str, Any] = {"tools": [own("add")]}
    assert calls(answer(model, text, **fields, parallel_tool_calls=True)) == [MADE] * 2
    got = answer(model, text, **fields, parallel_tool_calls=False)
    assert calls(got) == [MADE] and got["message"]["content"] == "I add."
    assert got["finish_reason"] == "tool_calls"
    got = answer(model, CALL * 2, **fields, parallel_tool_calls=False, tool_choice=named("add"))
    assert calls(got) == [MADE] and got["finish_reason"] == "stop"
    assert answer(model, "no", parallel_tool_calls=False)["message"]["content"] == "no"


def test_openai_parses_calls(model: Scripted) -> None:
    class Point(BaseModel):
        """A point."""

        x: int
        tags: list[bool]

    client = openai.OpenAI(api_key="none", base_url="http://localhost/v1", http_client=model.client)
    chosen: Any
    for chosen in ("required", named("Point"), openai.omit):
        script(model, '<tool_call>\n{"name": "Point", "arguments": {"x": 5, "tags": [true]}}')
        got = client.chat.completions.parse(
            model=NAME,
            messages=[{"role": "user", "content": "Which?"}],
            tools=[openai.pydantic_function_tool(Point)],
            tool_choice=chosen,
            temperature=0,
        )
        (call,) = got.choices[0].message.tool_calls or ()
        assert call.function.parsed_arguments == Point(x=5, tags=[True])


def test_answers_of_the_library_can_be_sent_back(model: Scripted) -> None:
    client = openai.OpenAI(api_key="none", base_url="http://localhost/v1", http_client=model.client)
    script(model, CALL)
    messages: list[Any] = [*HELLO]
    tools: Any = [strict("add")]
    with client.chat.completions.stream(model=NAME, messages=messages, tools=tools) as chunks:
        message = chunks.get_final_completion().choices[0].message
    (call,) = message.tool_calls or ()
    sent = {**message.model_dump(exclude_none=True), "parsed": {"x": 1}}
    assert sent["tool_calls"][0]["index"] == 0
    assert sent["tool_calls"][0]["function"]["parsed_arguments"] == MADE[1]
    result = {"role": "tool", "tool_call_id": call.id, "content": "128"}
    body = json.dumps({"messages": [*HELLO, sent, result], "tools": tools}).encode()
    prompt = model.served.prompts.of_chat(parsed(Chat, body)).text
    assert CALL in prompt and "index" not in prompt and "parsed" not in prompt


BAD = {"type": "object", "properties": {"x": {"not": {"type": "string"}}}}


@pytest.mark.parametrize(
    "fields, param, said",
    [
        ({"tool_choice": "required"}, "tool_choice", "expected tools"),
        ({"tools": [], "tool_choice": named("add")}, "tool_choice", "expected tools"),
        ({"tools": [TOOL], "tool_choice": named("sub")}, "tool_choice", "Got 'sub'."),
        ({"tools": [TOOL], "tool_choice": "add"}, "tool_choice", "'none' or 'required'"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice", "type: Input"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice", "function: Field"),
        ({"tools": [TOOL], "tool_choice": [1]}, "tool_choice", "Got [1]"),
        ({"tools": [TOOL, tool("f", BAD)], "tool_choice": "required"}, "tool_choice",
         "the function f: answers cannot be held to the schema: "),
        ({"tools": [strict("f", BAD)]}, "tools", "the function f: answers cannot be held"),
        ({"tools": [strict("f", {"type": "string"})]}, "tools", "f: parameters: expected a schema"),
        ({"tools": [strict("f", {"type": 3})]}, "tools", "f: parameters: expected a schema"),
        ({"tools": [strict("f", {"enum": [1]})]}, "tools", "incompatible types"),
        ({"tools": [tool("f"), tool("f")], "tool_choice": "required"}, "tool_choice",
         "f: expected another name"),
        ({"tools": [tool("f", strict=1)]}, "tools", "strict: Input should be a valid boolean"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused(
    model: Scripted, fields: dict[str, Any], param: str, said: str
) -> None:
    status, error = model.refused(PATH, **fields)
    assert (status, error["param"]) == (400, param) and said in error["message"], error


def test_schemas_that_are_too_large(model: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "MOST_SCHEMAS", 500)
    for tools, said in (([strict("f")], ""), ([strict(f"f{n}") for n in range(3)], "500 char")):
        if not said:
            assert calls(answer(model, CALL, tools=tools))
        else:
            status, error = model.refused(PATH, tools=tools)
            assert (status, error["param"]) == (400, "tools") and said in error["message"]
    monkeypatch.setattr(calling, "MOST_SECONDS", -1)
    assert "too complex together" in model.refused(PATH, tools=[strict("f")])[1]["message"]
    monkeypatch.setattr(grammar, "MOST_SCHEMA", 100)
    assert "expected at most 100" in model.refused(PATH, tools=[strict("f")])[1]["message"]


def test_what_is_not_called_is_not_checked(model: Scripted) -> None:
    got = answer(model, "no", tools=[TOOL, strict("f", BAD)], tool_choice="none")
    assert got["message"]["content"] == "no"
    fields = {"tools": [tool("add"), strict("f", BAD)], "tool_choice": named("add")}
    got = answer(model, "no", **fields, **NOT_THINKING)
    assert calls(got)[0][0] == "add"
    assert calls(answer(model, CALL, tools=[tool("add"), tool("f", BAD)])) == [MADE]


def rendering(template: str) -> Callable[[Any, Any], str]:
    """As `Prompts.past`, with a chat template of its own."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def render(messages: Any, tools: Any) -> str:
        made = _compile_jinja_template(template)
        return str(made.render(messages=messages, tools=tools, eos_token="</s>"))

    return render


def turns(calls: str, anchor: str, end: str) -> str:
    """A chat template that writes calls, as `c`, in a certain way."""
    return (
        "{{ tools | tojson }}{% for m in messages %}{% if m.role == 'user' %}[user]{{ m.content }}"
        f"{{% else %}}{anchor}{{% set c = m.tool_calls[0].function %}}"
        f"{{% set id = m.tool_calls[0].id %}}{calls}{end}{{% endif %}}{{% endfor %}}"
    )


def reading(anchor: str, field: dict[str, Any], **content: Any) -> dict[str, Any]:
    function = {"name": "{name}", "arguments": "{content}"}
    own = {"content": "json", "repeats": True, "transform": {"function": function}, **field}
    return {"start_anchor": anchor, "fields": {"content": content, "tool_calls": own}}


WHOLE = {"function": "{content}"}
FORMS = {
    "hermes": (
        turns('\n<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n'
              "</tool_call>", "<a>", "</s>\n"),
        reading("<a>", {"open_pattern": r"\s*<tool_call>\s*", "close": "</tool_call>",
                        "transform": WHOLE}),
        CallForm("", "<tool_call>", '\n{"name": "', '", "arguments": ', "}\n</tool_call>", ""),
    ),
    "mistral": (
        turns('[TOOL_CALLS] [{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}]',
              "[/INST]", "{{ eos_token }}"),
        reading("[/INST]", {"open": "[TOOL_CALLS]", "transform_each": True, "close": "</s>",
                            "transform": {"function": {"name": "{name}",
                                                       "arguments": "{arguments}"}}}),
        CallForm("", "[TOOL_CALLS]", ' [{"name": "', '", "arguments": ', "}]", ""),
    ),
    "tekken": (
        turns("{% if id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
              "[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments | tojson }}", "[/INST]", "</s>"),
        reading("[/INST]", {"open_pattern": r"\[TOOL_CALLS\](?P<name>[\w.-]+)\[ARGS\]",
                            "close_pattern": r"(?=\[TOOL_CALLS\])|</s>"}),
        CallForm("", "[TOOL_CALLS]", "", "[ARGS]", "", ""),
    ),
    "llama": (
        turns('{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}', "<a>", "</s>"),
        reading("<a>", {"open_pattern": r'(?=\{"name")', "close": "</s>", "transform": {
            "function": {"name": "{content.name}", "arguments": "{content.parameters}"}}}),
        CallForm("", "", '{"name": "', '", "parameters": ', "}", ""),
    ),
    "deepseek": (
        turns("<calls><call>function<sep>{{ c.name }}\n```json\n{{ c.arguments | tojson }}\n```"
              "</call>\n</calls>", "<a>", "</s>"),
        reading("<a>", {"open_pattern": r"<call>function<sep>(?P<name>.*?)\n```json\n",
                        "close": "\n```</call>"}, close_pattern=r"\s*</s>"),
        CallForm("<calls>", "<call>function<sep>", "", "\n```json\n", "\n```</call>",
                 "\n</calls>"),
    ),
    "kimi": (
        turns("<calls><call>{{ id }}<args>{{ c.arguments | tojson }}</call></calls>", "<a>",
              "</s>"),
        reading("<a>", {"open_pattern": r"(?:<calls>)?<call>functions\.(?P<name>.*?):\d+<args>",
                        "close_pattern": "</call>(?:</calls>)?"}),
        CallForm("<calls>", "<call>functions.", "", ":0<args>", "</call></calls>", ""),
    ),
    "thinks": (
        turns("<think>\n\n</think>\n\n<call>{{ c.name }}={{ c.arguments | tojson }}", "<a>",
              "</s>"),
        reading("<a>", {"open_pattern": r"<call>(?P<name>\w+)=", "close": "</s>"}),
        CallForm("", "<call>", "", "=", "", ""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_forms_of_calls(kind: str) -> None:
    chat, template, expected = FORMS[kind]
    assert form_of(rendering(chat), template, TAGS, ["</s>"]) == expected


UNKNOWN = {
    "arguments apart": turns(
        "<call>{{ c.name }}{% for k in c.arguments %}<{{ k }}>{{ c.arguments[k] }}</>{% endfor %}",
        "<a>", "</s>"),
    "arguments first": turns(
        '<call>{"arguments": {{ c.arguments | tojson }}, "name": "{{ c.name }}"}', "<a>", "</s>"),
    "other marks": turns("<other>{{ c.name }}={{ c.arguments | tojson }}", "<a>", "</s>"),
    "no calls": "{% for m in messages %}<a>{{ m.content }}{% endfor %}",
    "no templates": "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}",
    "half a call": turns("<call>{{ c.name }}={{ c.arguments | tojson }}", "", "</s>") + "<a>",
}  # fmt: skip
READS = [
    reading("<a>", {"open_pattern": r"<call>(?P<name>\w+)=", "close": "</s>"}),
    reading("<a>", {"open": "<call>", "close": "</s>", "transform": WHOLE}),
    reading("<a>", {"open_pattern": r"<call>(?P<name>\w+)", "close": "</s>",
                    "content": "xml-inline", "content_args": {
                        "tag_pattern": r"<(?P<key>\w+)>(?P<value>.*?)</>"}}),
]  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_forms_that_are_not_known(kind: str) -> None:
    for template in READS:
        with pytest.raises(UnknownFormError):
            form_of(rendering(UNKNOWN[kind]), template, None, ["</s>"])


@pytest.mark.parametrize("pieces", [1, 3, 999])
@pytest.mark.parametrize("must", [True, False])
@pytest.mark.parametrize("kind", FORMS)
def test_calls_are_read_in_every_form(kind: str, must: bool, pieces: int) -> None:
    form = FORMS[kind][2]
    value = {"a": f"{form.close} {form.open} }} é", "b": [{}]}
    text = "\n" + form.written("add_two", value) + "</s>"
    if not form.open and not must:
        return  # such models are refused
    reads = CallReader(form, ["add", "add_two"], None, must, ["</s>"])
    found = Message()
    for at in range(0, len(text), pieces):
        found.add(reads.feed(text[at : at + pieces]))
    found.add(reads.end(cut=False))
    call = {"name": "add_two", "arguments": json.dumps(value)}
    assert found.without_end("</s>") == Message("", "", [call])


@pytest.mark.parametrize("pieces", [1, 4, 999])
@pytest.mark.parametrize("kind", ["tekken", "deepseek", "kimi"])
def test_tokenizers_may_write_spaces_around_marks(kind: str, pieces: int) -> None:
    marks = ["[TOOL_CALLS]", "[ARGS]", "<calls>", "<call>", "<sep>", "<args>", "</call>"]
    text = "So: " + "!".join(FORMS[kind][2].written(name, {"a": "]"}) for name in "fg")
    for mark in marks:
        text = text.replace(mark, f" {mark} ")
    reads, found = CallReader(FORMS[kind][2], ["f", "g"], None, False, [], marks), Message()
    for at in range(0, len(text), pieces):
        found.add(reads.feed(text[at : at + pieces]))
    assert len(found.calls) == 2  # told as soon as they are there
    found.add(reads.end(cut=False))
    expected = [{"name": name, "arguments": '{"a": "]"}'} for name in "fg"]
    assert found == Message("So:!", "", expected)


@pytest.mark.parametrize("pieces", [1, 4, 999])
def test_text_between_calls(pieces: int) -> None:
    form = FORMS["deepseek"][2]
    two = form.written("f", {}).removesuffix(form.after) + form.written("f", {}).removeprefix(
        form.before
    )
    for text, content, made in (
        (f"a <call {two} b", "a <call b", 2),
        (f"<calls a\n\n{two}", "<calls a", 2),
        ("<think>\n<call>function<sep>f</think>x</calls", "x</calls", 0),
        ("\n<cal", "\n<cal", 0),
    ):
        reads, found = CallReader(form, ["f"], Split(TAGS, False), False, ["</s>"]), Message()
        for at in range(0, len(text), pieces):
            found.add(reads.feed(text[at : at + pieces]))
        found.add(reads.end())
        assert (found.text, len(found.calls)) == (content, made)


TEXTS = [
    ("", False),
    ("I do.", True),
    ("<tool_cal", True),
    (CALL, True),
    ("I do.\n\n" + CALL + "\n" + CALL + " So.", True),
    ("<think>a <tool_call>x</think>" + CALL, True),
    ("\n\n<think>hm</think>\n\nI:" + CALL, True),
]
NEVER = ["<tool_call>x", CALL[:-30] + "x", "I <think>hm</think><tool_call>{", CALL + "<tool_call>x"]


def follows(grammar: Any, tokenizer: Any, text: str) -> bool:
    """Whether a grammar lets an answer be a text, and end there."""
    matcher = grammar.matcher()
    for token in grammar.tokens.view.tokenize_str(text, parse_special=True):
        if matcher.complete or not matcher.allowed(len(tokenizer))[token]:
            return False
        matcher.take(token)
    return bool(matcher.complete or matcher.allowed(len(tokenizer))[tokenizer.eos_token_id])


THINK = ("<think>", "</think>")


@pytest.mark.parametrize("marks", [(), THINK, (*THINK, "<tool_call>", "</tool_call>")])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_marks_of_tokens_and_of_text(tokenizer_folder: Path, kind: str, marks: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if kind == "sentencepiece":
        tokenizer = llama_tokenizer()
    if marks:
        tokenizer.add_tokens(list(marks))
    template = {**FORMS["hermes"][1]}
    template["fields"] = {
        **template["fields"],
        "thinking": {"open": TAGS.open, "close": TAGS.close},
    }
    chat = FORMS["hermes"][0]
    maker = calling.Calling(
        grammar.Grammars(tokenizer, [tokenizer.eos_token_id], template), rendering(chat), ["</s>"]
    )

    def made(**fields: Any) -> Any:
        body = {"messages": HELLO, "tools": [strict("add")], **fields}
        return maker.of(parsed(Chat, json.dumps(body).encode()), "", chat)

    free, one = made(), made(parallel_tool_calls=False)
    forced = made(tool_choice="required")
    for text, good in TEXTS:
        assert follows(free, tokenizer, text) or not good, text
        assert follows(one, tokenizer, text) == (text.count(CALL) < 2), text
        assert follows(forced, tokenizer, text) == (text.count(CALL) == 1 and "I:" not in text), (
            text
        )
    for text in NEVER:
        assert not any(follows(each, tokenizer, text) for each in (free, one, forced)), text


@pytest.mark.parametrize("special", [True, False])
def test_marks_of_other_letters(tokenizer_folder: Path, special: bool) -> None:
    """As DeepSeek has them."""
    begin, end = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if special:
        tokenizer.add_tokens([begin, end])
    chat = turns(begin + "{{ c.name }}\n{{ c.arguments | tojson }}" + end, "<a>", "</s>")
    opens = begin + r"(?P<name>.*?)\n"
    template = reading("<a>", {"open_pattern": opens, "close": end})
    maker = calling.Calling(grammar.Grammars(tokenizer, [1], template), rendering(chat), ["</s>"])
    for fields in ({}, {"tool_choice": "required"}):
        body = json.dumps({"messages": HELLO, "tools": [strict("add")], **fields}).encode()
        made = maker.of(parsed(Chat, body), "", chat)
        call = begin + 'add\n{"x": 12, "code": "ab-123"}' + end
        assert made is not None and follows(made, tokenizer, call)
        assert not follows(made, tokenizer, call.replace("add", "sub"))
        reads = made.reader()
        assert reads is not None and len(reads.feed(call).calls) == 1


def test_other_special_tokens_stay_free(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<tool_call>", "<box>"], special_tokens=True)
    chat, template, _ = FORMS["hermes"]
    maker = calling.Calling(grammar.Grammars(tokenizer, [1], template), rendering(chat), ["</s>"])
    body = json.dumps({"messages": HELLO, "tools": [strict("add")]}).encode()
    made = maker.of(parsed(Chat, body), "", chat)
    assert follows(made, tokenizer, f"a <box>b<box>{CALL}<box>")
    assert made is not None and made.matcher().allowed(len(tokenizer)).sum() > 300


def test_a_model_whose_calls_have_an_unknown_form_says_so(
    model: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setitem(vars(model.served.prompts), "templates", {"default": plain})
    for fields, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [strict("add")]}, "tools"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ):
        status, error = model.refused(PATH, **{"tools": [tool("add")], **fields})
        assert (status, error["param"]) == (400, param)
        assert "not supported with this model: the form of its calls" in error["message"]
    assert calls(answer(model, CALL, tools=[tool("add")])) == [MADE]


def test_calls_in_channels(model: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss names the function in a channel, or before it."""
    chat = "{# <|channel|><|message|> #}" + model.served.prompts.template(tools=True)
    monkeypatch.setitem(vars(model.served.prompts), "templates", {"default": chat})
    status, error = model.refused(PATH, tools=[TOOL], tool_choice="required")
    assert (status, error["param"]) == (400, "tool_choice")
    assert "a forced call is not supported with this model" in error["message"]


def test_calls_without_the_library(model: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)  # cannot be imported
    status, error = model.refused(PATH, tools=[strict("add")])
    assert (status, error["param"]) == (400, "tools")
    assert "pip install llguidance" in error["message"]


def test_a_model_without_a_mark_of_calls(tokenizer_folder: Path) -> None:
    """Llama's calls begin as text may."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    chat, template, form = FORMS["llama"]
    maker = calling.Calling(grammar.Grammars(tokenizer, [1], template), rendering(chat), ["</s>"])

    def made(**fields: Any) -> Any:
        body = {"messages": HELLO, "tools": [strict("add")], **fields}
        return maker.of(parsed(Chat, json.dumps(body).encode()), "", chat)

    text = form.written("add", MADE[1])
    assert follows(made(tool_choice="required"), tokenizer, text)
    assert not follows(made(tool_choice="required"), tokenizer, "no")
    with pytest.raises(RefusedError, match="it is not known by what a call in its answers begins"):
        made()


def test_the_model_does_not_see_strict(model: Scripted) -> None:
    seen = {}
    for own in (strict, tool):
        body = json.dumps({"messages": HELLO, "tools": [own("add")]}).encode()
        seen[own] = model.served.prompts.of_chat(parsed(Chat, body)).text
    assert seen[strict] == seen[tool] and "strict" not in seen[tool]


def test_reasoning_effort_is_for_templates_that_read_it(
    model: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, error = model.refused(PATH, reasoning_effort="high")
    assert (status, error["param"]) == (400, "reasoning_effort")
    assert "it takes enable_thinking: leave the field out. Got 'high'." in error["message"]
    assert answer(model, "no", reasoning_effort=None)["message"]["content"] == "no"
    reads = "{{ messages[0].content }} effort={{ reasoning_effort }}"
    prompts = model.served.prompts
    monkeypatch.setitem(vars(prompts), "templates", {"default": reads})

    def prompt(**fields: Any) -> str:
        return prompts.of_chat(
            parsed(Chat, json.dumps({"messages": HELLO, **fields}).encode())
        ).text

    same = {"chat_template_kwargs": {"reasoning_effort": "low"}}
    assert prompt(reasoning_effort="high") == "x effort=high"
    assert prompt(reasoning_effort="low", **same) == prompt(**same) == "x effort=low"
    with pytest.raises(RefusedError, match="chat_template_kwargs has another one"):
        prompt(reasoning_effort="high", **same)


def test_fields_of_records_change_nothing(model: Scripted) -> None:
    plain = answer(model, "no")
    given = {"metadata": {"a": "b"}, "safety_identifier": "x", "store": True,
             "service_tier": "default", "parallel_tool_calls": True}  # fmt: skip
    assert answer(model, "no", **given) == plain
