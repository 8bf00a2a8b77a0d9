"""Chunks make up the text, and EOS stands where text is missing between them."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.text import documents, stream
from tests.text.conftest import Characters


@given(st.text(alphabet="aé漢🙂\n", max_size=200), st.integers(4, 40))
def test_chunks_make_up_the_text(text: str, chunk_bytes: int) -> None:
    document = documents._of_string("text", text)
    (count,) = stream._chunk_counts([document], chunk_bytes)
    chunks = [stream._chunk(document, i, count, chunk_bytes) for i in range(count)]
    assert "".join(chunks) == text


@given(st.lists(st.text(alphabet="ab\n", max_size=40), min_size=1, max_size=6), st.data())
def test_stream_puts_eos_where_text_is_missing(texts: list[str], draw: st.DataObject) -> None:
    """Against a plain implementation, with a tokenizer of one token per character."""

    chunk_bytes = 8
    given_documents = [documents._of_string("text", text) for text in texts]
    counts = stream._chunk_counts(given_documents, chunk_bytes)
    total = sum(counts)
    order = draw.draw(st.permutations(range(total)))[: draw.draw(st.integers(0, total))]
    found = stream.token_stream(given_documents, order, chunk_bytes, Characters(), math.inf)

    expected: list[int] = []
    last: tuple[int, int] | None = None  # document and chunk at the end of the stream
    index = 0
    for which, count in enumerate(counts):
        for chunk in range(count):
            if index in order:
                piece = stream._chunk(given_documents[which], chunk, count, chunk_bytes)
                if piece:
                    follows = last == (which, chunk - 1)
                    expected += [] if follows or not expected else [0]
                    expected += [ord(c) for c in piece]
                    last = (which, chunk)
                elif last == (which, chunk - 1):
                    last = (which, chunk)
            index += 1
    assert found.tolist() == expected
    assert found.dtype == torch.int64
