"""Captured steps (moepress.hf.captured): refused where they must be, how fast, and the same tokens.

Without a card, `tests/hf/tape.py` takes the place of CUDA graphs.

How tiny models are judged: a captured step sees more positions than the plain one, behind a mask.
Where another kernel of PyTorch sums them in another order (DeepSeek's latent attention; the rest
takes moepress's kernel, which gives the same bits), outputs of attention differ by 1e-6. A
compressed model rounds activations: of 8 bits now and then one becomes the next code, and the
logits of that token and of those after it differ by up to .03 of their spread; of 16 bits codes are
256 times closer, and it is 3e-4. A layer that lost a single token of its cache makes .09 and more,
whatever the bits. So logits of 16 bits are compared for the same tokens (`forced`), and texts of 8
bits may go apart only where logits differ, and little.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moepress.compress import compress
from moepress.hf import captured, load_model
from moepress.hf.captured import CapturedSteps
from moepress.hf.captured_step import Capture
from moepress.hf.cuda_graph import _recorded, cuda_graph
from moepress.kernels.modules import set_activation_bits
from moepress.prune import prune
from on_gpu.card import Card
from on_gpu.case import Case, CheckError, Row
from on_gpu.families import is_here, tokenizer
from on_gpu.model import LAYERS, PROMPT, FusedDecoder, packed_model

FAMILIES = (  # with sliding windows, chunks, latent attention, states of linear attention
    "mixtral", "gpt_oss", "qwen3_next", "deepseek_v3", "gemma4_text", "qwen3_moe", "llama4_text",
)  # fmt: skip
TINY = ("mixtral", "qwen3_next")
MIX = "default 2.5 bits"
NEW = 64  # tokens whose time is measured
TEXTS = 3  # the median of which is reported
COMPARED = 40  # tokens of a tiny model
SAMPLED = 20  # of them where they are sampled, or the model is pruned
PRUNED = 0.2  # share of the choices of experts
FORCED = 2e-3  # of the spread: most that logits of 16-bit activations differ, for the same tokens
FLIPPED = 0.05  # the same with 8 bits, up to the place where texts go apart


def cases(card: Card) -> Iterator[Case]:
    yield Case("captures that fail", partial(check_failures, card), 60)
    yield Case("Mixtral-8x7B's shape", partial(speeds, card), 150)
    for family in TINY if card.tiny else FAMILIES:
        yield Case(family, partial(check_family, card, family), 120)


def capture_of(card: Card) -> Capture:
    if card.is_cuda:
        return cuda_graph
    from tests.hf.tape import tape  # on_gpu.families has made the tests importable

    return tape


def steps_of(card: Card, model: Any) -> CapturedSteps:
    return CapturedSteps(model, capture=capture_of(card), devices=(card.device.type,))


def written(model: Any, ids: Tensor, tokens: int, **options: Any) -> Tensor:
    """What `generate` gives: [1, prompt and new tokens] int64."""
    given = {"do_sample": False, "eos_token_id": None, **options}
    with torch.inference_mode():
        found: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **given
        )
    return found


@contextmanager
def distances() -> Iterator[list[float]]:
    """How far logits are from those of the plain way, wherever steps are compared meanwhile."""
    found: list[float] = []
    plain = captured.distance

    def kept(got: Tensor, expected: Tensor) -> float:
        found.append(plain(got, expected))
        return found[-1]

    with patch.object(captured, "distance", kept):
        yield found


# Captures that fail


def check_failures(card: Card) -> list[Row]:
    """Work that a graph cannot hold is refused, and the card goes on as before."""
    attempts: dict[str, Callable[[], object]] = {
        name: partial(capture_of(card), work, card.device) for name, work in failing(card).items()
    }
    if card.is_cuda:
        attempts["item, while it is captured"] = partial(capture_invalid, card)
    rows = [{"work": name, "refused": refusal(attempt)} for name, attempt in attempts.items()]
    accepted = [row["work"] for row in rows if not row["refused"]]
    if accepted:
        raise CheckError(f"not refused: {accepted}")
    check_usable(card)
    return rows


def failing(card: Card) -> dict[str, Callable[[], Tensor]]:
    """Work that waits for the card, or raises."""
    x = torch.ones(8, device=card.device)

    def raises() -> Tensor:
        raise ValueError

    works: dict[str, Callable[[], Tensor]] = {
        "item": lambda: x * x.sum().item(),
        "nonzero": lambda: x.nonzero(),
        "raises": raises,
    }
    if card.is_cuda:
        works["copy from the host"] = lambda: x + torch.ones(8).to(card.device)
    return works


def refusal(attempt: Callable[[], object]) -> str:
    """Name of the error that an attempt raises; empty: none."""
    try:
        attempt()
    except Exception as error:  # which one is torch's affair
        return type(error).__name__
    return ""


def capture_invalid(card: Card) -> None:
    """Wait for the card inside of a capture: CUDA itself ends it."""
    stream = torch.cuda.Stream(card.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        _recorded(failing(card)["item"], card.device)


def check_usable(card: Card) -> None:
    """Random numbers, memory that several streams use, and a capture that must work."""
    card.synchronize()
    card.release()
    torch.multinomial(torch.rand(10, device=card.device), 3)
    if card.is_cuda:
        shared = torch.zeros(1 << 20, device=card.device)
        other = torch.cuda.Stream(card.device)  # type: ignore[no-untyped-call]
        shared.record_stream(other)
        del shared
        card.synchronize()
        card.release()
        if torch.cuda.is_current_stream_capturing():
            raise CheckError("the stream is still being captured")
    x = torch.zeros(4, device=card.device)
    graph = capture_of(card)(lambda: x * 2, card.device)
    x.fill_(3)
    graph.replay()
    if graph.result.tolist() != [6.0] * 4:
        raise CheckError(f"a capture after those gives {graph.result.tolist()}, expected 6")


# Tokens per second


def speeds(card: Card) -> list[Row]:
    """Time of a token after the prompt's: as ever, captured, and by replays alone.

    `captured, first text` has the capture and the steps that are compared in it.
    """
    model = packed_model(card, MIX, 2 if card.tiny else LAYERS)
    ids = torch.arange(PROMPT, device=card.device)[None] + 3
    new = 8 if card.tiny else NEW
    steps = steps_of(card, model)
    texts: list[Tensor] = []

    def seconds(tokens: int) -> float:
        card.synchronize()
        started = time.perf_counter()
        texts.append(written(model, ids, tokens))
        card.synchronize()
        return time.perf_counter() - started

    def median(tokens: int) -> float:
        return statistics.median(seconds(tokens) for _ in range(TEXTS))

    seconds(3)  # loads kernels
    prompt = median(1)
    plain = median(new)
    expected = texts[-1]
    with distances() as far, steps:
        first = seconds(new)
        later = median(new)
    if steps.refused or not steps.replayed:
        raise CheckError(f"{steps.replayed} steps were replayed; refused: {steps.refused}")
    with torch.inference_mode():
        bare = FusedDecoder(card, model).seconds()
    whole = {"plain": plain, "captured, first text": first, "captured": later}
    each = {way: (total - prompt) / (new - 1) for way, total in whole.items()}
    rows: list[Row] = [
        {"way": way, "ms_per_token": 1e3 * one, "tokens_per_s": 1 / one}
        for way, one in (each | {"replays alone": bare}).items()
    ]
    same = int((texts[-1] == expected).sum()) - PROMPT
    return [*rows, {"prompt_ms": 1e3 * prompt, "new_tokens": new, "same_tokens": same,
                    "replayed": steps.replayed, "logits_differ": max(far)}]  # fmt: skip


# The same tokens


class Seen(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Keeps the logits [1, V] of every token of a text.

    Args:
        tokens: of another text, which are chosen here too; None: as `generate` chooses.
    """

    def __init__(self, tokens: Tensor | None = None) -> None:
        self.tokens = tokens
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.clone())
        if self.tokens is None:
            return scores
        chosen = torch.full_like(scores, torch.finfo(scores.dtype).min)
        chosen[:, self.tokens[len(self.logits) - 1]] = 0
        return chosen

    def differs(self, other: Seen, count: int | None = None) -> float:
        """How far the first `count` logits are from another's: the most for a token."""
        pairs = list(zip(self.logits, other.logits, strict=True))[:count]
        return max(captured.distance(one, another) for one, another in pairs)


