"""Routers of few tokens on the card: the op against its definition, in models, and its time.

Times are those of one of several calls in a CUDA graph, each with a weight of its own, as layers
have. `after_us`: with a kernel of torch's before each call, as in a layer, less the time of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moepress import kernels
from moepress.hf.fused_router import fused_routers
from moepress.kernels import router
from moepress.kernels.router import Formula
from on_gpu.card import Card
from on_gpu.case import Case, CheckError, Row
from on_gpu.compare import Worst

CALLS = 32
TOKENS = (1, 4, 16)
BF16 = torch.bfloat16
HALF = {"product_dtype": BF16, "logits_dtype": BF16}


@dataclass(frozen=True)
class Router:
    """A router's shape and formula, in bfloat16."""

    experts: int
    columns: int
    top_k: int
    formula: Formula
    corrected: bool = False


MIXTRAL = Router(8, 4096, 2, Formula("softmax", True, **HALF))
QWEN3 = Router(128, 2048, 8, Formula("softmax", True, **HALF, weights_dtype=BF16))
DEEPSEEK = Router(256, 7168, 8, Formula("sigmoid", True, 1e-20, 2.5, 8, 4), True)
ROUTERS = {"Mixtral-8x7B": MIXTRAL, "Qwen3-30B-A3B": QWEN3, "DeepSeek-V3": DEEPSEEK}
OTHERS = {  # for checks alone
    "gpt-oss-120b": Router(
        128, 2880, 4, Formula("chosen", **HALF, score_dtype=BF16, weights_dtype=BF16)
    ),
    "DeepSeek-V2": Router(
        160, 5120, 6, Formula("softmax", scale=16.0, groups=8, kept_groups=3, group_best=1)
    ),
    "LFM2-8B-A1B": Router(
        32, 2048, 4,
        Formula("sigmoid", True, 1e-6, **HALF, score_dtype=BF16, weights_dtype=BF16), True,
    ),
    "DeepSeek-V4": Router(384, 1032, 6, Formula("sqrtsoftplus", True, 1e-20, 1.5), True),
    "32 of 1024": Router(1024, 264, 32, Formula("softmax")),
}  # fmt: skip

Given = tuple[Tensor, Tensor, Tensor | None]  # hidden [T, H], weight [E, H], correction [E]


def check_cases(card: Card) -> Iterator[Case]:
    """For the part `checks`."""
    yield Case("route", partial(check_route, card), 90)


def cases(card: Card) -> Iterator[Case]:
    yield Case("routers of transformers", partial(check_modules, card), 60)
    for name in ROUTERS:
        for tokens in (1, 4) if card.tiny else TOKENS:
            yield Case(f"{name}, {tokens} tokens", partial(times, card, name, tokens), 60)


