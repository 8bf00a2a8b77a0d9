"""What tokens are called in logprobs, and where in a text they stand.

A tokenizer decodes a text, not a token: it leaves out the space of a first one, and a part of a
character is U+FFFD. Names are made of what its vocabulary has.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte, where the other tokens are text
SPACE = "\u2581"  # a space, in vocabularies in the manner of SentencePiece
BYTES_SPACE = "\u0120"  # a space, in vocabularies of bytes
# How vocabularies of bytes write them since GPT-2: letters that can be printed.
LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}


class Name(NamedTuple):
    """A token as text, and its UTF-8."""

    text: str
    bytes: list[int]


class Names:
    """Names of the tokens of a tokenizer.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, Name] = {}  # answers have the same ones many times
        added = getattr(tokenizer, "added_tokens_decoder", {})
        marked = {token for token, about in added.items() if about.special}
        self._special = frozenset({*tokenizer.all_special_ids, *marked})
        vocabulary = tokenizer.get_vocab()
        self._of_bytes = self._stands_for_another(BYTES_SPACE, vocabulary)
        self._of_text = not self._of_bytes and self._stands_for_another(SPACE, vocabulary)

    def special(self, token: int) -> bool:
        """Whether texts are written without the token."""
        return token in self._special

    def __call__(self, token: int) -> Name:
        """The name of a token. Each is made once: its parts must not be changed."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = Name(self.text(token), list(self.raw(token)))
        return known

    def raw(self, token: int) -> bytes:
        """The UTF-8 of a token; of a part of a character, its part of that."""
        try:
            name = self._tokenizer.convert_ids_to_tokens(token)
        except LookupError:
            name = None
        if not isinstance(name, str):  # the model's table is longer than the vocabulary
            return b""
        if self._of_bytes:
            try:
                return bytes(LETTERS[letter] for letter in name)
            except KeyError:  # an added token, which is written as it is
                return name.encode()
        if self._of_text:
            found = BYTE.fullmatch(name)
            return bytes.fromhex(found[1]) if found else name.replace(SPACE, " ").encode()
        return str(self._tokenizer.decode([token])).encode()

    def text(self, token: int) -> str:
        """A token as text, or as OpenAI writes a part of a character: `bytes:\\xe2\\x80`."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _stands_for_another(self, letter: str, vocabulary: dict[str, int]) -> bool:
        """Whether the tokenizer writes something else for a letter of its vocabulary."""
        found = next((token for name, token in vocabulary.items() if letter in name), None)
        return found is not None and letter not in self._tokenizer.decode([found])


def places(names: Names, tokens: Sequence[int], text: str) -> list[int]:
    """Where the tokens of a prompt begin in its text, in characters.

    The text need not have their special tokens, nor the space that tokenizers in the manner of
    SentencePiece put before it.
    """
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    found, at = [], 0
    for token in tokens:
        found.append(at)
        name = characters.decode(names.raw(token))
        if text.startswith(name, at):
            at += len(name)
        elif name.startswith(" ") and text.startswith(name[1:], at):
            at += len(name) - 1
        elif not names.special(token):
            at += len(name)
    return found
