"""The text of tokens that come one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

UNKNOWN = "\ufffd"  # stands for bytes that are no character, or only a part of one
CONTEXT = 16  # tokens before the text that are decoded with it
MOST_WAITING = 16  # tokens that are decoded again with each that comes; a character has at most 4


class Pieces:
    """Decodes tokens as they come, in pieces of complete characters.

    Together the pieces are the text of all tokens. A later token can change how earlier ones are
    read: after `<0x0A>`, `<0xF0>` makes two bytes that are no character. What was given stays, and
    the text goes on with U+FFFD. So it does after `MOST_WAITING` tokens that are no character.

    Args:
        tokenizer: of transformers.
        special: write special tokens too.
        after: tokens that the text follows. Tokenizers in the manner of SentencePiece leave out the
            space that a text begins with: one that continues another must name its end here.
    """

    def __init__(self, tokenizer: Any, *, special: bool = False, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._fast: Any = getattr(tokenizer, "_tokenizer", None)  # None: written in Python
        self._before = list(after[-CONTEXT:])
        self._shown = self._decode(self._before)
        self._waiting: list[int] = []  # tokens that gave no text yet

    def add(self, token: int) -> str:
        """The text that one more token completes."""
        self._waiting.append(token)
        text = self._decode([*self._before, *self._waiting])
        waits_long = len(self._waiting) > MOST_WAITING
        if text.endswith(UNKNOWN) and not waits_long:
            return ""
        new = self._beyond(text)
        if waits_long and not new:
            self._waiting.pop()  # a special token, as those before it
        return new

    def end(self) -> str:
        """The rest, after the last token: a character that is cut is U+FFFD."""
        return self._beyond(self._decode([*self._before, *self._waiting]))

    def _beyond(self, text: str) -> str:
        """What a text has more than was shown."""
        if text.startswith(self._shown):
            new = text[len(self._shown) :]
        else:  # the tokens that wait have changed the text before them
            new = self._decode(self._waiting)
        if new:
            self._before, self._waiting = self._waiting, []
            self._shown = self._decode(self._before)
        return new

    def _decode(self, ids: list[int]) -> str:
        if isinstance(self._fast, Tokenizer):
            return str(self._fast.decode(ids, skip_special_tokens=not self._special))
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=not self._special, clean_up_tokenization_spaces=False
            )
        )
