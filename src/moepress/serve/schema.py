"""The fields of OpenAI's requests: each is honoured, or refused by name.

A field of the schema that asks for what this server does not do is refused unless its value is the
one that changes nothing (`WITHOUT_EFFECT`): clients send back messages with every field that
OpenAI's library knows. A field that is not in the schema is refused too.

Lists are refused at their first wrong item, and objects with names of the client's choice by their
size first: pydantic's report of each wrong value takes hundreds of times the value's bytes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MESSAGE_LENGTH = 500  # most characters of an error message, which quotes the invalid value
QUOTED = 80  # most characters of a quoted value
OF_A_FIELD = "of a field"  # errors of `Strict`
MOST_STOP = 16  # stop sequences; OpenAI allows 4
MOST_BIAS = 1024  # entries of logit_bias
MOST_VARIABLES = 64  # of a chat template
MOST_METADATA = 16
MOST_MESSAGES = 2048  # gpt-oss' template goes over all later messages at each: 2 s for so many
# Of arguments to a function without `parameters`.
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}

Number = Annotated[FiniteFloat, Field(strict=True)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
Positive = Annotated[StrictInt, Field(ge=1)]
Text = Annotated[StrictStr, Field(min_length=1)]
Stop = Annotated[list[Annotated[Text, Field(max_length=1000)]], Field(max_length=MOST_STOP)]
# Tags of fields that take either; error messages leave them out.
TEXT, LIST, NAMED = "a text", "a list", "an object"
EITHER = Discriminator(lambda value: LIST if isinstance(value, list) else TEXT)
TEXT_OR_OBJECT = Discriminator(lambda value: TEXT if isinstance(value, str) else NAMED)
Scalar = StrictBool | StrictInt | FiniteFloat | Annotated[StrictStr, Field(max_length=1000)] | None

# What OpenAI's library adds to an answer, from what is in its other fields.
Unread = Annotated[Any, Field(exclude=True)]

T = TypeVar("T", bound="Request")
Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]


def _at_most(most: int) -> BeforeValidator:
    """Refuse an object with more entries before any of them is read."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"expected at most {most} entries, got {len(value)}")
        return value

    return BeforeValidator(check)


class Strict(BaseModel):
    """An object. A field that is neither its own nor in `WITHOUT_EFFECT` is refused."""

    model_config = ConfigDict(extra="forbid")
    # Fields of OpenAI's that this server does not honour: values beside null that change nothing.
    WITHOUT_EFFECT: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        named = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in data.items():
            if name in named:
                kept[name] = value
            elif name not in cls.WITHOUT_EFFECT:
                raise _of_a_field(name, "there is no such field in this server's requests")
            elif not any(_same(value, other) for other in (None, *cls.WITHOUT_EFFECT[name])):
                raise _of_a_field(name, "not supported by this server", value)
        return kept


class StreamOptions(Strict):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # padding against eavesdroppers: never sent

    @field_validator("include_obfuscation")
    @classmethod
    def _no_obfuscation(cls, value: bool) -> bool:
        if value:
            raise ValueError("not supported")
        return value


class Request(Strict):
    """Fields that both endpoints have."""

    model: StrictStr | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: Annotated[Annotated[Text, Tag(TEXT)] | Annotated[Stop, Tag(LIST)], EITHER] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^\d{1,9}$")],
                Annotated[Number, Field(ge=-100, le=100)],
            ],
            _at_most(MOST_BIAS),
        ]
        | None
    ) = None
    max_tokens: Annotated[StrictInt, Field(ge=0)] | None = None
    user: StrictStr | None = None  # names the client's user; nothing depends on it

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        return tuple((int(token), value) for token, value in (self.logit_bias or {}).items())


PromptType = str | list[str] | list[int] | list[list[int]]


def _prompt(value: Any) -> Any:
    """A prompt. Checked here because pydantic tries every member of a union, also on long lists."""
    if isinstance(value, str) or _are_tokens(value):
        return value
    if isinstance(value, list) and value:
        texts = all(isinstance(one, str) for one in value)
        if texts or all(_are_tokens(one) for one in value):
            return value
    raise ValueError("expected a text, tokens, a list of texts, or a list of lists of tokens")


def _are_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(token) is int and token >= 0 for token in value)
    )


class Completion(Request):
    """POST /v1/completions"""

    WITHOUT_EFFECT = {"suffix": ("",)}

    prompt: Annotated[Any, PlainValidator(_prompt, json_schema_input_type=PromptType)]
    best_of: Positive | None = None
    echo: StrictBool | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several."""
        found: Any = self.prompt
        if isinstance(found, str) or (found and isinstance(found[0], int)):
            found = [found]
        return list(found)


class ImageUrl(Strict):
    url: StrictStr
    detail: Literal["auto"] | None = None


class Piece(Strict):
    """A part of a message."""

    type: Literal["text", "image_url"]
    text: StrictStr | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _has_its_field(self) -> Piece:
        if getattr(self, self.type) is None or None not in (self.text, self.image_url):
            raise ValueError(f"a part of type {self.type} needs the field {self.type} and no other")
        return self


class Called(Strict):
    name: StrictStr
    arguments: StrictStr
    parsed_arguments: Unread = None


class Call(Strict):
    id: StrictStr
    type: Literal["function"]
    function: Called
    index: Unread = None  # in what OpenAI's library makes of a stream; calls stand in their order


class Message(Strict):
    """A message, also an answer as `message.model_dump()` of OpenAI's library gives it back."""

    WITHOUT_EFFECT = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": (),
    }

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: (
        Annotated[Annotated[StrictStr, Tag(TEXT)] | Annotated[Items[Piece], Tag(LIST)], EITHER]
        | None
    ) = None
    name: StrictStr | None = None
    tool_calls: Items[Call] | None = None
    tool_call_id: StrictStr | None = None
    reasoning_content: StrictStr | None = None  # as this server's answers have it
    parsed: Unread = None


