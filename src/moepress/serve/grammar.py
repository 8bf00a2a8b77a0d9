"""Answers that are JSON: which tokens may come next, as the library llguidance computes it.

The grammar of an answer is made while its request is understood, so a schema that cannot be
followed is refused, and nothing of it is ignored. Each token then costs the engine's thread a
bounded time (`LIMITS`); an answer whose grammar needs more ends with an error.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moepress.serve.parsing import Reader
from moepress.serve.schema import RefusedError
from moepress.serve.thinking import Split, Thinking, UnknownFormError, beginning

PARAM = "response_format"
MISSING = (
    "this server cannot hold answers to a schema: a library is not installed. Install it with pip "
    "install llguidance"
)
UNKNOWN_FORM = (
    "only text is supported with this model: it is not known where the content of its answers "
    "begins"
)
OBJECT: Mapping[str, Any] = {"type": "object"}  # for {"type": "json_object"}
MOST_SCHEMA = 1 << 16  # characters of a schema as JSON
# Of all multipleOf in a schema: llguidance takes minutes and gigabytes for one of 10 million.
MOST_MULTIPLE = 1000
# Between the parts of JSON: without an end to it, models write spaces until they are cut.
SPACES = r"[ ]|\n{1,2}[ \t]{0,20}"
OPTIONS = {"whitespace_pattern": SPACES, "lenient": False, "coerce_one_of": False}
OWN = "x-guidance"  # a key of schemas by which llguidance takes options
NOTHING = "NoExtension"  # how llguidance says that no text fits
LIMITS: dict[str, Any] = {
    "step_lexer_fuel": 100_000,  # some ms of a token
    # Of 1 or 2 kB, of all answers to a request together; also what patterns cost in all, some
    # seconds. A string with `maxLength` takes four for each of its characters.
    "max_lexer_states": 50_000,
    "verbose_errors": False,  # they quote the whole grammar
}


class GrammarError(Exception):
    """An answer cannot go on as its grammar says. The message is for the client."""


class UnfitError(Exception):
    """Answers cannot be held to a grammar. The message is for the client, behind a field's name."""


class Matcher:
    """Follows one answer through its grammar.

    Args:
        grammar: of the answer.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._tokens = grammar.tokens
        self._inner = grammar.start.deep_copy()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._inner.is_stopped())

    def allowed(self, size: int) -> Tensor:
        """Which of a model's `size` tokens may come next, [size] bool.

        Raises:
            GrammarError: none may, or a limit is reached.
        """
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        self._check()
        known = np.unpackbits(bits, bitorder="little", count=self._tokens.view.vocab_size)
        found = np.zeros(max(size, len(known), max(self._tokens.ends, default=0) + 1), np.bool_)
        found[: len(known)] = known
        found[self._tokens.never] = False
        over = bool(self._inner.is_accepting())
        if over:
            found[self._tokens.view.eos_tokens] = False  # some token, where a model has none
        found[list(self._tokens.ends)] = over  # also one that is text by llguidance
        if not found[:size].any():
            raise GrammarError("The model has no token that can follow by the schema.")
        return torch.from_numpy(found[:size])

    def take(self, token: int) -> None:
        """Go on with a token that was allowed.

        Raises:
            GrammarError: a limit is reached.
        """
        if token not in self._tokens.ends:
            self._inner.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._inner.is_error():
            reason = _reason(self._inner.get_error())
            raise GrammarError(f"The answer cannot be held to the schema any longer: {reason}")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a model."""

    view: Any  # an LLTokenizer
    ends: frozenset[int]  # that end an answer
    never: Sequence[int]  # special ones that llguidance takes for text
    special: Sequence[int]  # the others


@dataclass(frozen=True)
class Grammar:
    """What the answers to a request are held to."""

    tokens: Tokens
    start: Any  # an LLMatcher
    reader: Callable[[], Reader | None]  # for one answer; None: all of it is content

    def matcher(self) -> Matcher:
        """For one answer."""
        return Matcher(self)


