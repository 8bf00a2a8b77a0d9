"""Turn generated tokens into text, piece by piece, up to a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Writer:
    """The text of one answer.

    Text is given out as soon as it is certain: complete characters that no stop sequence can begin
    with. The stop sequence itself is not part of the text.

    Args:
        tokenizer: of transformers.
        stop: sequences that end the answer.
        raw: keep special tokens, for what parses the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), raw: bool = False) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.raw = raw
        self.stopped = False
        self.ids: list[int] = []
        self._seen = ""  # text so far, in full
        self._given = 0  # characters of it given out
        self._fast: Any = getattr(tokenizer, "_tokenizer", None)  # None: written in Python
        self._stream = DecodeStream([], skip_special_tokens=not raw)

    def add(self, token: int) -> str:
        """The text that one more token makes certain."""
        self.ids.append(token)
        return self._more(self._step(token), last=False)

    def end(self) -> str:
        """The rest of the text, after the last token."""
        whole = self._decoded()
        more = whole[len(self._seen) :] if whole.startswith(self._seen) else ""
        return self._more(more, last=True)

    def _step(self, token: int) -> str:
        if self._fast is not None:
            return self._stream.step(self._fast, token) or ""
        whole = self._decoded()
        if whole.endswith("\ufffd") or not whole.startswith(self._seen):
            return ""  # an incomplete character
        return whole[len(self._seen) :]

    def _decoded(self) -> str:
        return str(
            self.tokenizer.decode(
                self.ids, skip_special_tokens=not self.raw, clean_up_tokenization_spaces=False
            )
        )

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
