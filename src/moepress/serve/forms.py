"""The form in which a model calls a function: what stands around the name and the arguments.

No file of a model's folder says it. But the chat template writes it where earlier calls of the
assistant are part of a prompt: a made-up call is written with it, and taken apart. The parser that
reads the model's answers must find in it, and in another call of this form, what was called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moepress.serve.thinking import Thinking, UnknownFormError

NAME, ARGUMENTS = "made_up_function", {"made_up": "value of it"}
OTHER, OTHERS = "other", {"made": [1, {"up": None}], "b": "c"}
# Kimi's template writes the id for the name; Mistral's take ids of nine letters and digits only.
IDS = (f"functions.{NAME}:0", "made0up1x")
PARAMETERS = {"type": "object", "properties": {"made_up": {"type": "string"}}}
FUNCTION = {"name": NAME, "description": "Of no use.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]]], str]


@dataclass(frozen=True)
class CallForm:
    """Texts of an answer that calls a function, in turn. Each may be empty."""

    before: str  # of the first call: what begins all calls of an answer
    open: str  # by this the parser knows that a call begins
    lead: str  # up to the name
    middle: str  # between the name and the arguments, which are JSON
    close: str
    after: str  # of the last call

    def written(self, name: str, arguments: Mapping[str, Any]) -> str:
        """An answer with one call."""
        begin = self.before + self.open + self.lead + name + self.middle
        return begin + json.dumps(arguments) + self.close + self.after


def form_of(
    render: Render, template: Any, thinking: Thinking | None, ends: Sequence[str]
) -> CallForm:
    """The form of a model's calls.

    Args:
        render: writes messages and tools with the chat template.
        template: of answers, as `answer_template` returns it.
        thinking: what may stand before a call.
        ends: texts of the tokens that end an answer.

    Raises:
        UnknownFormError: it is not JSON with a name before it, or cannot be found out.
    """
    for number in IDS:
        function = {"name": NAME, "arguments": dict(ARGUMENTS)}
        call = {"id": number, "type": "function", "function": function}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            text = render(messages, TOOLS)
        except Exception:  # of the template's own
            continue
        return _found(text, template, thinking, [end for end in ends if end])
    raise UnknownFormError


def _found(text: str, template: Any, thinking: Thinking | None, ends: Sequence[str]) -> CallForm:
    """The form of the call that ends a conversation."""
    from transformers.utils.chat_parsing.response_templates import load_response_template

    loaded = load_response_template(template)
    turn: str = loaded.truncate_past_last_anchor(text)
    begin, inside, end = _region(turn, template, NAME, ARGUMENTS)
    name = turn.find(NAME, begin)
    first, last = _json_after(turn, name + len(NAME))
    inside = min(inside, name)
    over = [at for one in ends if (at := turn.find(one, last)) >= 0]
    content = loaded.fields.get("content")
    if content is not None and content.close_re is not None:
        over += [match.start() for match in content.close_re.finditer(turn, last)]
    cut = min(over, default=len(turn))
    if not begin <= name < first < last <= min(end, cut):
        raise UnknownFormError
    end = min(end, cut)
    before = turn[:begin]
    if thinking is not None:
        before = before.rpartition(thinking.close)[2]
    opening = turn[begin:inside]
    # The pattern of an opening may begin with what other calls do not have: with spaces, or with
    # what begins all calls.
    at = max(
        at for at in range(len(opening) or 1) if at == 0 or _begins(turn[begin + at :], template)
    )
    mark = opening[at:].rstrip()
    close, after = turn[last:end], turn[end:cut].rstrip()
    found = CallForm(
        (before + opening[:at]).lstrip(),
        mark,
        turn[begin + at + len(mark) : name],
        turn[name + len(NAME) : first],
        close if after else close.rstrip(),
        after,
    )
    _region(found.written(OTHER, OTHERS), template, OTHER, OTHERS)
    return found


def _region(
    turn: str, template: Any, name: str, arguments: Mapping[str, Any]
) -> tuple[int, int, int]:
    """Where the parser finds one call: its begin, the end of what opens it, its end.

    Raises:
        UnknownFormError: it does not find this call, or more than it.
    """
    from moepress.serve.calls import CALLS, AnswerParser

    spans: list[tuple[int, int, int]] = []

    class Watched(AnswerParser):
        def _close_current(self, events: Any) -> None:
            if self._current == CALLS and self._opened:
                spans.append((*self._span, self._pos))
            super()._close_current(events)

    parser = Watched(template, "", TOOLS)
    events = parser.feed(turn) + parser.rest(cut=False)
    calls = [call for event in events for call in event.get("calls", ())]
    found = [(call["name"], json.loads(call["arguments"])) for call in calls]
    if len(spans) != 1 or found != [(name, arguments)]:
        raise UnknownFormError
    return spans[0]


def _begins(turn: str, template: Any) -> bool:
    """Whether the parser finds the call at the begin of a text."""
    try:
        return _region(turn, template, NAME, ARGUMENTS)[0] == 0
    except UnknownFormError:
        return False


def _json_after(turn: str, at: int) -> tuple[int, int]:
    """Where the arguments stand behind a name."""
    decoder = json.JSONDecoder()
    for first in range(at, len(turn)):
        if turn[first] == "{":
            try:
                value, last = decoder.raw_decode(turn, first)
            except ValueError:
                continue
            if value == ARGUMENTS:
                return first, last
    raise UnknownFormError
