"""Products with many tokens in both ways: by integers, and by weights decoded to bfloat16.

moepress/kernels/cuda/grouped.py is the second way. `way` forces one of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial

import torch

from moepress import kernels
from moepress.format.codec import CODE_BITS, PackedSpec, width_number
from moepress.kernels import ExpertsCall, reference
from moepress.kernels.cuda import grouped, products
from moepress.kernels.random_codes import random_packed
from on_gpu import checks, ops
from on_gpu.card import Card
from on_gpu.case import Case, Row

NEVER = 1 << 60
TOKENS = (512, 1024, 2048, 4096)
LINEAR_TOKENS = (128, 256, 512, 1024, 4096)
SHAPES = ("Mixtral-8x7B", "Qwen3-30B-A3B")
CODECS = ("trellis 2", "int 2")
SCRATCH = (64, 128, 512, 1024)  # MB, beside the default
TOLERANCE = 2e-2  # of a token: bfloat16 inputs, weights and results of two products


@contextlib.contextmanager
def way(by_groups: bool) -> Iterator[None]:
    """Products by decoded weights always (where the card has them), or never."""
    before = products.GROUPED_PER_EXPERT, products.GROUPED_ROWS
    products.GROUPED_PER_EXPERT = products.GROUPED_ROWS = 0 if by_groups else NEVER
    try:
        yield
    finally:
        products.GROUPED_PER_EXPERT, products.GROUPED_ROWS = before


def by_integers(case: Case) -> Case:
    """A case whose oracle rounds activations to codes."""

    def run() -> list[Row]:
        with way(False):
            return case.run()

    return dataclasses.replace(case, run=run)


def check_cases(card: Card) -> Iterator[Case]:
    for family in CODE_BITS:
        yield Case(f"decoded weights, gates {family}", partial(check_gates, card, family), 90)
    for family in CODE_BITS:
        yield Case(f"decoded weights {family}", partial(check, card, family), 90)


def prefill_cases(card: Card) -> Iterator[Case]:
    for shape in SHAPES:
        for codec in CODECS:
            name = f"both ways, {shape}, {codec}"
            yield Case(name, partial(both_ways, card, shape, codec), 60)
    yield Case("decoded weights, linear", partial(linears, card), 60)
    yield Case("decoded weights, scratch", partial(scratch_sizes, card), 60)
    yield Case("decoded weights, kernels", partial(kernels_of, card), 60)


def check(card: Card, family: str) -> list[Row]:
    """Linears and experts by decoded weights, plain and captured, against the reference."""
    worst = checks.Worst()
    with way(True), torch.inference_mode():
        for bits in CODE_BITS[family]:
            for rows, cols, group in ((70, 384, 128), (200, 64, 64), (512, 2816, 128)):
                spec = PackedSpec((bits,), group, family)
                packed = random_packed(spec, rows, cols, card.generator(rows))
                x = torch.randn(300, cols, device=card.device, generator=card.generator(rows))
                bias = torch.randn(rows, device=card.device, generator=card.generator(1))
                oracle = reference.linear(x, packed, bias, rows, spec.codecs[0]).cpu()
                given = packed, bias, rows, width_number(bits), group, 8, family
                for tokens in (1, 65, 300):
                    card.poison()
                    y = kernels.linear(x[:tokens], *given)
                    label = f"{bits} bits {rows}x{cols} T{tokens}"
                    worst(label, y, oracle[:tokens], TOLERANCE, torch.float32)
        for hidden, inner, groups, chosen, counts in (
            (256, 384, (128, 64), 4, (1, 2, 129)),
            (384, 128, (64, 128), 8, (4, 300)),
            (1024, 704, (128, 64), 2, (1, 100, 1000)),
        ):
            most = checks.on(
                card.device,
                checks.experts_call(family, hidden, inner, groups, chosen, max(counts)),
            )
            oracle = reference.experts(most).cpu()
            for tokens in counts:
                card.poison()
                call = checks.first_tokens(most, tokens)
                label = f"H{hidden} I{inner} k{chosen} T{tokens}"
                y = checks.run_experts(call)
                worst(label, y, oracle[:tokens], TOLERANCE, torch.float32)
                replay, z = card.captured(partial(checks.run_experts, call))
                replay()
                worst.same(label + " captured", z, y)
        large(card, family, worst)
    return worst.rows()


def check_gates(card: Card, family: str) -> list[Row]:
    """Every gate with biases, by decoded weights."""
    worst = checks.Worst()
    with way(True), torch.inference_mode():
        for (name, gate), tokens in ((g, t) for g in checks.GATES.items() for t in (1, 20, 70)):
            call = checks.experts_call(family, 128, 96, (32, 32), 2, tokens, "silu", 8, gate)
            oracle = reference.experts(call)
            card.poison()
            y = checks.run_experts(checks.on(card.device, call))
            worst(f"{name} T{tokens}", y, oracle, TOLERANCE, torch.float32)
    return worst.rows()


def large(card: Card, family: str, worst: checks.Worst) -> None:
    """Mixtral-8x7B's shape with few experts: several chunks of rows."""
    hidden, inner = (128, 256) if card.tiny else (4096, 14336)
    bits = checks.LARGE[family]
    spec = PackedSpec(bits, 128, family)
    shapes = (2 * inner, hidden), (hidden, inner)
    packed = [random_packed(spec, *shape, card.generator(3)) for shape in shapes]
    tables = [torch.tensor(spec.table(*shape), device=card.device) for shape in shapes]
    tokens, where = 700, {"device": card.device, "generator": card.generator(4)}
    x = torch.randn(tokens, hidden, **where).bfloat16()
    index = torch.rand(tokens, len(bits), **where).argsort(1)[:, :2]
    index[:, 0] = 1  # one expert with many tokens
    call = ExpertsCall(
        x, index, torch.rand(tokens, 2, **where), *packed, *tables, inner, 128, 128, "silu", 8,
        family,
    )  # fmt: skip
    card.poison()
    y = checks.run_experts(call)
    oracle = reference.experts(dataclasses.replace(call, hidden=x.float())).cpu()
    worst("large", y, oracle, TOLERANCE, torch.bfloat16)


