"""Text becomes token sequences, for calibration and for evaluation.

A text is named by a string:

    notes.txt, src/main.py     any file of UTF-8 text
    chats.jsonl, chats.ndjson  one object a line: "text", or "messages" for the chat template
    chats.json                 an array of such objects
    corpus/                    every text file below a folder, by path; hidden files are left out
    c4, wikitext2, math        data sets, through the optional `datasets` library and the network
    stdlib                     library and reference of the running Python: always available
    self                       what the model itself writes: for users with no data and no network

A name wins over a path: a folder called `math` is written `./math`.

A text is a list of documents. Calibration must not tokenise a gigabyte to draw 64 sequences. It
cuts the documents into chunks, tokenises them in a random order until there are twice as many
tokens as asked for, puts these chunks into the order of the text (stream.py), and cuts windows at
random places of that stream:

    stream      aaaa aaaa EOS bb EOS cccc     windows   [--]  [--] [--]

A sequence is a window behind the special tokens that the model's tokenizer begins a text with
(beginning.py). Every text has a random generator of its own, seeded with the seed and the text's
file name, so that adding another text changes nothing in it. A special token spelt out in the text
is read as one, which chat templates need.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.generation import context_of
from moepress.text.beginning import beginning, begun
from moepress.text.documents import documents_of
from moepress.text.named import SELF
from moepress.text.samples import own_samples
from moepress.text.stream import chunk_count, token_stream

# Bytes of a chunk per token of a sequence: at about 4 bytes a token, a chunk makes 4 sequences.
CHUNK_BYTES_PER_TOKEN = 16
EVALUATION_CHUNK = 1 << 20  # bytes; evaluation reads in order: large chunks are few reads
SURPLUS = 2  # tokens in the stream per token drawn, so that windows lie at random places

_WEIGHTED = re.compile(r"(.*)=([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class Tokens:
    """Token sequences of equal length, without padding."""

    ids: Tensor  # [S, length] int64
    texts: tuple[str, ...]  # [S] the text that each sequence comes from
    special: int = 0  # special tokens that each sequence begins with

    def scored(self, values: Tensor) -> Tensor:
        """Of [S, length - 1] values of predicted tokens, those of text after text.

        A special token is nothing to predict, and the first token after it stands in mid-text.
        """
        return values[:, self.special :]


def parse_text(given: str) -> tuple[str, float]:
    """Text and weight of "PATH" or "PATH=WEIGHT"; without a weight it is 1.

    Only a number after the last "=" is a weight: `a=b.txt` is a path, and so is `run=3` if it is
    written `run=3=1`.

    Raises:
        InputError: the path is empty, or the weight is not above 0.
    """
    match = _WEIGHTED.fullmatch(given)
    text, weight = (match[1], float(match[2])) if match else (given, 1.0)
    if not text or not 0 < weight < math.inf:
        raise InputError(f"Text {given!r}: expected PATH or PATH=WEIGHT, with a weight above 0.")
    return text, weight


def load_tokens(
    texts: Sequence[tuple[str, float]],
    tokenizer: Any,
    sequences: int,
    length: int,
    seed: int,
    *,
    model: Callable[[], Any] | None = None,
) -> Tokens:
    """Draw sequences for calibration at random, divided over the texts by weight.

    Args:
        texts: (text, weight) pairs.
        tokenizer: the model's, of transformers.
        sequences, length: how many sequences, of how many tokens each.
        seed: same seed, same sequences.
        model: returns the model for the text "self": a causal LM of transformers, or anything with
            its `generate` and `device`. None: it does not fit in memory.

    Raises:
        InputError: a text cannot be read or is too short, or there are more texts than sequences.
    """
    _check_request(texts)
    shares = divide(sequences, [weight for _, weight in texts])
    drawn = []
    for (text, _), share in zip(texts, shares, strict=True):
        # The file name alone, so that the same file elsewhere gives the same sequences.
        rng = random.Random(f"{seed}:{Path(text).name}")
        if text == SELF:
            drawn.append(own_samples(model, tokenizer, share, length, rng))
        else:
            drawn.append(_random_windows(text, tokenizer, share, length, rng))
    names = [text for text, _ in texts]
    return Tokens(
        torch.cat(drawn),
        tuple(name for name, share in zip(names, shares, strict=True) for _ in range(share)),
    )


def evaluation_tokens(
    texts: Sequence[tuple[str, float]], tokenizer: Any, length: int, limit: int | None
) -> Tokens:
    """Consecutive windows from the start of each text, which do not overlap; weights are ignored.

    Data sets and `stdlib` give their held-out split. The last tokens of a text that fill no window
    are left out.

    Args:
        limit: windows per text at most; None: the whole text.

    Raises:
        InputError: a text cannot be read or is shorter than a window.
    """
    _check_request(texts)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}. Expected at least 1 window, or none for no limit.")
    begin = beginning(tokenizer)
    step = _step(length, begin)
    windows = []
    for text, _ in texts:
        if text == SELF:
            raise InputError("'self' is for calibration only. Evaluate on a file or another text.")
        documents = documents_of(text, tokenizer, "valid")
        enough = math.inf if limit is None else limit * step + len(begin)
        order = range(chunk_count(documents, EVALUATION_CHUNK))
        stream = token_stream(documents, order, EVALUATION_CHUNK, tokenizer, enough)
        fit = (len(stream) - len(begin)) // step
        count = fit if limit is None else min(fit, limit)
        if count < 1:
            raise InputError(
                f"Evaluation text {text} has {len(stream):,} tokens; one window needs "
                f"{length:,}. Add text or lower --length."
            )
        starts = range(0, count * step, step)
        windows.append(torch.stack([begun(stream, start, length, begin) for start in starts]))
    return Tokens(
        torch.cat(windows),
        tuple(text for (text, _), own in zip(texts, windows, strict=True) for _ in own),
        len(begin),
    )


def check_context(length: int, config: Any, option: str) -> None:
    """Refuse sequences that are longer than what the model reads.

    Beyond that most models predict noise: costs and perplexities of it would look like figures.

    Args:
        config: of the language model.
        option: that says the length, for the message.

    Raises:
        InputError: they are.
    """
    reads = context_of(config)
    if reads is not None and length > reads:
        raise InputError(
            f"Sequences have {length:,} tokens, and the model reads {reads:,} "
            f"(max_position_embeddings). Expected at most that: lower {option}."
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
            f"Text {tokens.texts[row]} gives token {int(tokens.ids[outside][0])}, but the model "
            f"knows {vocab_size:,} tokens. The tokenizer is not this model's: use its own."
        )


def divide(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` into whole shares by weight (largest remainder), each at least 1.

    Raises:
        InputError: `total` is smaller than the number of shares, or the weights add up to
            infinity.
    """
    if total < len(weights):
        raise InputError(
            f"{len(weights)} texts share {total} sequences. Expected at least one for each: raise "
            "--sequences or give fewer texts."
        )
    if not math.isfinite(total * sum(weights)):
        raise InputError(
            f"The weights of the texts, {', '.join(f'{weight:g}' for weight in weights)}, are too "
            "large to be added. Expected smaller ones: only their ratios matter."
        )
    quotas = [total * weight / sum(weights) for weight in weights]
    shares = [max(1, math.floor(quota)) for quota in quotas]
    while sum(shares) != total:
        step = 1 if sum(shares) < total else -1
        able = [i for i, share in enumerate(shares) if share + step >= 1]
        shares[max(able, key=lambda i: step * (quotas[i] - shares[i]))] += step
    return shares


