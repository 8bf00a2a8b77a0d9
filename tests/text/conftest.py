"""Tokenizers and a text for the tests of text, and the streams they should give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.conftest import byte_level_bpe

LINES = "".join(f"{i} is a number after {i - 1}, né?\n" for i in range(700))
EOS = 1


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a few lines, with <s> = 0 and </s> = 1."""
    bpe = byte_level_bpe(LINES, 320)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def begins(tokenizer: Any, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts the tokens of a template around a text, `$A`."""
    bpe = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    bpe.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.txt"
    path.write_text(LINES)
    return path


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def joined(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """The stream that documents of these texts should give."""
    ids = encode(tokenizer, texts[0])
    for following in texts[1:]:
        ids += [EOS, *encode(tokenizer, following)]
    return ids


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.characters = 0
        self.eos_token_id = inner.eos_token_id

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self.inner(texts, **options)


class Characters:
    """A tokenizer of one token per character."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}
