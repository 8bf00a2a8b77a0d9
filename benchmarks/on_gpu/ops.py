"""Times of single ops by CUDA graph replay, over more weights than the L2 cache holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress import kernels
from moepress.format.codec import Codec, PackedSpec
from moepress.kernels import ExpertsCall
from moepress.kernels.random_codes import random_packed
from on_gpu.card import Card
from on_gpu.case import Case, Row

SHAPES = {  # hidden, intermediate, experts, chosen
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "DeepSeek-V3": (7168, 2048, 256, 8),
}
CODECS: dict[str, tuple[str, tuple[float, ...]]] = {  # family, widths that experts take in turn
    "trellis 2": ("trellis", (2,)),
    "trellis 2.5": ("trellis", (2, 3)),
    "trellis 1": ("trellis", (1,)),
    "trellis 1.5": ("trellis", (1.5,)),
    "trellis 2.5, half": ("trellis", (2.5,)),
    "trellis 3.5": ("trellis", (3.5,)),
    "trellis 3": ("trellis", (3,)),
    "trellis 4": ("trellis", (4,)),
    "int 2": ("int", (2,)),
    "int 4": ("int", (4,)),
}
READ = 600 << 20  # bytes that one replay reads, at least: several times the L2 cache
CALLS = 64  # of the op in one replay, at most
FEW = (1, 4, 16)
MANY = (512, 4096)
INSTRUCTIONS = {1: 2, 2: 2, 3: 3, 4: 3}  # of a trellis weight, at least (trellis_code.cuh)


def cases(card: Card) -> Iterator[Case]:
    yield Case("ceilings", partial(ceilings, card), 60)
    for codec in CODECS:
        yield Case(f"Mixtral-8x7B, {codec}", partial(few_tokens, card, "Mixtral-8x7B", codec), 60)
    for codec in ("trellis 2", "int 2"):
        yield Case(f"kernels, {codec}", partial(kernels_of, card, "Mixtral-8x7B", codec), 60)


def shapes_cases(card: Card) -> Iterator[Case]:
    yield Case("linear", partial(linears, card), 60)
    yield Case("queries, keys and values", partial(together, card), 60)
    for shape, codec in ((s, c) for s in SHAPES if s != "Mixtral-8x7B" for c in CODECS):
        yield Case(f"{shape}, {codec}", partial(few_tokens, card, shape, codec), 60)
    yield Case("kernels", partial(kernels_of, card, "Qwen3-30B-A3B", "trellis 2"), 60)


def prefill_cases(card: Card) -> Iterator[Case]:
    from on_gpu import grouped

    yield from grouped.prefill_cases(card)
    shape = "Mixtral-8x7B"
    yield Case("torch bfloat16", partial(grouped_product, card, shape), 60)
    for codec in ("trellis 2", "trellis 2.5", "int 2", "trellis 4", "int 4"):
        yield Case(codec, partial(many_tokens, card, shape, codec), 60)
    for name in ("Qwen3-30B-A3B",):
        yield Case(f"{name}, torch bfloat16", partial(grouped_product, card, name), 60)
        yield Case(f"{name}, trellis 2", partial(many_tokens, card, name, "trellis 2"), 60)


def sizes(card: Card, shape: str) -> tuple[int, int, int, int]:
    hidden, inner, experts, chosen = SHAPES[shape]
    return (128, 256, min(experts, 16), chosen) if card.tiny else (hidden, inner, experts, chosen)


def clock_rate(card: Card) -> float:
    """Cycles per second of a multiprocessor at its highest."""
    rate = getattr(card.properties, "clock_rate", 0)  # kHz; newer torch has it no more
    return 1e3 * rate if rate else 1.98e9


def ceilings(card: Card) -> list[Row]:
    row: Row = {
        "copy_gb_per_s": card.copy_rate() / 1e9,
        "read_gb_per_s": card.read_rate() / 1e9,
        "bf16_tflops": card.product_rate() / 1e12,
    }
    if card.is_cuda:
        about = card.properties
        row |= {
            "card": about.name,
            "multiprocessors": about.multi_processor_count,
            "mhz": clock_rate(card) / 1e6,
            "l2_mb": about.L2_cache_size / 1e6,
        }
    return [row]


class Layers:
    """Packed experts of several layers of one shape, more than the L2 cache holds.

    Args:
        read: bytes that calls with few tokens read together before they meet a weight again.
    """

    def __init__(self, card: Card, shape: str, codec: str, read: int) -> None:
        self.hidden, self.inner, self.experts, self.chosen = sizes(card, shape)
        family, widths = CODECS[codec]
        bits = tuple(widths[e % len(widths)] for e in range(self.experts))
        self.spec = PackedSpec(bits, 128, family)
        self.shapes = (2 * self.inner, self.hidden), (self.hidden, self.inner)
        layer = sum(self.spec.nbytes(*s) for s in self.shapes)
        count = 1 if card.tiny else max(1, math.ceil(read / layer))
        count = max(1, min(count, int(0.6 * card.memory / layer)))
        generator = card.generator(1)
        self.packed = [
            [random_packed(self.spec, *s, generator) for s in self.shapes] for _ in range(count)
        ]
        self.tables = [torch.tensor(self.spec.table(*s), device=card.device) for s in self.shapes]
        self.weights_per_expert = sum(rows * cols for rows, cols in self.shapes)
        self.bytes_of = [
            sum(Codec(b, 128, family).nbytes(*shape) for shape in self.shapes) for b in bits
        ]

    def call(
        self, layer: int, index: Tensor, generator: torch.Generator, dtype: torch.dtype
    ) -> Callable[[], Tensor]:
        device = generator.device
        x = torch.randn(len(index), self.hidden, generator=generator, device=device).to(dtype)
        weights = torch.rand(index.shape, generator=generator, device=device)
        gate_up, down = self.packed[layer % len(self.packed)]
        given = ExpertsCall(
            x, index, weights, gate_up, down, *self.tables, self.inner, 128, 128, "silu", 8,
            self.spec.family,
        )  # fmt: skip
        fields = [getattr(given, f.name) for f in dataclasses.fields(given)]
        return lambda: kernels.experts(*fields)


def few_tokens(card: Card, shape: str, codec: str) -> list[Row]:
    """Weights per second: those of the experts that a call's tokens choose, each once."""
    layers = Layers(card, shape, codec, READ)
    rows, generator = [], card.generator(2)
    read_rate = card.read_rate()
    for tokens in FEW:
        calls, weights, read, order = [], 0, 0, torch.empty(0, dtype=torch.int64)
        layer = -1
        while len(calls) < (2 if card.tiny else CALLS) and (read < READ or len(calls) < 2):
            if tokens == 1:  # experts in turn: no call reads what another has read
                if len(order) < layers.chosen:
                    order = torch.randperm(layers.experts)
                    layer += 1
                index, order = order[None, : layers.chosen], order[layers.chosen :]
            else:
                index = torch.rand(tokens, layers.experts).argsort(1)[:, : layers.chosen]
                layer += 1
            used = index.unique().tolist()
            weights += len(used) * layers.weights_per_expert
            read += sum(layers.bytes_of[e] for e in used)
            index = index.to(card.device)
            calls.append(layers.call(layer, index, generator, torch.bfloat16))
        with torch.inference_mode():
            replay, _ = card.captured(lambda calls=calls: [call() for call in calls])
            seconds = card.seconds(replay)
        row: Row = {
            "tokens": tokens,
            "us_per_call": 1e6 * seconds / len(calls),
            "tweights_per_s": weights / seconds / 1e12,
            "gb_per_s": read / seconds / 1e9,
            "of_read_rate": read / seconds / read_rate,
        }
        if card.is_cuda:
            row["of_issue_rate"] = issue_share(card, layers.spec, weights / seconds)
        rows.append(row)
    return rows


