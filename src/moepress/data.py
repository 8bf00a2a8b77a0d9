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

import json
import math
import random
import re
from bisect import bisect_right
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from moepress.errors import InputError
from moepress.progress import Progress

Split = Literal["calib", "valid"]

SELF, STDLIB = "self", "stdlib"
# Bytes of a part for each token of a sequence: at about 4 bytes a token, a part makes 4 sequences.
PART_BYTES_PER_TOKEN = 16
EVALUATION_PART = 1 << 20  # bytes; evaluation reads on and on, so parts are as large as is handy
BATCH_BYTES = 1 << 18  # of text given to the tokenizer at once
SURPLUS = 2  # tokens in the stream per token drawn, so that windows fall at random
SELF_BATCH = 64  # sequences that the model writes side by side
SELF_GREEDY = 4  # tokens after the first one that are the most likely ones
C4_DOCUMENTS = 10_000  # about 5 million tokens, the first 20 MB of its first file
MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra",
    "number_theory", "prealgebra", "precalculus",
)  # fmt: skip

_WEIGHTED = re.compile(r"(.*)=([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class Tokens:
    """Token sequences, none of them padded."""

    ids: Tensor  # [S, length] int64
    sources: tuple[str, ...]  # [S] the source of each sequence


@dataclass(frozen=True)
class Document:
    """A text that is read in parts."""

    name: str  # for messages
    size: int  # bytes: of a file exactly, of a line of JSON with its quoting
    read: Callable[[int, int | None], bytes]  # UTF-8 from a byte to another; None: to the end


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
        documents = _documents(source, tokenizer, "valid")
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
    documents = _documents(source, tokenizer, "calib")
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
        raise _not_text(document.name, start + error.start) from error
    if "\0" in text:
        raise _not_text(document.name, start + raw.index(b"\0"))
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _not_text(name: str, byte: int) -> InputError:
    return InputError(
        f"{name} is not UTF-8 text: see byte {byte:,}. Expected a text file, a .jsonl file or a "
        "folder of them."
    )


def _cut(document: Document, at: int, reach: int) -> int:
    """Where the text may be cut at or after byte `at`: after a line's end, else a character's."""
    if at == 0:
        return 0
    ahead = document.read(at, at + reach)
    line_end = ahead.find(b"\n")
    if line_end >= 0:
        return at + line_end + 1
    return at + sum(1 for _ in takewhile(lambda byte: byte & 0xC0 == 0x80, ahead))


# From sources to documents.


def _documents(source: str, tokenizer: Any, split: Split) -> list[Document]:
    """The documents of a source other than "self"."""
    if source in DATA_SETS:
        return [_of_text(source, text) for text in _fetch(source, split)]
    if source == STDLIB:
        from moepress.demo.corpus import corpus

        return [_of_text(f"stdlib {document.name}", document.text) for document in corpus(split)]
    path = Path(source)
    if path.is_dir():
        files = [file for file in _visible_files(path) if _looks_like_text(file)]
        documents = [document for file in files for document in _of_file(file, tokenizer)]
    elif path.is_file():
        documents = _of_file(path, tokenizer)
    else:
        raise InputError(
            f"No text '{source}'. Expected a file, a folder, or one of "
            f"{', '.join((*DATA_SETS, STDLIB, SELF))}."
        )
    if not any(document.size for document in documents):
        what = "no text files" if path.is_dir() else "no text: it is empty"
        raise InputError(f"{source} holds {what}. Expected UTF-8 text or .jsonl.")
    return documents


def _visible_files(folder: Path) -> list[Path]:
    inside = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    shown = [p for p in inside if not any(part.startswith(".") for part in p.parts)]
    return [inside[p] for p in sorted(shown, key=Path.as_posix)]


def _looks_like_text(path: Path) -> bool:
    """Whether a file of a folder begins as text does; images and the like are not for us."""
    with _opened(path) as file:
        head = file.read(8192)
    try:
        getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _of_file(path: Path, tokenizer: Any) -> list[Document]:
    if path.suffix != ".jsonl":
        return [Document(str(path), path.stat().st_size, partial(_read_file, path))]
    documents = []
    offset = 0
    # Parts of a long line are asked for one after the other: it is parsed once for all of them.
    text = lru_cache(maxsize=1)(partial(_line_text, path, tokenizer))
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                read = partial(_read_line, text, (number, offset, len(line)))
                documents.append(Document(f"{path}, line {number}", len(line), read))
            offset += len(line)
    return documents


def _of_text(name: str, text: str) -> Document:
    raw = text.encode()
    return Document(name, len(raw), lambda start, stop: raw[start:stop])


def _read_file(path: Path, start: int, stop: int | None) -> bytes:
    with _opened(path) as file:
        file.seek(start)
        return file.read(-1 if stop is None else stop - start)


def _read_line(
    text: Callable[..., bytes], place: tuple[int, int, int], start: int, stop: int | None
) -> bytes:
    return text(*place)[start:stop]


def _line_text(path: Path, tokenizer: Any, number: int, offset: int, size: int) -> bytes:
    """The text, in UTF-8, that a line of a .jsonl file stands for."""
    name = f"{path}, line {number},"
    try:
        fields = json.loads(_read_file(path, offset, offset + size))
    except ValueError as error:  # UnicodeDecodeError is one
        raise InputError(f"{name} is not JSON: {error}. Expected one object a line.") from error
    return _text_of(fields, name, tokenizer).encode(errors="replace")


def _text_of(fields: object, name: str, tokenizer: Any) -> str:
    """The "text" of an object, or its "messages" as the model's chat template writes them."""
    if isinstance(fields, dict) and isinstance(fields.get("text"), str):
        return str(fields["text"])
    if not isinstance(fields, dict) or not isinstance(fields.get("messages"), list):
        found = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
        raise InputError(
            f'{name} has {found}. Expected an object with "text" (a string) or "messages" (a list).'
        )
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f'{name} has "messages", but the tokenizer has no chat template to write them with. '
            'Give their text as "text".'
        )
    try:
        return str(tokenizer.apply_chat_template(fields["messages"], tokenize=False))
    except Exception as error:  # templates are programs, and fail as they please
        raise InputError(
            f"{name} does not fit the tokenizer's chat template: {error}. Expected messages with "
            '"role" and "content".'
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(
            f"Cannot read {path}: {error.strerror}. Expected a file that can be read."
        ) from error


# Data sets, with the configurations usual for GPTQ.


def _fetch(name: str, split: Split) -> list[str]:
    """The documents of a data set."""
    otherwise = f"Give a text file instead, or '{STDLIB}', or '{SELF}' (the model's own samples)."
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"Data set '{name}' needs the datasets library, which is not installed: "
            f"pip install 'moepress[datasets]'. {otherwise}"
        ) from error
    try:
        return DATA_SETS[name](load_dataset, split)
    except Exception as error:  # the library, the network and file systems each raise their own
        raise InputError(
            f"Data set '{name}' cannot be loaded, {type(error).__name__}: {error}. It needs the "
            f"network. {otherwise}"
        ) from error


