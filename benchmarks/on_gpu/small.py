"""Small operations of decoding on the card: against plain PyTorch, in a model, and how fast.

Times are those of one of several calls in a CUDA graph: as in a captured step, with what lies
between two kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from moepress import kernels
from moepress.hf import fused_norms as norming
from moepress.hf import fused_rotary as turning
from moepress.hf.trying import FEW, disagreement
from moepress.kernels import small_reference as reference
from moepress.kernels.small_reference import FORMULAS, STYLES
from moepress.self_test import ROUNDING
from on_gpu.attention import CLOSE, STEPS, decoded_logits, small_model
from on_gpu.card import Card
from on_gpu.case import Case, CheckError, Row
from on_gpu.compare import Worst

NORMS = ((1, 4096), (16, 4096), (64, 128), (3, 13), (2, 9000), (1, 1101))  # rows, columns
ROTARY = (  # batches, heads of queries, of keys, tokens, size of a head, columns
    (1, 32, 8, 1, 128, 128), (2, 4, 1, 3, 80, 32), (1, 128, 1, 1, 64, 64), (1, 4, 0, 1, 16, 16),
)  # fmt: skip
CACHES = ((1, 8, 1280, 128, 128), (2, 3, 5, 5, 3), (1, 128, 9, 192, 128))  # .., sizes of both
CALLS = 32
EPS = 1e-5
HEADS, SHARED, SIZE, WIDTH, ROOM = 32, 8, 128, 4096, 1280  # what is timed: Mixtral-8x7B's


def check_cases(card: Card) -> Iterator[Case]:
    """For the part `checks`."""
    yield Case("norms", partial(check_norms, card), 60)
    yield Case("rotary embeddings", partial(check_rotary, card), 60)
    yield Case("cache", partial(check_cache, card), 60)


def cases(card: Card) -> Iterator[Case]:
    yield Case("logits of a model", partial(check_model, card), 90)
    yield Case("times", partial(times, card), 60)


def check_norms(card: Card) -> list[Row]:
    """Errors: of a row."""
    worst, generator = Worst(), torch.Generator().manual_seed(0)
    for (rows, columns), dtype in ((s, d) for s in NORMS for d in ROUNDING):
        x = torch.randn(rows, columns, generator=generator).to(dtype)
        weight = (1 + torch.randn(columns, generator=generator)).to(dtype)
        for formula, given in ((f, w) for f in FORMULAS for w in (weight, weight.float(), None)):
            exact = reference.rms_norm(x.double(), None if given is None else given.double(),
                                       EPS, formula)  # fmt: skip
            card.poison()
            there = None if given is None else given.to(card.device)
            found = kernels.rms_norm(x.to(card.device), there, EPS, formula)
            label = f"norm {rows} x {columns} {dtype} {formula}"
            plain = reference.rms_norm(x, given, EPS, formula)
            if plain.dtype == dtype:
                worst(label, found, exact, 1e-6 + ROUNDING[dtype], dtype)
            share = disagreement(
                found.cpu(), plain, dtype
            )  # where roundings are not those of torch
            worst.expect(f"{label}: {share:.3g} of the numbers differ", share < FEW)
    return worst.rows()


def check_rotary(card: Card) -> list[Row]:
    worst, generator = Worst(), torch.Generator().manual_seed(0)
    for shape, dtype, style in ((s, d, n) for s in ROTARY for d in ROUNDING for n in STYLES):
        batches, heads, shared, tokens, size, columns = shape
        if STYLES[style].doubled:
            columns = min(columns, size // 2)
        q, k = (
            torch.randn(batches, tokens, n, size, generator=generator).to(dtype).transpose(1, 2)
            for n in (heads, shared)
        )
        angles = torch.randn(2, batches, tokens, columns, generator=generator)
        for wide, cos_sin in ((False, angles.to(dtype)), (True, angles)):
            exact = reference.rotary(q, k, *cos_sin, style, wide)
            card.poison()
            there = [x.to(card.device) for x in (q, k, *cos_sin)]
            found = kernels.rotary(*there, style, wide)
            for one, other in zip(found, exact, strict=True):
                worst.same(f"rotary {shape} {dtype} {style} wide {wide}", one.cpu(), other)
    return worst.rows()


def check_cache(card: Card) -> list[Row]:
    worst, generator = Worst(), torch.Generator().manual_seed(0)
    for (batches, heads, room, *sizes), dtype in ((s, d) for s in CACHES for d in ROUNDING):
        held = [torch.randn(batches, heads, room, n, generator=generator).to(dtype) for n in sizes]
        there = [x.to(card.device) for x in held]
        for position in map(torch.tensor, (1, 2)):
            token = [
                torch.randn(batches, 1, heads, n, generator=generator).to(dtype).transpose(1, 2)
                for n in sizes
            ]
            reference.cache_write(*held, *token, position)
            given = (x.to(card.device) for x in (*token, position))
            kernels.cache_write(*there, *given)
        label = f"cache {batches} x {heads} x {room} {sizes} {dtype}"
        for found, exact in zip(there, held, strict=True):
            worst.same(label, found.cpu(), exact)
    return worst.rows()


@torch.inference_mode()
def check_model(card: Card) -> list[Row]:
    """Logits of decoded tokens with the ops in every layer, and with transformers' functions."""
    model = small_model(card)
    plain, devices = decoded_logits(card, model), (card.device.type,)
    with (
        norming.fused_norms(model, devices),
        turning.fused_rotary(model, devices),
        patch.object(norming, "rms_norm", wraps=kernels.rms_norm) as norm,
        patch.object(turning, "rotary", wraps=kernels.rotary) as turn,
    ):
        found = decoded_logits(card, model)
    layers = model.config.num_hidden_layers
    error = float((found - plain).norm() / plain.norm())
    # The prompt of two texts has 60 rows, too, and 60 tokens.
    row: Row = {"norms": norm.call_count, "rotary": turn.call_count, "error": error}
    right = norm.call_count == (STEPS + 1) * (2 * layers + 1), turn.call_count == STEPS * layers
    if not error < CLOSE or not all(right):
        raise CheckError(f"expected a call of every layer, and an error below {CLOSE}: {row}")
    return [row]


