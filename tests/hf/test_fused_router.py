"""Routers replaced by the op `moepress::route`: which are, and that they choose as before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moepress.hf import fused_router, router_formula
from moepress.hf.captured import CapturedSteps
from moepress.hf.cuda_graph import Graph
from moepress.hf.fused_router import fused_routers
from moepress.hf.router_formula import find_way
from moepress.hf.router_parts import parts_of
from moepress.prune import Pruning, prune
from tests.families.causal import CAUSAL
from tests.families.composites import TEXT_ONLY
from tests.families.models import make_model
from tests.hf.tape import tape

CPU = ("cpu",)
IDS = torch.arange(2 * 8).view(2, 8) * 7 % 300 + 5
LEFT = {  # why: what these compute has no formula
    "dbrx": "the block chooses",
    "doge": "products of keys",
    "gemma4_text": "a norm, and scales of experts",
    "inkling_text": "shared experts are weighed too",
    "jetmoe": "sorts the tokens",
    "kolibri1": "chooses by corrected logits",
    "llama4_text": "the scores of all experts",
    "phimoe": "sparsemixer",
    "zaya": "a small network, with states of the layer before",
}
FAMILIES = sorted([*CAUSAL, *TEXT_ONLY])
# Logits of 16 bits: other roundings of products, of scores, of weights.
SIXTEEN_BITS = (
    "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "ernie4_5_moe", "gpt_oss",
    "granitemoe", "hunyuan_v1_moe", "lfm2_moe", "minimax_m2", "mistral4", "cohere2_moe",
)  # fmt: skip

FAST = {*SIXTEEN_BITS, "afmoe", "flint", "gemma4_text", "inkling2_loop_text", "phimoe"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of the op inside a model."""
    found: list[int] = []
    plain = fused_router.routed

    def counted(hidden: Tensor, *rest: Any) -> Any:
        found.append(len(hidden))
        return plain(hidden, *rest)

    monkeypatch.setattr(fused_router, "routed", counted)
    return found


def routers(model: nn.Module) -> list[nn.Module]:
    """The modules that are replaced now."""
    return [m for m in model.modules() if isinstance(vars(m).get("forward"), fused_router._Fused)]


@torch.no_grad()
def gives_indices_first(model: nn.Module) -> bool:
    """Whether they are Granite's of transformers 5.17: those are left alone."""
    routers = [m for m in model.modules() if type(m).__name__ == "GraniteMoeTopKRouter"]
    return any(not m(torch.randn(2, m.weight.shape[1]))[0].is_floating_point() for m in routers)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in FAST else pytest.mark.families) for f in FAMILIES]
)
def test_families(family: str, calls: list[int]) -> None:
    model = make_model(family)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = [logits_of(model, ids) for ids in (IDS, IDS.repeat(2, 1))]
    left = family in LEFT or gives_indices_first(model)
    assert not calls
    with fused_routers(model, CPU):
        found = [logits_of(model)]
        count = len(routers(model))
        assert bool(count) == (not left)
        assert len(calls) >= count and set(calls) <= {IDS.numel()}
        found.append(logits_of(model, IDS.repeat(2, 1)))
        assert len(calls) <= 2 * count  # a loop of layers runs some of them twice
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def trial(module: nn.Module, dtype: torch.dtype) -> tuple[Any, Any]:
    """Parts and way of a router."""
    parts = parts_of(module)
    assert parts is not None
    return parts, find_way(module, parts, dtype)