def both_ways(card: Card, shape: str, codec: str) -> list[Row]:
    layers = ops.Layers(card, shape, codec, 1)
    rows = []
    for tokens in ops.counts(card) if card.tiny else TOKENS:
        index = ops.routing(card, shape, tokens)
        call = layers.call(0, index, card.generator(1), torch.bfloat16)
        took = []
        for by_groups in (False, True):
            with way(by_groups), torch.inference_mode():
                took.append(card.seconds(card.captured(call)[0], 0.02, 3))
        operations = 2 * tokens * layers.chosen * layers.weights_per_expert
        rows.append({
            "tokens": tokens, "integers_us": 1e6 * took[0], "decoded_us": 1e6 * took[1],
            "tflops": operations / min(took) / 1e12,
        })  # fmt: skip
        card.release()
    return rows


def linears(card: Card) -> list[Row]:
    rows = []
    for (out, cols), (bits, family) in (
        ((4096, 4096), (4, "trellis")),
        ((4096, 4096), (4, "int")),
        ((1024, 4096), (4, "trellis")),
    ):
        out, cols = (256, 128) if card.tiny else (out, cols)
        packed = random_packed(PackedSpec((bits,), 128, family), out, cols, card.generator(3))
        for tokens in (20,) if card.tiny else LINEAR_TOKENS:
            x = torch.randn(tokens, cols, device=card.device, dtype=torch.bfloat16)
            took = []
            for by_groups in (False, True):
                call = partial(kernels.linear, x, packed, None, out, bits, 128, 8, family)
                with way(by_groups), torch.inference_mode():
                    took.append(card.seconds(card.captured(call)[0], 0.005, 3))
            rows.append({
                "linear": f"{out}x{cols} {family} {bits}", "tokens": tokens,
                "integers_us": 1e6 * took[0], "decoded_us": 1e6 * took[1],
            })  # fmt: skip
    return rows


def scratch_sizes(card: Card) -> list[Row]:
    """Mixtral-8x7B, 2-bit trellis codes: bytes of decoded weights at a time."""
    layers = ops.Layers(card, SHAPES[0], "trellis 2", 1)
    tokens, rows = max(ops.counts(card)), []
    call = layers.call(0, ops.routing(card, SHAPES[0], tokens), card.generator(1), torch.bfloat16)
    before = grouped.SCRATCH_BYTES
    try:
        for megabytes in SCRATCH:
            grouped.SCRATCH_BYTES = megabytes << 20
            with way(True), torch.inference_mode():
                seconds = card.seconds(card.captured(call)[0], 0.02, 3)
            rows.append({"scratch_mb": megabytes, "tokens": tokens, "decoded_us": 1e6 * seconds})
            card.release()
    finally:
        grouped.SCRATCH_BYTES = before
    return rows


def kernels_of(card: Card) -> list[Row]:
    """The kernels of one call with decoded weights: Mixtral-8x7B, 4096 tokens."""
    rows = []
    for codec in CODECS:
        layers = ops.Layers(card, SHAPES[0], codec, 1)
        index = ops.routing(card, SHAPES[0], max(ops.counts(card)))
        call = layers.call(0, index, card.generator(1), torch.bfloat16)
        with way(True), torch.inference_mode():
            rows += [{"codec": codec, **row} for row in card.profiled(call, 1)]
        card.release()
    return rows
