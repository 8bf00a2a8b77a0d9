"""From documents to one stream of tokens, a chunk of text at a time.

Documents are cut into chunks at line ends. The tokens of some chunks, in the order of the text,
are a stream. An EOS stands wherever text is missing between two chunks, or a document ends:

    documents   aaaaaaaaaaaa|bb|cccccc        chunks   aaaa aaaa aaaa bb cccc cc
    stream      aaaa aaaa EOS bb EOS cccc
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice, takewhile
from typing import Any

import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.text.documents import Document

BATCH_BYTES = 1 << 18  # of text given to the tokenizer at once
LOOKED_AT = 1 << 20  # bytes that are read at a time to count lines


def token_stream(
    documents: Sequence[Document],
    order: Iterable[int],
    chunk_bytes: int,
    tokenizer: Any,
    enough: float,
) -> Tensor:
    """Tokens [T] int64 of the first chunks in `order`, sorted into the order of the text.

    Args:
        order: indices of chunks, 0 .. `chunk_count` - 1.
        chunk_bytes: size of a chunk.
        enough: read no further batch of chunks once there are this many tokens.

    Raises:
        InputError: a chunk that is read is not UTF-8 text.
    """
    ends = list(accumulate(_chunk_counts(documents, chunk_bytes)))
    taken: dict[int, list[int]] = {}
    count = 0
    rest = iter(order)
    # A batch is sorted so that neighbouring chunks of a document are read one after the other.
    while count < enough and (batch := sorted(islice(rest, max(1, BATCH_BYTES // chunk_bytes)))):
        texts = []
        for index in batch:
            which = bisect_right(ends, index)
            first = ends[which - 1] if which else 0
            texts.append(_chunk(documents[which], index - first, ends[which] - first, chunk_bytes))
        for index, ids in zip(batch, encode(tokenizer, texts), strict=True):
            taken[index] = ids
            count += len(ids)
    begins = {0, *ends}
    eos = torch.tensor([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    pieces: list[Tensor] = []
    apart = False  # whether text is missing, or a document ends, since the last piece
    for index in sorted(taken):
        apart |= index in begins or index - 1 not in taken
        if taken[index]:
            pieces += [eos] if pieces and apart else []
            pieces.append(torch.tensor(taken[index]))
            apart = False
    return torch.cat([torch.empty(0, dtype=torch.int64), *(piece.long() for piece in pieces)])


def chunk_count(documents: Sequence[Document], chunk_bytes: int) -> int:
    """How many chunks the documents have together."""
    return sum(_chunk_counts(documents, chunk_bytes))


def _chunk_counts(documents: Sequence[Document], chunk_bytes: int) -> list[int]:
    return [max(1, math.ceil(document.size / chunk_bytes)) for document in documents]


def encode(tokenizer: Any, texts: list[str], special: bool = False) -> list[list[int]]:
    """Tokens of each text.

    Args:
        special: with the special tokens that the tokenizer puts around a text.

    Raises:
        InputError: the tokenizer fails.
    """
    # verbose=False: no warning about texts longer than the model's context; they are cut later.
    try:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)[
            "input_ids"
        ]
    except Exception as error:  # the tokenizer's library, or code of the model
        raise InputError(
            f"The model's tokenizer fails on the text with {type(error).__name__}: "
            f"{str(error)[:300]}. Its files are damaged, or of another model: fetch them again."
        ) from error
    return ids


def _chunk(document: Document, index: int, count: int, chunk_bytes: int) -> str:
    """The text of chunk `index` of the document's `count` chunks."""
    start = _cut(document, index * chunk_bytes, chunk_bytes)
    stop = None if index == count - 1 else _cut(document, (index + 1) * chunk_bytes, chunk_bytes)
    raw = document.read(start, stop)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(document, start + error.start) from error
    if "\0" in text:
        raise _not_text(document, start + raw.index(b"\0"))
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _cut(document: Document, at: int, reach: int) -> int:
    """The first place to cut the document at or after byte `at`.

    That is after the first line end within `reach` bytes, else at the next whole character.
    """
    if at == 0:
        return 0
    ahead = document.read(at, at + reach)
    line_end = ahead.find(b"\n")
    if line_end >= 0:
        return at + line_end + 1
    return at + sum(1 for _ in takewhile(lambda byte: byte & 0xC0 == 0x80, ahead))


def _not_text(document: Document, byte: int) -> InputError:
    """The error of a document that is no text at one byte."""
    line = 1
    for start in range(0, byte, LOOKED_AT):
        line += document.read(start, min(byte, start + LOOKED_AT)).count(b"\n")
    return InputError(
        f"{document.name} is not UTF-8 text: see byte {byte:,}, line {line:,}. Expected a text "
        "file in UTF-8, a .jsonl file or a folder of them: convert it, or leave it out."
    )