@torch.no_grad()
@pytest.mark.parametrize("family", SIXTEEN_BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(family: str, dtype: torch.dtype) -> None:
    """Choices of other inputs than were tried, from the very logits, are a router's own."""
    model = make_model(family).to(dtype)
    with fused_routers(model, CPU):
        modules = routers(model)
    if gives_indices_first(make_model(family)):
        assert not modules
        return
    assert modules
    for module in modules:
        parts, way = trial(module, dtype)
        hidden = router_formula.tried_states(parts.weight, dtype)[:64].flip(1)
        correction = 0.1 * torch.randn(len(parts.weight)) if parts.corrected else None
        given = () if correction is None else (correction,)
        expected = module(hidden if 2 in way.dims else hidden[None], *given)
        found = router_formula.routed(hidden, parts, correction, way.formula)
        for one, other in zip(found[:2], expected[:2], strict=True):
            assert one.dtype == other.dtype
        # Of equal scores others may be chosen.
        same = (found[2].sort(1).values == expected[2].sort(1).values).all(1)
        assert same.float().mean() > 0.8
        weights = [torch.zeros_like(found[0]).scatter(1, x[2], x[1].to(found[0].dtype))[same]
                   for x in (found, expected)]  # fmt: skip
        torch.testing.assert_close(*weights, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


CHANGED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "groups by two": (
        "deepseek_v3", {"n_routed_experts": 16, "n_group": 4, "topk_group": 2},
        {"score": "sigmoid", "groups": 4, "kept_groups": 2, "group_best": 2, "scale": 2.5},
    ),
    "groups by one": (
        "deepseek_v2",
        {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
         "topk_method": "group_limited_greedy"},
        {"score": "softmax", "groups": 4, "kept_groups": 2, "group_best": 1},
    ),
    "groups that do not count": (
        "deepseek_v2",
        {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "topk_method": "greedy"},
        {"groups": 1},
    ),
    "groups whose others count 0": (
        "axk2", {"num_local_experts": 16, "n_group": 4, "topk_group": 2},
        {"score": "sigmoid", "groups": 4, "kept_groups": 2},
    ),
    "groups of softmax": (
        "mistral4", {"n_routed_experts": 16, "n_group": 4, "topk_group": 1},
        {"score": "softmax", "groups": 4, "kept_groups": 1},
    ),
    "normalised": ("qwen3_moe", {"norm_topk_prob": True}, {"normalise": True}),
    "not normalised": ("qwen3_moe", {"norm_topk_prob": False}, {"normalise": False}),
    "scaled": ("glm4_moe", {"routed_scaling_factor": 3.5}, {"scale": 3.5}),
    "sigmoid": ("cohere2_moe", {"expert_selection_fn": "sigmoid"}, {"score": "sigmoid"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_which_formula(name: str) -> None:
    family, changes, wanted = CHANGED[name]
    model = make_model(family, **changes)
    expected = logits_of(model)
    with fused_routers(model, CPU):
        modules = routers(model)
        found = logits_of(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert modules
    for module in modules:
        formula = trial(module, torch.float32)[1].formula
        assert {field: getattr(formula, field) for field in wanted} == wanted


class Router(nn.Module):
    """Softmax, the best two, with what a test changes."""

    def __init__(self, change: Callable[[Tensor], Tensor] | None = None, experts: int = 8) -> None:
        super().__init__()
        self.top_k = 2
        self.change = change or (lambda x: x)
        self.weight = nn.Parameter(torch.randn(experts, 64) / 4)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.change(F.linear(hidden, self.weight))
        weights, index = torch.softmax(logits, -1).topk(2, -1)
        return logits, weights, index


class GateOfOtherOrder(Router):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = super().forward(hidden)
        return weights, logits, index


class RouterOfAll(Router):
    """Its weights depend on the other tokens."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = super().forward(hidden)
        return logits, weights / weights.sum(), index


class RouterOfNoExpert(Router):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = super().forward(hidden)
        return logits, weights, index + 7


class RouterOfSwappedWeights(Router):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = super().forward(hidden)
        return logits, weights.flip(-1), index


class RouterWithMore(Router):
    def __init__(self) -> None:
        super().__init__()
        self.expert_scale = nn.Parameter(torch.ones(8))


class Mixer(Router):
    """By its name no router."""


class InnerRouter(Router):
    def __init__(self) -> None:
        super().__init__()
        del self.weight
        self.projection = nn.Linear(64, 8, bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.projection(hidden)
        weights, index = torch.softmax(logits, -1).topk(2, -1)
        return logits, weights, index


def fused(module: nn.Module) -> bool:
    with fused_routers(nn.Sequential(module.eval()), CPU):
        return bool(routers(module))


def test_unknown_routers_are_left_alone() -> None:
    torch.manual_seed(0)
    assert fused(Router()) and fused(InnerRouter())
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda x: 4 * torch.tanh(x / 4),
        lambda x: 1.1 * x,
        lambda x: x + 0.01,
        lambda x: x.bfloat16().float(),
        lambda x: x + torch.rand_like(x),
        lambda x: x / x.norm(),
        lambda x: x.roll(1, -1),
        lambda x: x[:4],
    ]
    for change in changes:
        assert not fused(Router(change))
    others = (
        GateOfOtherOrder, RouterOfAll, RouterOfNoExpert, RouterOfSwappedWeights, RouterWithMore,
        Mixer,
    )  # fmt: skip
    for kind in others:
        assert not fused(kind())
    hooked = InnerRouter()
    hooked.projection.register_forward_hook(lambda module, args, out: out)
    assert not fused(hooked)
    replaced = Router()
    replaced.forward = replaced.forward  # type: ignore[method-assign]
    assert not fused(replaced)


def test_a_formula_that_fits_one_router_and_not_another(calls: list[int]) -> None:
    """Modules of one class are verified one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(Router(), Router(lambda x: 2 * x), Router()).eval()
    with fused_routers(model, CPU), torch.no_grad():
        assert routers(model) == [model[0], model[2]]


def test_a_correction_of_zeros() -> None:
    """A vector is used by its name, also where it changes nothing in the layer that is tried."""
    model = make_model("deepseek_v3")
    gates = [m for m in model.modules() if "Router" in type(m).__name__]
    gates[0].e_score_correction_bias.zero_()
    for module in gates:
        assert trial(module, torch.float32)[0].correction is not None
    expected = logits_of(model)
    with fused_routers(model, CPU):
        assert len(routers(model)) == len(gates)
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)


def test_calls_that_are_left_alone(calls: list[int]) -> None:
    module = Router().eval()
    plain = copy.deepcopy(module)
    x = torch.randn(16, 64)
    with fused_routers(nn.Sequential(module), CPU):
        module(x)  # gradients
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                module(x)
            module(x.repeat(2, 1))
            module.train()(x)
            module.eval()
            assert not calls
            with torch.inference_mode():
                found = module(x)
            assert calls == [16]
            for one, other in zip(found, plain(x), strict=True):
                torch.testing.assert_close(one, other)
            module(hidden=x)
            module.double()(x.double())
            assert calls == [16]
    with torch.no_grad():
        module.float()(x)
    assert calls == [16]


def test_other_devices_are_left_alone() -> None:
    model = make_model("mixtral")
    with fused_routers(model):
        assert not routers(model)


def test_after_an_error_and_inside_another() -> None:
    model = nn.Sequential(Router()).eval()
    with pytest.raises(KeyboardInterrupt), fused_routers(model, CPU):
        raise KeyboardInterrupt
    assert "forward" not in vars(model[0])
    with fused_routers(model, CPU):
        own = vars(model[0])["forward"]
        with fused_routers(model, CPU):
            assert vars(model[0])["forward"] is own
        assert vars(model[0])["forward"] is own
    assert "forward" not in vars(model[0])


def test_hooks_of_a_router_see_its_results(calls: list[int]) -> None:
    """transformers reads logits of routers by such hooks."""
    model = make_model("mixtral")
    with torch.no_grad():
        expected = model(IDS, output_router_logits=True).router_logits
        with fused_routers(model, CPU):
            found = model(IDS, output_router_logits=True).router_logits
    assert calls and len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("protect", [0.0, 0.3])
def test_pruning(protect: float, calls: list[int]) -> None:
    model = make_model("qwen3_moe")
    pruning = Pruning(dict.fromkeys(range(3), (0.0, 0.8)), True, protect)
    found = []
    for devices in ((), CPU):
        with fused_routers(model, devices), prune(model, pruning, count=True) as pruned:
            found.append((logits_of(model), pruned.statistics()))
    assert calls
    assert found[0][1] == found[1][1] and found[0][1].share > 0.1
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "minimax_m2"])
def test_a_captured_step(family: str) -> None:
    """The op is in the graph, and the tokens are as before."""
    model: Any = make_model(family)
    names: list[str] = []

    def capture(work: Callable[[], Tensor], device: torch.device) -> Graph:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            graph = tape(work, device)
        names.extend(event.key for event in seen.key_averages())
        return graph

    ids = IDS[:1]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    with torch.inference_mode():
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        steps = CapturedSteps(model, capture=capture, devices=CPU)
        with steps:
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert steps.replayed and steps.refused is None
    assert torch.equal(found, expected)
    assert "moepress::route" in names
    assert not routers(model)


@pytest.fixture(autouse=True)
def same_numbers() -> Iterator[None]:
    torch.manual_seed(0)
    yield
