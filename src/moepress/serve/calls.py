"""transformers' parser of answers, for models that do not always write as they should.

The module imports what older versions of transformers lack: parsing.py imports it when it needs it.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from transformers.utils.chat_parsing import ResponseParser

logger = logging.getLogger(__name__)

CALLS = "tool_calls"  # what templates name the field
AS_TEXT = "calls_as_text"  # the field where they are text
OPENS = ("open", "open_pattern")
CLOSES = ("close", "close_pattern")
Events = list[dict[str, Any]]


class AnswerParser(ResponseParser):  # type: ignore[misc]  # transformers is untyped
    """The events of an answer: of what the model writes, not of what the prompt begins it with.

    The end of a readable call has its name and arguments as `calls`. A call that cannot be read is
    content, as the model wrote it.

    Args:
        template: how answers are built, as `ResponseParser` takes it.
        prefix: the prompt as text.
        tools: of the request.
    """

    def __init__(self, template: Any, prefix: str, tools: Any) -> None:
        self._prompt = 0  # characters at the beginning of the buffer that are the prompt's
        self._span = (0, 0)  # in the buffer, of what opened the region
        self._cut = False
        super().__init__(template, prefix=prefix, tools=tools)
        self._prompt = len(self._buffer)

    def rest(self, cut: bool) -> Events:
        """The last events. If the answer is cut, a call that it ends in is left out."""
        events: Events = []
        self._cut = cut
        self._process(events, eos=True)
        return events

    def _open_explicit(self, events: Events, field: Any, m: Any) -> None:
        self._span = m.span()
        super()._open_explicit(events, field, m)

    def _accumulate(self, events: Events, text: str) -> None:
        """Text goes to the region that is open; here, `_pos` is where it begins in the buffer."""
        before = len(events)
        super()._accumulate(events, text)
        for event in events[before:]:
            if event["type"] == "region_chunk":
                event["text"] = text[max(self._prompt - self._pos, 0) :]
                if event["field"] == AS_TEXT:
                    event["field"] = "content"

    def _close_current(self, events: Events) -> None:
        """The region ends; here, `_pos` is behind what closed it."""
        calls = self._current == CALLS and self._opened
        begin, inside = self._span
        if calls and self._cut and inside + len(self._body) == self._pos:  # nothing closed it
            self._reset_to_implicit()
            return
        before = len(events)
        try:
            super()._close_current(events)
            if calls:
                events[-1]["calls"] = calls_of(events[-1]["value"])
        except Exception as error:  # a model may write anything, also what breaks parsers
            logger.info("a part of an answer cannot be read: %s", type(error).__name__)
            del events[before:]
            self._reset_to_implicit()
            if calls:
                raw = self._buffer[max(begin, self._prompt) : self._pos]
                events.append({"type": "region_chunk", "field": "content", "text": raw})


def calls_of(value: Any) -> list[dict[str, str]]:
    """Names and arguments, as JSON, of the calls in a region of an answer.

    Args:
        value: what transformers made of the region: {"function": {"name": , "arguments": }}, or a
            list of these. A call without arguments has none.

    Raises:
        ValueError, TypeError, KeyError: it is something else, or cannot be sent as JSON.
    """
    made = []
    for one in value if isinstance(value, list) else [value]:
        function = one["function"]
        name, given = function["name"], function.get("arguments")
        if not name or not isinstance(name, str) or not isinstance(given, str | dict | None):
            raise TypeError("expected a name, and arguments as an object")
        arguments = given if isinstance(given, str) else json.dumps(given or {}, allow_nan=False)
        f"{name}{arguments}".encode()  # JSON has escapes for halves of characters, UTF-8 has none
        made.append({"name": name, "arguments": arguments})
    return made


def without_calls(template: Any) -> Any:
    """A template that takes calls of tools for text."""
    fields = {name: field for name, field in template["fields"].items() if name != CALLS}
    calls = template["fields"].get(CALLS)
    if calls is not None and all(_opens(field) for field in fields.values()):
        # No field takes what stands between the others: the calls' own must.
        kept = {name: calls[name] for name in (*OPENS, *CLOSES, "repeats") if name in calls}
        text = {"content": "text", "content_args": {"strip": False}, "transform": "{content}"}
        fields[AS_TEXT] = {**kept, **text}
    return {**template, "fields": fields}


def _opens(field: Any) -> bool:
    return any(name in field for name in OPENS)