def kernels_of(card: Card, shape: str, codec: str) -> list[Row]:
    """The kernels of one call of the op, with one token and with 512."""
    layers = Layers(card, shape, codec, READ)
    rows: list[Row] = []
    for tokens in (1, 512):
        index = routing(card, shape, tokens)
        calls = [layers.call(n, index, card.generator(n), torch.bfloat16) for n in range(4)]
        with torch.inference_mode():
            found = card.profiled(lambda calls=calls: [call() for call in calls])
        rows += [
            {
                "tokens": tokens,
                "kernel": row["kernel"],
                "calls": row["calls"] / len(calls),
                "us_per_call_of_the_op": row["us"] / len(calls),
            }
            for row in found
        ]
    return rows


def instructions(bits: float) -> float:
    """Of a trellis weight. Half widths spend the whole numbers below and above in turn."""
    return (INSTRUCTIONS[math.floor(bits)] + INSTRUCTIONS[math.ceil(bits)]) / 2


def issue_share(card: Card, spec: PackedSpec, rate: float) -> float | str:
    """Share of the rate at which the card could issue a trellis weight's instructions."""
    if spec.family != "trellis":
        return ""
    per_weight = sum(map(instructions, spec.bits)) / len(spec.bits)
    issued = 128 * card.properties.multi_processor_count * clock_rate(card)
    return rate * per_weight / issued


