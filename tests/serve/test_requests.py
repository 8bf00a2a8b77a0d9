"""Every field of a request is honoured, or refused by its name."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import tracemalloc
from dataclasses import replace
from typing import Any

import openai
import pytest
import torch
from pydantic_core import to_json

from moepress.serve import app, asking
from moepress.serve.stepping import Stepper
from tests.serve.conftest import NAME, Here, again

PROMPT = "def f1(x):"


def test_a_completion_is_what_generate_writes(here: Here) -> None:
    answer = here.complete(PROMPT, max_tokens=12)
    assert answer["choices"][0]["text"] == here.alone(PROMPT, 12)
    assert answer["choices"][0]["finish_reason"] == "length"
    read = len(here.served.prompts.tokenizer(PROMPT).input_ids)
    assert answer["usage"] == {
        "prompt_tokens": read, "completion_tokens": 12, "total_tokens": read + 12,
        "prompt_tokens_details": {"cached_tokens": 0},  # so short a prompt is computed
    }  # fmt: skip
    assert answer["object"] == "text_completion" and answer["model"] == NAME
    usual = here.client.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0})
    assert usual.json()["usage"]["completion_tokens"] == 16  # as OpenAI's schema says


def test_several_prompts_and_answers(here: Here) -> None:
    prompts = ["def f3(x):", "    return"]
    answer = here.complete(prompts, n=2, max_tokens=6)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [here.alone(prompt, 6) for prompt in prompts for _ in range(2)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    tokenizer = here.served.prompts.tokenizer
    assert here.text(tokenizer(PROMPT).input_ids) == here.text(PROMPT)
    both = here.complete([tokenizer(prompt).input_ids for prompt in prompts], max_tokens=6)
    assert [choice["text"] for choice in both["choices"]] == texts[::2]
    sampled = here.complete(n=4, temperature=2.0, seed=3)
    assert len({choice["text"] for choice in sampled["choices"]}) > 1
    read = len(tokenizer(PROMPT).input_ids)
    assert sampled["usage"]["prompt_tokens"] == read  # once, however many answers


def test_seed_temperature_and_top_p(here: Here) -> None:
    """The folder's own settings are greedy."""
    texts = {here.text(temperature=1.5, seed=seed) for seed in range(5)}
    assert len(texts) > 1
    assert len({here.text(temperature=1.5, seed=-7) for _ in range(3)}) == 1
    assert len({here.text(temperature=1.5) for _ in range(5)}) > 1
    assert {here.text(temperature=1.5, top_p=1e-9, seed=s) for s in range(3)} == {here.text()}
    greedy = here.complete(temperature=None)["choices"][0]["text"]
    assert greedy == here.text()
    assert len({here.text(temperature=None, top_p=0.999, seed=s) for s in range(5)}) > 1


def test_stop_is_not_repeated(here: Here) -> None:
    whole = here.text(max_tokens=40)
    stop = whole[10:13]
    at = whole.index(stop)
    for given in (stop, [stop], ["not there", stop]):
        answer = here.complete(max_tokens=40, stop=given)["choices"][0]
        assert answer == {**answer, "text": whole[:at], "finish_reason": "stop"}
    assert here.text(max_tokens=40, stop=["not there"]) == whole
    streamed = stream(here, max_tokens=40, stop=stop)
    assert "".join(choice["text"] for choice in streamed) == whole[:at]
    assert streamed[-1]["finish_reason"] == "stop"


def test_stop_strings_of_the_folder_end_answers(here: Here) -> None:
    text = here.text(max_tokens=40)
    stops = replace(here.served.defaults, stop=(text[10:13],))
    client = again(Here(replace(here.served, defaults=stops), here.client))
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(text[10:13])], "stop")
    (choice,) = client.post("/v1/completions", json={**body, "stop": text[3]}).json()["choices"]
    assert choice["text"] == text[: text.index(text[3])]


def stream(here: Here, **fields: Any) -> list[dict[str, Any]]:
    """Choices of the chunks of a stream of a completion."""
    body = {"prompt": PROMPT, "temperature": 0, **fields, "stream": True}
    answer = here.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]" and '"usage"' not in answer.text
    return [json.loads(line)["choices"][0] for line in lines[:-1]]


