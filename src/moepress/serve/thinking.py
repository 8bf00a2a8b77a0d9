"""Where the thinking of an answer ends that is held to a schema: there its JSON begins.

Such an answer is read here and not by parsing.py: what stands in its JSON is content, also if it
looks like a call of a tool or like more thinking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moepress.serve.parsing import REASONING, Message


class UnknownFormError(Exception):
    """It is not known where the content of a model's answers begins."""


@dataclass(frozen=True)
class Thinking:
    """What stands around the thinking in a model's answers."""

    open: str
    close: str
    plain: str = ""  # what begins the content of an answer without thinking


TAGS = Thinking("<think>", "</think>")
_FINAL = "<|channel|>final<|message|>"
CHANNELS = Thinking(  # of gpt-oss
    "<|channel|>analysis<|message|>", "<|end|><|start|>assistant" + _FINAL, _FINAL
)


def thinking_of(template: Any, chat: str, calls: bool = False) -> Thinking | None:
    """How a model thinks in its answers; None: it does not.

    Args:
        template: of answers, as `answer_template` returns it.
        chat: the chat template, whose text tells where there is no other.
        calls: what follows it may be calls, whose marks are known; those of content do not matter.

    Raises:
        UnknownFormError: what follows the thinking has marks that are not known.
    """
    if "<|channel|>" in chat and "<|message|>" in chat:
        if calls:  # their mark may be in a channel or before it
            raise UnknownFormError
        return CHANNELS
    fields: Mapping[str, Any] = template["fields"] if template else {"content": {}}
    marked = "content" not in fields or {"open", "open_pattern"} & fields["content"].keys()
    if marked and not calls:
        raise UnknownFormError
    named = next((name for name in REASONING if name in fields), None)
    if named is None:
        return TAGS if TAGS.close in chat else None
    marks = [fields[named].get(mark) for mark in ("open", "close")]
    if not all(isinstance(mark, str) and mark for mark in marks):
        raise UnknownFormError
    return Thinking(*marks)


def begun(thinking: Thinking, prompt: str) -> bool | None:
    """Whether a prompt ends inside of the thinking; None: the answer begins it, or does not."""
    end = prompt.rstrip()
    if end.endswith(thinking.open.rstrip()):
        return True
    return False if end.endswith(thinking.close.rstrip()) else None


def beginning(
    template: Any, chat: str, prompt: str, calls: bool = False
) -> tuple[Thinking | None, bool]:
    """How the answer to a prompt thinks, and whether it begins inside of that.

    Args:
        template, chat, calls: of `thinking_of`.
        prompt: of `begun`.

    Raises:
        UnknownFormError: as `thinking_of` raises it.
    """
    thinking = thinking_of(template, chat, calls)
    inside = None if thinking is None else begun(thinking, prompt)
    return (None, False) if inside is False else (thinking, bool(inside))


class Split:
    """Tells the thinking of one answer from its content, as `Parser` does.

    Args:
        thinking: what stands around it.
        inside: whether the answer begins inside of it.
    """

    def __init__(self, thinking: Thinking, inside: bool) -> None:
        self._thinking = thinking
        self._held = ""  # text that may be a mark, or a part of one
        self._inside: bool | None = inside or None  # None: nothing was written yet

    def feed(self, text: str) -> Message:
        self._held += text
        if self._inside is None:
            self._begin()
        made = Message()
        if self._inside:
            made.reasoning = self._think()
        if self._inside is False:
            made.text, self._held = self._held, ""
        return made

    def end(self, cut: bool = True) -> Message:
        """The rest."""
        held, self._held = self._held, ""
        return Message(reasoning=held) if self._inside else Message(held)

    def _begin(self) -> None:
        """Find out with which mark the answer begins, and leave it out."""
        text = self._held.lstrip()
        for mark, inside in ((self._thinking.open, True), (self._thinking.plain, False)):
            if mark and text.startswith(mark):
                self._held, self._inside = text.removeprefix(mark), inside
                return
        if not any(mark.startswith(text) for mark in (self._thinking.open, self._thinking.plain)):
            self._inside = False

    def _think(self) -> str:
        """What is certainly thinking of the held text."""
        close = self._thinking.close
        text, found, rest = self._held.partition(close)
        if found:
            self._inside, self._held = False, rest
            return text
        first = max(0, len(text) - len(close))
        at = next(n for n in range(first, len(text) + 1) if close.startswith(text[n:]))
        self._held = text[at:]
        return text[:at]
