"""Tokenizers in the manner of SentencePiece: a space belongs to the word behind it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moepress.pieces import UNKNOWN
from moepress.serve.limits import Limits
from moepress.serve.names import Names, places
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


def test_names(tokenizer_folder: Path) -> None:
    names = Names(TOKENIZER)
    found = [names.text(token) for token in ids("\u2581the", "the", "\u2581", "</s>", "<0x0A>")]
    assert found == [" the", "the", " ", "</s>", "\n"]
    (part,) = ids("<0xF0>")
    assert names.raw(part) == b"\xf0" and names.text(part) == "bytes:\\xf0"
    assert names.text(len(TOKENIZER)) == ""  # the model's table is longer
    assert names.special(1) and not names.special(part)
    assert names(part) == ("bytes:\\xf0", [0xF0]) and names(part) is names(part)

    of_bytes = AutoTokenizer.from_pretrained(tokenizer_folder)
    names = Names(of_bytes)
    text = "h\u00e9 \u2192 def f(x)\n\t\U0001f600"
    tokens = of_bytes(text, add_special_tokens=False).input_ids
    assert b"".join(map(names.raw, tokens)).decode() == text
    whole = [names.raw(token) for token in range(len(of_bytes))]
    assert len(set(whole)) == len(whole)  # nothing has another's name


class Words:
    """A tokenizer whose vocabulary says nothing about spaces and bytes."""

    all_special_ids = (0,)

    def get_vocab(self) -> dict[str, int]:
        return {"<s>": 0, "a": 1}

    def convert_ids_to_tokens(self, token: int) -> str:
        return ["<s>", "a"][token]

    def decode(self, tokens: list[int]) -> str:
        return "".join(f"{self.convert_ids_to_tokens(token)}." for token in tokens)


def test_names_of_another_vocabulary() -> None:
    names = Names(Words())
    assert [names.text(token) for token in (1, 2)] == ["a.", ""]


def test_places_in_a_prompt() -> None:
    def found(text: str, *tokens: str) -> list[int]:
        return places(Names(TOKENIZER), ids(*tokens), text)

    hello = ("<s>", "\u2581Hello", "\u2581the", "<0xC3>", "<0xA9>", "x")
    assert found("Hello the\u00e9x", *hello) == [0, 0, 5, 9, 9, 10]
    assert found("<s> Hello the\u00e9x", *hello) == [0, 3, 9, 13, 13, 14]
    assert found("HELLO x", "Hello", "\u2581", "x") == [0, 5, 6]  # as it was normalised


SOME = ("\u2581the", "the", "\u2581world", "\u2581", "x", "<0xC3>", "<0xA9>", "<0x0A>")
BIAS = {str(token): 100 for token in ids(*SOME)}


def test_logprobs_are_of_the_text(llama: Here) -> None:
    asked: dict[str, Any] = {"logit_bias": BIAS, "temperature": 9.0, "max_tokens": 24}
    asked |= {"prompt": "Hello", "logprobs": 3}
    for seed in range(4):
        choice = llama.complete(seed=seed, **asked)["choices"][0]
        found, text = choice["logprobs"], choice["text"]
        assert len(found["tokens"]) == 24 and found["text_offset"][0] == 0
        for at, token in zip(found["text_offset"], found["tokens"], strict=True):
            if not text.startswith("\ufffd", at):  # with what is behind it, one piece
                assert text.startswith("\u00e9" if "bytes:" in token else token, at)
        assert all(len(top) == 3 for top in found["top_logprobs"])
        parts = [part["logprobs"] for part in stream(llama, seed=seed, **asked)]
        for name, values in found.items():
            assert [x for part in parts if part for x in part[name]] == values
        echoed = llama.complete(seed=seed, echo=True, **asked)["choices"][0]
        offsets = echoed["logprobs"]["text_offset"]
        assert echoed["text"] == "Hello" + text and echoed["logprobs"]["tokens"][0] == "<s>"
        assert offsets == [0, 0, *(5 + at for at in found["text_offset"])]


def test_logprobs_leave_out_what_the_text_does(llama: Here) -> None:
    """The token that ends an answer, and a stop sequence."""
    answer = llama.complete("Hello", logprobs=1, logit_bias=always("</s>"))
    (ended,) = answer["choices"]
    assert ended["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 1
    assert ended["logprobs"]["tokens"] == ended["logprobs"]["text_offset"] == []
    chat = llama.chat(logprobs=True, logit_bias=always("</s>"))["choices"][0]
    assert chat["logprobs"]["content"] == []
    asked: dict[str, Any] = {"prompt": "Hello", "logprobs": 0, "max_tokens": 9}
    asked["logit_bias"] = always("\u2581world")
    for stop, text, tokens in ((" world", "", 0), ("d wor", " worl", 1), ("d world", " worl", 1),
                               (" world world world!", " world" * 9, 9)):  # fmt: skip
        choice = llama.complete(stop=stop, **asked)["choices"][0]
        assert choice["text"] == text and choice["logprobs"]["tokens"] == [" world"] * tokens
        parts = stream(llama, stop=stop, **asked)
        assert sum(len(part["logprobs"]["tokens"]) for part in parts if part["logprobs"]) == tokens
        assert "".join(part["text"] for part in parts) == text