@torch.inference_mode()
def times(card: Card) -> list[Row]:
    """Microseconds of one call in bfloat16: of the op, and of what transformers calls."""
    from transformers.cache_utils import StaticLayer
    from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, apply_rotary_pos_emb

    generator, device = card.generator(), card.device
    norm = MixtralRMSNorm(WIDTH, EPS).to(device, torch.bfloat16)
    of_head = MixtralRMSNorm(SIZE, EPS).to(device, torch.bfloat16)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=generator)

    x, heads = drawn(1, 1, WIDTH), drawn(1, 1, HEADS, SIZE)
    q, k, v = (drawn(1, 1, n, SIZE).transpose(1, 2) for n in (HEADS, SHARED, SHARED))
    cos, sin = drawn(2, 1, 1, SIZE)
    layer = StaticLayer(max_cache_len=ROOM)
    layer.lazy_initialization(k, v)
    position = torch.zeros((), dtype=torch.int64, device=device)

    def written() -> Tensor:
        kernels.cache_write(layer.keys, layer.values, k, v, position)
        return position

    work: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        f"norm of {WIDTH}": (
            lambda: kernels.rms_norm(x, norm.weight, EPS, "rounded"), lambda: norm(x)),
        f"norm of {HEADS} x {SIZE}": (
            lambda: kernels.rms_norm(heads, of_head.weight, EPS, "rounded"),
            lambda: of_head(heads)),
        "rotary embedding": (
            lambda: kernels.rotary(q, k, cos, sin, "halves", False),
            lambda: apply_rotary_pos_emb(q, k, cos, sin)),
        "cache": (written, lambda: layer.update(k, v)),
    }  # fmt: skip
    rows: list[Row] = []
    for name, (ours, theirs) in work.items():
        found: list[float] = []
        for call in (ours, theirs):
            layer.cumulative_length.zero_()
            found.append(microseconds(card, call, layer.cumulative_length))
        rows.append({"what": name, "op_us": found[0], "transformers_us": found[1]})
    return rows


def microseconds(card: Card, call: Callable[[], Any], counter: Tensor) -> float:
    """Of one of CALLS calls, replayed as one CUDA graph. The counter begins at 0 each time."""
    calls = 2 if card.tiny else CALLS

    def work() -> None:
        counter.zero_()
        for _ in range(calls):
            call()

    replay, _ = card.captured(work)
    return 1e6 * card.seconds(replay) / calls
