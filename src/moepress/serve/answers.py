"""Answers in OpenAI's form."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moepress.serve.names import Names, places
from moepress.serve.parsing import Message
from moepress.serve.sampling import Choice
from moepress.serve.work import Event, Prompt

Json = dict[str, Any]


@dataclass
class Whole:
    """An answer that is complete, put together from its events."""

    message: Message = field(default_factory=Message)
    choices: list[Choice] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of the choices in the text
    scored: tuple[Choice, ...] | None = None
    finish: str | None = None

    def add(self, event: Event) -> None:
        self.message.add(event.message)
        self.choices += event.choices
        self.starts += event.starts
        if event.finish:
            self.finish, self.scored = event.finish, event.scored


@dataclass(frozen=True)
class Form:
    """How answers to one request are written.

    Args:
        chat: for chat/completions, else for completions.
        model: name in the answer.
        prompts: of the request.
        names: of tokens, for logprobs; None: they are not wanted.
        echo: whether the prompt begins the text of a completion.
        include_usage: whether the last chunk of a stream has the usage, and the others none.
        named: whether the request names the function to call: then OpenAI's answers end with
            "stop", as if they were no calls.
    """

    chat: bool
    model: str
    prompts: Sequence[Prompt]
    names: Names | None = None
    echo: bool = False
    include_usage: bool = False
    named: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Whole], usage: Json) -> Json:
        """The answer to a request without `stream`."""
        choices = []
        read: Json | None = None
        for index, answer in enumerate(answers):
            if answer.scored is not None:  # for all answers to this prompt: they share it
                read = self._read(self.prompts[index], answer.scored)
            choices.append(self._choice(index, answer, read))
        return {**self._head(stream=False), "choices": choices, "usage": usage}

    def first(self, index: int) -> Json:
        """The first chunk of an answer of a stream: the role, or with `echo` the prompt."""
        if self.chat:
            return self._chunk(index, {"role": "assistant", "content": ""}, None, None)
        return self._chunk(index, self.prompts[index].text, None, None)

    def chunk(self, event: Event, calls: int) -> Json:
        """A chunk of a stream.

        Args:
            calls: calls of tools in earlier chunks of the answer.
        """
        logprobs = self._logprobs(event.choices, event.starts) if event.choices else None
        if not self.chat:
            return self._chunk(event.index, event.message.text, logprobs, event.finish)
        message = event.message
        delta: Json = {}
        if message.text:
            delta["content"] = message.text
        if message.reasoning:
            delta["reasoning_content"] = message.reasoning
        if message.calls:
            made = [_call(call) for call in message.calls]
            delta["tool_calls"] = [{"index": calls + at, **call} for at, call in enumerate(made)]
        return self._chunk(
            event.index, delta, logprobs, self._finish(event.finish, calls + len(message.calls))
        )

    def usage_chunk(self, usage: Json) -> Json:
        """The last chunk of a stream with `include_usage`."""
        return {**self._head(stream=True), "choices": [], "usage": usage}

    def _head(self, stream: bool) -> Json:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if stream else "chat.completion"
        name = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{name}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _chunk(self, index: int, content: Any, logprobs: Any, finish: str | None) -> Json:
        body = {"delta" if self.chat else "text": content}
        choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": finish}
        usage: Json = {"usage": None} if self.include_usage else {}
        return {**self._head(stream=True), "choices": [choice], **usage}

    def _read(self, prompt: Prompt, scored: Sequence[Choice]) -> Json:
        """Logprobs of a prompt's tokens."""
        assert self.names is not None
        starts = places(self.names, prompt.ids, prompt.text)
        return _completion_logprobs(self.names, [Choice(prompt.ids[0]), *scored], starts)

    def _choice(self, index: int, answer: Whole, read: Json | None) -> Json:
        message = answer.message
        text, starts = message.text, answer.starts
        if self.echo:
            before = self.prompts[index].text
            text = before + text
            starts = [len(before) + start for start in starts]
        logprobs = self._logprobs(answer.choices, starts)
        if self.chat:
            made: Json = {"role": "assistant", "content": message.text or None, "refusal": None}
            if not message.calls:
                made["content"] = message.text
            if message.reasoning:
                made["reasoning_content"] = message.reasoning
            if message.calls:
                made["tool_calls"] = [_call(call) for call in message.calls]
            finish = self._finish(answer.finish, len(message.calls))
            return {"index": index, "message": made, "logprobs": logprobs, "finish_reason": finish}
        if logprobs is not None and read is not None:
            logprobs = {name: [*read[name], *values] for name, values in logprobs.items()}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": answer.finish}

    def _finish(self, finish: str | None, calls: int) -> str | None:
        return "tool_calls" if finish == "stop" and calls and not self.named else finish

    def _logprobs(self, choices: Sequence[Choice], starts: Sequence[int]) -> Json | None:
        """Of tokens and where they begin in the text; None: they are not wanted."""
        if self.names is None:
            return None
        if not self.chat:
            return _completion_logprobs(self.names, choices, starts)
        content = [
            {
                **self._described(choice.token, choice.logprob),
                "top_logprobs": [self._described(token, value) for token, value in choice.top],
            }
            for choice in choices
        ]
        return {"content": content, "refusal": None}

    def _described(self, token: int, logprob: float | None) -> Json:
        assert self.names is not None
        name = self.names(token)
        return {"token": name.text, "logprob": _finite(logprob), "bytes": name.bytes}


def _completion_logprobs(names: Names, choices: Sequence[Choice], starts: Sequence[int]) -> Json:
    """The older form. Of the first token of a prompt nothing is known."""
    return {
        "tokens": [names(choice.token).text for choice in choices],
        "token_logprobs": [_finite(choice.logprob) for choice in choices],
        "top_logprobs": [
            None if choice.logprob is None else _top(names, choice) for choice in choices
        ],
        "text_offset": list(starts),
    }


def _top(names: Names, choice: Choice) -> Json:
    """The most probable tokens by name; of those with one name, the more probable."""
    made: Json = {}
    for token, value in choice.top:
        made.setdefault(names(token).text, _finite(value))
    return made


class Usage:
    """Tokens of a request. A prompt with n answers counts once."""

    def __init__(self, prompts: Sequence[Prompt], n: int) -> None:
        self._n = n
        self._read = sum(len(prompt.ids) for prompt in prompts[::n])
        self._generated = [0] * len(prompts)
        self._reused = [0] * len(prompts)

    def add(self, news: Event) -> None:
        self._generated[news.index] = news.tokens
        self._reused[news.index] = news.reused

    def json(self) -> Json:
        generated = sum(self._generated)
        return {
            "prompt_tokens": self._read,
            "completion_tokens": generated,
            "total_tokens": self._read + generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._reused[:: self._n])},
        }


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> Json:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(data: Json | str) -> str:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n"


def _call(call: dict[str, str]) -> Json:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call}


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: a token that cannot come gets the lowest value of OpenAI's."""
    return None if value is None else max(value, -9999.0)
