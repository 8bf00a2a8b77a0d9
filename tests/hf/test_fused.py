"""Norms and rotary embeddings by our ops: which formula is found, and that nothing else changes."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from moepress import kernels
from moepress.hf import fused_norms as norming
from moepress.hf import fused_rotary as turning
from moepress.hf.captured import PROOFS, CapturedSteps
from moepress.hf.fused_norms import MOST_ROWS, Norm, fused_norms, norms_of
from moepress.hf.fused_rotary import MOST_TOKENS, Form, forms_of, fused_rotary
from tests.families.causal import CAUSAL
from tests.families.models import make_model
from tests.hf.tape import tape

CPU = torch.device("cpu")
HERE = ("cpu",)
IDS = (torch.arange(24)[None] * 7) % 300 + 5
STEPS = 3
# Every formula, every style, norms without weight, heads of which a part turns, one tensor a call.
SOME = (
    "mixtral", "gpt_oss", "gemma4_text", "qwen3_next", "deepseek_v3", "cohere2_moe", "ernie4_5_moe",
    "glm4_moe", "llama4_text", "zaya", "deepseek_v4",
)  # fmt: skip
NO_NORMS = {"cohere2_moe", "dbrx", "phimoe"}  # these have LayerNorm
# Complex angles, other shapes, or none at all
NO_ROTARY = {
    "deepseek_v2", "deepseek_v4", "inkling2_loop_text", "inkling2_text", "inkling_text", "jamba",
    "kimi_linear", "llama4_text", "granitemoehybrid", "nemotron_h",
}  # fmt: skip

WIDE_ROUTERS = {"inkling2_text", "inkling2_loop_text"}  # float32, which `to` does not know


@contextmanager
def fused(model: nn.Module, devices: tuple[str, ...] = HERE) -> Iterator[None]:
    with fused_norms(model, devices), fused_rotary(model, devices):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op was called by a model; calls that try formulas do not count."""
    seen: Counter[str] = Counter()
    trying = []
    for home, op, finder in (
        (norming, "rms_norm", "_norm_of"),
        (turning, "rotary", "_form_of"),
    ):
        plain, find = getattr(home, op), getattr(home, finder)

        def counted(*given: Any, op: str = op, plain: Any = plain) -> Any:
            seen[op] += not trying
            return plain(*given)

        def tried(*given: Any, find: Any = find) -> Any:
            trying.append(0)
            try:
                return find(*given)
            finally:
                trying.pop()

        monkeypatch.setattr(home, op, counted)
        monkeypatch.setattr(home, finder, tried)
    return seen


@torch.no_grad()
def decoded(model: Any) -> Tensor:
    """Logits of a prompt and of tokens after it."""
    taken = model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=STEPS, min_new_tokens=STEPS,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.cat(taken.logits).float()


def families() -> Iterator[object]:
    for family in CAUSAL:
        yield pytest.param(family, marks=[] if family in SOME else [pytest.mark.families])


@pytest.mark.parametrize("family", families())
def test_logits_stay(family: str, calls: Counter[str]) -> None:
    original = make_model(family)
    dtypes = (torch.float32,) if family in WIDE_ROUTERS else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        model = copy.deepcopy(original).to(dtype)
        calls.clear()
        expected = decoded(model)
        assert not calls
        before = functions_of(model)
        with fused(model):
            found = decoded(model)
        assert bool(calls["rms_norm"]) == (family not in NO_NORMS)
        assert bool(calls["rotary"]) == (family not in NO_ROTARY)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        assert functions_of(model) == before
        assert not any("forward" in vars(module) for module in model.modules())


def functions_of(model: nn.Module) -> list[Any]:
    homes = {type(module).__module__ for module in model.modules()}
    return [
        value
        for home in sorted(homes)
        for name, value in vars(sys.modules[home]).items()
        if name.startswith("apply_rotary")
    ]


# Which formula


def first_norm(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if type(m).__name__.endswith("RMSNorm"))