class Grammars:
    """Makes grammars for one model. Threads may share it.

    Args:
        tokenizer: of transformers.
        ends: tokens that end an answer.
        template: of answers, as `answer_template` returns it.
    """

    def __init__(self, tokenizer: Any, ends: Iterable[int], template: Any) -> None:
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)
        self.template = template
        self._making = threading.Lock()
        self._made: Tokens | None = None

    def of(self, schema: Mapping[str, Any], prompt: str, chat: str) -> Grammar:
        """The grammar of answers that fit a schema.

        Args:
            prompt: as text, which an answer goes on with.
            chat: the model's chat template.

        Raises:
            RefusedError: answers cannot be held to the schema, or not by this server or model.
        """
        try:
            thinking, inside = beginning(self.template, chat, prompt)
            tokens = self.tokens()
            form = around(tokens, thinking, inside, "@json")
            start = started(tokens, form, [checked(tokens, "json", schema)])
        except UnknownFormError:
            raise RefusedError(PARAM, f"{PARAM}: {UNKNOWN_FORM}") from None
        except UnfitError as error:
            raise RefusedError(PARAM, f"{PARAM}: {error}") from error
        return Grammar(tokens, start, lambda: None if thinking is None else Split(thinking, inside))

    def tokens(self) -> Tokens:
        """The model's tokens. Of a large vocabulary that takes a second: they are made once.

        Raises:
            UnfitError: llguidance is not installed, or cannot read them.
        """
        library = _library()
        with self._making:
            if self._made is None:
                view = self._view(library)
                special = [*filter(view.is_special_token, range(view.vocab_size))]
                never = [
                    token
                    for token in self._tokenizer.all_special_ids
                    if token < view.vocab_size and not view.is_special_token(token)
                ]
                self._made = Tokens(view, self._ends, never, special)
            return self._made

    def special_in(self, text: str) -> list[str]:
        """The special tokens that a text has, as text."""
        return [token for token in self._tokenizer.get_added_vocab() if token in text]

    def _view(self, library: Any) -> Any:
        ends = sorted(token for token in self._ends if token < len(self._tokenizer))
        try:
            return library.hf.from_tokenizer(self._tokenizer, eos_token=ends or None)
        except BaseException as error:  # a panic of Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UnfitError(
                "only text is supported with this model: llguidance cannot read its tokenizer: "
                f"{_reason(str(error))}"
            ) from error


def started(tokens: Tokens, form: str, schemas: Sequence[str]) -> Any:
    """An LLMatcher at the beginning of an answer.

    Args:
        form: of the answer in llguidance's language, where `@NAME` is JSON that fits a schema.
        schemas: as `checked` returns them.

    Raises:
        UnfitError: together they are too complex.
    """
    matcher = _matcher(tokens, form, schemas)
    if matcher.is_error():
        raise _unfit(_reason(matcher.get_error()))
    return matcher


def checked(tokens: Tokens, name: str, schema: Mapping[str, Any]) -> str:
    """A schema as llguidance takes it, under a name.

    Raises:
        UnfitError: it cannot be followed, or not all of it.
    """
    written = _written(name, schema)
    _try(_matcher(tokens, f"start: @{name}", [written]), tokens.view)
    return written


def _library() -> Any:
    """llguidance.

    Raises:
        UnfitError: it is not installed.
    """
    try:
        import llguidance.hf
    except ImportError:
        raise UnfitError(MISSING) from None
    return llguidance


def _matcher(tokens: Tokens, form: str, written: Sequence[str]) -> Any:
    """An LLMatcher. It may be in error.

    Args:
        form: of an answer, with JSON as `@NAME`.
        written: the schemas of JSON, as `_written` returns them.
    """
    library = _library()
    text = f'{{"grammars": [{", ".join([json.dumps({"lark_grammar": form}), *written])}]}}'
    limits = library.LLParserLimits(**LIMITS)
    return library.LLMatcher(tokens.view, text, log_level=0, limits=limits)


def _try(matcher: Any, view: Any) -> None:
    """Take the first steps of JSON, which find most of what is too complex.

    Raises:
        UnfitError: the schema cannot be followed, or not all of it.
    """
    matcher.compute_bitmask()
    if matcher.try_consume_tokens(view.tokenize_str("{")):
        matcher.compute_bitmask()
    found = [matcher.get_error()] if matcher.is_error() else matcher.get_grammar_warnings()
    if found:
        reason = _reason(found[0])
        raise _unfit("nothing fits it" if reason.startswith(NOTHING) else reason)