def test_streams_say_the_same(here: Here) -> None:
    text = here.text(max_tokens=30)
    chunks = stream(here, max_tokens=30)
    assert "".join(chunk["text"] for chunk in chunks) == text and len(chunks) > 3
    assert [c["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    body = {"messages": [{"role": "user", "content": "def f2(x):"}], "temperature": 0, "n": 2}
    body |= {"stream": True, "max_tokens": 9, "stream_options": {"include_usage": True}}
    answer = here.client.post("/v1/chat/completions", json=body)
    lines = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
    assert lines[-1]["choices"] == [] and lines[-1]["usage"]["completion_tokens"] == 18
    assert all(line["usage"] is None for line in lines[:-1])
    assert lines[0]["choices"][0]["delta"]["role"] == "assistant"
    for index in range(2):
        own = [c for line in lines for c in line["choices"] if c["index"] == index]
        text = "".join(choice["delta"].get("content", "") for choice in own)
        assert text == here.alone("[user] def f2(x):\n[assistant] ", 9)


def test_penalties_and_bias(here: Here) -> None:
    tokenizer = here.served.prompts.tokenizer
    token = tokenizer("Z", add_special_tokens=False).input_ids[0]
    assert here.text(logit_bias={str(token): 100}, max_tokens=4) == "ZZZZ"
    once = here.text(logit_bias={str(token): 100}, presence_penalty=2, max_tokens=4)
    assert once == "ZZZZ"  # 2 of 100: it stays the most probable
    first = tokenizer(here.text(max_tokens=1), add_special_tokens=False).input_ids[0]
    assert here.text(max_tokens=1, logit_bias={str(first): -100}) != here.text(max_tokens=1)
    free = here.text(max_tokens=60)
    assert here.text(max_tokens=60, frequency_penalty=2) != free
    assert here.text(max_tokens=60, presence_penalty=2) != free


@torch.inference_mode()
def test_logprobs_and_echo(here: Here) -> None:
    """Against the logits of one plain call of the model."""
    tokenizer = here.served.prompts.tokenizer
    answer = here.complete(logprobs=2, echo=True, max_tokens=3)["choices"][0]
    assert answer["text"] == PROMPT + here.alone(PROMPT, 3)
    found = answer["logprobs"]
    ids = tokenizer(answer["text"], return_tensors="pt").input_ids
    read = len(tokenizer(PROMPT).input_ids)
    assert "".join(found["tokens"]) == answer["text"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    logprobs = here.served.engine.stepper.model(input_ids=ids).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
    got = torch.tensor(found["token_logprobs"][1:])
    torch.testing.assert_close(got[:read], expected[:read], atol=1e-3, rtol=1e-3)
    assert all(len(top) == 2 for top in found["top_logprobs"][1:])
    only = here.complete(logprobs=1, echo=True, max_tokens=0)["choices"][0]
    assert only["text"] == PROMPT and len(only["logprobs"]["tokens"]) == read
    chat = here.chat(logprobs=True, top_logprobs=3, max_tokens=2)["choices"][0]["logprobs"]
    for token in chat["content"]:
        assert len(token["top_logprobs"]) == 3
        best = token["top_logprobs"][0]
        assert best["logprob"] == token["logprob"]
        raw = bytes(best["bytes"])
        part = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)  # of a character
        assert best["token"] == (raw.decode() if _is_text(raw) else part)
        assert math.exp(token["logprob"]) <= 1
    assert here.complete()["choices"][0]["logprobs"] is None


def test_answers_to_a_prompt_share_its_logprobs(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 128 answers to a long prompt they would be gigabytes."""
    scored: list[int] = []
    prefill = Stepper.prefill

    def counting(self: Stepper, state: Any, ids: Any, inputs: Any, *, all_logits: bool) -> Any:
        scored.extend([len(ids)] * all_logits)
        return prefill(self, state, ids, inputs, all_logits=all_logits)

    monkeypatch.setattr(Stepper, "prefill", counting)
    prompts = [PROMPT, PROMPT + " x", PROMPT]
    asked: dict[str, Any] = {"echo": True, "logprobs": 2, "max_tokens": 3}
    together = here.complete(prompts, n=2, **asked)["choices"]
    lengths = [len(here.served.prompts.tokenizer(prompt).input_ids) for prompt in prompts]
    assert sorted(scored) == sorted(lengths)
    for index, choice in enumerate(together):
        alone = here.complete(prompts[index // 2], **asked)["choices"][0]
        assert choice["text"] == alone["text"]
        for name, values in alone["logprobs"].items():
            if name == "token_logprobs":
                assert choice["logprobs"][name][1:] == pytest.approx(values[1:], abs=1e-3)
            elif name != "top_logprobs":
                assert choice["logprobs"][name] == values


def test_logprobs_of_a_request_have_a_limit(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    read = len(here.served.prompts.tokenizer(PROMPT).input_ids)
    asked: dict[str, Any] = {"prompt": PROMPT, "n": 2, "logprobs": 2, "max_tokens": 7}
    for more, tokens in (({}, 14), ({"echo": True}, 14 + 2 * read)):
        monkeypatch.setattr(asking, "MOST_LOGPROBS", 3 * tokens)
        here.complete(**asked, **more)
        monkeypatch.setattr(asking, "MOST_LOGPROBS", 3 * tokens - 1)
        status, error = here.refused(**asked, **more)
        assert (status, error["param"]) == (400, "logprobs")
        assert error["message"].startswith(f"logprobs: expected at most {3 * tokens - 1} in all")
    monkeypatch.setattr(asking, "MOST_LOGPROBS", 7)
    here.complete(PROMPT, n=2)  # without logprobs, nothing is kept
    assert here.refused("/v1/chat/completions", logprobs=True, max_tokens=8)[0] == 400


def test_json_is_written_outside_the_event_loop(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logprobs are many megabytes of it, and others wait for the loop."""
    threads: list[bool] = []

    def watched(answer: Any, **options: Any) -> bytes:
        try:
            asyncio.get_running_loop()
            threads.append(False)
        except RuntimeError:
            threads.append(True)
        return to_json(answer, **options)

    monkeypatch.setattr(app, "to_json", watched)
    here.complete()
    assert threads == [True]


def _is_text(raw: bytes) -> bool:
    return "\ufffd" not in raw.decode(errors="replace")


def test_a_chat_goes_through_the_folders_template(here: Here) -> None:
    parts = [{"type": "text", "text": "def"}, {"type": "text", "text": "f2(x):"}]
    answer = here.chat(messages=[{"role": "user", "content": parts}], user="somebody")
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": here.alone("[user] def f2(x):\n[assistant] ", 8),
        "refusal": None,
    }
    assert answer["object"] == "chat.completion"


def test_answers_of_openais_library_can_be_sent_back(here: Here) -> None:
    """`message.model_dump()` has every field that the library knows."""
    from openai.types.chat import ChatCompletionMessage, ParsedChatCompletionMessage

    plain = [{"role": "assistant", "content": "hm"}, {"role": "user", "content": "def f2(x):"}]
    expected = here.chat(messages=plain)["choices"]
    annotations: Any
    for annotations in (None, []):
        for kind in (ChatCompletionMessage, ParsedChatCompletionMessage):
            sent = kind(role="assistant", content="hm", annotations=annotations).model_dump()
            assert {"refusal", "audio", "function_call", "tool_calls"} <= sent.keys()
            assert here.chat(messages=[sent, plain[1]])["choices"] == expected


@pytest.mark.parametrize(
    "field, value", [("audio", {"id": "x"}), ("function_call", {"name": "f", "arguments": "{}"}),
    ("refusal", "no"), ("annotations", [{"type": "url_citation"}]), ("nonsense", None)],
)  # fmt: skip
def test_fields_of_messages_that_mean_something_are_refused(
    here: Here, field: str, value: Any
) -> None:
    message = {"role": "assistant", "content": "x", field: value}
    status, error = here.refused("/v1/chat/completions", messages=[message])
    assert (status, error["param"]) == (400, "messages")
    assert error["message"].startswith(f"messages.0.{field}: ")


def test_messages_are_limited() -> None:
    """Templates may go over all others at each."""
    from moepress.serve.schema import MOST_MESSAGES, Chat, RefusedError, parsed

    def body(count: int) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": "x"}] * count}).encode()

    assert len(parsed(Chat, body(MOST_MESSAGES)).messages) == MOST_MESSAGES
    with pytest.raises(RefusedError, match="at most 2048 items"):
        parsed(Chat, body(MOST_MESSAGES + 1))


@pytest.mark.parametrize(
    "field, value",
    [
        ("messages", [{}] * 100_000),
        ("messages", [{"role": "user", "content": [{}] * 100_000}]),
        ("messages", [{"role": "assistant", "tool_calls": [{}] * 100_000}]),
        ("messages", [{str(n): 1 for n in range(50_000)}]),
        ("tools", [{}] * 100_000),
        ("stop", [3] * 100_000),
        ("chat_template_kwargs", {str(n): [1] for n in range(50_000)}),
        ("logit_bias", {f"x{n}": 1 for n in range(50_000)}),
    ],
)
def test_many_wrong_values_are_refused_at_the_first(field: str, value: Any) -> None:
    """pydantic's report of all takes a kilobyte for each."""
    from moepress.serve.schema import Chat, RefusedError, parsed

    body = json.dumps({"messages": [{"role": "user", "content": "x"}], field: value}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(RefusedError) as error:
            parsed(Chat, body)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(body) + (1 << 20)
    finally:
        tracemalloc.stop()
    assert error.value.param == field and len(error.value.message) <= 500


WRONG = [
    ("temperature", -1), ("temperature", "hot"), ("top_p", 0), ("top_p", 2), ("seed", "x"),
    ("seed", 2**63), ("stream", "perhaps"), ("generation_config", "{}"), ("max_tokens", "many"),
    ("max_tokens", 0), ("max_tokens", 10**9), ("max_tokens", 1.5), ("stop", ""), ("stop", 3),
    ("stop", ["a"] * 17), ("frequency_penalty", -2.5), ("presence_penalty", 3), ("n", 0),
    ("n", 10**6), ("n", True), ("logit_bias", {"x": 1}), ("logit_bias", {"1": 101}),
    ("logit_bias", {"999999": 1}), ("stream_options", {"include_usage": True}), ("model", 3),
    ("chat_template", "{{ 1 }}"), ("nonsense", 1),
]  # fmt: skip
ONLY = {
    "/v1/completions": [
        ("prompt", ""), ("prompt", 3), ("prompt", []), ("prompt", [[]]), ("prompt", [-1]),
        ("prompt", [999]), ("prompt", ["x", ""]), ("prompt", ["x"] * 200), ("suffix", "end"),
        ("best_of", 2), ("logprobs", 21), ("logprobs", True), ("echo", "yes"),
    ],
    "/v1/chat/completions": [
        ("messages", "x"), ("messages", []), ("messages", [{"content": "x"}]),
        ("messages", [{"role": "user", "content": [{}]}]),
        ("messages", [{"role": "user", "content": [
            {"type": "text", "text": "x", "image_url": {"url": "data:image/png;base64,AA"}}]}]),
        ("max_completion_tokens", 1.5),
        ("max_completion_tokens", 10**9), ("tools", {}),
        ("messages", [{"role": "villain", "content": "x"}]),
        ("messages", [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]),
        ("tools", [{"type": "function", "function": {"name": "f"}}]), ("tool_choice", "required"),
        ("response_format", {"type": "json"}), ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "", "schema": {}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": []}}),
        ("response_format", {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {}, "schema_": {}}}),
        ("logprobs", 1), ("top_logprobs", 2),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}), ("store", 1),
        ("chat_template_kwargs", {"x": [1]}), ("chat_template_kwargs", {"x": 1}),
        ("reasoning_effort", "high"), ("audio", {}),
        ("functions", []), ("modalities", ["audio"]), ("web_search_options", {}),
        ("prediction", {"type": "content", "content": "x"}), ("parallel_tool_calls", 0),
        ("service_tier", "priority"), ("metadata", {"a": 1}), ("verbosity", "low"),
        ("metadata", {str(n): "" for n in range(17)}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("path", ONLY)
def test_what_is_not_honoured_is_refused_by_name(here: Here, path: str) -> None:
    for field, value in [*WRONG, *ONLY[path]]:
        status, error = here.refused(path, **{field: value})
        assert (status, error["param"]) == (400, field), (field, value, error)
        assert len(error["message"]) <= 500 and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("stop", ["a"] * 17, "stop: List should have at most 16 items"),
        ("stop", ["a", ""], "stop.1: String should have at least 1 character"),
        ("stop", 3, "stop: Input should be a valid string. Got 3."),
        ("messages", [{"role": "user", "content": [
            {"type": "text", "text": "x"}, {"type": "file"}]}],
         "messages.0.content.1.type: Input should be 'text' or 'image_url'. Got 'file'."),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}],
         "messages.0.content.0: a part of type text needs the field text and no other"),
    ],
)  # fmt: skip
def test_what_is_wrong_inside_of_a_list_is_named(
    here: Here, field: str, value: Any, said: str
) -> None:
    """Not that a text was expected, as which it could have been given too."""
    _, error = here.refused("/v1/chat/completions", **{field: value})
    assert error["message"].startswith(said)


