"""Walks through families whose layers hand on more than states, forward, backward and resumed.

The oracle is the model itself: its logits, and its gradients by autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moepress.costs.sensitivity import embedding_norms, head_gradient, measure_sensitivity
from moepress.draws import drawn_tokens, gumbel_noise
from moepress.errors import InputError
from moepress.format.journal import Journal
from moepress.original import batches as batch_sizes
from moepress.original.backward import BackwardWalk
from moepress.original.between import bytes_between_layers
from moepress.original.carried import CarriedCall, Gathered, Placeholder, returned_values
from moepress.original.passes import passes_back
from moepress.original.source import Source
from moepress.original.walk import Walk
from tests.families.models import make_model, save_model

IDS = torch.randint(2, 360, (3, 24), generator=torch.Generator().manual_seed(0))
SHARED_KEYS = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 384,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LOOP = {  # blocks of one layer: before the loop, of its three layers, after it
    "num_hidden_layers": 5,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid", "hybrid_sliding"],
    "mlp_layer_types": ["dense"] + 4 * ["sparse"],
    "loop_layer_index_start": 1,
    "loop_layer_index_end": 4,
    "loop_num_passes": 3,
}
# Family, changes of its tiny config, and the names of the values carried out of the last layer.
FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "states only": ("mixtral", {}, set()),
    "chosen tokens": ("glm_moe_dsa", {}, {"returned.0"}),
    "states of the router": ("zaya", {}, {"returned.0"}),
    "keys and values": (
        "gemma4_text",
        SHARED_KEYS,
        {f"shared.{kind}_attention.{n}" for kind in ("sliding", "full") for n in (0, 1)},
    ),
    "several residual streams": ("qwen4_exp_text", {}, set()),
    "a loop": ("inkling2_loop_text", LOOP, {"blocks"}),
}


class Case(NamedTuple):
    folder: Path
    names: set[str]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            family, changes, names = FAMILIES[name]
            folder = tmp_path_factory.mktemp(family) / "model"
            made[name] = Case(save_model(make_model(family, **changes), folder), names)
        return made[name]

    return make


def oracle(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model.requires_grad_(False)


def pass_layer(walk: Walk, layer: int) -> None:
    with walk.source.layer_loaded(layer):
        walk.pass_layer(layer)


def logits(walk: Walk) -> Tensor:
    return torch.cat([found.clone() for _, found in walk.logits()])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_walk_is_the_models_forward_and_goes_on_where_it_stopped(
    case: Callable[[str], Case], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_sizes, "BATCH_TOKENS", 48)  # batches of two sequences and of one
    folder, names = case(name)
    with torch.inference_mode():
        expected = oracle(folder)(IDS, use_cache=False).logits
    source = Source(folder)
    count = len(source.layers)
    walk = Walk(source, IDS)
    for layer in range(count - 1):
        pass_layer(walk, layer)
    journal = Journal(tmp_path, {}, count)
    for layer in range(count - 1):
        journal.commit(layer, {"x": torch.ones(1)}, walk.tensors)
    resumed = Walk(source, IDS)
    assert list(journal.remaining(resumed.restore)) == [count - 1]
    for one in (walk, resumed):
        pass_layer(one, count - 1)
        assert set(one.carried) == names
        torch.testing.assert_close(logits(one), expected, rtol=1e-4, atol=1e-4)


def passed_layers(walk: Walk) -> list[dict[str, Tensor]]:
    """Bring a walk through all layers. Returns what it was in front of each."""
    stored = []
    for layer in range(len(walk.source.layers)):
        stored.append({k: v.clone() for k, v in walk.tensors().items()})
        pass_layer(walk, layer)
    return stored


def test_a_walk_goes_on_inside_a_loop(case: Callable[[str], Case]) -> None:
    folder, _ = case("a loop")
    source = Source(folder)
    walk = Walk(source, IDS)
    stored = passed_layers(walk)
    assert [len(one["states"]) // len(IDS) for one in stored] == [1, 3, 3, 3, 1]
    for start in range(1, len(stored)):
        resumed = Walk(source, IDS)
        resumed.restore(stored[start])
        for layer in range(start, len(stored)):
            pass_layer(resumed, layer)
        assert torch.equal(logits(resumed), logits(walk))


def test_sensitivities_of_a_loop_go_on_where_they_stopped(
    case: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of all passes, in the order that a walk has these in."""
    source = Source(case("a loop").folder)
    whole = measure_sensitivity(source, IDS, tmp_path / "whole", {}, seed=0)
    back, calls = BackwardWalk.back, []

    def stopped(self: BackwardWalk, layer: int, linears: Any) -> Any:
        calls.append((layer, self.walk.passes))
        if len(calls) == 6:  # in the second pass from the last
            raise KeyboardInterrupt
        return back(self, layer, linears)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BackwardWalk, "back", stopped)
        measure_sensitivity(source, IDS, tmp_path / "stopped", {}, seed=0)
    assert calls == [(4, (0,)), *((layer, (2,)) for layer in (3, 2, 1)), (3, (1,)), (2, (1,))]
    resumed = measure_sensitivity(source, IDS, tmp_path / "stopped", {}, seed=0)
    for layer in range(len(source.layers)):
        expected, found = whole.layer(layer), resumed.layer(layer)
        assert expected.keys() == found.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name])
            assert len(value) == (3 if layer in (1, 2, 3) else 1) * IDS.numel()
    assert not list(tmp_path.rglob("states-*"))
    assert not list(tmp_path.rglob("gradient-*"))