def _written(name: str, schema: Mapping[str, Any]) -> str:
    """A schema as llguidance takes it, under the name that a form calls.

    Raises:
        UnfitError: it is too large, or has numbers that JSON cannot write.
    """
    own = {key: value for key, value in schema.items() if key != OWN}
    try:
        text = json.dumps({**own, OWN: OPTIONS}, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise _unfit(str(error)) from error
    if len(text) > MOST_SCHEMA:
        raise _unfit(f"it has {len(text)} characters, expected at most {MOST_SCHEMA}")
    multiples = list(_multiples(own))
    if any(value <= 0 for value in multiples) or _common_multiple(multiples) > MOST_MULTIPLE:
        raise _unfit(
            "multipleOf: expected positive values whose least common multiple is at most "
            f"{MOST_MULTIPLE}, in units of their last digit"
        )
    return f'{{"name": "{name}", "json_schema": {text}}}'


def _multiples(schema: Any) -> Iterator[Decimal]:
    """All values of multipleOf in a schema."""
    if isinstance(schema, Mapping):
        found = schema.get("multipleOf")
        if isinstance(found, int | float):
            yield Decimal(str(found)).normalize()
    if isinstance(schema, Mapping | list):
        for part in schema.values() if isinstance(schema, Mapping) else schema:
            yield from _multiples(part)


def _common_multiple(values: Sequence[Decimal]) -> int:
    """The least common multiple, in units of the last digit that any has."""
    digits = max((-int(value.as_tuple().exponent) for value in values), default=0)
    return math.lcm(*(int(value.scaleb(max(0, digits))) for value in values))


def around(tokens: Tokens, thinking: Thinking | None, inside: bool, body: str) -> str:
    """The grammar of an answer that ends in `body`, in llguidance's language.

    Models begin with a space, or with newlines behind their thinking.

    Raises:
        UnknownFormError: the end of the thinking cannot be told.
    """
    space = "\nspace: /[ \\n]{1,2}/\n"
    if thinking is None:
        return f"start: space? {body}{space}"
    rules = f"{thought(tokens, thinking.close)}{space}"
    if inside:
        return f"start: thought space? {body}\n{rules}"
    opened = f"{spelled(tokens, thinking.open)} thought"
    if thinking.plain:
        return f"start: ({opened} | {spelled(tokens, thinking.plain)}) space? {body}\n{rules}"
    return f"start: space? ({opened} space?)? {body}\n{rules}"


def thought(tokens: Tokens, close: str) -> str:
    """The rule `thought`: anything but the end of the answer, and then a mark.

    Raises:
        UnknownFormError: the mark begins with text and has special tokens.
    """
    ids = tokens.view.tokenize_str(close, parse_special=True)
    special = [tokens.view.is_special_token(token) for token in ids]
    if special[0]:
        others = {token for token in tokens.ends if token < tokens.view.vocab_size}
        stops = ",".join(map(str, sorted({*others, ids[0]})))
        return f"thought: <[^{stops}]>* {spelled(tokens, close)}"
    if any(special):
        raise UnknownFormError
    return f"thought[suffix={json.dumps(close)}]: /(?s:.*)/"


def spelled(tokens: Tokens, mark: str) -> str:
    """A mark as llguidance takes it: special tokens by number, and the text between them."""
    parts = []
    ids = tokens.view.tokenize_str(mark, parse_special=True)
    for special, run in itertools.groupby(ids, tokens.view.is_special_token):
        group = list(run)
        parts += (
            [f"<[{token}]>" for token in group]
            if special
            else [json.dumps(tokens.view.decode_str(group))]
        )
    return " ".join(parts)


def _unfit(reason: str) -> UnfitError:
    return UnfitError(f"answers cannot be held to the schema: {reason}")


def _reason(text: str) -> str:
    """A message of llguidance's in one line."""
    return " ".join(text.replace("<non-verbose/>", "").split())