def test_the_formula_is_that_of_the_class() -> None:
    """Also where all weights are 1, as in new models, and all formulas give the same."""
    for family, norm in {
        "mixtral": Norm("variance_epsilon", "rounded"),
        "gpt_oss": Norm("variance_epsilon", "wide"),
        "gemma4_text": Norm("eps", "wide"),
        "qwen3_next": Norm("eps", "centered"),
        "llama4_text": Norm("eps", "rounded"),
    }.items():
        module = first_norm(make_model(family).bfloat16())
        with torch.no_grad():
            module.weight.fill_(1)  # type: ignore[operator, union-attr]
        assert norms_of(module, CPU, {torch.bfloat16}) == {torch.bfloat16: norm}, family
        assert module.weight.eq(1).all()  # type: ignore[operator, union-attr]


def test_the_form_is_that_of_the_function() -> None:
    bf16 = torch.bfloat16
    for family, kinds in {
        "mixtral": {(bf16, bf16, "whole"): Form("halves", False)},
        "gpt_oss": {(bf16, bf16, "half"): Form("halves_of_pairs", False)},
        "cohere2_moe": dict.fromkeys(
            ((bf16, bf16, "whole"), (bf16, torch.float32, "whole")), Form("neighbours", True)
        ),
        "qwen3_next": {(bf16, bf16, s): Form("halves", False) for s in ("whole", "half", "part")},
    }.items():
        ((_, _, function),) = turning._functions(make_model(family))
        assert forms_of(function, CPU, bf16) == kinds, family


class Strange(nn.Module):
    """The largest number in the place of the mean of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.abs().amax(-1, keepdim=True) + self.eps)


class OtherEpsilon(Strange):
    """The epsilon is not where it seems to be."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 10 * self.eps))


