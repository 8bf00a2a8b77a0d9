"""Small runs of every kernel, by group, for compute-sanitizer (sanitizer.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moepress import kernels
from moepress.format.codec import CODE_BITS, TRELLIS_BITS, Codec, PackedSpec
from moepress.kernels import trellis
from moepress.kernels.random_codes import random_packed
from moepress.rounding.methods import viterbi
from on_gpu import attention, checks, grouped, route, small
from on_gpu import search as search_checks
from on_gpu.card import Card
from on_gpu.search import targets

ROWS, COLS = 70, 128
FEW, MANY = (1, 5, 16), (20, 70)  # tokens of a linear: other kernels
GROUP_SIZES = (32, 128)


def run(card: Card, group: str) -> None:
    with grouped.way(False), torch.inference_mode():
        GROUPS[group](card)
        card.synchronize()


def products(card: Card, family: str, tokens: tuple[int, ...], tokens_of_experts: int) -> None:
    """Inputs, products, gate, sums: every width, for linears and for experts."""
    for bits in CODE_BITS[family]:
        for size in GROUP_SIZES:
            codec = Codec(bits, size, family)
            for count in tokens:
                linear(card, codec, count, 8)
            linear(card, codec, tokens[-1], 16)
    for activation_bits in (8, 16):
        sizes = 128, 96, (32, 32), 2
        call = checks.experts_call(family, *sizes, tokens_of_experts, "silu", activation_bits)
        checks.run_experts(checks.on(card.device, call))


def linear(card: Card, codec: Codec, tokens: int, activation_bits: int) -> None:
    spec = PackedSpec((codec.bits,), codec.group_size, codec.family)
    packed = random_packed(spec, ROWS, COLS, torch.Generator()).to(card.device)
    x = torch.randn(tokens, COLS, device=card.device)
    given = ROWS, codec.number, codec.group_size, activation_bits, codec.family
    kernels.linear(x, packed, torch.randn(ROWS, device=card.device), *given)


def by_decoded_weights(card: Card) -> None:
    with grouped.way(True):
        for family, widths in CODE_BITS.items():
            for bits in widths:
                linear(card, Codec(bits, 32, family), 70, 8)
            for gate in (None, *checks.GATES.values()):
                call = checks.experts_call(family, 128, 96, (32, 32), 2, 40, gate=gate)
                checks.run_experts(checks.on(card.device, call))


def gates(card: Card) -> None:
    """Every gate, with biases."""
    for family in CODE_BITS:
        for gate in checks.GATES.values():
            for tokens in (1, 70):
                call = checks.experts_call(family, 128, 96, (32, 32), 2, tokens, gate=gate)
                checks.run_experts(checks.on(card.device, call))


def embedding(card: Card) -> None:
    for bits in CODE_BITS["int"]:
        packed = random_packed(PackedSpec((bits,), 32), ROWS, COLS, torch.Generator())
        for dtype in (torch.float32, torch.bfloat16):
            ids = torch.arange(ROWS, device=card.device)
            given = ROWS, COLS, int(bits), 32, dtype
            kernels.embedding(ids, packed.to(card.device), *given)
    index = torch.randint(8, (5, 2), device=card.device)
    weights = torch.rand(5, 2, device=card.device)
    thresholds = torch.tensor([0.0, 0.5], device=card.device)
    for renormalise in (False, True):
        kernels.drop(index, weights, thresholds, renormalise, None, 8)


def search(card: Card) -> None:
    for bits in TRELLIS_BITS:
        viterbi.search(targets(card, bits, trellis.TILE_COLUMNS, 128), bits)
    target = torch.stack([targets(card, b, 16, 128) for b in TRELLIS_BITS])
    branches = torch.empty(target.shape, dtype=torch.uint8, device=card.device)
    viterbi.round_together(target, torch.zeros_like(target), branches, TRELLIS_BITS, 8)


def small_ops(card: Card) -> None:
    for check in (small.check_norms, small.check_rotary, small.check_cache):
        check(card)


GROUPS: dict[str, Callable[[Card], Any]] = {
    "trellis_decode": partial(products, family="trellis", tokens=FEW, tokens_of_experts=3),
    "int_decode": partial(products, family="int", tokens=FEW, tokens_of_experts=3),
    "trellis_prefill": partial(products, family="trellis", tokens=MANY, tokens_of_experts=70),
    "int_prefill": partial(products, family="int", tokens=MANY, tokens_of_experts=70),
    "grouped": by_decoded_weights,
    "gates": gates,
    "embedding": embedding,
    "search": search,
    "rotation": search_checks.check_rotation,
    "attention": attention.check_attention,
    "route": route.check_route,
    "small": small_ops,
    "drawn": search_checks.check_drawn,
    "values": search_checks.check_values,
    "linears": checks.check_linears,
}
