"""Reasoning and calls of tools inside an answer, found with transformers' parsers.

A folder's tokenizer may say how its answers are built (`response_template`), and transformers knows
it for some model types. Of other models the answer is text only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Message:
    """A piece of an answer, or all of it."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)  # {"name": , "arguments": JSON}


class Parser:
    """Parses one answer while it is written.

    Args:
        template: what `answer_template` returns.
        prefix: the prompt as text: it may end inside the answer's reasoning.
        tools: as the request gives them.
    """

    def __init__(self, template: Any, prefix: str, tools: Sequence[Any] | None) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self._parser = ResponseParser(template, prefix=prefix, tools=tools)
        self._first = list(self._parser.initial_events)

    def feed(self, text: str) -> Message:
        events, self._first = self._first, []
        return _message([*events, *(self._parser.feed(text) if text else [])])

    def end(self) -> Message:
        """The rest. What ends inside a call of a tool, because the answer was cut, is lost."""
        try:
            _, events = self._parser.finalize()
        except (ValueError, RuntimeError):
            events = []
        return _message([*self._first, *events])


def answer_template(processor: Any, model: Any) -> Any:
    """How the model's answers are built, for `Parser`; None: as plain text."""
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:  # an older transformers
        return None
    return get_response_template(processor, model)


def _message(events: Sequence[Any]) -> Message:
    made = Message()
    for item in _items(events):
        if isinstance(item, str):
            if type(item) is str:
                made.text += item
            else:
                made.reasoning += item
        else:
            made.calls.append({"name": item.name, "arguments": item.arguments})
    return made


def _items(events: Sequence[Any]) -> Iterator[Any]:
    from transformers.cli.serving.utils import response_events_to_chunks

    yield from response_events_to_chunks(list(events))
