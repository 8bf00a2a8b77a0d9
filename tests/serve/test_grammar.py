"""Answers that are held to a schema. The models are random: what fits does so by the mask alone."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import BaseModel
from transformers import AutoTokenizer

from moepress.serve import grammar as grammars
from moepress.serve.grammar import Grammar, GrammarError, Grammars
from moepress.serve.parsing import Message
from moepress.serve.sampling import Sampler, Settings
from moepress.serve.schema import RefusedError
from moepress.serve.thinking import (
    CHANNELS,
    TAGS,
    Split,
    Thinking,
    UnknownFormError,
    begun,
    thinking_of,
)
from tests.llama_tokenizer import llama_tokenizer
from tests.serve.conftest import NAME, Here, again
from tests.serve.test_tools import TOOL, Scripted, qwen_server  # noqa: F401  # a fixture

pytest.importorskip("llguidance")

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "def f2(x):"}]
PERSON = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog", 3, None]},
        "age": {"type": "integer", "minimum": 7, "maximum": 130},
        "tags": {
            "type": "array", "minItems": 1, "maxItems": 2,
            "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
    },
    "required": ["kind", "age", "tags"],
    "additionalProperties": False,
}  # fmt: skip
TREE = {
    "$defs": {
        "leaf": {"const": {"end": True}},
        "node": {
            "type": "object", "properties": {"next": {"$ref": "#/$defs/leaf"}},
            "required": ["next"], "additionalProperties": False,
        },
    },
    "anyOf": [{"$ref": "#/$defs/node"}, {"$ref": "#/$defs/leaf"}],
}  # fmt: skip
CODE = {"type": "string", "pattern": "^[a-c]{2}-[0-9]{3}$"}
SHORT = {"type": "string", "minLength": 3, "maxLength": 9}
CODES = {"type": "array", "items": CODE, "minItems": 2, "maxItems": 2}
EITHER = {"anyOf": [{"type": "integer", "minimum": -5, "maximum": 5}, CODE]}
SCHEMAS = [PERSON, TREE, CODE, SHORT, CODES, EITHER]
TYPES: Mapping[str, Any] = {
    "object": dict, "array": list, "string": str, "integer": int, "boolean": bool
}  # fmt: skip


def fits(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> bool:
    """Whether a value fits a schema, of the keywords that these tests use."""
    root = schema if root is None else root
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema and not any(fits(value, one, root) for one in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "type" in schema and type(value) is not TYPES[schema["type"]]:
        return False
    if isinstance(value, str):
        length = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1 << 20)
        return length and re.search(schema.get("pattern", ""), value) is not None
    if type(value) is int:
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if isinstance(value, list):
        length = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1 << 20)
        return length and all(fits(item, schema.get("items", {}), root) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return set(schema["required"]) <= value.keys() <= known.keys() and all(
            fits(item, known[name], root) for name, item in value.items()
        )
    return True


def wanted(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


@pytest.fixture
def client(here: Here) -> TestClient:
    return again(here, limits={"max_tokens": 220})


def ask(client: TestClient, form: Any, **fields: Any) -> dict[str, Any]:
    body = {"messages": HELLO, "temperature": 0, "response_format": form, **fields}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("schema", SCHEMAS)
def test_answers_fit_their_schema(client: TestClient, schema: Mapping[str, Any]) -> None:
    """Also those that are sampled where much is probable, and several to one prompt."""
    greedy = ask(client, wanted(schema))["choices"]
    texts = [choice["message"]["content"] for choice in greedy]
    for seed, more in enumerate(({}, {"top_p": 0.9}, {"presence_penalty": 2, "top_p": 0.99})):
        sampled = ask(client, wanted(schema), temperature=1.5, seed=seed, n=4, **more)["choices"]
        texts += [choice["message"]["content"] for choice in sampled]
        assert [choice["finish_reason"] for choice in (*greedy, *sampled)] == ["stop"] * 5
    for text in texts:
        assert fits(json.loads(text), schema), text
    assert len(set(texts)) > 1
    strict = {"name": "x", "description": "y", "schema": schema, "strict": True}
    again = ask(client, {"type": "json_schema", "json_schema": strict})["choices"][0]
    assert again["message"]["content"] == texts[0]


def test_any_object(here: Here, client: TestClient) -> None:
    """The model loops on newlines, and its tokens for brackets are not probable."""
    tokenizer = here.served.prompts.tokenizer

    def bias(**values: float) -> dict[str, float]:
        names = {"newline": "\n", "close": "}", "list": "[", "space": " "}
        ids = {name: tokenizer(text, add_special_tokens=False).input_ids for name, text in
               names.items()}  # fmt: skip
        return {str(ids[name][0]): value for name, value in values.items()}

    any_object = {"type": "json_object"}
    for given in (bias(newline=100, space=90, close=50), bias(list=100, close=50)):
        choice = ask(client, any_object, logit_bias=given)["choices"][0]
        assert choice["finish_reason"] == "stop"
        text = choice["message"]["content"]
        assert isinstance(json.loads(text), dict) and len(text) < 30
    for seed in range(5):
        choice = ask(client, any_object, logit_bias=bias(close=9), temperature=1, seed=seed)
        assert isinstance(json.loads(choice["choices"][0]["message"]["content"]), dict)


def stream(client: TestClient, form: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": HELLO, "temperature": 0, "response_format": form, **fields}
    answer = client.post(CHAT, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]" or "error" in lines[-1]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_a_stream_says_the_same(client: TestClient) -> None:
    chunks = [chunk["choices"][0] for chunk in stream(client, wanted(PERSON))]
    text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
    assert text == ask(client, wanted(PERSON))["choices"][0]["message"]["content"]
    assert fits(json.loads(text), PERSON) and chunks[-1]["finish_reason"] == "stop"


def test_an_answer_may_be_cut(client: TestClient) -> None:
    whole = ask(client, wanted(PERSON))
    most = whole["usage"]["completion_tokens"]
    for tokens in (1, most - 1):
        choice = ask(client, wanted(PERSON), max_tokens=tokens)["choices"][0]
        assert choice["finish_reason"] == "length"
        text = choice["message"]["content"]
        assert whole["choices"][0]["message"]["content"].startswith(text)
    choice = ask(client, wanted(PERSON), max_tokens=most)["choices"][0]
    assert choice["finish_reason"] == "stop" and fits(
        json.loads(choice["message"]["content"]), PERSON
    )
    choice = ask(client, wanted(PERSON), stop=["age"])["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"].endswith('"')


def test_others_in_the_batch_are_free(here: Here, client: TestClient) -> None:
    free = here.alone("[user] def f2(x):\n[assistant] ", 60)

    def one(number: int) -> str:
        form = wanted(PERSON) if number % 2 else {"type": "text"}
        answer = ask(client, form, max_tokens=60 + 160 * (number % 2))
        return str(answer["choices"][0]["message"]["content"])

    held = one(1)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(one, range(6))) == [free, held] * 3


def test_logprobs_are_the_models(client: TestClient) -> None:
    more = {"logprobs": True, "top_logprobs": 3, "max_tokens": 2}
    held = ask(client, wanted(CODE), **more)["choices"][0]["logprobs"]["content"]
    free = ask(client, {"type": "text"}, **more)["choices"][0]["logprobs"]["content"]
    assert held[0]["top_logprobs"] == free[0]["top_logprobs"]
    assert held[0]["logprob"] < free[0]["logprob"]  # it would have written another token


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


def test_the_official_client_parses_them(here: Here) -> None:
    client = openai.OpenAI(
        base_url="http://localhost/v1", api_key="none", max_retries=0,
        http_client=again(here, limits={"max_tokens": 220}),
    )  # fmt: skip

    class Colours(BaseModel):
        colours: list[Colour]
        small: bool

    found = client.chat.completions.parse(
        model=NAME, messages=[{"role": "user", "content": "x"}], response_format=Colours,
        temperature=0.8, seed=1,
    ).choices[0].message.parsed  # fmt: skip
    assert isinstance(found, Colours)


REFUSED = [
    ({"not": {"type": "string"}}, "not"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "object", "propertyNames": {"pattern": "x"}}, "propertyNames"),
    ({"type": "array", "contains": {"const": 1}}, "contains"),
    ({"type": "words"}, "words"),
    ({"type": "string", "pattern": "("}, "unclosed group"),
    ({"type": "string", "pattern": "(?=x)y"}, "look-around"),
    ({"type": "string", "format": "phone"}, "phone"),
    ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "oneOf"),
    ({"enum": []}, "empty"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
    ({"$ref": "#"}, "nothing fits it"),
    ({"$ref": "#/$defs/a"}, "/$defs/a"),
    ({"$ref": "https://example.com/a.json"}, "example.com"),
    ({"$ref": "file:///etc/passwd"}, "passwd"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
    ({"properties": {str(n): {} for n in range(2000)}}, "max is 2000"),
    ({"const": "x" * 70_000}, "at most 65536"),
    ({"type": "integer", "multipleOf": 9_999_991}, "multipleOf"),
    ({"type": "integer", "multipleOf": -3}, "multipleOf"),
    ({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf"),
    ({"multipleOf": 0.0001, "anyOf": [{"multipleOf": 3}]}, "multipleOf"),
    ({"type": "string", "pattern": "(" * 3000 + ")" * 3000}, "regex parse error"),
    ({"type": "string", "allOf": [{"pattern": f".*{c}.{{12}}"} for c in "abcdefgh"]}, "regex"),
]


@pytest.mark.parametrize("schema, says", REFUSED, ids=[says for _, says in REFUSED])
def test_a_schema_that_cannot_be_followed_is_refused(
    here: Here, schema: dict[str, Any], says: str
) -> None:
    status, error = here.refused(CHAT, response_format=wanted(schema))
    assert (status, error["param"]) == (400, "response_format"), error
    assert error["message"].startswith("response_format: ") and len(error["message"]) <= 500
    assert says in error["message"]


def test_deep_schemas_are_refused(here: Here) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(90):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    assert here.refused(CHAT, response_format=wanted(schema))[0] == 400


def test_multiples_that_are_taken(client: TestClient) -> None:
    schema = {"anyOf": [{"type": "integer", "multipleOf": 125, "minimum": 100, "maximum": 999}]}
    for seed in range(3):
        answer = ask(client, wanted(schema), temperature=2, seed=seed)
        assert int(answer["choices"][0]["message"]["content"]) % 125 == 0
    for multiple in (0.01, 125.0, 1000):
        ask(client, wanted({"multipleOf": multiple, "type": "number"}), max_tokens=3)


def test_without_the_library_only_schemas_are_refused(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)  # cannot be imported
    for form in ({"type": "json_object"}, wanted(CODE)):
        status, error = here.refused(CHAT, response_format=form)
        assert (status, error["param"]) == (400, "response_format")
        assert "pip install llguidance" in error["message"]
    assert here.chat(response_format={"type": "text"}) and here.text()


def test_an_answer_that_becomes_too_complex_ends_alone(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grammars.LIMITS, "max_lexer_states", 60)
    long = wanted({"type": "string", "minLength": 150})
    body = {"messages": HELLO, "temperature": 0, "max_tokens": 200}
    with ThreadPoolExecutor(2) as pool:
        free = pool.submit(ask, client, {"type": "text"}, max_tokens=200)
        answer = client.post(CHAT, json={**body, "response_format": long})
        assert free.result()["usage"]["completion_tokens"] == 200
    assert answer.status_code == 400  # after 500, clients ask again
    error = answer.json()["error"]
    assert "cannot be held to the schema" in error["message"]
    assert error["type"] == "invalid_request_error"
    last = stream(client, long, max_tokens=200)[-1]
    assert last["error"] == error and ask(client, {"type": "text"}, max_tokens=2)


THOUGHT = '<think>\nIs it {"a": 1}? <b></think>\n\n'


@pytest.fixture
def thinker(qwen_server: Scripted) -> Scripted:  # noqa: F811
    return qwen_server


def script(thinker: Scripted, text: str) -> None:
    """The model wants to write a text, and is at a loss where it is led away from it."""
    thinker.write(text)
    thinker.script += [thinker.script[-1]] * 200


@pytest.mark.parametrize("streams", [False, True])
def test_thinking_is_free_and_the_schema_begins_behind_it(thinker: Scripted, streams: bool) -> None:
    script(thinker, THOUGHT + "Sure: ab")
    form = wanted(CODE)
    if streams:
        chunks = [chunk["choices"][0] for chunk in stream(thinker.client, form, max_tokens=150)]
        assert chunks[-1]["finish_reason"] == "stop"
        deltas = [chunk["delta"] for chunk in chunks]
        message = {name: "".join(delta.get(name, "") for delta in deltas)
                   for name in ("content", "reasoning_content")}  # fmt: skip
    else:
        message = thinker.message(response_format=form)
    assert message["reasoning_content"] == THOUGHT[7:-10]
    assert message["content"].startswith("\n\n") and fits(json.loads(message["content"]), CODE)


def test_a_model_may_leave_thinking_out(thinker: Scripted) -> None:
    text = '{"a": "<tool_call> <think>x</think> </tool_call>"}'
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    for more in ({}, {"chat_template_kwargs": {"enable_thinking": False}}):
        script(thinker, text)
        message = thinker.message(response_format=wanted(schema), **more)
        assert message["content"] == text and "reasoning_content" not in message
    script(thinker, "12")
    message = thinker.message(response_format=wanted({"type": "integer"}))
    assert message["content"] == "12"  # without the end token
    script(thinker, THOUGHT)  # no longer, where the prompt has ended it
    message = thinker.message(
        response_format=wanted(CODE), chat_template_kwargs={"enable_thinking": False}
    )
    assert fits(json.loads(message["content"]), CODE) and "reasoning_content" not in message


def test_a_prompt_may_begin_the_thinking(
    thinker: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ messages[0].content }}<|im_start|>assistant\n<think>\n"
    monkeypatch.setitem(vars(thinker.served.prompts), "templates", {"default": template})
    script(thinker, 'Is it "ab-123"?</think>Sure')
    message = thinker.message(response_format=wanted(CODE))
    assert message["reasoning_content"] == 'Is it "ab-123"?'
    assert fits(json.loads(message["content"]), CODE)


def test_thinking_may_be_cut(thinker: Scripted) -> None:
    script(thinker, THOUGHT)
    choice = thinker.chat(response_format=wanted(CODE), max_tokens=14)["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == ""
    assert THOUGHT[7:].startswith(choice["message"]["reasoning_content"])


def test_tools_beside_a_schema(thinker: Scripted) -> None:
    for form in ({"type": "json_object"}, wanted(CODE)):
        status, error = thinker.refused(CHAT, response_format=form, tools=[TOOL])
        assert (status, error["param"]) == (400, "response_format") and "tools" in error["message"]
    script(thinker, '"ab-123"')
    message = thinker.message(response_format=wanted(CODE), tools=[TOOL], tool_choice="none")
    assert message["content"] == '"ab-123"' and "tool_calls" not in message
    assert thinker.chat(response_format={"type": "text"}, tools=[TOOL], max_tokens=1)


@pytest.mark.parametrize("pieces", [1, 2, 5, 99])
@pytest.mark.parametrize(
    "thinking, inside, text, expected",
    [
        (TAGS, False, '<think>a <b</think>{"a": "</think>"}', ('{"a": "</think>"}', "a <b")),
        (TAGS, False, "\n<think>a</think>\n{}", ("\n{}", "a")),
        (TAGS, False, "\n<tho", ("\n<tho", "")),
        (TAGS, False, "\n<thi", ("\n<thi", "")),
        (TAGS, True, "a</thi</think>{}", ("{}", "a</thi")),
        (TAGS, True, "a</thi", ("", "a</thi")),
        (TAGS, True, "", ("", "")),
        (CHANNELS, False, f"{CHANNELS.open}hm<|end|{CHANNELS.close}{{}}", ("{}", "hm<|end|")),
        (CHANNELS, False, CHANNELS.plain + "{}", ("{}", "")),
    ],
)
def test_thinking_is_split_from_content(
    thinking: Thinking, inside: bool, text: str, expected: tuple[str, str], pieces: int
) -> None:
    reads, found = Split(thinking, inside), Message()
    for at in range(0, len(text), pieces):
        found.add(reads.feed(text[at : at + pieces]))
    found.add(reads.end())
    assert found == Message(*expected)


def test_where_models_think() -> None:
    field = {"open": "[T]", "close": "[/T]"}
    assert thinking_of({"fields": {"content": {}, "thinking": field}}, "") == Thinking(
        "[T]", "[/T]"
    )
    assert thinking_of(None, "{{ x.split('</think>') }}") == TAGS
    assert thinking_of(None, "") is None and thinking_of({"fields": {"content": {}}}, "") is None
    assert thinking_of(None, "<|channel|>analysis<|message|>") == CHANNELS
    unknown: Any
    for unknown in (
        {"content": {"open": "[C]"}},
        {},
        {"content": {}, "reasoning": {"open_pattern": "x+", "close": "y"}},
        {"content": {}, "reasoning_content": {"open": ["x", "y"], "close": "y"}},
    ):
        with pytest.raises(UnknownFormError):
            thinking_of({"fields": unknown}, "")
    assert begun(TAGS, "x<think>\n") and begun(TAGS, "x<think>\n\n</think>\n\n") is False
    assert begun(TAGS, "<think>x") is None


def test_a_model_whose_answers_have_an_unknown_form_says_so(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here.served.grammars, "template", {"fields": {}})
    status, error = here.refused(CHAT, response_format=wanted(CODE))
    assert status == 400 and "only text is supported with this model" in error["message"]


def made(
    tokenizer: Any,
    schema: Any = PERSON,
    *,
    ends: Any = (1,),
    template: Any = None,
    prompt: str = "",
    chat: str = "",
) -> Grammar:
    return Grammars(tokenizer, ends, template).of(schema, prompt, chat)


def written(grammar: Grammar, size: int, seed: int, most: int = 400) -> tuple[list[int], Sampler]:
    """Tokens of a model that knows nothing."""
    sampler = Sampler(Settings(temperature=1, seed=seed), [0], 0, grammar.matcher())
    random = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while len(tokens) < most and not sampler.complete:
        tokens.append(sampler.choose(torch.randn(size, generator=random)).token)
        if tokens[-1] in grammar.tokens.ends:
            break
    return tokens, sampler


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def test_models_know_more_tokens_than_their_tokenizers_or_fewer(tokenizer: Any) -> None:
    grammar = made(tokenizer)
    size = len(tokenizer)
    for logits in (size, size + 1, size + 77, size - 3):
        for seed in range(5):
            tokens, _ = written(grammar, logits, seed)
            assert fits(json.loads(tokenizer.decode(tokens)), PERSON)
    favourite = Sampler(Settings(), [0], 0, grammar.matcher())
    assert favourite.choose(torch.arange(size + 77.0)).token < size
    with pytest.raises(GrammarError, match="no token that can follow"):
        Sampler(Settings(), [0], 0, grammar.matcher()).choose(torch.zeros(3))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_every_end_token_ends_an_answer(tokenizer: Any, kind: str) -> None:
    if kind == "sentencepiece":
        tokenizer = llama_tokenizer()
    for ends in ((1,), (1, 5), (1, len(tokenizer) + 3), ()):
        grammar = made(tokenizer, {"type": "integer", "minimum": 10, "maximum": 5000}, ends=ends)
        last = set()
        for seed in range(60):
            tokens, sampler = written(grammar, len(tokenizer) + 5, seed)
            ended = tokens[-1] in ends
            last |= {tokens[-1]} & set(ends)
            assert ended or sampler.complete
            assert 10 <= int(tokenizer.decode(tokens[: -1 if ended else None])) <= 5000
        assert last == set(ends)


def test_an_end_token_that_is_text_does_not_end_half_an_answer(tokenizer: Any) -> None:
    four = tokenizer("4", add_special_tokens=False).input_ids[0]
    for ends in ((1,), (1, four)):
        matcher = made(tokenizer, {"type": "integer", "minimum": 10}, ends=ends).matcher()
        assert bool(matcher.allowed(len(tokenizer))[four]) == (four not in ends)


def test_no_special_token_is_content(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<think>", "</think>", "[X]"], special_tokens=True)
    grammar = made(tokenizer, {"type": "string"})
    matcher = grammar.matcher()
    quote = tokenizer('"', add_special_tokens=False).input_ids[0]
    matcher.take(quote)
    allowed = matcher.allowed(len(tokenizer))
    assert not allowed[tokenizer.all_special_ids].any() and not allowed[-3:].any()
    assert allowed.sum() > len(tokenizer) / 2


@pytest.mark.parametrize("special", [True, False])
def test_thinking_is_free_of_the_schema(tokenizer_folder: Path, special: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if special:
        tokenizer.add_tokens(["<think>", "</think>", "<tool_call>"])
    chat = "</think>"
    for prompt, text in (
        ("", '<think>So: "{}" é</think>\n{"end": true}'),
        ("", '\n<think></think>{"end": true}'),
        ("", ' {"end": true}'),
        ("<think>\n", 'So</think>{"end": true}'),
        ("<think>\n\n</think>\n\n", '{"end": true}'),
    ):
        matcher = made(tokenizer, {"const": {"end": True}}, prompt=prompt, chat=chat).matcher()
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            assert matcher.allowed(len(tokenizer))[token], (text, tokenizer.decode([token]))
            matcher.take(token)
        assert matcher.complete
    matcher = made(tokenizer, prompt="<think>", chat=chat).matcher()
    allowed = matcher.allowed(len(tokenizer))
    assert not allowed[1] and (not special or allowed.sum() == len(tokenizer) - 1)
    done = made(tokenizer, CODE, prompt="<think></think>", chat=chat)
    assert done.reader() is None
    with pytest.raises(GrammarError):
        done.matcher().take(tokenizer("<think>", add_special_tokens=False).input_ids[0])


def test_answers_in_channels(tokenizer_folder: Path) -> None:
    """gpt-oss writes its content behind marks of special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    marks = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>", "<|call|>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    ends = tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"])
    grammar = made(tokenizer, CODE, ends=ends, prompt="<|start|>assistant", chat="".join(marks))
    thought = f"{CHANNELS.open}Which?{CHANNELS.close}"
    for text in (f'{thought}"ab-123"', f'{CHANNELS.plain}"ab-123"'):
        matcher, reads, found = grammar.matcher(), grammar.reader(), Message()
        assert reads is not None
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            assert matcher.allowed(len(tokenizer))[token]
            matcher.take(token)
            found.add(reads.feed(tokenizer.decode([token])))
        assert matcher.complete and found.text == '"ab-123"'
    for seed in range(5):
        tokens, _ = written(grammar, len(tokenizer), seed, most=3000)
        assert json.loads(tokenizer.decode(tokens).rpartition(CHANNELS.plain)[2])


