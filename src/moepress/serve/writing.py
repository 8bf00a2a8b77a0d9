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
        self._seen = ""  # text so far, in full
        self._given = 0  # characters of it given out
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
            self._told += [len(self._seen)] * self._silent
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
        longest = max(map(len, self.stop), default=0)
        start = max(self._given, len(self._seen) - longest)  # earlier text was searched
        if text:
            span = len(self._seen), len(self._seen) + len(text)
            self._spans.extend([span] * self._silent)
            self._silent = 0
        self._seen += text
        found = [(at, one) for one in self.stop if (at := self._seen.find(one, start)) >= 0]
        if found:
            self.stopped = True
            end = min(found)[0]
        else:
            end = len(self._seen) if last else len(self._seen) - _begun(self._seen, self.stop)
        given, self._given = self._given, max(end, self._given)
        return self._seen[given : self._given]


def _begun(text: str, stop: Sequence[str]) -> int:
    """The most characters at the end of a text with which a stop sequence begins."""
    lengths = (n for one in stop for n in range(1, len(one)) if text.endswith(one[:n]))
    return max(lengths, default=0)