class Either(nn.Module):
    """Two norms of one class that compute other things, in one case of heads alone."""

    def __init__(self, centered: bool, of_heads: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.eps = 1e-6
        self.centered, self.of_heads = centered, of_heads

    def forward(self, x: Tensor) -> Tensor:
        axes = (-2, -1) if self.of_heads and x.dim() == 4 else (-1,)
        normed = x * torch.rsqrt(x.pow(2).mean(axes, keepdim=True) + self.eps)
        return normed * (1 + self.weight if self.centered else self.weight)


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Turns the other way."""
    from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb as right

    turned: tuple[Tensor, Tensor] = right(q, k, cos, -sin, unsqueeze_dim)
    return turned


def test_what_is_not_known_is_left_alone() -> None:
    known = first_norm(make_model("mixtral"))
    layer = nn.LayerNorm(64, bias=False)
    model = nn.ModuleList([Strange(), OtherEpsilon(), nn.LayerNorm(64), layer, known])
    before = apply_rotary_pos_emb
    with fused(model):
        assert ["forward" in vars(module) for module in model] == [False] * 4 + [True]
        assert apply_rotary_pos_emb is before


def test_norms_of_one_class_are_tried_one_by_one() -> None:
    model = nn.ModuleList(
        [Either(False), Either(True), Either(False), Either(False, of_heads=True)]
    )
    x = torch.randn(1, 2, 3, 64)
    expected = [module(x) for module in model]
    with torch.no_grad(), fused(model):
        assert ["forward" in vars(module) for module in model] == [True, False, True, False]
        for module, one in zip(model, expected, strict=True):
            torch.testing.assert_close(module(x), one)


def test_other_devices_are_left_alone() -> None:
    model = make_model("mixtral")
    before = functions_of(model)
    with fused(model, ("cuda",)):
        assert not any("forward" in vars(module) for module in model.modules())
        assert functions_of(model) == before


def test_an_error_restores_everything() -> None:
    model = make_model("mixtral")
    before = functions_of(model)
    with pytest.raises(KeyboardInterrupt), fused(model):
        assert any("forward" in vars(module) for module in model.modules())
        assert functions_of(model) != before
        raise KeyboardInterrupt
    assert functions_of(model) == before
    assert not any("forward" in vars(module) for module in model.modules())


# Which calls


def test_many_rows_and_gradients_are_computed_as_ever(calls: Counter[str]) -> None:
    model = make_model("mixtral")
    norm = first_norm(model)
    x = torch.randn(1, MOST_ROWS + 1, 64)
    with fused(model):
        for rows, called in ((MOST_ROWS, 1), (MOST_ROWS + 1, 0), (0, 0)):
            calls.clear()
            with torch.no_grad():
                norm(x[:, :rows])
            assert calls["rms_norm"] == called
        calls.clear()
        norm(x[:, :1]).sum().backward()
        assert not calls and norm.weight.grad is not None
        model.requires_grad_(False)
        norm(x[:, :1])
        assert calls["rms_norm"] == 1
        with torch.no_grad():
            norm(hidden_states=x[:, :1])  # as another module might call it
            norm(x[:, :1].half())
        assert calls["rms_norm"] == 1


def test_calls_of_rotary_embeddings(calls: Counter[str]) -> None:
    from transformers.models.mixtral import modeling_mixtral as mixtral

    model = make_model("mixtral")
    plain = mixtral.apply_rotary_pos_emb

    def drawn(tokens: int, heads: int = 1, batches: int = 1) -> list[Tensor]:
        torch.manual_seed(tokens)
        shapes = [(batches, n, tokens, 16) for n in (4, 2)]
        angles = [torch.randn(batches, tokens, 16) for _ in range(2)]
        return [*(torch.randn(s).transpose(1, heads) for s in shapes), *angles]

    def same(given: list[Tensor], called: bool, **named: Any) -> None:
        calls.clear()
        found = mixtral.apply_rotary_pos_emb(*given, **named)
        for one, other in zip(found, plain(*given, **named), strict=True):
            assert torch.equal(one, other) and one.shape == other.shape
        assert bool(calls["rotary"]) == called

    with fused_rotary(model, HERE):
        same(drawn(1), True)
        same(drawn(3, batches=2), True)
        same(drawn(3, heads=2), True, unsqueeze_dim=2)
        same(drawn(MOST_TOKENS + 1), False)
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(same, drawn(1), False).result()
        q, k, cos, sin = drawn(2)
        same([q.requires_grad_(), k, cos, sin], False)
        with torch.no_grad():
            same([q, k, cos, sin], True)
            same([q.half(), k.half(), cos.half(), sin.half()], False)
            calls.clear()
            found = mixtral.apply_rotary_pos_emb(q, k, sin=sin, cos=cos)
            assert torch.equal(found[0], plain(q, k, cos, sin)[0]) and calls["rotary"] == 1
        many = drawn(3, batches=2)
        same([*many[:2], *(a[:1] for a in many[2:])], True)  # angles of one sequence for all


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_next", "gemma4_text"])
@torch.inference_mode()
def test_captured_steps(family: str, calls: Counter[str]) -> None:
    model = make_model(family)
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **given)
    with CapturedSteps(model, capture=tape, devices=HERE) as steps:
        found = model.generate(IDS, **given)
    assert torch.equal(found, expected)
    assert (steps.refused, steps.replayed) == (None, 12 - 1 - PROOFS)
    assert calls["rms_norm"] and calls["rotary"]


@pytest.mark.parametrize("exact", [True, False], ids=["plain PyTorch", "kernels"])
def test_a_cache_that_grows_sees_the_same_keys(calls: Counter[str], exact: bool) -> None:
    """In plain PyTorch sums of norms have one order."""
    model = make_model("qwen3_moe")
    caches = []
    for inside in (False, True):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), kernels.only("reference") if exact else nullcontext():
            model(IDS, past_key_values=cache)
            with fused(model, HERE if inside else ()):
                model(IDS[:, :2], past_key_values=cache)
        caches.append(cache)
    assert calls["rotary"] == model.config.num_hidden_layers
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        torch.testing.assert_close(one.keys, other.keys, **close)
        torch.testing.assert_close(one.values, other.values, **close)