def test_every_field_of_the_schema_is_known(here: Here) -> None:
    """A field with a value that changes nothing is taken; none is unknown."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as Chats
    from openai.types.completion_create_params import CompletionCreateParamsStreaming as Texts

    from moepress.serve.schema import Chat, Completion

    for kind, fields in ((Chat, Chats), (Completion, Texts)):
        named = set(fields.__annotations__) | set(fields.__mro__[0].__annotations__)
        assert len(named) > 15
        assert named <= kind.model_fields.keys() | kind.WITHOUT_EFFECT.keys()
    unset = dict.fromkeys(Chat.WITHOUT_EFFECT)
    given = {"store": False, "prompt_cache_key": "agent-7", "prompt_cache_retention": "in_memory"}
    assert here.chat(**{**unset, "n": None, "stop": None, **given})


def test_bodies_that_are_no_requests(here: Here) -> None:
    nested = b"[" * 10_000
    for body in (b"{not json", b"[]", b"", b'"x"', nested, b'{"prompt": "\xff"}', b'{"n": 1e999}',
                 b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}"):  # fmt: skip
        answer = here.client.post(
            "/v1/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400, body[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert here.text()


def test_what_does_not_fit_is_refused(here: Here) -> None:
    context = here.served.prompts.context
    assert context == 256  # of the model
    for prompt in ("a b " * context, "a" * (1 << 17), [5] * 300):
        status, error = here.refused(prompt=prompt)
        assert (status, error["param"]) == (400, "prompt") and str(context) in error["message"]
        assert error["code"] == "context_length_exceeded"
    status, error = here.refused(prompt=[5] * 200, max_tokens=100)
    assert (status, error["param"]) == (400, "max_tokens") and "at most 56" in error["message"]
    long = [{"role": "user", "content": "a" * (1 << 17)}]
    status, error = here.refused("/v1/chat/completions", messages=long)
    assert (status, error["param"]) == (400, "messages")


def test_tokens_that_the_model_does_not_know_are_refused(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(here.served.prompts.tokenizer)
    known = here.served.prompts.vocabulary
    tokenizer.add_tokens([f"<new{number}>" for number in range(known - len(tokenizer) + 1)])
    (unknown,) = tokenizer(f"<new{known - len(here.served.prompts.tokenizer)}>").input_ids[-1:]
    assert unknown == known
    monkeypatch.setattr(here.served.prompts, "tokenizer", tokenizer)
    text = f"x {tokenizer.decode([unknown])}"
    for path, fields in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": [1, unknown]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        status, error = here.refused(path, **fields)
        assert status == 400 and f"below {known}" in error["message"]


def test_other_models_are_not_found_and_not_looked_for(here: Here) -> None:
    for name in ("/etc", "/nowhere", "gpt-4"):
        status, error = here.refused(model=name)
        assert (status, error["code"]) == (404, "model_not_found")
        assert NAME in error["message"]
    listed = here.client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == [NAME]


def test_a_model_that_does_not_chat_says_so(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(here.served.prompts), "templates", {})
    status, error = here.refused("/v1/chat/completions")
    assert status == 400 and "no chat template" in error["message"]


def test_the_official_client_reads_the_answers(here: Here) -> None:
    client = openai.OpenAI(
        base_url="http://localhost/v1", api_key="none", max_retries=0,
        http_client=again(here),
    )  # fmt: skip
    answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=5, temperature=0)
    assert answer.choices[0].text == here.alone(PROMPT, 5)
    with pytest.raises(openai.BadRequestError, match="max_tokens: Input should be a valid integer"):
        client.completions.create(model=NAME, prompt="x", max_tokens="many")  # type: ignore[call-overload]
    with pytest.raises(openai.NotFoundError, match="one model"):
        client.completions.create(model="another", prompt="x")
