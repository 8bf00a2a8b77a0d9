"""Answers whose calls of tools fit the schemas of their parameters.

Either the answer is one call, behind the thinking, or it is free: text, until the model opens a
call. Both are grammars of llguidance, around the form of the model's calls (forms.py). Such answers
are read here and not by parsing.py: what stands in the arguments of a call ends no call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import regex  # transformers needs it, too: it finds where a match may begin at a text's end

from moepress.serve.forms import CallForm, Render, form_of
from moepress.serve.grammar import (
    OBJECT,
    Grammar,
    Grammars,
    Tokens,
    UnfitError,
    around,
    checked,
    spelled,
    started,
    thought,
)
from moepress.serve.parsing import Message
from moepress.serve.schema import Chat, Function, RefusedError
from moepress.serve.thinking import Split, Thinking, UnknownFormError, beginning, thinking_of

MOST_SECONDS = 10.0  # to make all schemas ready; one takes some at the worst
MOST_SCHEMAS = 1 << 18  # characters of all schemas that the calls of an answer are held to
UNKNOWN_FORM = (
    "not supported with this model: the form of its calls is not known to be JSON behind the name "
    "of a function, between fixed marks"
)
NO_MARK = "not supported with this model: it is not known by what a call in its answers begins"


@dataclass(frozen=True)
class Terms:
    """How the calls of an answer are bound.

    Args:
        must: the answer is one call; else it is free up to each call.
        many: a free answer may have several.
    """

    must: bool
    many: bool


class Calling:
    """Makes grammars of calls for one model. Threads may share it.

    Args:
        grammars: of the model.
        render: writes messages and tools with the chat template.
        ends: texts of the tokens that end an answer.
    """

    def __init__(self, grammars: Grammars, render: Render, ends: Sequence[str]) -> None:
        self._grammars = grammars
        self._render = render
        self._ends = tuple(ends)
        self._forms: dict[str, CallForm | None] = {}  # by chat template

    def of(self, asked: Chat, prompt: str, chat: str) -> Grammar | None:
        """What the answers to a request are held to for its calls; None: nothing.

        Args:
            prompt: as text.
            chat: the chat template.

        Raises:
            RefusedError: the calls cannot be held to what is asked for.
        """
        functions = asked.callable
        terms = Terms(asked.must_call, asked.parallel_tool_calls is not False)
        strict = any(function.strict for function in functions)
        if not functions or not (terms.must or strict or not terms.many):
            return None
        param = "tool_choice" if terms.must else "tools" if strict else "parallel_tool_calls"
        what = {"tool_choice": "a forced call is ", "tools": "strict is "}.get(param, "false is ")
        try:
            return self._made(functions, terms, prompt, chat)
        except UnknownFormError as error:
            raise RefusedError(param, f"{param}: {what}{str(error) or UNKNOWN_FORM}") from None
        except UnfitError as error:
            raise RefusedError(param, f"{param}: {error}") from error

    def _made(self, functions: Sequence[Function], terms: Terms, prompt: str, chat: str) -> Grammar:
        form = self._form(chat)
        thinking, inside = beginning(self._grammars.template, chat, prompt, calls=True)
        tokens = self._grammars.tokens()
        schemas = _schemas(tokens, functions, terms)
        names = [function.name for function in functions]
        if terms.must:
            answer = around(tokens, thinking, inside, _one_call(tokens, form, names))
        else:
            answer = _free(tokens, form, names, thinking, inside, terms.many)
        start = started(tokens, answer, schemas)
        special = self._grammars.special_in(form.written("", {}))

        def reader() -> CallReader:
            split = None if thinking is None else Split(thinking, inside)
            return CallReader(form, names, split, terms.must, self._ends, special)

        return Grammar(tokens, start, reader)

    def _form(self, chat: str) -> CallForm:
        if chat not in self._forms:
            template = self._grammars.template
            try:
                thinking = thinking_of(template, chat, calls=True)
                self._forms[chat] = form_of(self._render, template, thinking, self._ends)
            except UnknownFormError:
                self._forms[chat] = None
        form = self._forms[chat]
        if form is None:
            raise UnknownFormError
        return form


def _schemas(tokens: Tokens, functions: Sequence[Function], terms: Terms) -> list[str]:
    """The schemas of the functions' arguments, as `checked` returns them for `_call`.

    Raises:
        UnfitError: one cannot be followed, or they are too large together.
    """
    found: list[str] = []
    names: set[str] = set()
    size, begun = 0, time.monotonic()
    for number, function in enumerate(functions):
        schema = function.takes if terms.must or function.strict else OBJECT
        where = f"the function {function.name}"
        if function.name in names:
            raise UnfitError(f"{where}: expected another name for each function")
        if schema.get("type") != "object":
            raise UnfitError(f"{where}: parameters: expected a schema of type object")
        try:
            found.append(checked(tokens, f"a{number}", schema))
        except UnfitError as error:
            raise UnfitError(f"{where}: {error}") from error
        size += len(found[-1])
        if size > MOST_SCHEMAS:
            raise UnfitError(f"expected schemas of at most {MOST_SCHEMAS} characters in all")
        if time.monotonic() - begun > MOST_SECONDS:
            raise UnfitError("the schemas are too complex together")
        names.add(function.name)
    return found


def _one_call(tokens: Tokens, form: CallForm, names: Sequence[str]) -> str:
    return " ".join([
        spelled(tokens, form.before + form.open + form.lead),
        _call(tokens, form, names),
        spelled(tokens, form.close + form.after),
    ])  # fmt: skip


def _call(tokens: Tokens, form: CallForm, names: Sequence[str]) -> str:
    """The name of a function, and its arguments."""
    middle = spelled(tokens, form.middle)
    calls = (f"{json.dumps(name)} {middle} @a{number}" for number, name in enumerate(names))
    return f"({' | '.join(calls)})"


def _free(
    tokens: Tokens,
    form: CallForm,
    names: Sequence[str],
    thinking: Thinking | None,
    inside: bool,
    many: bool,
) -> str:
    """The grammar of an answer that is text, where what follows the opening of a call is one.

    Text is one lexeme as far as it goes: two of them could make up a mark.

    Raises:
        UnknownFormError: it is not known what opens a call, or ends the thinking.
    """
    if not form.open:
        raise UnknownFormError(NO_MARK)
    marks = [form.open] if thinking is None or inside else [form.open, thinking.open]
    first = [_first_special(tokens, mark) for mark in marks]
    others = [token for token in tokens.special if token not in {*tokens.ends, *first}]
    rest = " ".join([
        spelled(tokens, form.lead), _call(tokens, form, names), spelled(tokens, form.close)
    ])  # fmt: skip
    rules = [f"TEXT: /(?s:.+)/{_without(marks)}", "ANY: /(?s:.*)/"]
    if first[0] is not None:
        rules.append(f"call: {spelled(tokens, form.open)} {rest}")
    else:
        rules += [
            f"call: opening {rest}",
            f"opening[suffix={json.dumps(form.open)}]: BEFORE",
            f"BEFORE: ANY{_without(marks[1:])}",
        ]
    other = f"<[{','.join(map(str, others))}]>" if others else None
    piece = f"(call | {other})" if other else "call"
    if many:
        rules.append(f"body: TEXT? ({piece} TEXT?)*")
    else:
        rules.append(f"body: TEXT? ({other} TEXT?)* call?" if other else "body: TEXT? call?")
    start = "body"
    if thinking is not None:
        rules.append(thought(tokens, thinking.close))
        start = "thought body"
        if not inside:
            opened = json.dumps(marks[1]) if first[1] is None else spelled(tokens, marks[1])
            kind = "THINK" if first[1] is None else "think"
            rules.append(f"{kind}: /[ \\n]{{0,2}}/ {opened}")
            start = f"({kind} thought)? body"
    return "\n".join([f"start: {start}", *rules])


def _without(marks: Sequence[str]) -> str:
    """What a lexeme is limited by that has none of some marks."""
    return "".join(f" & ~(ANY {json.dumps(mark)} ANY)" for mark in marks)


def _first_special(tokens: Tokens, mark: str) -> int | None:
    """The special token that a mark begins with; None: the mark is text.

    Raises:
        UnknownFormError: it is text, and then a special token.
    """
    ids = tokens.view.tokenize_str(mark, parse_special=True)
    special = [tokens.view.is_special_token(token) for token in ids]
    if special[0]:
        return int(ids[0])
    if any(special):
        raise UnknownFormError(NO_MARK)
    return None


class CallReader:
    """Finds the calls in one answer while it is written.

    Args:
        form: of the calls.
        names: of the functions.
        split: tells the thinking; None: there is none.
        must: the answer is a call: other text is none of it.
        ends: texts of the tokens that end an answer.
        special: texts of special tokens in the form.
    """

    def __init__(
        self,
        form: CallForm,
        names: Sequence[str],
        split: Split | None,
        must: bool,
        ends: Sequence[str],
        special: Sequence[str] = (),
    ) -> None:
        self._split = split
        self._must = must
        self._held = ""  # text that may be a mark, a part of one, or a call
        self._made = 0  # calls
        loose = partial(_loose, special)
        before = rf"(?:{loose(form.before)}\s*)?" if form.before else ""
        opening = rf"\s*{before}{loose(form.open + (form.lead if must else ''))}"
        after = rf"|(?P<after>\s*{loose(form.after)})" if form.after else ""
        lead = "" if must else loose(form.lead)
        some = "|".join(map(regex.escape, names))
        self._mark = regex.compile(rf"(?P<call>{opening}){after}")
        self._call = regex.compile(rf"{opening}{lead}\s*(?P<name>{some}){loose(form.middle)}\s*")
        self._close = regex.compile(rf"\s*{loose(form.close)}" if form.close else "")
        self._closing = self._close if form.close else regex.compile("}")
        self._longest = 2 * len(form.close) + 1  # with spaces that tokenizers write
        self._looked = 0  # characters of the held text in which no call is closed
        self._end = regex.compile(rf"\s*(?:{'|'.join(map(regex.escape, ends))})?\s*")

    def feed(self, text: str) -> Message:
        made = Message()
        if self._split is not None:
            made = self._split.feed(text)
            text, made.text = made.text, ""
        self._held += text
        self._read(made)
        return made

    def end(self, cut: bool = True) -> Message:
        """The rest. If the answer is cut inside a call, the call is lost."""
        made = Message() if self._split is None else self._split.end(cut)
        self._held, made.text = self._held + made.text, ""
        self._read(made)
        inside = (found := self._mark.match(self._held)) is not None and found["call"] is not None
        if inside and not cut and self._take(made, closed=False):
            inside = False
        if not inside:
            self._say(made, self._held)
        elif not cut:  # a stop sequence ended it
            made.text += self._held
        self._held = ""
        return made

    def _read(self, made: Message) -> None:
        """Move what is certain from the held text to a message."""
        while self._held:
            found = self._mark.search(self._held, partial=True)
            at = len(self._held) if found is None else found.start()
            self._say(made, self._held[:at])
            self._held = self._held[at:]
            if found is None or found.partial:
                return
            if found["call"] is None:
                self._held = self._held[len(found[0]) :]
            elif not self._take(made, closed=True):
                return

    def _take(self, made: Message, closed: bool) -> bool:
        """Read a call at the beginning of the held text. Returns whether there is a whole one.

        Args:
            closed: only one that what follows a call has closed.
        """
        head = self._call.match(self._held)
        if head is None:
            return False
        if closed:
            since = max(head.end(), self._looked - self._longest)
            self._looked = len(self._held)
            if self._closing.search(self._held, since) is None:
                return False
        try:
            stop = json.JSONDecoder().raw_decode(self._held, head.end())[1]
        except (ValueError, RecursionError):
            return False
        close = self._close.match(self._held, stop)
        if closed and close is None:
            return False
        made.calls.append({"name": head["name"], "arguments": self._held[head.end() : stop]})
        self._made += 1
        self._looked = 0
        self._held = self._held[stop if close is None else close.end() :]
        return True

    def _say(self, made: Message, text: str) -> None:
        if not self._must and not (self._made and self._end.fullmatch(text)):
            made.text += text


def _loose(special: Sequence[str], text: str) -> str:
    """A pattern of a text with other spaces, or none, where it has some, and beside special tokens:
    tokenizers may write some there."""
    marks = "|".join(map(regex.escape, special))
    parts = regex.split(rf"\s+|(?:\s*({marks})\s*)" if marks else r"\s+", text)
    return r"\s*".join(regex.escape(part or "") for part in parts)