def check_family(card: Card, family: str) -> list[Row]:
    """A tiny model in float32, and compressed: tokens of `generate` with and without steps.

    A model whose steps are refused must give the same tokens too; the row says why they were.
    """
    if not is_here(family):
        return [{"family": family, "refused": "not in this transformers"}]
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        for kind, folder in folders(card, family, Path(root)).items():
            model = load_model(folder, str(card.device))
            steps = steps_of(card, model)
            packed, apart = kind == "compressed", list[str]()
            with distances() as far:
                unequal = differing(card, model, steps, packed, apart)
            if packed:
                set_activation_bits(model, 16)
            forced = forced_differ(card, model, steps)
            wrong += [f"{kind}, {way}" for way in unequal]
            if not forced < FORCED:
                wrong.append(f"{kind}, logits of the same tokens, by {forced:.2g}")
            rows.append({
                "family": family, "model": kind, "replayed": steps.replayed,
                "logits_differ": max(far, default=0.0), "forced_differ": forced,
                "apart": "; ".join(apart), "refused": steps.refused or "",
            })  # fmt: skip
    if wrong:
        raise CheckError(f"tokens differ: {'; '.join(wrong)}: {rows}")
    return rows


def folders(card: Card, family: str, root: Path) -> dict[str, Path]:
    """A family's tiny model, and the same compressed on the card."""
    from tests.conftest import TEXT, small_recipe
    from tests.families.models import make_model, save_model

    text = root / "text.txt"
    text.write_text(TEXT)
    original = save_model(make_model(family), root / "original", tokenizer(root / "tokenizer"))
    recipe = small_recipe(text, bits=2, sequences=4)
    packed = compress(original, root / "compressed", recipe, device=str(card.device))
    return {"original": original, "compressed": packed}