def _check_request(texts: Sequence[tuple[str, float]]) -> None:
    names = [text for text, _ in texts]
    if not names:
        raise InputError("No text is given. Expected at least one.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"Text {twice[0]} is given twice. Give it once.")
    for name, weight in texts:
        if not name:
            raise InputError("The name of a text is empty. Give a file or another text.")
        if not 0 < weight < math.inf:
            raise InputError(f"Text {name} has weight {weight}. Expected a number above 0.")


def _random_windows(
    text: str, tokenizer: Any, count: int, length: int, rng: random.Random
) -> Tensor:
    """Windows [count, length] int64 that do not overlap, in the order of the text."""
    documents = documents_of(text, tokenizer, "calib")
    begin = beginning(tokenizer)
    step = _step(length, begin)
    chunk_bytes = CHUNK_BYTES_PER_TOKEN * length
    order = list(range(chunk_count(documents, chunk_bytes)))
    rng.shuffle(order)
    needed = count * step + len(begin)
    stream = token_stream(documents, order, chunk_bytes, tokenizer, SURPLUS * needed)
    slack = len(stream) - needed
    if slack < 0:
        raise InputError(
            f"Calibration text {text} has {len(stream):,} tokens; {count} sequences of {length} "
            f"need {needed:,}. Add text or lower --sequences/--sequence-length."
        )
    # Sorted offsets into the slack keep the windows in order and apart.
    gaps = sorted(rng.randint(0, slack) for _ in range(count))
    starts = [gap + i * step for i, gap in enumerate(gaps)]
    return torch.stack([begun(stream, start, length, begin) for start in starts])


def _step(length: int, begin: Tensor) -> int:
    """Tokens of a sequence that are of the text.

    Raises:
        InputError: they leave nothing to predict.
    """
    step = length - len(begin)
    if step < 2:
        special = f", {len(begin)} of which are special tokens," if len(begin) else ""
        raise InputError(
            f"Sequences of {length} tokens{special} leave nothing to predict. Use at least "
            f"{len(begin) + 2}."
        )
    return step
