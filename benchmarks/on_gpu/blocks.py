"""Half a decoder layer with packed modules, captured in CUDA graphs and compiled by torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moepress import kernels
from moepress.format.codec import CODE_BITS, Codec, PackedSpec
from moepress.kernels import Gate
from moepress.kernels.modules import PackedExperts, PackedLinear
from moepress.kernels.random_codes import random_packed
from moepress.self_test import TOLERANCE
from on_gpu.card import Card
from on_gpu.case import Case, Row
from on_gpu.compare import Worst

WIDTHS = {"int": (2, 3, 2, 1, 0, 4), "trellis": (2, 2.5, 3, 1.5, 0, 4)}


def graph_cases(card: Card) -> Iterator[Case]:
    yield Case("CUDA graph", partial(check_graph, card), 60)


def compile_cases(card: Card) -> Iterator[Case]:
    for family in CODE_BITS:
        yield Case(family, partial(check_compile, card, family), 120)


class Block(nn.Module):
    """A packed projection, a router, packed experts and the residual: half a decoder layer."""

    def __init__(self, card: Card, family: str) -> None:
        super().__init__()
        hidden, inner, count = 256, 128, 6
        bits = WIDTHS[family]
        specs = PackedSpec(bits, 64, family), PackedSpec(bits[2::-1] + bits[3:], 64, family)
        four = Codec(4, 64, family)
        self.project = PackedLinear(hidden, hidden, four)
        self.router = nn.Linear(hidden, count, bias=False)
        self.experts = PackedExperts(count, hidden, inner, *specs, Gate("silu"))
        generator = torch.Generator().manual_seed(0)
        filled = (
            (self.project.weight, PackedSpec((4,), 64, family), hidden, hidden),
            (self.experts.gate_up_proj, specs[0], 2 * inner, hidden),
            (self.experts.down_proj, specs[1], hidden, inner),
        )
        for parameter, spec, rows, cols in filled:
            parameter.data = random_packed(spec, rows, cols, generator)
        self.router.weight.data.normal_(generator=generator)
        self.to(card.device)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        weights, index = self.router(y).softmax(-1).topk(2)
        return x + self.experts(y, index, weights)


def check_graph(card: Card) -> list[Row]:
    """A captured graph gives what plain calls give, for inputs that came after capture."""
    worst = Worst()
    for family in CODE_BITS:
        block = Block(card, family)
        thresholds = torch.tensor([0.0, 0.5], device=card.device)
        table = random_packed(PackedSpec((4,), 64), 40, 256, card.generator())
        for tokens in (1, 4, 40):
            ids = torch.zeros(tokens, dtype=torch.int64, device=card.device)
            x = torch.zeros(tokens, 256, device=card.device)
            weights = torch.rand(tokens, 2, device=card.device)
            index = torch.randint(6, (tokens, 2), device=card.device)

            def work(
                x: Tensor = x,
                ids: Tensor = ids,
                index: Tensor = index,
                weights: Tensor = weights,
                block: Block = block,
                table: Tensor = table,
                thresholds: Tensor = thresholds,
            ) -> tuple[Tensor, ...]:
                y = block(x) + kernels.embedding(ids, table, 40, 256, 4, 64, torch.float32)
                return y, *kernels.drop(index, weights, thresholds, True, None, 6)

            with torch.inference_mode():
                replay, results = card.captured(work)
                for seed in range(3):
                    generator = card.generator(seed)
                    x.normal_(generator=generator)
                    ids.random_(0, 40, generator=generator)
                    weights.uniform_(generator=generator)
                    replay()
                    card.synchronize()
                    if card.is_cuda:
                        for found, plain in zip(results, work(), strict=True):
                            worst.same(f"{family} {tokens} tokens", found, plain)
    return worst.rows()


def check_compile(card: Card, family: str) -> list[Row]:
    """torch.compile(fullgraph=True) of a block: the same but for the order of torch's own sums."""
    worst, rows = Worst(), []
    ways: tuple[dict[str, Any], ...] = ({}, {"mode": "reduce-overhead"})
    for options in ways if card.is_cuda else ({"backend": "aot_eager"},):
        block = Block(card, family)
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, dynamic=False, **options)
        with torch.inference_mode():
            for seed in range(4):
                x = torch.randn(4, 256, device=card.device, generator=card.generator(seed))
                y = compiled(x).clone()
                worst(f"{options} {family}", y, block(x).cpu(), TOLERANCE[8], torch.float32)
        rows.append({"compiled": str(options or "inductor")})
    return [*worst.rows(), *rows]