class Function(Strict):
    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None

    @property
    def takes(self) -> dict[str, Any]:
        """What the arguments of a call fit."""
        if self.parameters is None:
            return dict(NO_PARAMETERS)
        return {"type": "object", **self.parameters}


class Tool(Strict):
    type: Literal["function"]
    function: Function

    @property
    def shown(self) -> dict[str, Any]:
        """What the model gets to see."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class FunctionName(Strict):
    name: StrictStr


class Choice(Strict):
    """The one function to call."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Strict):
    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None  # answers fit the schema in any case


class Format(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Format:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("json_schema is needed with type json_schema, and with no other")
        return self


class Chat(Request):
    """POST /v1/chat/completions"""

    WITHOUT_EFFECT = {
        "audio": (),
        "function_call": (),
        "functions": (),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "service_tier": ("auto", "default"),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Annotated[Items[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Positive | None = None
    prompt_cache_key: StrictStr | None = None  # says which prompts begin alike: the server sees it
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: Format | None = None
    tools: Items[Tool] | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["auto", "none", "required"], Tag(TEXT)]
            | Annotated[Choice, Tag(NAMED)],
            TEXT_OR_OBJECT,
        ]
        | None
    ) = None
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: Annotated[StrictStr, Field(max_length=64)] | None = None
    # Of no effect, as `user`: for the client's own records at OpenAI.
    metadata: Annotated[dict[str, StrictStr], _at_most(MOST_METADATA)] | None = None
    safety_identifier: StrictStr | None = None
    store: StrictBool | None = None
    # Variables of the folder's template.
    chat_template_kwargs: Annotated[dict[str, Scalar], _at_most(MOST_VARIABLES)] | None = None

    @property
    def callable(self) -> list[Function]:
        """The functions that the answers may call."""
        if not self.tools or self.tool_choice == "none":
            return []
        functions = [tool.function for tool in self.tools]
        if not isinstance(self.tool_choice, Choice):
            return functions
        return [one for one in functions if one.name == self.tool_choice.function.name]

    @property
    def must_call(self) -> bool:
        """Whether the answers have to be calls."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, Choice)


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        param: the field that is to blame; None: none is.
        message: what is wrong and what was expected.
        value: what was got, to be quoted.
        status: of HTTP.
    """

    def __init__(
        self,
        param: str | None,
        message: str,
        value: Any = None,
        *,
        status: int = 400,
        code: str | None = None,
    ) -> None:
        got = "" if value is None else f" Got {_quoted(value)}."
        self.message = f"{message.rstrip('.')}.{got}"[:MESSAGE_LENGTH]
        self.param = param
        self.status = status
        self.code = code
        super().__init__(self.message)


def parsed(kind: type[T], body: bytes) -> T:
    """The request in a body of JSON.

    Raises:
        RefusedError: it is not one; the first field that is wrong is named.
    """
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        raise _first(error) from None
    _check_together(asked)
    return asked


def _check_together(asked: Request) -> None:
    """Refuse fields that need others."""
    if asked.stream_options is not None and not asked.stream:
        raise RefusedError("stream_options", "stream_options needs stream: true")
    if isinstance(asked, Chat):
        if asked.top_logprobs is not None and not asked.logprobs:
            raise RefusedError("top_logprobs", "top_logprobs needs logprobs: true")
        if asked.max_tokens == 0:
            raise RefusedError("max_tokens", "max_tokens: expected at least 1", 0)
        both = asked.max_tokens, asked.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise RefusedError("max_tokens", "max_tokens and max_completion_tokens differ", both)
        _check_choice(asked)
    if isinstance(asked, Completion):
        if asked.best_of is not None and asked.best_of != (asked.n or 1):
            raise RefusedError(
                "best_of", "best_of is supported only where it equals n", asked.best_of
            )
        if asked.max_tokens == 0 and not asked.echo:
            raise RefusedError("max_tokens", "max_tokens: expected at least 1, or echo: true", 0)


def _check_choice(asked: Chat) -> None:
    """Refuse a choice of a function that is not there."""
    if not asked.must_call:
        return
    if not asked.tools:
        raise RefusedError("tool_choice", "tool_choice: a call without tools: expected tools")
    if not asked.callable:
        assert isinstance(asked.tool_choice, Choice)
        message = "tool_choice: tools have no function of this name"
        raise RefusedError("tool_choice", message, asked.tool_choice.function.name)


def _first(found: ValidationError) -> RefusedError:
    """The first field that pydantic refuses, as OpenAI names it."""
    error = min(found.errors(include_url=False), key=lambda one: len(one["loc"]) == 0)
    steps = [str(step) for step in error["loc"] if step not in (TEXT, LIST, NAMED)]
    value = error["input"]
    if error["type"] == OF_A_FIELD:  # pydantic has the object as the input
        context = error["ctx"]
        steps.append(context["name"])
        value = context["value"]
    steps = [ascii(step[:QUOTED])[1:-1] for step in steps]  # names are the client's
    where = ".".join(steps) or "body"
    message = error["msg"].removeprefix("Value error, ")
    return RefusedError(steps[0] if steps else None, f"{where}: {message}", value)


def _of_a_field(name: str, message: str, value: Any = None) -> PydanticCustomError:
    return PydanticCustomError(OF_A_FIELD, message, {"name": name, "value": value})


def _quoted(value: Any) -> str:
    text = reprlib.repr(value)  # of a large value, only the beginning
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


def _same(value: Any, other: Any) -> bool:
    """Equality that tells False from 0."""
    return type(value) is type(other) and bool(value == other)
