"""Every op on the card against the reference backend, which runs on the CPU.

The oracle rounds activations as the kernels do (`reference.linear(rounded=True)`), in float32.
Outputs are compared by |out - oracle| / |oracle|, over all tokens and for the worst token. A number
that lies between two activation codes may be rounded up here and down there, since sums are in
another order; hence the tolerances.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moepress import kernels
from moepress.errors import MoepressError
from moepress.format.codec import (
    CODE_BITS,
    GRID_BITS,
    HALF_WIDTHS,
    Codec,
    PackedSpec,
)
from moepress.kernels import ExpertsCall, Gate, reference
from moepress.kernels.random_codes import random_packed
from moepress.self_test import TOLERANCE
from on_gpu.card import Card
from on_gpu.case import Case, Row
from on_gpu.compare import Worst

TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200, 300)
SHAPES = (  # rows, columns, group size of a linear
    (64, 32, 32), (1, 64, 32), (70, 384, 128), (200, 64, 64), (130, 160, 32), (257, 1024, 128),
    (48, 192, 64), (512, 2816, 128),
)  # fmt: skip
SEVERAL: tuple[tuple[tuple[int, ...], tuple[float, ...], int, int], ...] = (
    # rows and widths of matrices with the same inputs, columns, group size
    ((4096, 1024, 1024), (4, 4, 3.5), 4096, 128), ((64, 70, 1, 200), (1, 1.5, 2, 2.5), 384, 64),
    ((512, 512), (3, 2), 96, 32),
)  # fmt: skip
EXPERTS = (  # hidden, intermediate, gate_up's and down's group size, chosen, tokens
    (64, 32, 32, 32, 2, (1, 3, 8, 9, 40, 300)),
    (96, 160, 32, 32, 1, (1, 5, 64, 130)),
    (256, 384, 128, 64, 4, (1, 2, 16, 17, 129)),
    (384, 128, 64, 128, 8, (1, 4, 33, 300)),
    (1024, 704, 128, 64, 2, (1, 16, 100)),
)
GATES = {  # all with biases
    "plain": Gate("silu"),
    "gpt_oss": Gate("silu", limit=7.0, alpha=1.702, up_offset=1.0),
    "step3p7": Gate("silu", limit=2.0, limits_output=True),
    "inkling2": Gate("silu", gate_softcap=4.0, up_softcap=2.5),
    "nemotron_h": Gate("relu2", gated=False),
}
LARGE: dict[str, tuple[float, ...]] = {  # widths of experts of Mixtral-8x7B's shape
    "int": (2, 3, 4, 1),
    "trellis": (2, 2.5, 3, 1.5, 3.5),
}


def cases(card: Card) -> Iterator[Case]:
    """First what no card has run so far."""
    from on_gpu import attention, blocks, grouped, route, small

    yield from route.check_cases(card)
    yield from small.check_cases(card)
    yield from attention.check_cases(card)
    yield Case("linears", partial(check_linears, card), 90)
    families = [(family, bits) for family, widths in CODE_BITS.items() for bits in widths]
    families.sort(key=lambda one: one[1] not in HALF_WIDTHS)  # these first
    linears = [
        Case(f"linear {family} {bits}", partial(check_linear, card, family, bits), 90)
        for family, bits in families
    ]
    new, old = linears[: len(HALF_WIDTHS)], linears[len(HALF_WIDTHS) :]
    new += [Case(f"gates {f}", partial(check_gates, card, f), 90) for f in CODE_BITS]
    yield from map(grouped.by_integers, new)
    yield from grouped.check_cases(card)
    yield from map(grouped.by_integers, [*old_cases(card), *old, *blocks.graph_cases(card)])


def old_cases(card: Card) -> Iterator[Case]:
    for family in CODE_BITS:
        yield Case(f"large {family}", partial(check_large, card, family), 120)
        for number in range(len(EXPERTS)):
            run = partial(check_experts, card, family, number)
            yield Case(f"experts {family}, shape {number}", run, 90)
        yield Case(f"activations {family}", partial(check_activations, card, family), 90)
        yield Case(f"odd inputs {family}", partial(check_odd_inputs, card, family), 60)
    yield Case("embedding", partial(check_embedding, card), 60)
    yield Case("drop", partial(check_drop, card), 60)


def _tokens(card: Card) -> tuple[int, ...]:
    return (1, 2, 3, 17) if card.tiny else TOKENS


# Linear


def check_linear(card: Card, family: str, bits: float) -> list[Row]:
    worst, generator = Worst(), torch.Generator().manual_seed(round(2 * bits))
    for (rows, cols, group), activation_bits in (
        (shape, a) for shape in (SHAPES[:4] if card.tiny else SHAPES) for a in (8, 16)
    ):
        spec = PackedSpec((bits,), group, family)
        packed = random_packed(spec, rows, cols, torch.Generator().manual_seed(rows))
        x = torch.randn(max(_tokens(card)), cols, generator=generator)
        bias = torch.randn(rows, generator=generator)
        (codec,) = spec.codecs
        oracle = reference.linear(x, packed, None, rows, codec, activation_bits, rounded=True)
        here = [t.to(card.device) for t in (x, packed, bias)]

        def call(
            x: Tensor,
            bias: Tensor | None = None,
            packed: Tensor = here[1],
            given: tuple[Any, ...] = (rows, codec.number, group, activation_bits, family),
        ) -> Tensor:
            y: Tensor = kernels.linear(x, packed, bias, *given)
            return y

        for tokens in _tokens(card):
            card.poison()
            label = f"{rows}x{cols} g{group} a{activation_bits} T{tokens}"
            allowed = TOLERANCE[activation_bits]
            try:
                y = call(here[0][:tokens])
            except MoepressError as error:  # other numbers of tokens take other kernels
                worst.wrong.append(f"{label}: {str(error)[:300]}")
                break
            worst(label, y, oracle[:tokens], allowed, torch.float32)
            worst.same(label + " twice", call(here[0][:tokens]), y)
            if tokens in (1, 17):
                with_bias = call(here[0][:tokens], here[2])
                worst(label + " bias", with_bias, oracle[:tokens] + bias, allowed, torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            some = x[:17].to(dtype)
            exact = reference.linear(
                some.float(), packed, bias.to(dtype).float(), rows, codec, activation_bits,
                rounded=True,
            )  # fmt: skip
            y = call(some.to(card.device), here[2].to(dtype))
            worst(f"{rows}x{cols} {dtype}", y, exact, 2 * TOLERANCE[activation_bits], dtype)
        moved = torch.cat([here[1].new_zeros(64), here[1]])[64:]  # another alignment
        worst.same("moved by 64 bytes", call(here[0][:3], None, moved), call(here[0][:3]))
        nothing = call(here[0][:0])
        worst.expect("no token", nothing.shape == (0, rows))
        deep = call(here[0][:6].view(2, 3, cols))
        worst.same("[2, 3, K]", deep.view(6, rows), call(here[0][:6]))
    return worst.rows()


def check_linears(card: Card) -> list[Row]:
    """Several matrices with the same inputs beside each of them alone."""
    worst, generator = Worst(), torch.Generator().manual_seed(0)
    for rows, bits, cols, group in SEVERAL:
        specs = [PackedSpec((b,), group, "trellis") for b in bits]
        packed = [random_packed(s, n, cols, generator) for s, n in zip(specs, rows, strict=True)]
        there = [p.to(card.device) for p in packed]
        codecs = [spec.codecs[0] for spec in specs]
        for tokens, activation_bits in ((t, a) for t in (1, 3, 8, 11, 16, 20) for a in (8, 16)):
            card.poison()
            x = torch.randn(tokens, cols, generator=generator)
            found = kernels.linears(
                x.to(card.device), there, list(rows), [c.number for c in codecs], group,
                activation_bits, "trellis",
            )  # fmt: skip
            oracle = torch.cat([
                reference.linear(x, p, None, n, codec, activation_bits, rounded=True)
                for p, n, codec in zip(packed, rows, codecs, strict=True)
            ], -1)  # fmt: skip
            label = f"{rows} x {cols}, g{group} a{activation_bits} T{tokens}"
            worst(label, found, oracle, TOLERANCE[activation_bits], torch.float32)
    return worst.rows()


# Experts


def experts_call(
    family: str,
    hidden: int,
    inner: int,
    groups: tuple[int, int],
    chosen: int,
    tokens: int,
    activation: str = "silu",
    activation_bits: int = 8,
    gate: Gate | None = None,
) -> ExpertsCall:
    """A call on the CPU: every width, an expert that is left out, choices that are no expert.

    With a gate there are biases, and inputs large enough for its limits.
    """
    widths = CODE_BITS[family]
    gate_up = (*widths, 0, *widths[::-1], 2)
    down = (*widths[1:], widths[0], 0, *widths, 2)
    specs = PackedSpec(gate_up, groups[0], family), PackedSpec(down, groups[1], family)
    shapes = ((gate.parts if gate else 2) * inner, hidden), (hidden, inner)
    generator = torch.Generator().manual_seed(tokens + hidden)
    packed = [random_packed(s, *shape, generator) for s, shape in zip(specs, shapes, strict=True)]
    tables = [torch.tensor(s.table(*shape)) for s, shape in zip(specs, shapes, strict=True)]
    count = len(gate_up)
    order = torch.rand(tokens, count + 2, generator=generator).argsort(1)[:, :chosen]
    index = order - 1  # -1 and `count` are no expert
    weights = torch.rand(tokens, chosen, generator=generator)
    x = torch.randn(tokens, hidden, generator=generator)
    call = ExpertsCall(
        x, index, weights, *packed, *tables, inner, *groups, activation, activation_bits, family
    )
    if gate is None:
        return call
    biases = [torch.randn(count, rows, generator=generator) for rows, _ in shapes]
    (rows, cols), codec = shapes[0], Codec(gate_up[0], groups[0], family)
    y = reference.linear(x, packed[0][: codec.nbytes(rows, cols)], None, rows, codec)
    return dataclasses.replace(
        call,
        hidden=x * (6 / float(y.std())),
        gate_up_bias=biases[0],
        down_bias=biases[1],
        **dataclasses.asdict(gate),
    )


def on(device: torch.device, call: ExpertsCall) -> ExpertsCall:
    moved = {
        f.name: getattr(call, f.name).to(device)
        for f in dataclasses.fields(call)
        if isinstance(getattr(call, f.name), Tensor)
    }
    return dataclasses.replace(call, **moved)


def run_experts(call: ExpertsCall) -> Tensor:
    y: Tensor = kernels.experts(*(getattr(call, f.name) for f in dataclasses.fields(call)))
    return y


def first_tokens(call: ExpertsCall, tokens: int) -> ExpertsCall:
    names = "hidden", "top_k_index", "top_k_weights"
    return dataclasses.replace(call, **{n: getattr(call, n)[:tokens] for n in names})


def check_experts(card: Card, family: str, number: int) -> list[Row]:
    hidden, inner, first, second, chosen, counts = EXPERTS[number]
    worst = Worst()
    for activation_bits in (8, 16):
        most = experts_call(
            family, hidden, inner, (first, second), chosen, max(counts), "silu", activation_bits
        )
        here = on(card.device, most)
        # The CPU takes long for large ones. In PyTorch's own operations, the card is as good.
        oracle = reference.experts(here if number > 2 else most, rounded=True).cpu()
        for tokens in counts[:2] if card.tiny else counts:
            card.poison()
            label = f"H{hidden} I{inner} k{chosen} a{activation_bits} T{tokens}"
            call = first_tokens(here, tokens)
            y = run_experts(call)
            worst(label, y, oracle[:tokens], TOLERANCE[activation_bits], torch.float32)
            worst.same(label + " twice", run_experts(call), y)
        for dtype in (torch.bfloat16, torch.float16) if number < 3 else ():
            some = first_tokens(most, 5)
            half = some.hidden.to(dtype)
            exact = reference.experts(dataclasses.replace(some, hidden=half.float()), rounded=True)
            given = dataclasses.replace(first_tokens(here, 5), hidden=half.to(card.device))
            allowed = 2 * TOLERANCE[activation_bits]
            worst(f"{dtype} a{activation_bits}", run_experts(given), exact, allowed, dtype)
    return worst.rows()


def check_activations(card: Card, family: str) -> list[Row]:
    worst = Worst()
    for name in reference.ACTIVATIONS:
        call = experts_call(family, 128, 96, (32, 32), 2, 20, name, 16)
        oracle = reference.experts(call, rounded=True)
        worst(name, run_experts(on(card.device, call)), oracle, TOLERANCE[16], torch.float32)
    return worst.rows()


def check_gates(card: Card, family: str) -> list[Row]:
    worst = Worst()
    for name, gate in GATES.items():
        for tokens, activation_bits in ((1, 16), (20, 16), (70, 8)):
            call = experts_call(family, 128, 96, (32, 32), 2, tokens, "silu", activation_bits, gate)
            oracle = reference.experts(call, rounded=True)
            label = f"{name} a{activation_bits} T{tokens}"
            allowed = TOLERANCE[activation_bits]
            worst(label, run_experts(on(card.device, call)), oracle, allowed, torch.float32)
    return worst.rows()


def check_odd_inputs(card: Card, family: str) -> list[Row]:
    """Memory layouts, values that are not finite, no choices at all."""
    worst = Worst()
    call = on(card.device, experts_call(family, 128, 96, (32, 32), 2, 20, "silu", 16))
    y = run_experts(call)
    strided = dataclasses.replace(
        call,
        hidden=torch.stack([call.hidden] * 2, dim=1)[:, 1],
        top_k_index=call.top_k_index.T.contiguous().T,
        top_k_weights=call.top_k_weights.T.contiguous().T,
    )
    worst.same("strided inputs", run_experts(strided), y)
    worst.same("int32 index", run_experts(
        dataclasses.replace(call, top_k_index=call.top_k_index.int())), y)  # fmt: skip
    none = dataclasses.replace(call, top_k_index=torch.full_like(call.top_k_index, -1))
    worst.expect("no choices give 0", bool(run_experts(none).eq(0).all()))
    empty = run_experts(first_tokens(call, 0))
    worst.expect("no tokens", empty.shape == (0, 128))
    last = len(call.gate_up_table)
    half = call.top_k_index.clone()
    half[:, 1] = last
    alone = run_experts(dataclasses.replace(call, top_k_index=half))
    oracle = reference.experts(
        on(torch.device("cpu"), dataclasses.replace(call, top_k_index=half)), rounded=True
    )
    worst("one choice dropped", alone, oracle, TOLERANCE[16], torch.float32)
    spoiled = call.hidden.clone()
    spoiled[3, 5], spoiled[7, 0], spoiled[11] = torch.nan, torch.inf, 0
    z = run_experts(dataclasses.replace(call, hidden=spoiled))
    others = [t for t in range(20) if t not in (3, 7, 11)]
    worst.same("a NaN spoils no other token", z[others], y[others])
    inside = (call.top_k_index >= 0) & (call.top_k_index < last)
    widths = call.gate_up_table[call.top_k_index.clamp(0, last - 1), 1]
    chooses = ((widths > 0) & inside).any(1)
    for t in (3, 7):
        worst.expect(f"token {t} is NaN", bool(z[t].isnan().all()) or not bool(chooses[t]))
    worst.expect("a zero token gives 0", bool(z[11].eq(0).all()))
    return worst.rows()


# Embedding, drop


def check_embedding(card: Card) -> list[Row]:
    worst = Worst()
    for bits, (rows, cols, group) in (
        (b, s) for b in GRID_BITS for s in ((50, 64, 32), (300, 384, 128), (33, 192, 64))
    ):
        spec = PackedSpec((bits,), group)
        packed = random_packed(spec, rows, cols, torch.Generator().manual_seed(rows))
        for shape, dtype in (
            (s, d)
            for s in ((1,), (2, 3), (0,), (1, 257))
            for d in (torch.float32, torch.bfloat16, torch.float16)
        ):
            ids = torch.randint(rows, shape, generator=torch.Generator().manual_seed(1))
            ids.flatten()[-1:] = rows - 1
            card.poison()
            exact = reference.embedding(ids, packed, rows, cols, spec.codecs[0], dtype)
            y = kernels.embedding(
                ids.to(card.device), packed.to(card.device), rows, cols, bits, group, dtype
            )
            worst.same(f"{bits} bits {rows}x{cols} {dtype} {shape}", y.cpu(), exact)
    return worst.rows()


def check_drop(card: Card) -> list[Row]:
    worst, generator = Worst(), torch.Generator().manual_seed(0)
    for tokens, k, count in ((1, 2, 8), (7, 8, 128), (300, 4, 16), (1000, 8, 256), (0, 2, 8)):
        weights = torch.rand(tokens, k, generator=generator)
        index = torch.rand(tokens, count + 2, generator=generator).argsort(1)[:, :k] - 1
        thresholds = torch.cat([torch.zeros(1), torch.rand(k - 1, generator=generator)])
        keep = torch.rand(tokens, generator=generator) < 0.2
        for renormalise, kept in ((r, p) for r in (False, True) for p in (None, keep)):
            given = index, weights, thresholds, renormalise, kept, count
            exact = reference.drop(*given)
            found = kernels.drop(
                *(g.to(card.device) if isinstance(g, Tensor) else g for g in given)
            )
            label = f"{tokens} tokens of {k}, renormalise {renormalise}, keep {kept is not None}"
            worst.same(label + ": index", found[0].cpu(), exact[0])
            worst.same(label + ": dropped", found[2].cpu(), exact[2])
            gap = (found[1].cpu() - exact[1]).abs().max() if tokens else torch.zeros(())
            worst.expect(label + f": weights differ by {float(gap):.3g}", float(gap) < 1e-6)
    return worst.rows()


# Large shapes


def check_large(card: Card, family: str) -> list[Row]:
    """Mixtral-8x7B's shape, with the reference backend on the card itself as the oracle."""
    worst, bits = Worst(), LARGE[family]
    hidden, inner = (128, 256) if card.tiny else (4096, 14336)
    generator = card.generator(3)
    shapes = (2 * inner, hidden), (hidden, inner)
    spec = PackedSpec(bits, 128, family)
    packed = [random_packed(spec, *shape, generator) for shape in shapes]
    tables = [torch.tensor(spec.table(*shape), device=card.device) for shape in shapes]
    for tokens, activation_bits in ((1, 8), (3, 16), (16, 8), (200, 8), (600, 16)):
        x = torch.randn(tokens, hidden, generator=generator, device=card.device)
        scores = torch.rand(tokens, len(bits), generator=generator, device=card.device)
        index = scores.argsort(1)[:, :2]
        weights = torch.rand(tokens, 2, generator=generator, device=card.device)
        call = ExpertsCall(
            x, index, weights, *packed, *tables, inner, 128, 128, "silu", activation_bits, family
        )
        card.poison()
        y = run_experts(call)
        oracle = reference.experts(call, rounded=True).cpu()
        label = f"{tokens} tokens a{activation_bits}"
        worst(label, y, oracle, TOLERANCE[activation_bits], torch.float32)
    rows, cols = (500, 256) if card.tiny else (32000, 4096)
    spec = PackedSpec((4,), 128, family)
    matrix = random_packed(spec, rows, cols, generator)
    for tokens in (1, 70):
        x = torch.randn(tokens, cols, generator=generator, device=card.device)
        y = kernels.linear(x, matrix, None, rows, 4, 128, 8, family)
        oracle = reference.linear(x, matrix, None, rows, spec.codecs[0], 8, rounded=True).cpu()
        worst(f"head, {tokens} tokens", y, oracle, TOLERANCE[8], torch.float32)
    return worst.rows()
