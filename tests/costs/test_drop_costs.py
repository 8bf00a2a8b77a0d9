"""Drop costs are what the MoE block loses; no thresholds are better than the solved ones."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moepress.calibrate import calibrate
from moepress.compress import compress
from moepress.costs import drop_costs
from moepress.costs.drop_costs import NO_EXPERT, DropCosts, DropMeter
from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import DROP_COSTS, load_tensors, read_about, save_tensors
from moepress.original.experts import hidden_states
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.pruning.rule import Pruning
from moepress.pruning.thresholds import (
    cheapest,
    cheapest_reads,
    dropped_share,
    medians,
    quantile,
    reachable_share,
)
from moepress.work import calibration_ids
from tests.conftest import make_model, small_recipe

Folder = Callable[..., Path]


def some_costs(layers: int = 2, ranks: int = 2, bins: int = 4, seed: int = 0) -> DropCosts:
    rng = np.random.default_rng(seed)
    ratio = np.sort(rng.random((layers, ranks, bins + 1), dtype=np.float32), axis=-1)
    cost = rng.random((layers, ranks, bins), dtype=np.float32)
    return DropCosts(tuple(range(layers)), ratio, cost, 2 * cost, True, {"model": "made up"})


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_costs_are_what_dropping_does_to_the_block(
    model_folder: Folder, text_file: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Oracle: transformers' own block, with its routing cut off after each rank."""
    monkeypatch.setattr(drop_costs, "BINS", 5)
    folder, recipe = model_folder(family), small_recipe(text_file)
    source = Source(folder)
    costs = calibrate(source, recipe).drop_costs
    assert costs.normalised == (family == "mixtral")

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    experts = model.get_submodule(source.experts[0].path)
    calls = []
    handle = experts.register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.inference_mode():
        ids = calibration_ids(source, recipe)
        states = model.model(ids, output_hidden_states=True).hidden_states
        handle.remove()
        energy = states[1].double().square().sum(-1).median().item()
        ((hidden, index, weight),) = calls
        weight, order = weight.float().sort(dim=1, descending=True, stable=True)
        index = index.gather(1, order)
        full = experts(hidden, index, weight).double()
        top_k = weight.shape[1]
        errors = {True: [], False: []}
        for renormalise, kept in itertools.product((False, True), range(1, top_k + 1)):
            cut = weight.clone()
            cut[:, kept:] = 0
            if renormalise:
                cut *= weight.sum(1, keepdim=True) / cut.sum(1, keepdim=True)
            errors[renormalise].append(
                (experts(hidden, index, cut).double() - full).square().sum(-1) / energy
            )
    assert costs.top_k == top_k
    for rank in range(1, top_k):
        ratio = weight[:, rank] / weight[:, 0]
        by_ratio = ratio.argsort(stable=True)
        edges = np.linspace(0, len(ratio), 6).round().astype(int)
        expected = ratio[by_ratio][np.minimum(edges, len(ratio) - 1)]
        assert costs.ratio[0, rank - 1] == pytest.approx(expected.numpy(), rel=1e-5)
        for renormalise, found in ((False, costs.cost), (True, costs.renormalised_cost)):
            each = (errors[renormalise][rank - 1] - errors[renormalise][rank])[by_ratio]
            for q, (first, last) in enumerate(itertools.pairwise(edges)):
                mean = each[first:last].mean().item()
                assert found[0, rank - 1, q] == pytest.approx(mean, rel=1e-3, abs=1e-6)


