"""Turn generated tokens into text, piece by piece, up to a stop sequence."""

from __future__ import annotations

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

    def add(self, token: int) -> str:
        """The text that one more token makes certain."""
        return self._more(self._pieces.add(token), last=False)

    def end(self) -> str:
        """The rest of the text, after the last token."""
        return self._more(self._pieces.end(), last=True)

    def _more(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        longest = max(map(len, self.stop), default=0)
        start = max(self._given, len(self._seen) - longest)  # earlier text was searched
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
