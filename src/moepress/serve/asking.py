"""From the body of a request to what the engine computes. May take long: it runs in a thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from moepress.serve.answers import Form
from moepress.serve.calling import Calling
from moepress.serve.engine import Engine
from moepress.serve.grammar import OBJECT, Grammar, Grammars
from moepress.serve.limits import Limits
from moepress.serve.names import Names
from moepress.serve.parsing import Parser, Reader
from moepress.serve.prompts import Prompts
from moepress.serve.sampling import Settings
from moepress.serve.schema import Chat, Choice, Completion, RefusedError, Request, parsed
from moepress.serve.work import Prompt, Wanted

COMPLETION_TOKENS = 16  # of a completion without max_tokens, as OpenAI has it
MOST_LOGPROBS = 1 << 19  # of a request; each takes up to 400 bytes, and 1 us to write as JSON


@dataclass(frozen=True)
class Served:
    """A model, ready to answer."""

    name: str  # in requests
    limits: Limits
    engine: Engine
    prompts: Prompts
    defaults: Settings
    parser: Callable[[str, Any], Parser] | None  # from a prompt's text and tools
    grammars: Grammars
    calling: Calling

    @cached_property
    def names(self) -> Names:
        """What tokens are called in logprobs."""
        return Names(self.prompts.tokenizer)


@dataclass(frozen=True)
class Asked:
    """A request that can be computed."""

    form: Form  # with the prompt of each answer
    n: int
    wanted: Wanted
    stream: bool


def settings_of(asked: Request, defaults: Settings) -> Settings:
    """How to choose tokens: what the request says, else what the model's folder says.

    A request with top_p that names no temperature samples, with that of the folder or 1.
    """
    temperature = asked.temperature
    if temperature is None:
        temperature = defaults.temperature
        if asked.top_p is not None and asked.top_p < 1 and temperature == 0:
            temperature = 1.0
    return replace(
        defaults,
        temperature=temperature,
        top_p=defaults.top_p if asked.top_p is None else asked.top_p,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        seed=asked.seed,
    )


def understood(served: Served, kind: type[Request], body: bytes) -> Asked:
    """The request in a body.

    Raises:
        RefusedError: it is not one, or asks for what this server does not do.
    """
    asked = parsed(kind, body)
    if asked.model not in (None, served.name):
        message = f"this server has one model, '{served.name}'"
        raise RefusedError("model", message, asked.model, status=404, code="model_not_found")
    _check_size(asked, served)
    if isinstance(asked, Chat):
        prompts = [served.prompts.of_chat(asked)]
    else:
        assert isinstance(asked, Completion)
        prompts = served.prompts.of_completion(asked)
    n = asked.n or 1
    logprobs = _logprobs(asked)
    echo = isinstance(asked, Completion) and bool(asked.echo)
    options = asked.stream_options
    grammar = _grammar(asked, served, prompts[0])
    wanted = Wanted(
        replace(settings_of(asked, served.defaults), bias=asked.bias, logprobs=logprobs),
        _most(asked, max(len(prompt.ids) for prompt in prompts), served),
        (*asked.stops, *served.defaults.stop),
        _parser(asked, served, grammar),
        grammar,
        score=echo and logprobs is not None,
        continues=isinstance(asked, Completion),
    )
    _check_logprobs(wanted, prompts, n)
    form = Form(
        chat=isinstance(asked, Chat),
        model=served.name,
        prompts=tuple(prompt for prompt in prompts for _ in range(n)),
        names=None if logprobs is None else served.names,
        echo=echo,
        include_usage=bool(options and options.include_usage),
        named=isinstance(asked, Chat) and isinstance(asked.tool_choice, Choice),
    )
    return Asked(form, n, wanted, bool(asked.stream))


def _check_size(asked: Request, served: Served) -> None:
    """Refuse what asks for too much, before its prompt is read."""
    prompts = len(asked.prompts) if isinstance(asked, Completion) else 1
    answers = prompts * (asked.n or 1)
    if answers > served.limits.answers:
        param = "prompt" if prompts > served.limits.answers else "n"
        message = f"{param}: expected at most {served.limits.answers} answers in all"
        raise RefusedError(param, message, answers)
    for name in ("max_tokens", "max_completion_tokens"):
        given = getattr(asked, name, None)
        if given is not None and given > served.limits.max_tokens:
            raise RefusedError(name, f"{name}: expected at most {served.limits.max_tokens}", given)
    unknown = next((token for token, _ in asked.bias if token >= served.prompts.vocabulary), None)
    if unknown is not None:
        raise RefusedError("logit_bias", "logit_bias: the model has no such token", unknown)
    if isinstance(asked, Completion) and asked.echo and asked.stream and asked.logprobs is not None:
        raise RefusedError("echo", "echo with logprobs is not supported in a stream")


def _most(asked: Request, longest: int, served: Served) -> int:
    """New tokens that an answer may have. `longest`: tokens of the longest prompt."""
    context = served.prompts.context
    room = context - longest
    name = "max_tokens"
    given = asked.max_tokens
    if given is None and isinstance(asked, Chat):
        name = "max_completion_tokens"
        given = asked.max_completion_tokens
    if given is None:
        usual = served.limits.max_tokens
        return min(usual if isinstance(asked, Chat) else min(usual, COMPLETION_TOKENS), room)
    if given > room:
        message = (
            f"{name}: the prompt has {longest} tokens and this server reads {context}, with the "
            f"answer: expected at most {room}"
        )
        raise RefusedError(name, message, given, code="context_length_exceeded")
    return given


def _logprobs(asked: Request) -> int | None:
    """Tokens to name beside each; None: no logprobs are wanted."""
    if isinstance(asked, Chat):
        return (asked.top_logprobs or 0) if asked.logprobs else None
    assert isinstance(asked, Completion)
    return asked.logprobs


def _check_logprobs(wanted: Wanted, prompts: Sequence[Prompt], n: int) -> None:
    """Refuse more logprobs than `MOST_LOGPROBS`, if every answer has as many tokens as it may."""
    if wanted.settings.logprobs is None:
        return
    read = sum(len(prompt.ids) for prompt in prompts) if wanted.score else 0
    tokens = n * (read + len(prompts) * wanted.most)
    most = tokens * (1 + wanted.settings.logprobs)
    if most > MOST_LOGPROBS:
        message = (
            f"logprobs: expected at most {MOST_LOGPROBS} in all answers to a request, with those "
            "of the most probable tokens: ask for fewer, or for fewer answers or tokens"
        )
        raise RefusedError("logprobs", message, most)


def _grammar(asked: Request, served: Served, prompt: Prompt) -> Grammar | None:
    """What the answers to a chat are held to; None: nothing."""
    if not isinstance(asked, Chat):
        return None
    form = asked.response_format
    if form is None or form.type == "text":
        chat = served.prompts.template(tools=True) or ""
        return served.calling.of(asked, prompt.text, chat)
    if asked.callable:
        message = (
            f"response_format: {form.type} together with tools is not supported: leave one of them "
            "out, or send tool_choice: none"
        )
        raise RefusedError("response_format", message)
    schema = OBJECT if form.json_schema is None else form.json_schema.schema_
    return served.grammars.of(schema, prompt.text, served.prompts.template(tools=False) or "")


def _parser(
    asked: Request, served: Served, grammar: Grammar | None
) -> Callable[[str], Reader | None] | None:
    if grammar is not None:
        return lambda prefix: grammar.reader()
    make = served.parser
    if make is None or not isinstance(asked, Chat):
        return None
    tools = None
    if asked.callable:
        tools = [tool.shown for tool in asked.tools or ()]
    return lambda prefix: make(prefix, tools)