def drawn(card: Card, shape: Router, tokens: int, seed: int = 0) -> Given:
    """Random inputs whose logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, shape.columns, generator=generator)
    weight = torch.randn(shape.experts, shape.columns, generator=generator)
    correction = 0.1 * torch.randn(shape.experts, generator=generator)
    weight *= 2 * shape.columns**-0.5
    return (
        hidden.to(card.device, BF16),
        weight.to(card.device, BF16),
        correction.to(card.device) if shape.corrected else None,
    )


def by_op(shape: Router, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, correction = given
    return kernels.route(
        hidden, weight, None, correction, shape.top_k, *astuple(shape.formula)
    )  # fmt: skip


def by_torch(shape: Router, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """As transformers computes it."""
    hidden, weight, correction = given
    formula, k = shape.formula, shape.top_k
    dtype = formula.product_dtype
    logits = F.linear(hidden.to(dtype), weight.to(dtype))
    if correction is None:
        scores = torch.softmax(logits, -1, dtype=torch.float32)
        weights, index = torch.topk(scores, k, dim=-1)
    else:
        scores = logits.sigmoid()
        choice = scores + correction
        grouped = choice.view(len(choice), formula.groups, -1)
        worth = grouped.topk(2, dim=-1)[0].sum(-1)
        kept = torch.topk(worth, formula.kept_groups, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(worth).scatter_(1, kept, 1)
        mask = mask.unsqueeze(-1).expand_as(grouped).reshape(choice.shape)
        choice = choice.masked_fill(~mask.bool(), -torch.inf)
        index = torch.topk(choice, k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, index)
    if formula.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + formula.epsilon)
    if formula.scale != 1:
        weights = weights * formula.scale
    return logits, weights.to(formula.weights_dtype), index


# Checks


def check_route(card: Card) -> list[Row]:
    """Logits against float64; choices and weights from the logits that were found.

    Errors: of the logits of a token. Of equal choices the op takes the first.
    """
    worst = Worst()
    for name, shape in (ROUTERS | OTHERS).items():
        for tokens in (1, 5) if card.tiny else (1, 2, 4, 5, 16, 17):
            given = drawn(card, shape, tokens, seed=tokens)
            card.poison()
            found = by_op(shape, given)
            compare(worst, f"{name}, {tokens} tokens", shape, given, found)
            again = by_op(shape, given)
            for one, other in zip(found, again, strict=True):
                worst.same(f"{name}, {tokens} tokens, twice", one, other)
    equal = torch.zeros(2, 8, device=card.device), torch.ones(20, 8, device=card.device), None
    (_, _, index) = by_op(Router(20, 8, 4, Formula("softmax")), equal)
    worst.expect("equal ones", index.tolist() == [[0, 1, 2, 3]] * 2)
    return worst.rows()


def compare(
    worst: Worst, label: str, shape: Router, given: Given, found: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, correction = (None if x is None else x.cpu() for x in given)
    assert hidden is not None and weight is not None
    logits, weights, index = (x.cpu() for x in found)
    formula = shape.formula
    exact = hidden.double() @ weight.double().T
    worst(f"{label}: logits", logits, exact.float(), 1e-5, formula.logits_dtype)
    scores = router.scores_of(logits, formula)
    choice = router.choices(scores, correction, formula).float()
    best = choice.sort(-1, descending=True).values[:, : shape.top_k]
    gap = float((choice.gather(1, index) - best).abs().max())
    # exp of the card and of the CPU differ in the last bit, and so may a rounding to 16 bits.
    allowed = 4 * torch.finfo(formula.score_dtype).eps * float(best.abs().max())
    worst.expect(f"{label}: choices are {gap:.2g} below the best", gap <= allowed)
    worst.expect(f"{label}: chosen twice", all(len(set(i)) == len(i) for i in index.tolist()))
    mine = scores.gather(1, index)
    if formula.score == "chosen":
        mine = torch.softmax(mine.float(), -1)
    if formula.normalise:
        mine = mine.float() / (mine.float().sum(-1, keepdim=True) + formula.epsilon)
    mine = mine.float() * formula.scale
    far = float(((weights.float() - mine).abs() / mine.abs().clamp_min(1e-30)).max())
    allowed = 5 * max(torch.finfo(d).eps for d in (formula.score_dtype, formula.weights_dtype))
    worst.expect(f"{label}: weights differ by {far:.2g}", far <= allowed + 2e-6)


def modules(card: Card) -> Iterator[tuple[str, nn.Module]]:
    """Routers of transformers in bfloat16, with random weights."""
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    for kind, config in (
        (MixtralTopKRouter, MixtralConfig()),
        (Qwen3MoeTopKRouter, Qwen3MoeConfig(norm_topk_prob=True)),
    ):
        module: Any = kind(config)
        module.weight.data.normal_(0, 2 * config.hidden_size**-0.5)
        yield kind.__name__, module.to(card.device, BF16).eval()


@torch.no_grad()
def check_modules(card: Card) -> list[Row]:
    """Which routers of transformers are replaced, and whether they choose as before.

    `other`: tokens for which one of the logits, or of equal ones another, was rounded otherwise.
    """
    rows: list[Row] = []
    for name, module in modules(card):
        x = torch.randn(16, module.weight.shape[1], device=card.device).to(BF16)
        expected = module(x)
        with fused_routers(nn.Sequential(module), (card.device.type,)):
            replaced = "forward" in vars(module)
            found = module(x)
        same = (found[2].sort(1).values == expected[2].sort(1).values).all(1)
        rows.append({"router": name, "replaced": replaced, "other": int((~same).sum())})
        close = torch.allclose(found[0].float(), expected[0].float(), rtol=0.02, atol=0.02)
        if not replaced or not close or float(same.float().mean()) < 0.7:
            raise CheckError(f"expected a router that is replaced and chooses as before: {rows}")
    return rows


# Times


@torch.inference_mode()
def times(card: Card, name: str, tokens: int) -> list[Row]:
    """Microseconds of a call, and then the op's kernels."""
    shape = ROUTERS[name]
    calls = 2 if card.tiny else CALLS
    given = [drawn(card, shape, tokens, seed) for seed in range(calls)]
    ours = microseconds(card, partial(by_op, shape), given)
    norm = microseconds(card, times_one, given)
    after = microseconds(card, lambda one: (times_one(one), by_op(shape, one)), given)
    weight = given[0][1]
    row: Row = {
        "router": name,
        "tokens": tokens,
        "op_us": ours,
        "after_us": after - norm,
        "torch_us": microseconds(card, partial(by_torch, shape), given),
        "gb_per_s": weight.numel() * weight.element_size() / ours / 1e3,
    }
    found = card.profiled(lambda: [by_op(shape, one) for one in given])
    return [row, *({"router": name, "tokens": tokens, **kernel_of(k)} for k in found)]


def times_one(given: Given) -> Tensor:
    """A kernel of torch's that reads and writes the hidden states."""
    return given[0].mul_(1)


def kernel_of(row: Row) -> Row:
    return {"kernel": row["kernel"], "us": row["us"] / max(row["calls"], 1)}


def microseconds(card: Card, call: Callable[[Given], Any], given: list[Given]) -> float:
    """Of one of the calls, replayed as one CUDA graph."""
    replay, _ = card.captured(lambda: [call(one) for one in given])
    return 1e6 * card.seconds(replay) / len(given)
