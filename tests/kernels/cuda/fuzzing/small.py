"""Random calls of attention, routers and the small ops of decoding, beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import torch
from torch import Tensor

from moepress.kernels import cuda, reference, router, small_reference
from moepress.kernels.router import SCORES, Formula
from moepress.kernels.small_reference import FORMULAS, STYLES
from tests.kernels.cuda.fuzzing.draw import FLOATS, Draw, storage_bytes, twin


def attention(draw: Draw) -> None:
    batches, heads = draw.integer("batches", 1, 3), draw.integer("heads", 1, 4)
    queries = heads * draw.integer("group", 1, draw.random.choice((2, 17)))
    tokens = draw.integer("tokens", 1, draw.random.choice((1, 5)))
    positions = draw.integer("positions", 1, draw.random.choice((70, 300, 1500)))
    size = 8 * draw.integer("size / 8", 1, draw.random.choice((8, 32)))
    dtype = draw.dtype()
    rows, whole = draw.spoiled(draw.normal(batches * queries * tokens, size).to(dtype))
    whole = whole.view(batches, queries, tokens).transpose(1, 2)
    k, v = (draw.normal(batches, heads, positions, size).to(dtype) for _ in "kv")
    mask = _mask(draw, (batches, queries, tokens, positions), dtype)
    q = rows.view(batches, queries, tokens, size)
    scale = draw.one("scale", (size**-0.5, 0.3, 2.0))
    exact = reference.attention(q.double(), k.double(), v.double(), mask, scale)
    given = draw.placed("q", q), draw.placed("k", k), draw.placed("v", v)
    found = cuda.attention(*given, mask, scale)
    plain = reference.attention(q, k, v, mask, scale)
    assert found.dtype == dtype and found.shape == exact.shape and found.is_contiguous()
    if not whole.any():
        return
    error, usual = ((y.double() - exact)[whole].abs().max() for y in (found, plain))
    size_of_values = float(v.double().abs().max())
    allowed = 2 * usual + (1e-5 + torch.finfo(dtype).eps) * size_of_values
    assert error <= allowed, f"error {error:.2g}, plain PyTorch {usual:.2g}"


def _mask(draw: Draw, full: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor | None:
    kind = draw.one("mask", ("none", "bool", "added", "float32", "least", "blind"))
    if kind == "none":
        return None
    shape = [n if draw.random.random() < 0.5 else 1 for n in full]
    seen = draw.uniform(*draw.note("mask shape", shape)) < draw.one("seen", (0.02, 0.5, 0.98))
    if kind != "blind":
        seen[..., 0] = True
    if kind in ("bool", "blind"):
        return draw.placed("mask", seen)
    least = torch.finfo(dtype).min if kind == "least" else -torch.inf
    added = draw.normal(*shape).masked_fill(~seen, least)
    return draw.placed("mask", added.to(torch.float32 if kind == "float32" else dtype))


def route(draw: Draw) -> None:
    groups = draw.one("groups", (1, 1, 1, 2, 4, 8))
    experts = groups * draw.integer("experts / groups", 1, draw.random.choice((4, 40, 128)))
    kept = draw.integer("kept", 1, groups)
    top_k = draw.integer("top_k", 1, min(32, experts // groups * kept))
    tokens, cols = draw.tokens(20), 8 * draw.integer("cols / 8", 1, draw.random.choice((20, 300)))
    score = draw.one("score", SCORES)
    formula = Formula(
        score,
        draw.random.random() < 0.5,
        draw.random.choice((0.0, 1e-20, 1e-6)),
        draw.random.choice((1.0, 2.5)),
        groups,
        kept,
        draw.random.choice((1, 2)),
        *(draw.random.choice(FLOATS) for _ in range(4)),
    )
    draw.note("formula", astuple(formula))
    hidden = draw.normal(tokens, cols).to(draw.dtype())
    weight = (draw.normal(experts, cols) * 2 * cols**-0.5).to(draw.dtype("weight dtype"))
    bias = draw.normal(experts).to(draw.dtype("bias dtype")) if draw.chance("bias", 0.3) else None
    correction = None
    if score != "chosen" and draw.chance("correction", 0.4):
        correction = (0.2 * draw.normal(experts)).to(draw.dtype("correction dtype"))
    router.check(hidden, weight, bias, correction, top_k, formula)
    given = (
        draw.placed("hidden", hidden),
        draw.placed("weight", weight, unit=draw.random.choice((1, 8))),
        None if bias is None else draw.placed("bias", bias),
        None if correction is None else draw.placed("correction", correction),
    )
    logits, weights, index = cuda.route(*given, top_k, formula)
    if tokens > 1 and draw.chance("spoiled", 0.2):  # one token, which changes no other one
        spoiled = twin(given[0])
        spoiled[0, draw.random.randrange(cols)] = torch.nan
        other = cuda.route(spoiled, *given[1:], top_k, formula)
        for one, another in zip(other, (logits, weights, index), strict=True):
            assert torch.equal(one[1:], another[1:]), "a token changes with another one's numbers"
        _are_experts(other[2], experts)
    exact = router.route(hidden.float(), weight, bias, correction, top_k, formula)[0]
    step = torch.finfo(formula.product_dtype).eps + torch.finfo(formula.logits_dtype).eps
    assert logits.dtype == formula.logits_dtype and weights.dtype == formula.weights_dtype
    torch.testing.assert_close(logits.float(), exact.float(), rtol=step, atol=1e-5)
    _same_choice(logits, weights, index, correction, formula)


def _same_choice(
    logits: Tensor, weights: Tensor, index: Tensor, correction: Tensor | None, formula: Formula
) -> None:
    """Compare the choice and its weights with those of the logits that were found.

    Logits are chosen from before they are rounded to their own dtype, so they are only looked at
    where that is no rounding. Where scores are equal up to an exponential's last bit, either expert
    may be chosen.
    """
    top_k = index.shape[1]
    _are_experts(index, logits.shape[1])
    if not index.numel():
        return
    scores = router.scores_of(logits, formula)
    choice = router.choices(scores, correction, formula)
    best = choice.sort(dim=-1, descending=True).values[:, :top_k].float()
    close = 4 * torch.finfo(formula.score_dtype).eps
    if formula.groups == 1:  # else the last bit of a score may change a group
        torch.testing.assert_close(choice.gather(1, index).float(), best, rtol=close, atol=1e-6)
    usual, same = router.choose(logits, correction, top_k, formula)
    close = 8 * max(torch.finfo(d).eps for d in (formula.score_dtype, formula.weights_dtype))
    alike = (index == same).all(1)
    assert alike.float().mean() >= (0.9 if formula.score_dtype == torch.float32 else 0.0)
    torch.testing.assert_close(weights[alike], usual[alike], rtol=close, atol=1e-6)


def _are_experts(index: Tensor, experts: int) -> None:
    for row in index.tolist():
        assert len(set(row)) == len(row) and 0 <= min(row) <= max(row) < experts, row


def rms_norm(draw: Draw) -> None:
    shape = [draw.random.randint(0 if draw.random.random() < 0.1 else 1, 5) for _ in range(2)]
    shape = shape[: draw.integer("dimensions", 1, 3) - 1]
    size = draw.integer("size", 1, draw.random.choice((40, 600, 9000)))
    size = draw.note("size", 8 * max(1, size // 8)) if draw.chance("by eights", 0.5) else size
    x = (draw.normal(*draw.note("shape", shape), size) * draw.one("factor", (1e-2, 1, 50))).to(
        draw.dtype()
    )
    weight = None
    if draw.chance("weight", 0.8):
        weight = (1 + draw.normal(size)).to(draw.dtype("weight dtype"))
        weight = draw.placed("weight", weight.expand(1, size))[0]
    formula, eps = draw.one("formula", FORMULAS), draw.one("eps", (1e-5, 1e-6, 0.1))
    if x.dim() == 2:
        x, _ = draw.spoiled(x)
    found = cuda.rms_norm(draw.placed("x", x), weight, eps, formula)
    exact = small_reference.rms_norm(x, weight, eps, formula)
    assert found.dtype == exact.dtype and found.is_contiguous()
    close = 3e-6 if x.dtype == torch.float32 else 2 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(found, exact, rtol=close, atol=1e-7, equal_nan=True)
    if exact.numel() > 1000:
        apart = (found.float() - exact.float()).abs() > 3e-6 * exact.float().abs() + 1e-7
        assert apart.float().mean() < 0.01


def rotary(draw: Draw) -> None:
    style = draw.one("style", sorted(STYLES))
    batches, tokens = draw.integer("batches", 1, 3), draw.integer("tokens", 0, 5)
    queries, keys = draw.integer("heads of q", 0, 6), draw.integer("heads of k", 0, 4)
    rotated = 2 * draw.integer("pairs", 1, draw.random.choice((8, 64, 200)))
    size = rotated + draw.one("rest", (0, 0, 1, 7, 32))
    columns = rotated // 2 if STYLES[style].doubled else rotated
    dtype, wide = draw.dtype(), draw.chance("wide", 0.5)
    q, k = (draw.normal(batches, n, tokens, size).to(dtype) for n in (queries, keys))
    one = draw.one("angles for", (1, batches))
    angles = [draw.normal(one, tokens, columns) for _ in range(2)]
    angles = [a.to(draw.dtype("angles") if wide and not i else dtype) for i, a in enumerate(angles)]
    cos, sin = (a.to(angles[0].dtype) for a in angles)
    given = q, k, cos, sin
    placed = [draw.placed(n, x) for n, x in zip(("q", "k", "cos", "sin"), given, strict=True)]
    found = cuda.rotary(*placed, style, wide)  # type: ignore[arg-type]
    exact = small_reference.rotary(*given, style, wide)
    for one_of, other, x in zip(found, exact, placed, strict=False):
        assert one_of.dtype == dtype and torch.equal(one_of, other)
        assert one_of.stride() == torch.empty_like(x).stride()


def cache_write(draw: Draw) -> None:
    batches, heads = draw.integer("batches", 1, 3), draw.integer("heads", 1, 9)
    room = draw.integer("room", 1, 9)
    held, tokens = [], []
    for name in ("keys", "values"):
        dtype = draw.one(f"{name} dtype", (*FLOATS, torch.float64, torch.uint8))
        size = draw.integer(f"size of {name}", 1, draw.random.choice((7, 140)))
        size = draw.note(f"size of {name}", 8 * -(-size // 8)) if draw.chance("8", 0.5) else size
        full, one = (
            (draw.normal(batches, heads, n, size) * 50).abs().to(dtype) for n in (room, 1)
        )  # fmt: skip
        held.append(draw.placed(name, full))
        tokens.append(draw.placed(f"one of {name}", one))
    position = torch.tensor([draw.integer("position", 0, room - 1)])
    position = position[0] if draw.chance("number", 0.5) else draw.placed("position", position)
    exact = [twin(x) for x in held]
    cuda.cache_write(held[0], held[1], *tokens, position)
    small_reference.cache_write(exact[0], exact[1], *tokens, position)
    for found, wanted in zip(held, exact, strict=True):  # what lies beside them too
        assert torch.equal(storage_bytes(found), storage_bytes(wanted))


CASES: dict[str, Callable[[Draw], None]] = {
    "attention": attention, "route": route, "rms_norm": rms_norm, "rotary": rotary,
    "cache_write": cache_write,
}  # fmt: skip
