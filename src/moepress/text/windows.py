"""Text becomes token sequences: what calibration and evaluation read.

A source is named by a string:

    notes.txt, src/main.py     any file of UTF-8 text
    chats.jsonl                one object a line: "text", or "messages" for the chat template
    corpus/                    every text file below a folder, by path; hidden ones left out
    c4, wikitext2, math        data sets, through the optional `datasets` library and the network
    stdlib                     source and reference of the Python that runs this: always there
    self                       what the model itself writes: for users with no data and no network

A name wins over a path: a folder called `math` is written `./math`.

A source is a list of documents. Calibration must not tokenise a gigabyte to draw 64 sequences, so
documents are cut into parts at line ends, a seeded shuffle of the parts is tokenised until there is
twice what is asked, and the taken parts, in their order and joined by EOS where text is missing
between them, are the stream that random windows are cut from:

    documents   aaaaaaaaaaaa|bb|cccccc        parts   aaaa aaaa aaaa bb cccc cc
    stream      aaaa aaaa EOS bb EOS cccc     windows   [--]  [--] [--]

Every source has a random stream of its own, from the seed and its file name, so that adding another
source changes nothing in it. No special token is added but those EOS; one spelt out in the text is
read as such, which chat templates need.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.progress import Progress
from moepress.text.documents import SELF, STDLIB, Document, documents_of, not_text

# Bytes of a part for each token of a sequence: at about 4 bytes a token, a part makes 4 sequences.
PART_BYTES_PER_TOKEN = 16
EVALUATION_PART = 1 << 20  # bytes; evaluation reads on and on, so parts are as large as is handy
BATCH_BYTES = 1 << 18  # of text given to the tokenizer at once
SURPLUS = 2  # tokens in the stream per token drawn, so that windows fall at random
SELF_BATCH = 64  # sequences that the model writes side by side
SELF_GREEDY = 4  # tokens after the first one that are the most likely ones

_WEIGHTED = re.compile(r"(.*)=([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class Tokens:
    """Token sequences, none of them padded."""

    ids: Tensor  # [S, length] int64
    sources: tuple[str, ...]  # [S] the source of each sequence


def parse_source(text: str) -> tuple[str, float]:
    """Source and weight of "PATH=WEIGHT"; without a weight it is 1.

    Only a number after the last "=" is a weight: `a=b.txt` is a path, and so is `run=3` if it is
    written `run=3=1`.

    Raises:
        InputError: the source is empty, or the weight is not above 0.
    """
    match = _WEIGHTED.fullmatch(text)
    source, weight = (match[1], float(match[2])) if match else (text, 1.0)
    if not source or not 0 < weight < math.inf:
        raise InputError(
            f"Text source {text!r}: expected PATH or PATH=WEIGHT, with a weight above 0."
        )
    return source, weight


def load_tokens(
    sources: Sequence[tuple[str, float]],
    tokenizer: Any,
    sequences: int,
    length: int,
    seed: int,
    *,
    model: Callable[[], Any] | None = None,
) -> Tokens:
    """Sequences for calibration, drawn at random and divided over sources by weight.

    Args:
        sources: (source, weight) pairs.
        tokenizer: the model's, of transformers.
        sequences, length: how many, of how many tokens each.
        seed: same seed, same sequences.
        model: gives the model for the source "self": a causal LM of transformers, or anything with
            its `generate` and `device`. None: it does not fit in memory.

    Raises:
        InputError: a source cannot be read or is too short, or there are more sources than
            sequences.
    """
    _check_request(sources, length)
    shares = divide(sequences, [weight for _, weight in sources])
    drawn = []
    for (source, _), share in zip(sources, shares, strict=True):
        # The name alone, so that the same file elsewhere gives the same sequences.
        rng = random.Random(f"{seed}:{Path(source).name}")
        if source == SELF:
            drawn.append(_own_samples(model, tokenizer, share, length, rng))
        else:
            drawn.append(_random_windows(source, tokenizer, share, length, rng))
    names = [source for source, _ in sources]
    return Tokens(
        torch.cat(drawn),
        tuple(name for name, share in zip(names, shares, strict=True) for _ in range(share)),
    )


def evaluation_tokens(
    sources: Sequence[tuple[str, float]], tokenizer: Any, length: int, limit: int | None
) -> Tokens:
    """Consecutive, non-overlapping windows from the start of each source; weights are ignored.

    Data sets and `stdlib` give their held-out part. The last tokens that fill no window are left
    out.

    Args:
        limit: windows per source at most; None: the whole text.

    Raises:
        InputError: a source cannot be read or is shorter than a window.
    """
    _check_request(sources, length)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}. Expected at least 1 window, or none for no limit.")
    windows = []
    for source, _ in sources:
        if source == SELF:
            raise InputError("'self' is for calibration only. Evaluate on a file or another text.")
        documents = documents_of(source, tokenizer, "valid")
        enough = math.inf if limit is None else limit * length
        order = range(sum(_part_counts(documents, EVALUATION_PART)))
        stream = _stream(documents, order, EVALUATION_PART, tokenizer, enough)
        count = min(len(stream) // length, math.inf if limit is None else limit)
        if not count:
            raise InputError(
                f"Evaluation text {source} has {len(stream):,} tokens; one window needs "
                f"{length:,}. Add text or lower --length."
            )
        windows.append(stream[: int(count) * length].view(-1, length))
    return Tokens(
        torch.cat(windows),
        tuple(source for (source, _), own in zip(sources, windows, strict=True) for _ in own),
    )


def check_vocab(tokens: Tokens, vocab_size: int) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        InputError: an id lies outside 0 .. vocab_size - 1.
    """
    outside = (tokens.ids < 0) | (tokens.ids >= vocab_size)
    if outside.any():
        row = int(outside.any(dim=1).nonzero()[0])
        raise InputError(
            f"Text {tokens.sources[row]} gives token {int(tokens.ids[outside][0])}, but the model "
            f"knows {vocab_size:,} tokens. The tokenizer is not this model's: use its own."
        )


