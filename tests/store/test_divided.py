"""Models bigger than a card: the CPU takes the place of the card, and computes both halves."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations import accelerate as device_maps

from moepress.errors import InputError
from moepress.format.checkpoint import SCORES
from moepress.hf import load_model
from moepress.hf.devices import device_types, keep_experts_on_cpu, only_device
from moepress.kernels.divided import DividedExperts, packed_experts
from moepress.prune import Pruning, prune
from moepress.store import statistics
from moepress.store.forecast import card_fits
from moepress.store.hottest import hottest, share_of
from moepress.store.memory import Room, card_budget, host_room, memory_wanted
from moepress.store.places import total_bytes
from tests.store.test_models import (  # fixtures and models of that module
    EXPERTS,
    IDS,
    PRUNING,
    READS,
    budgets,
    in_memory,
    run,
)
from tests.store.test_models import folder as folder
from tests.test_allocate import make_scores

CARD = torch.device("cpu")
GB = 10**9


def opened(path: Path, gpu_memory: int, memory: Any = None, **options: Any) -> Any:
    """A model on a card that has so much memory for weights."""
    with memory_wanted(memory, gpu_memory):
        return AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **options)


def kinds(model: Any) -> list[str]:
    """Where the experts of each layer are."""
    return [
        "both" if isinstance(one, DividedExperts) else "card" if one.stored is None else "host"
        for one in packed_experts(model).values()
    ]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def sizes(path: Path) -> tuple[int, int]:
    """Bytes of all experts, and of the other weights."""
    (fit,) = card_fits(path, 0).values()
    return fit.expert_bytes, fit.other_bytes


def most_of(path: Path) -> int:
    experts, rest = sizes(path)
    return rest + 2 * experts // 3


def with_counts(path: Path, to: Path, tokens: np.ndarray) -> Path:
    shutil.copytree(path, to)
    make_scores(layers=(0, 1), experts=EXPERTS, tokens=tokens).save(to / SCORES)
    return to


# Which experts


def test_the_hottest_experts_that_fit_over_all_layers() -> None:
    frequency = [np.array([0.9, 0.1, 0.3]), np.array([0.6, 0.4, 0.0])]
    nbytes = [np.array([10.0, 10.0, 30.0]), np.array([10.0, 10.0, 0.0])]
    taken = hottest(frequency, nbytes, 35)
    assert [row.tolist() for row in taken] == [[True, False, False], [True, True, True]]
    assert share_of(frequency, taken) == pytest.approx(1.9 / 2.3)
    chosen = [row.tolist() for row in hottest(frequency, nbytes, 45)]
    assert chosen == [[True, True, False], [True, True, True]]  # the large one is passed over
    for budget, _ in itertools.product(range(0, 80, 7), range(3)):
        taken = hottest(frequency, nbytes, budget)
        assert sum(float(s[t].sum()) for s, t in zip(nbytes, taken, strict=True)) <= budget
    unknown = [np.zeros(3), np.zeros(3)]
    assert hottest(unknown, [np.full(3, 10.0)] * 2, 40)[0].all()  # whole layers first
    assert share_of(unknown, hottest(unknown, [np.full(3, 10.0)] * 2, 40)) == pytest.approx(4 / 6)


def test_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert card_budget("fit", 70, 20, 100) is None
    assert card_budget("fit", 75, 20, 100) == 60
    assert card_budget(90, 70, 20, 0) is None and card_budget(50, 70, 20, 1000) == 30
    with pytest.raises(InputError, match=r"memory for weights is 1.0 GB.* take 2.0 GB"):
        card_budget(GB, 7 * GB, 2 * GB, 0)
    monkeypatch.setattr("moepress.store.memory.free_host_memory", lambda: 100)
    assert host_room("fit", 90) == host_room("mapped", 90) == Room(90, False)
    assert host_room("fit", 95) == Room(80, False)
    assert host_room("all", 95) == Room(95, True)
    assert (host_room(50, 95), host_room(500, 95)) == (Room(50, False), Room(95, False))


def test_device_maps_are_read() -> None:
    assert only_device({"": torch.device("cuda", 1)}) == torch.device("cuda", 1)
    assert only_device({"a": 0, "b": 0}) == torch.device("cuda", 0)
    for several in (None, "auto", {"a": 0, "b": "cpu"}, {"": "disk"}):
        assert only_device(several) is None
    assert device_types({"a": 0, "b": "cpu", "c": "disk"}) == {"cuda", "cpu", "disk"}


def test_auto_is_the_accelerator_of_this_machine_whichever(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Mac accelerate puts the model on its GPU, which a store's experts cannot follow."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert device_types("auto") == {"cpu"}
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    assert (device_types("auto"), device_types(None)) == ({"mps"}, {"cpu"})
    with memory_wanted(GB), pytest.raises(InputError, match=r"on \['mps'\]. Experts on disk need"):
        AutoModelForCausalLM.from_pretrained(folder("mixtral", "int"), device_map="auto")


# Models


@pytest.mark.parametrize("family, codes", [("mixtral", "int"), ("qwen2_moe", "trellis")])
def test_the_same_results_at_every_budget(
    folder: Callable[..., Path], family: str, codes: str
) -> None:
    path = folder(family, codes)
    expected = run(in_memory(path))
    experts, rest = sizes(path)
    seen = set()
    for memory in (rest, rest + 2 * experts // 3, rest + experts - 1, rest + experts):
        model = opened(path, memory)
        seen.add(tuple(kinds(model)))
        close(run(model), expected)
    assert seen >= {("host", "host"), ("card", "card")}
    assert any("both" in one for one in seen)


def test_the_hottest_are_on_the_card_and_the_coldest_are_read(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    tokens = np.array([[9, 8, 7, 1, 1, 1, 1, 1], [1, 1, 1, 1, 9, 9, 9, 1]])
    path = with_counts(folder(), tmp_path / "counted", tokens)
    model = opened(path, most_of(path))
    first, second = packed_experts(model).values()
    assert {0, 1} <= {*first.host.left_out} and {4, 5, 6} <= {*second.host.left_out}
    assert not any({*one.card.left_out} & {*one.host.left_out} - {2} for one in (first, second))
    expected = run(in_memory(path))
    close(run(model), expected)
    few, more, *_ = budgets(path)
    memory = int(3 * (more - few) / 0.8)  # about three experts
    frugal = opened(path, most_of(path), memory=memory)  # card, memory and disk
    close(run(frugal), expected)
    found = statistics(frugal)
    assert found is not None and found.hit_rate is not None and found.hit_rate < 1
    assert found.counts.bytes_held <= memory


def test_pruning_is_that_of_the_undivided_model(folder: Callable[..., Path]) -> None:
    path = folder()
    models = in_memory(path), opened(path, most_of(path))
    assert "both" in kinds(models[1])
    results, counts = [], []
    for model in models:
        with prune(model, PRUNING, count=True) as active:
            results.append(run(model))
            counts.append(active.statistics())
    close(results[1], results[0])
    assert counts[1].dropped == counts[0].dropped and counts[0].share > 0
    with prune(models[1], READS, count=True) as active, torch.inference_mode():
        models[1](input_ids=IDS[:1])
        assert active.statistics().share <= 0.2


def test_what_a_divided_model_refuses(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder()
    model = opened(path, most_of(path))
    with pytest.raises(InputError, match="on disk, so it cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="on disk, so it cannot be saved"):
        model.state_dict()
    assert model.num_parameters() == in_memory(path).num_parameters()
    with pytest.raises(InputError, match="Expected a card"):
        load_model(path, gpu_memory=GB)
    with pytest.raises(InputError, match="Give at least"):
        opened(path, 1000)
    assert not model.hf_quantizer.is_compileable


# Device maps of transformers


@pytest.mark.parametrize("device_map", ["auto", "sequential"])
def test_a_device_map_divides_the_experts_of_a_small_card(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, device_map: str
) -> None:
    path = folder()
    room = most_of(path)

    def one_card(max_memory: Any = None) -> dict[Any, int]:
        return {CARD: room, "cpu": GB} if max_memory is None else dict(max_memory)

    monkeypatch.setattr(device_maps, "get_max_memory", one_card)
    expected = run(in_memory(path))
    model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map)
    assert "both" in kinds(model)
    close(run(model), expected)
    room = total_bytes([path / "model.safetensors"])
    model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map)
    assert kinds(model) == ["card", "card"]


def test_device_maps_count_packed_bytes(folder: Callable[..., Path]) -> None:
    path = folder("qwen2_moe")
    model = in_memory(path)
    packed, _ = device_maps.compute_module_sizes(model, model.hf_quantizer)
    buffers, _ = device_maps.compute_module_sizes(model, model.hf_quantizer, buffers_only=True)
    assert packed[""] - buffers[""] == total_bytes([path / "model.safetensors"])


@pytest.mark.parametrize("codes", ["int", "trellis"])
def test_experts_that_a_device_map_leaves_on_the_cpu_run_there(
    folder: Callable[..., Path], codes: str
) -> None:
    """The execution device is a CPU by another name, so accelerate copies weights to it."""
    path = folder("qwen2_moe", codes)
    model, expected = in_memory(path), run(in_memory(path))
    places = {name: "cpu" for name, _ in model.named_children()}
    accelerate.dispatch_model(model, places, main_device=CARD, force_hooks=True)
    experts = packed_experts(model)
    assert all(one.first_proj.is_meta for one in experts.values())
    close(run(model), expected)  # as accelerate does it: weights come for every call
    keep_experts_on_cpu(model)
    assert not any(one.first_proj.is_meta for one in experts.values())
    assert not any(hasattr(one, "_hf_hook") for one in experts.values())
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    close(run(model), expected)
    whole = in_memory(path)
    pruning = Pruning({0: (0.0, 0.7, 0.8), 1: (0.0, 0.8, 0.9)}, renormalise=True, protect=0.2)
    with prune(model, pruning), prune(whole, pruning):
        close(run(model), run(whole))


def test_hooks_of_accelerate_after_loading(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder("qwen2_moe")
    expected = run(in_memory(path))
    close(run(accelerate.cpu_offload(in_memory(path), CARD)), expected)
    close(run(accelerate.disk_offload(in_memory(path), str(tmp_path), CARD)), expected)