def linears(card: Card) -> list[Row]:
    """The linear op and torch's in bfloat16, with one token and with 16."""
    rows = []
    square, head = ((256, 128), (512, 128)) if card.tiny else ((4096, 4096), (32000, 4096))
    for name, (out, cols), (bits, family) in (
        ("trellis 4", square, (4, "trellis")),
        ("trellis 2", square, (2, "trellis")),
        ("int 4", square, (4, "int")),
        ("int 8", square, (8, "int")),
        ("int 4", head, (4, "int")),
        ("trellis 4", head, (4, "trellis")),
    ):
        spec = PackedSpec((bits,), 128, family)
        size = spec.nbytes(out, cols)
        count = 2 if card.tiny else min(CALLS, max(2, math.ceil(READ / 4 / size)))
        generator = card.generator(3)
        packed = [random_packed(spec, out, cols, generator) for _ in range(count)]
        plain = [
            torch.randn(out, cols, device=card.device, dtype=torch.bfloat16)
            for _ in range(min(count, 8))
        ]
        for tokens in (1, 16):
            x = torch.randn(tokens, cols, device=card.device, dtype=torch.bfloat16)

            def ours(
                x: Tensor = x,
                packed: list[Tensor] = packed,
                given: tuple[Any, ...] = (None, out, bits, 128, 8, family),
            ) -> Any:
                return [kernels.linear(x, p, *given) for p in packed]

            def theirs(x: Tensor = x, plain: list[Tensor] = plain) -> Any:
                return [F.linear(x, w) for w in plain]

            with torch.inference_mode():
                seconds = card.seconds(card.captured(ours)[0]) / count
                bfloat16 = card.seconds(card.captured(theirs)[0]) / len(plain)
            rows.append({
                "linear": f"{out}x{cols} {name}", "tokens": tokens, "us": 1e6 * seconds,
                "tweights_per_s": out * cols / seconds / 1e12, "gb_per_s": size / seconds / 1e9,
                "bf16_us": 1e6 * bfloat16, "times_bf16": bfloat16 / seconds,
            })  # fmt: skip
    return rows


def together(card: Card) -> list[Row]:
    """Queries, keys and values of Mixtral-8x7B's shape, one token: three calls, and one."""
    cols, rows = (128, (128, 64, 64)) if card.tiny else (4096, (4096, 1024, 1024))
    found: list[Row] = []
    for bits in (4, 3):
        spec, generator = PackedSpec((bits,), 128, "trellis"), card.generator(4)
        size = sum(spec.nbytes(n, cols) for n in rows)
        count = 2 if card.tiny else min(CALLS, math.ceil(READ / 4 / size))
        packed = [[random_packed(spec, n, cols, generator) for n in rows] for _ in range(count)]
        x = torch.randn(1, cols, device=card.device, dtype=torch.bfloat16)

        def alone(x: Tensor = x, packed: list[list[Tensor]] = packed, bits: int = bits) -> Any:
            return [
                kernels.linear(x, p, None, n, bits, 128, 8, "trellis")
                for layer in packed
                for p, n in zip(layer, rows, strict=True)
            ]

        def joined(x: Tensor = x, packed: list[list[Tensor]] = packed, bits: int = bits) -> Any:
            return [
                kernels.linears(x, layer, list(rows), [bits] * 3, 128, 8, "trellis")
                for layer in packed
            ]

        with torch.inference_mode():
            each, one = (card.seconds(card.captured(call)[0]) / count for call in (alone, joined))
        found.append({"bits": bits, "three_calls_us": 1e6 * each, "one_us": 1e6 * one})
    return found


# Many tokens


def routing(card: Card, shape: str, tokens: int) -> Tensor:
    """Distinct experts for each token, all equally likely: [T, k]."""
    _, _, experts, chosen = sizes(card, shape)
    scores = torch.rand(tokens, experts, generator=card.generator(tokens), device=card.device)
    return scores.argsort(1)[:, :chosen].contiguous()


def counts(card: Card) -> tuple[int, ...]:
    return (20, 70) if card.tiny else MANY


def many_tokens(card: Card, shape: str, codec: str) -> list[Row]:
    layers = Layers(card, shape, codec, 1)
    rows = []
    for tokens in counts(card):
        call = layers.call(0, routing(card, shape, tokens), card.generator(1), torch.bfloat16)
        with torch.inference_mode():
            seconds = card.seconds(card.captured(call)[0])
        operations = 2 * tokens * layers.chosen * layers.weights_per_expert
        rows.append({
            "tokens": tokens, "us": 1e6 * seconds, "tflops": operations / seconds / 1e12,
        })  # fmt: skip
    return rows


def grouped_product(card: Card, shape: str) -> list[Row]:
    """torch's grouped bfloat16 products with the gate between them: rows are sorted already."""
    hidden, inner, experts, chosen = sizes(card, shape)
    bfloat16 = {"device": card.device, "dtype": torch.bfloat16}
    gate_up = torch.randn(experts, 2 * inner, hidden, **bfloat16).mul_(hidden**-0.5)
    down = torch.randn(experts, hidden, inner, **bfloat16).mul_(inner**-0.5)
    grouped = getattr(F, "grouped_mm", None) or torch._grouped_mm
    rows = []
    for tokens in counts(card):
        flat = routing(card, shape, tokens).flatten()
        ends = torch.bincount(flat, minlength=experts).cumsum(0).int()
        x = torch.randn(tokens * chosen, hidden, **bfloat16)

        def products(x: Tensor = x, ends: Tensor = ends) -> Tensor:
            y = grouped(x, gate_up.transpose(1, 2), offs=ends)
            gate, up = y.chunk(2, dim=-1)
            z: Tensor = grouped(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
            return z

        with torch.inference_mode():
            seconds = card.seconds(card.captured(products)[0])
        operations = 2 * tokens * chosen * 3 * hidden * inner
        rows.append({
            "tokens": tokens, "us": 1e6 * seconds, "tflops": operations / seconds / 1e12,
        })  # fmt: skip
    return rows
