"""Tokenizers in the manner of SentencePiece: a space belongs to the word behind it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepress.pieces import UNKNOWN
from moepress.serve.limits import Limits
from moepress.serve.writing import Writer
from tests.llama_tokenizer import llama_tokenizer
from tests.serve.conftest import Here, serving
from tests.serve.test_requests import stream
from tests.test_chat import TEMPLATE

TOKENIZER = llama_tokenizer()
PIECES = ("\u2581", "\u2581the", "the", "\u2581world", "x", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in (0x0A, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 0x20))


def ids(*names: str) -> list[int]:
    return list(TOKENIZER.convert_tokens_to_ids(list(names)))


def written(tokens: list[int], after: list[int], tokenizer: Any = TOKENIZER) -> list[str]:
    writer = Writer(tokenizer, after=after)
    return [*(writer.add(token) for token in tokens), writer.end()]


@pytest.fixture(scope="module")
def llama(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(chat_folder, folder, ignore=shutil.ignore_patterns("*token*"))
    TOKENIZER.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    made = serving(folder, Limits())
    yield made
    assert made.served.engine.stop(30)


def always(name: str) -> dict[str, float]:
    """A bias with which nothing else is written."""
    return {str(ids(name)[0]): 100}


def test_the_tokenizer_is_as_llamas() -> None:
    assert TOKENIZER("Hello world").input_ids == ids("<s>", "\u2581Hello", "\u2581world")
    assert TOKENIZER.decode(ids("\u2581world")) == "world"
    assert TOKENIZER.decode(ids("<0xC3>", "<0xA9>", "\u2581the")) == "\u00e9 the"


def test_a_completion_goes_on_with_its_prompt(llama: Here) -> None:
    bias = always("\u2581world")
    assert llama.text("Hello", logit_bias=bias, max_tokens=2) == " world world"
    assert llama.text("Hello", logit_bias=bias, max_tokens=2, echo=True) == "Hello world world"
    tokens = TOKENIZER("Hello").input_ids
    assert llama.text(tokens, logit_bias=bias, max_tokens=2) == " world world"
    chunks = stream(llama, prompt="Hello", logit_bias=bias, max_tokens=2)
    assert "".join(chunk["text"] for chunk in chunks) == " world world"
    assert llama.text("x ", logit_bias=bias, max_tokens=1) == " world"
    assert llama.text([0], logit_bias=bias, max_tokens=1) == "world"  # after <s> a text begins


def test_a_chat_answer_is_a_text_of_its_own(llama: Here) -> None:
    answer = llama.chat(logit_bias=always("\u2581world"), max_tokens=2)
    assert answer["choices"][0]["message"]["content"] == "world world"


@given(
    st.lists(st.sampled_from((*PIECES, *BYTES)), max_size=8),
    st.lists(st.sampled_from(PIECES), max_size=3),
)
def test_pieces_are_the_whole_text(names: list[str], before: list[str]) -> None:
    tokens, after = ids(*names), ids(*before)
    pieces = written(tokens, after)
    read, whole = (TOKENIZER.decode(x, skip_special_tokens=True) for x in (after, after + tokens))
    text = "".join(pieces)
    if UNKNOWN in whole:  # what was given cannot be taken back: there may be fewer of them
        assert 0 < text.count(UNKNOWN) <= whole.count(UNKNOWN)
        assert letters(read + text) == letters(whole)
    else:
        assert text == whole[len(read) :]


def letters(text: str) -> list[str]:
    return [letter for letter in text if letter.isascii() and letter.isalpha()]


def test_bytes_that_are_no_character() -> None:
    assert written(ids("<0x0A>", "<0xF0>", "\u2581the"), []) == ["\n", "", "\ufffd the", ""]
    assert written(ids("<0x0A>", "<0xF0>"), []) == ["\n", "", "\ufffd"]
    assert written(ids("<0xF0>", "x"), ids("<0x0A>")) == ["", "\ufffdx", ""]


def test_a_server_goes_on_after_such_bytes(llama: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter(ids("<0x0A>", "<0xF0>", "\u2581the"))
    from moepress.serve import engine as engines
    from moepress.serve.sampling import Choice

    monkeypatch.setattr(
        engines.Sampler, "choose", lambda self, logits: Choice(next(script), -1.0, ())
    )
    assert llama.text("Hello", max_tokens=3) == "\n\ufffd the"