def squared_norms(model: nn.Module, paths: list[str]) -> Callable[[], dict[str, Tensor]]:
    """Hooks on modules of the oracle, and a function that gives [T] after the backward pass."""
    seen: dict[str, list[Tensor]] = {}
    modules = dict(model.named_modules())

    def hook(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.retain_grad()
                seen.setdefault(path, []).append(out)

        return keep

    for path in paths:
        modules[path].register_forward_hook(hook(path))

    def norms() -> dict[str, Tensor]:
        return {
            path: torch.cat([o.grad.square().sum(-1).flatten() for o in outs if o.grad is not None])
            for path, outs in seen.items()
        }

    return norms


@pytest.mark.parametrize("name", FAMILIES)
def test_bytes_between_layers_are_those_of_a_walk(case: Callable[[str], Case], name: str) -> None:
    source = Source(case(name).folder)
    walk = Walk(source, IDS)
    held = []
    for layer in range(len(source.layers)):
        held.append(sum(value.nbytes for value in walk.tensors().values()))
        with source.layer_loaded(layer):
            walk.pass_layer(layer)
    held.append(sum(value.nbytes for value in walk.tensors().values()))
    found = bytes_between_layers(source, IDS.shape[1])
    assert [IDS.numel() * one for one in found] == held
    assert (max(found) > found[0]) == bool(case(name).names)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_backward_walk_is_autograd(
    case: Callable[[str], Case], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the experts, at all linears and at the embedding of every layer."""
    monkeypatch.setattr(batch_sizes, "BATCH_TOKENS", 48)
    folder, _ = case(name)
    source = Source(folder)
    walk = Walk(source, IDS)
    stored = passed_layers(walk)
    gradient = head_gradient(walk, 0)
    back = BackwardWalk(walk, gradient)
    found: dict[str, Tensor] = {}
    for layers in reversed(walk.loop.groups(range(len(source.layers)))):
        for number in passes_back(gradient, walk.loop.runs(layers[0])):
            for layer in reversed(layers):
                walk.restore(stored[layer])
                with source.layer_loaded(layer):
                    one = back.on(walk.of_pass(number))
                    at_experts, norms = one.back(layer, source.packable[layer])
                new = {name.removesuffix(".weight"): norm for name, norm in norms.items()}
                if at_experts is not None:
                    new[source.experts[layer].path] = at_experts
                for path, norm in new.items():  # the oracle's first pass comes first
                    found[path] = torch.cat([norm, found[path]]) if path in found else norm
    model = oracle(folder)
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_() * 1)
    expected = squared_norms(model, list(found))
    predictions = model(IDS, use_cache=False).logits.log_softmax(-1)
    noise = gumbel_noise(tuple(IDS.shape), predictions.shape[-1], 0)
    drawn = [
        drawn_tokens(p.detach(), noise.at(starts))
        for p, starts in zip(predictions, noise.starts, strict=True)
    ]
    predictions.gather(-1, torch.stack(drawn)[..., None]).sum().backward()
    for path, norm in expected().items():
        if norm.shape == found[path].shape:  # zaya calls a linear for the token before the first
            torch.testing.assert_close(found[path], norm, rtol=1e-3, atol=1e-5 * float(norm.max()))
        else:
            assert path.endswith("v_proj_delayed")
    assert len(expected()) >= len(found) - 2
    assert embedding_norms(back).min() > 0


@pytest.mark.parametrize("family", ["sarvam_moe", "lara_mini"])
def test_tensors_that_are_split_are_what_transformers_loads(family: str, tmp_path: Path) -> None:
    folder = save_model(make_model(family), tmp_path / "model")
    source = Source(folder)
    state = oracle(folder).state_dict()
    for name in source.all_names:
        assert torch.equal(source.tensor(name), state[name]), name


def test_layers_that_are_called_twice_are_refused(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(case("states only").folder)
    layers = source.model.model.layers
    again = nn.ModuleList([*layers, layers[1]])
    monkeypatch.setattr(source.model.model.config, "num_hidden_layers", len(again))
    source.model.model.layers = again
    with pytest.raises(InputError, match=r"in the order \[0, 1, 2, 1\]. Expected each layer once"):
        Walk(source, IDS)


class Undecided(nn.Module):
    def forward(self, hidden_states: Tensor, short: bool = False) -> Any:
        if short:
            return hidden_states
        return hidden_states, None


class Pair(nn.Module):
    def forward(self, hidden_states: Tensor, other: Tensor | None = None) -> tuple[Tensor, Any]:
        def inner() -> tuple[int, int, int]:
            return 1, 2, 3

        return hidden_states, inner()[0]


def test_what_layers_return_is_read_from_their_code() -> None:
    assert returned_values(nn.Linear(1, 1)) == 0 and returned_values(Pair()) == 1
    with pytest.raises(InputError, match="sometimes return 1 values and sometimes 2"):
        returned_values(Undecided())


def test_what_layers_return_is_checked() -> None:
    call = CarriedCall((Placeholder("returned.0"),), {}, torch.zeros(1, 2, 3), {})
    assert call.args == (None,)
    with pytest.raises(InputError, match=r"returns \['Tensor', 'int'\]. Expected 2 tensors"):
        call.run(Pair())


def test_what_is_carried_has_one_entry_for_each_sequence() -> None:
    gathered = Gathered({}, 4, torch.device("cpu"))
    with pytest.raises(InputError, match=r"hand x of shape \(6, 1\) on, for 2 sequences"):
        gathered.add(slice(0, 2), {}, {"x": torch.zeros(6, 1)})
