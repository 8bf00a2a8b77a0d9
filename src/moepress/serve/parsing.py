"""Reasoning and calls of tools inside an answer, found with transformers' parsers.

A folder's tokenizer may say how its answers are built (`response_template`), and transformers knows
it for some model types. Of other models the answer is text only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

REASONING = ("reasoning_content", "reasoning", "thinking")  # what templates name the field


@dataclass
class Message:
    """A piece of an answer, or all of it."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)  # {"name": , "arguments": JSON}

    def add(self, other: Message) -> None:
        self.text += other.text
        self.reasoning += other.reasoning
        self.calls += other.calls

    def without_end(self, end: str) -> Message:
        """The message without the text of a token that a parser did not know and left."""
        text, reasoning = self.text.removesuffix(end), self.reasoning.removesuffix(end)
        return Message(text, reasoning, self.calls)


class Reader(Protocol):
    """What tells the parts of one answer apart while it is written."""

    def feed(self, text: str) -> Message: ...

    def end(self, cut: bool = True) -> Message: ...


class Parser:
    """Parses one answer while it is written.

    Args:
        template: what `answer_template` returns.
        prefix: the prompt as text: it may end inside the answer's reasoning.
        tools: that the model may call, as the request gives them. None: what looks like a call is
            text.
    """

    def __init__(self, template: Any, prefix: str, tools: Sequence[Any] | None) -> None:
        from moepress.serve.calls import AnswerParser, without_calls

        self._parser = AnswerParser(template if tools else without_calls(template), prefix, tools)

    def feed(self, text: str) -> Message:
        return _message(self._parser.feed(text) if text else [])

    def end(self, cut: bool = True) -> Message:
        """The rest.

        Args:
            cut: the model did not end the answer. If it is cut inside a call, the call is lost.
        """
        return _message(self._parser.rest(cut))


def answer_template(processor: Any, model: Any) -> Any:
    """How the model's answers are built, for `Parser`; None: as plain text."""
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:  # an older transformers
        return None
    return get_response_template(processor, model)


def _message(events: Iterable[Mapping[str, Any]]) -> Message:
    made = Message()
    for event in events:
        made.calls += event.get("calls", ())
        if event["type"] == "region_chunk" and not event.get("dirty"):
            if event["field"] in REASONING:
                made.reasoning += event["text"]
            elif event["field"] == "content":
                made.text += event["text"]
    return made