def prompt_of(card: Card) -> Tensor:
    return ((torch.arange(12, device=card.device)[None] * 7) % 300) + 5


def forced_differ(card: Card, model: Any, steps: CapturedSteps) -> float:
    """How far logits are with captured steps, for the same tokens."""
    ids, plain = prompt_of(card), Seen()
    tokens = written(model, ids, COMPARED, logits_processor=[plain])[0, ids.shape[1] :]
    replayed = Seen(tokens)
    with steps:
        written(model, ids, COMPARED, logits_processor=[replayed])
    return replayed.differs(plain)


def differing(
    card: Card, model: Any, steps: CapturedSteps, pruned: bool, apart: list[str]
) -> list[str]:
    """Kinds of text whose tokens are not those that the model writes without captured steps.

    Args:
        pruned: whether one of them prunes.
        apart: gets those that may differ, in words.
    """
    ids = prompt_of(card)
    greedy = partial(written, model, ids, COMPARED)
    ways: dict[str, Callable[..., Tensor]] = {
        "greedy": greedy,
        "again": greedy,  # from the first step on with the graph of the text before
        "another text": partial(written, model, ids.flip(1)[:, :5], COMPARED),
        "sampled": partial(written, model, ids, SAMPLED, do_sample=True),
    }
    wrong = unequal(ways, steps, apart)
    if pruned:
        with prune(model, PRUNED):
            wrong += unequal({"pruned": partial(written, model, ids, SAMPLED)}, steps, apart)
    return wrong


def unequal(
    ways: dict[str, Callable[..., Tensor]], steps: CapturedSteps, apart: list[str]
) -> list[str]:
    """Names of the ways to write that give other tokens with captured steps, and should not."""
    wrong = []
    for name, write in ways.items():
        plain, replayed = Seen(), Seen()
        torch.manual_seed(1)
        expected = write(logits_processor=[plain])
        torch.manual_seed(1)
        with steps:
            found = write(logits_processor=[replayed])
        if torch.equal(found, expected):
            continue
        place = int((found != expected).flatten().nonzero()[0])
        count = place - (expected.shape[1] - len(plain.logits)) + 1
        far = replayed.differs(plain, count)
        words = f"{name} from token {place} of {expected.shape[1]}, logits by {far:.2g}"
        (apart if 0 < far < FLIPPED else wrong).append(words)
    return wrong