def _c4(load: Callable[..., Any], split: Split) -> list[str]:
    file, part = {
        "calib": ("en/c4-train.00000-of-01024.json.gz", "train"),
        "valid": ("en/c4-validation.00000-of-00008.json.gz", "validation"),
    }[split]
    rows = load("allenai/c4", data_files={part: file}, split=part, streaming=True)
    return [row["text"] for row in islice(rows, C4_DOCUMENTS)]


def _wikitext2(load: Callable[..., Any], split: Split) -> list[str]:
    """One document: rows are lines, joined by blank ones as in GPTQ's code."""
    part = {"calib": "train", "valid": "test"}[split]
    rows = load("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
    return ["\n\n".join(row["text"] for row in rows)]


def _math(load: Callable[..., Any], split: Split) -> list[str]:
    """MATH (arXiv:2103.03874), each problem with its solution."""
    part = {"calib": "train", "valid": "test"}[split]
    return [
        f"{row['problem']}\n\n{row['solution']}"
        for subject in MATH_SUBJECTS
        for row in load("EleutherAI/hendrycks_math", subject, split=part)
    ]


DATA_SETS: dict[str, Callable[[Callable[..., Any], Split], list[str]]] = {
    "c4": _c4,
    "wikitext2": _wikitext2,
    "math": _math,
}


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
