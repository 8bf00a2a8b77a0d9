"""Turn generated tokens into text, piece by piece, up to a stop sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from moepress.pieces import Pieces


class Writer:
    """The text of one answer.

    Text is given out as soon as it is certain: complete characters that no stop sequence can begin
    with. The stop sequence itself is not part of the text.

    Args:
        tokenizer: of transformers.
        stop: sequences that end the answer.
        raw: keep special tokens, for what parses the answer.
        after: tokens whose text the answer continues; none for an answer that begins a text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        raw: bool = False,
        after: Sequence[int] = (),
    ) -> None:
        self.stop = tuple(stop)
        self.stopped = False
        self._pieces = Pieces(tokenizer, special=raw, after=after)
        self._held = ""  # text that may begin a stop sequence
        self._given = 0  # characters given out before it
        self._silent = 0  # tokens since the last that gave text
        self._spans: deque[tuple[int, int]] = deque()  # in the text, of tokens not told yet
        self._told: list[int] = []

    def add(self, token: int) -> str:
        """The text that one more token makes certain."""
        self._silent += 1
        given = self._more(self._pieces.add(token), last=False)
        while self._spans and self._spans[0][1] <= self._given:
            self._told.append(self._spans.popleft()[0])
        return given

    def end(self) -> str:
        """The rest of the text, after the last token."""
        given = self._more(self._pieces.end(), last=True)
        self._told += [start for start, _ in self._spans if start < self._given]
        if not self.stopped:
            self._told += [self._given] * self._silent
        self._spans.clear()
        self._silent = 0
        return given

    def told(self) -> list[int]:
        """Where tokens begin whose text has been given out since the last call, in the order of
        `add`, in characters of the whole text.

        Those of a stop sequence are never told. Tokens without text are, with the next that has.
        """
        told, self._told = self._told, []
        return told

    def _more(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        if text:
            start = self._given + len(self._held)
            self._spans.extend([(start, start + len(text))] * self._silent)
            self._silent = 0
        self._held += text
        found = [at for one in self.stop if (at := self._held.find(one)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._held) if last else _certain(self._held, self.stop)
        given, self._held = self._held[:end], self._held[end:]
        self._given += end
        return given


def _certain(text: str, stop: Sequence[str]) -> int:
    """Characters of a text before the first with which a stop sequence may begin.

    They are given out, and each was looked at once: an answer costs no more than its text is long.
    """
    for at in range(len(text)):
        rest = text[at:]
        if any(one.startswith(rest) for one in stop):
            return at
    return len(text)