def test_a_sample_of_the_tokens_is_taken(
    model_folder: Folder, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(text_file)
    whole = calibrate(model_folder(), recipe).drop_costs
    monkeypatch.setattr(drop_costs, "SAMPLE", 64)
    part = calibrate(model_folder(), recipe).drop_costs
    again = calibrate(model_folder(), recipe).drop_costs
    other = calibrate(model_folder(), recipe.with_changes(seed=1)).drop_costs
    assert np.array_equal(part.cost, again.cost) and not np.array_equal(part.cost, whole.cost)
    assert not np.array_equal(part.cost, other.cost)
    assert part.cost.sum() == pytest.approx(whole.cost.sum(), rel=0.5)


@torch.inference_mode()
def test_a_token_whose_routing_weights_are_all_0_drops_none(
    text_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Sigmoids of large negative numbers are 0. A run ended with an error, after all its work."""
    model = make_model("deepseek_v3")
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.mul_(1e5)
    model.save_pretrained(tmp_path)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, tmp_path)
    source, recipe = Source(tmp_path), small_recipe(text_file)
    costs = calibrate(source, recipe).drop_costs
    assert (costs.ratio == 1).any() and (costs.ratio == 0).any()
    assert costs.ratio.max() == 1


def test_what_an_expert_keeps_for_its_tokens_is_not_used_for_the_sample(
    model_folder: Folder, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(model_folder())
    walk = Walk(source, calibration_ids(source, small_recipe(text_file)))
    monkeypatch.setattr(drop_costs, "SAMPLE", 64)
    with source.layer_loaded(0):
        routed = walk.route(0)
        meters = [DropMeter(routed, 4, seed=0) for _ in range(2)]
        for number in range(4):
            expert = walk.expert(0, number, routed)
            hidden = hidden_states(expert, expert.weights.gate_up)
            meters[0].add(expert)
            meters[1].add(expert.with_weights(expert.weights, hidden))
    without, kept = (meter.result(1.0) for meter in meters)
    assert without.keys() == kept.keys() and without["cost"].any()
    assert all(torch.equal(without[name], kept[name]) for name in without)


def test_a_compressed_folder_carries_the_costs_of_its_own_weights(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(text_file, expert_bits=(1, 8), attention_bits=16)
    fine, coarse = (
        DropCosts.load(compress(model_folder(), tmp_path / str(b), recipe, bits=b) / DROP_COSTS)
        for b in (8, 1)
    )
    original = calibrate(model_folder(), recipe).drop_costs
    assert fine.layers == original.layers == (0, 1)
    assert fine.ratio == pytest.approx(original.ratio, abs=0.02)
    near, far = (np.abs(c.cost - original.cost).sum() for c in (fine, coarse))
    # A bin holds six tokens here: a little noise in a ratio moves some to the next one.
    assert near < 0.05 * original.cost.sum() < far


def test_round_trip_and_damage(tmp_path: Path) -> None:
    costs = some_costs()
    costs.save(tmp_path / "c.safetensors")
    loaded = DropCosts.load(tmp_path / "c.safetensors")
    for name, value in vars(costs).items():
        assert np.array_equal(value, getattr(loaded, name)), name
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="cannot be read"):
        DropCosts.load(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="do not fit together"):
        DropCosts((0,), costs.ratio, costs.cost, costs.cost, True, {})


@pytest.mark.parametrize(
    "change",
    [
        {"ratio": lambda a: a[0]},
        {"ratio": lambda a: -a},
        {"ratio": lambda a: a.flip(-1)},
        {"cost": lambda a: a * torch.nan},
        {"cost": lambda a: a.bfloat16()},
        {"cost": lambda a: a[..., 1:]},
        {"renormalised_cost": lambda a: None},
        {"about": lambda about: "{"},
        {"about": lambda about: "[]"},
        {"about": lambda about: about.replace("drop costs", "scores")},
        {"about": lambda about: about.replace('"layers": [0, 1]', '"layers": [0, 0]')},
        {"about": lambda about: about.replace('"layers": [0, 1]', '"layers": ["a", "b"]')},
        {"about": lambda about: about.replace('"layers": [0, 1]', '"layers": 3')},
        {"about": lambda about: about.replace('"normalised"', '"normal"')},
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, Callable[..., Any]]) -> None:
    path = tmp_path / "c.safetensors"
    some_costs().save(path)
    arrays, about = load_tensors(path), read_about(path)
    for name, damage in change.items():
        if name == "about":
            about = damage(about)
        elif (damaged := damage(arrays[name])) is None:
            del arrays[name]
        else:
            arrays[name] = damaged
    save_tensors(path, arrays, about)
    with pytest.raises(CheckpointError, match="Copy it again, or measure them again"):
        DropCosts.load(path)


def test_medians_are_the_papers_mu() -> None:
    costs = some_costs()
    thresholds = medians(costs)
    assert thresholds.shape == (2, 3) and (thresholds[:, 0] == 0).all()
    assert thresholds[:, 1:] == pytest.approx(costs.ratio[:, :, 2])


def costs_with_left_out_experts(ratios: np.ndarray) -> DropCosts:
    """Costs that rise with the ratio, of the ratios [T, k - 1] of a layer's tokens."""
    bins, tokens = drop_costs.BINS, len(ratios)
    edges = np.linspace(0, tokens - 1, bins + 1).round().astype(int)
    ratio = np.sort(ratios, axis=0)[edges].T[None].astype(np.float32)
    return DropCosts((0,), ratio, ratio[..., :-1].copy(), ratio[..., :-1].copy(), True, {})


@pytest.mark.parametrize("left_out", [0, 0.05, 0.3, 0.5, 0.9, 1])
def test_choices_of_experts_that_are_left_out_have_no_median(left_out: float) -> None:
    ratios = np.random.default_rng(0).random((4096, 1))
    here = ratios[int(left_out * len(ratios)) :]
    costs = costs_with_left_out_experts(
        np.concatenate([here, np.full((len(ratios) - len(here), 1), NO_EXPERT)])
    )
    expected = np.median(here) if len(here) else 0
    assert medians(costs)[0, 1] == pytest.approx(expected, abs=0.05)
    assert reachable_share(costs) == pytest.approx((1 - left_out) / 2, abs=0.02)


def test_a_rank_without_choices_lets_earlier_ones_be_dropped() -> None:
    """Of three experts that a token chooses, one is left out: only its second can be dropped."""
    ratios = np.random.default_rng(0).random((4096, 2))
    ratios[:, 1] = NO_EXPERT
    costs = costs_with_left_out_experts(ratios)
    thresholds, _ = cheapest(costs, 0.2, False)
    assert dropped_share(costs, thresholds) == pytest.approx(0.2, abs=0.01)
    assert thresholds == pytest.approx(np.array([[0, 0.6, 0]]), abs=0.05)
    here, away, _ = cheapest_reads(costs, 0.2, False, 0.5, 1.0)
    assert here == pytest.approx(thresholds, abs=0.05)
    assert away == pytest.approx(thresholds, abs=0.05)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bins_taken", range(9))
def test_cheapest_is_the_best_of_all_thresholds(seed: int, bins_taken: int) -> None:
    """Oracle: every number of bins for every layer and rank."""
    costs = some_costs(2, 1, 4, seed)
    rising = DropCosts(
        costs.layers, costs.ratio, np.sort(costs.cost, axis=-1), costs.cost, True, {}
    )
    share = bins_taken / (2 * 2 * 4)
    thresholds, predicted = cheapest(rising, share, renormalise=False)
    best = min(
        (sum(rising.cost[layer, 0, :n].sum() for layer, n in enumerate(taken)) / 4, taken)
        for taken in itertools.product(range(5), repeat=2)
        if sum(taken) == bins_taken
    )
    assert predicted == pytest.approx(best[0], rel=1e-5)
    for layer, n in enumerate(best[1]):
        expected = rising.ratio[layer, 0, n] if n else 0
        assert thresholds[layer, 1] == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("missing", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("relative_time", [1.0, 3.0, 1e9])
def test_reads_are_dropped_where_they_save_most_time_per_loss(
    seed: int, missing: float, relative_time: float
) -> None:
    """Oracle: every number of bins of choices in memory and of choices to be read. The share is
    taken in whole bins; no other with as many dropped choices costs less for the time it saves."""
    some = some_costs(1, 1, 4, seed)
    cost = np.sort(some.cost, axis=-1)
    costs = DropCosts(some.layers, some.ratio, cost, cost, True, {})
    taken = (2, 3)  # bins: in memory, to be read
    share = (taken[0] * (1 - missing) + taken[1] * missing) / (2 * 4)
    here, away, predicted = cheapest_reads(costs, share, False, missing, relative_time)
    bins = [np.searchsorted(costs.ratio[0, 0], t[0, 1] - 1e-7) for t in (here, away)]
    if relative_time == 1:
        assert predicted == pytest.approx(cheapest(costs, share, False)[1], rel=1e-4)
        if missing == 0.5:
            np.testing.assert_allclose(here, away, atol=0.4)
    else:
        assert bins[1] >= bins[0] and (away >= here).all()
    if relative_time == 1e9:  # reads first, as far as they go
        reads = min(share * 2 * 4 / missing, 4)
        at = np.interp(reads, range(5), costs.ratio[0, 0])
        assert away[0, 1] == pytest.approx(at, abs=1e-5)
    dropped = [
        np.interp(t[0, 1], costs.ratio[0, 0], range(5)) if t[0, 1] else 0 for t in (here, away)
    ]
    total = dropped[0] * (1 - missing) + dropped[1] * missing
    assert total == pytest.approx(share * 8, abs=1e-4)


def test_thresholds_drop_from_the_smallest_ratio_even_where_costs_fall() -> None:
    """Where measured costs fall, the cheaper bins are pooled with those before them."""
    ratio = np.linspace(0, 1, 5, dtype=np.float32)[None, None]
    cost = np.array([[[4.0, 0.0, 2.0, 9.0]]], dtype=np.float32)
    costs = DropCosts((0,), ratio, cost, cost, True, {})
    thresholds, predicted = cheapest(costs, 3 / 8, False)
    assert thresholds.tolist() == [[0, 0.75]] and predicted == pytest.approx(6 / 4)
    thresholds, predicted = cheapest(costs, 1.5 / 8, False)  # half of a bin is interpolated
    assert thresholds.tolist() == [[0, 0.375]] and predicted == pytest.approx(4 / 4)


@pytest.mark.parametrize("seed", range(10))
def test_a_token_loses_its_last_choices_never_one_before_them(seed: int) -> None:
    thresholds, _ = cheapest(some_costs(3, 3, 8, seed), 0.6, False)
    assert (np.diff(thresholds, axis=1) >= 0).all() and thresholds.max() > 0


def tied_costs() -> DropCosts:
    """Layer 0: half of the second choices tie with the first. Layer 1: none, but it costs more."""
    ratio = np.array([[[0, 0.5, 1, 1, 1]], [[0, 0.25, 0.5, 0.75, 1]]], dtype=np.float32)
    cost = np.array([[[1, 1, 1, 1]], [[2, 2, 2, 2]]], dtype=np.float32)
    return DropCosts((0, 1), ratio, cost, cost, True, {})


def test_choices_that_tie_with_the_first_are_not_counted_on() -> None:
    """Of 16 choices, 2 of layer 0 can be dropped, and 4 of layer 1."""
    costs = tied_costs()
    thresholds, predicted = cheapest(costs, 5 / 16, False)
    assert thresholds.tolist() == [[0, 1], [0, 0.75]] and predicted == pytest.approx(8 / 4)
    assert dropped_share(costs, thresholds) == pytest.approx(5 / 16)


def test_a_share_that_ties_keep_from_being_dropped_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Pruning.of(tied_costs(), 6 / 16)
    assert not caplog.records
    pruning = Pruning.of(tied_costs(), 0.5)
    assert "0.5 of the chosen experts are to be dropped, but only about 0.375" in caplog.text
    assert set(pruning.thresholds.values()) == {(0.0, 1.0)}


@pytest.mark.parametrize("seed", range(5))
def test_the_share_below_thresholds_is_counted(seed: int) -> None:
    """Ratios are drawn from few values; those of one value are dropped together or not at all."""
    rng = np.random.default_rng(seed)
    ratios = np.sort(rng.integers(0, 9, (3, 2, 2049)) / 8).astype(np.float32)
    flat = np.zeros((3, 2, 2048), dtype=np.float32)
    costs = DropCosts((0, 1, 2), ratios, flat, flat, True, {})
    thresholds = np.pad(rng.integers(0, 9, (3, 2)) / 8, ((0, 0), (1, 0)))
    expected = (ratios < thresholds[:, 1:, None]).mean() * 2 / 3
    assert dropped_share(costs, thresholds) == pytest.approx(expected, abs=2e-3)


def test_quantiles() -> None:
    costs = some_costs()
    for share, column in ((0.25, 1), (1.0, 4)):
        assert quantile(costs, np.full((2, 2), share)) == pytest.approx(costs.ratio[:, :, column])
    assert (quantile(costs, np.zeros((2, 2))) == 0).all()


@pytest.mark.parametrize("share", [-0.1, 0.67, 2.0, float("nan")])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(InputError, match=r"keeps its first. Give a share from 0 to 0.667"):
        cheapest(some_costs(), share, False)