def divide(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole shares by weight (largest remainder), each at least 1.

    Raises:
        InputError: there are more shares than there is to share.
    """
    if total < len(weights):
        raise InputError(
            f"{len(weights)} texts share {total} sequences. Expected at least one for each: raise "
            "--sequences or give fewer texts."
        )
    quotas = [total * weight / sum(weights) for weight in weights]
    shares = [max(1, math.floor(quota)) for quota in quotas]
    while sum(shares) != total:
        step = 1 if sum(shares) < total else -1
        able = [i for i, share in enumerate(shares) if share + step >= 1]
        shares[max(able, key=lambda i: step * (quotas[i] - shares[i]))] += step
    return shares


def _check_request(sources: Sequence[tuple[str, float]], length: int) -> None:
    names = [source for source, _ in sources]
    if not names:
        raise InputError("No text is given. Expected at least one source.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"Text {twice[0]} is given twice. Give it once, with a larger weight.")
    for name, weight in sources:
        if not 0 < weight < math.inf:
            raise InputError(f"Text {name} has weight {weight}. Expected a number above 0.")
    if length < 2:
        raise InputError(f"Sequences of {length} tokens leave nothing to predict. Use at least 2.")


# From documents to tokens.


def _random_windows(
    source: str, tokenizer: Any, count: int, length: int, rng: random.Random
) -> Tensor:
    """[count, length] int64, windows that do not overlap, in the order of the text."""
    documents = documents_of(source, tokenizer, "calib")
    part_bytes = PART_BYTES_PER_TOKEN * length
    order = list(range(sum(_part_counts(documents, part_bytes))))
    rng.shuffle(order)
    needed = count * length
    stream = _stream(documents, order, part_bytes, tokenizer, SURPLUS * needed)
    slack = len(stream) - needed
    if slack < 0:
        raise InputError(
            f"Calibration text {source} has {len(stream):,} tokens; {count} sequences of {length} "
            f"need {needed:,}. Add text or lower --sequences/--sequence-length."
        )
    gaps = sorted(rng.randint(0, slack) for _ in range(count))
    starts = [gap + i * length for i, gap in enumerate(gaps)]
    return torch.stack([stream[start : start + length] for start in starts])


def _stream(
    documents: Sequence[Document],
    order: Iterable[int],
    part_bytes: int,
    tokenizer: Any,
    enough: float,
) -> Tensor:
    """Tokens [T] int64 of parts taken in `order` until there are `enough`, in the text's order."""
    ends = list(accumulate(_part_counts(documents, part_bytes)))
    taken: dict[int, list[int]] = {}
    count = 0
    rest = iter(order)  # below, a batch is sorted to read the parts of a document together
    while count < enough and (batch := sorted(islice(rest, max(1, BATCH_BYTES // part_bytes)))):
        texts = []
        for index in batch:
            which = bisect_right(ends, index)
            first = ends[which - 1] if which else 0
            texts.append(_part(documents[which], index - first, ends[which] - first, part_bytes))
        for index, ids in zip(batch, _encode(tokenizer, texts), strict=True):
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


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # verbose=False: a text longer than the model's window is cut here, and needs no warning.
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _part_counts(documents: Sequence[Document], part_bytes: int) -> list[int]:
    return [max(1, math.ceil(document.size / part_bytes)) for document in documents]


def _part(document: Document, index: int, count: int, part_bytes: int) -> str:
    """The text of part `index` of `count`."""
    start = _cut(document, index * part_bytes, part_bytes)
    stop = None if index == count - 1 else _cut(document, (index + 1) * part_bytes, part_bytes)
    raw = document.read(start, stop)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_text(document.name, start + error.start) from error
    if "\0" in text:
        raise not_text(document.name, start + raw.index(b"\0"))
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _cut(document: Document, at: int, reach: int) -> int:
    """Where the text may be cut at or after byte `at`: after a line's end, else a character's."""
    if at == 0:
        return 0
    ahead = document.read(at, at + reach)
    line_end = ahead.find(b"\n")
    if line_end >= 0:
        return at + line_end + 1
    return at + sum(1 for _ in takewhile(lambda byte: byte & 0xC0 == 0x80, ahead))


# The model's own samples.


def _own_samples(
    model: Callable[[], Any] | None, tokenizer: Any, count: int, length: int, rng: random.Random
) -> Tensor:
    """[count, length] int64 that the model writes, on from a random token each.

    As in LLM-QAT (arXiv:2305.17888): the first token is random, the next few are the most likely
    ones, so that they become a plausible beginning, and the rest are sampled at temperature 1. EOS
    does not end a sequence; what follows it is the next document, as in the other sources.
    """
    if model is None:
        raise InputError(
            "'self' has the model write its calibration text, so the original model must fit in "
            f"memory, and it does not. Give a text file or '{STDLIB}'."
        )
    special = set(tokenizer.all_special_ids)
    plain = sorted(set(tokenizer.get_vocab().values()) - special)
    bos = tokenizer.bos_token_id
    begin = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    starts = torch.tensor([[*begin, token] for token in rng.choices(plain, k=count)])
    seed = rng.getrandbits(63)
    writer = model()
    device = torch.device(writer.device)
    accelerators = [device] if device.type != "cpu" else []
    batches = torch.split(starts[:, :length], SELF_BATCH)
    written = []
    with (
        Progress("sample", total=len(batches)) as progress,
        torch.random.fork_rng(accelerators, device_type=device.type),
        torch.inference_mode(),
    ):
        torch.manual_seed(seed)
        for ids in batches:
            greedy = min(SELF_GREEDY, length - ids.shape[1])
            ids = _continued(writer, ids.to(device), greedy, sample=False)
            ids = _continued(writer, ids, length - ids.shape[1], sample=True)
            written.append(ids.cpu())
            progress.advance()
    return torch.cat(written)


def _continued(model: Any, ids: Tensor, count: int, *, sample: bool) -> Tensor:
    """Sequences [b, t] with `count` more tokens each.

    The model's own temperature, top-k, top-p, repetition penalty and EOS are set aside.
    """
    if count == 0:
        return ids
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    out: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=sample,
        repetition_penalty=1.0,
        eos_token_id=None,
        pad_token_id=None,
        **sampling,
    )
    return out