def test_marks_of_special_tokens_and_text(tokenizer_folder: Path) -> None:
    """As Gemma 4 begins its thinking."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<|channel>", "<channel|>"], special_tokens=True)
    field = {"open": "<|channel>thought\n", "close": "<channel|>"}
    template = {"fields": {"content": {"close": "</s>"}, "reasoning_content": field}}
    for prompt, text in (
        ("", '<|channel>thought\nSo<channel|>"ab-123"'),
        ("<|channel>thought\n", 'So<channel|>"ab-123"'),
        ("<|channel>thought\n<channel|>", '"ab-123"'),
    ):
        grammar = made(tokenizer, CODE, template=template, prompt=prompt)
        matcher = grammar.matcher()
        for token in tokenizer(text, add_special_tokens=False).input_ids:
            assert matcher.allowed(len(tokenizer))[token], (text, tokenizer.decode([token]))
            matcher.take(token)
        assert matcher.complete
    mixed = {**field, "close": "end<channel|>"}  # text before a special token: not known to come
    with pytest.raises(RefusedError, match="only text is supported"):
        made(tokenizer, CODE, template={"fields": {"content": {}, "thinking": mixed}})


def test_threads_make_one_view_of_the_tokens(tokenizer: Any) -> None:
    maker = Grammars(tokenizer, (1,), None)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: maker.of(CODE, "", "").tokens, range(8)))
    assert all(tokens is found[0] for tokens in found)


class Slow:
    """A tokenizer that is written in Python."""

    def __len__(self) -> int:
        return 9


def test_a_tokenizer_that_cannot_be_read_is_no_fault(tokenizer_folder: Path) -> None:
    from tokenizers import decoders

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    for odd in (tokenizer, Slow()):
        with pytest.raises(RefusedError, match="only text is supported with this model"):
            made(odd)
