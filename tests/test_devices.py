"""Which device a command takes where the user names none. Cards are pretended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from moepress import devices, kernels, ranks
from moepress.cli.options import device_to_compress, device_to_run
from moepress.doctor import doctor
from moepress.errors import InputError
from moepress.format.checkpoint import SCORES
from moepress.inspect import inspect
from moepress.kernels import backends
from moepress.ranks import Ranks
from moepress.store.forecast import card_fits
from moepress.store.places import total_bytes
from tests.store.test_models import EXPERTS, packed_folder
from tests.test_allocate import make_scores


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends cards with so many bytes free."""

    def pretend(*free: int, backend: str = "cuda") -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        for module in ("moepress.devices", "moepress.store.forecast"):
            monkeypatch.setattr(f"{module}.free_memory", lambda card: free[card.index])
        named = SimpleNamespace(name="Small GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: named)
        status = kernels.Status("cuda", backend, {})
        monkeypatch.setattr(backends, "_choose", lambda card: status)

    return pretend


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = packed_folder(tmp_path_factory.mktemp("devices") / "folder", "mixtral", "int")
    tokens = np.array([[9, 8, 7, 1, 1, 1, 1, 1], [1, 1, 1, 1, 9, 9, 9, 1]])
    make_scores(layers=(0, 1), experts=EXPERTS, tokens=tokens).save(path / SCORES)
    return path


def test_the_first_card_with_room_and_kernels(
    folder: Path, cards: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    need = total_bytes([folder / "model.safetensors"])
    assert device_to_run(None, folder, None, None) == "cpu"
    cards(need, 2 * need)
    assert devices.to_run(folder) == "cuda:1" and devices.with_room(need // 2) == "cuda:0"
    capsys.readouterr()
    assert device_to_run(None, folder, None, None) == "cuda:1"
    assert capsys.readouterr().err == "device: cuda:1 (Small GPU)\n"
    assert device_to_run(None, folder, "1GB", None) == "cpu"
    assert device_to_run(None, folder, None, "1GB") == "cuda"
    assert device_to_run("cpu", folder, None, None) == "cpu"
    assert device_to_compress(None, folder) == "cuda:0"  # a layer fits
    cards(need)
    assert devices.to_run(folder) == "cpu"
    cards(10 * need, backend="reference")
    assert device_to_run(None, folder, None, None) == "cpu"
    cards()
    with pytest.raises(InputError, match="torch finds no CUDA card here"):
        device_to_run(None, folder, None, "1GB")


def test_the_largest_layer_in_its_compute_dtype(tmp_path: Path) -> None:
    half = torch.zeros(10, dtype=torch.bfloat16)
    tensors = {
        "model.layers.0.w": half,
        "model.layers.1.w": half.clone(),
        "model.layers.1.codes": torch.zeros(10, dtype=torch.uint8),
        "lm_head.weight": torch.zeros(10),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert devices.largest_layer(tmp_path) == 20 + 40


def test_what_a_card_takes_of_a_folder(folder: Path, cards: Callable[..., None]) -> None:
    total = total_bytes([folder / "model.safetensors"])
    assert card_fits(folder) == {}
    (whole,) = card_fits(folder, total).values()
    assert (whole.experts, whole.choices) == (1, 1) and "fit into" in str(whole)
    (none,) = card_fits(folder, 1000).values()
    assert not none.runs and "do not fit" in str(none) and none.choices is None
    half = whole.other_bytes + whole.expert_bytes // 2
    (some,) = card_fits(folder, half).values()
    assert 0.2 < some.experts < some.choices < 1  # the hottest come first
    assert f"{some.choices:.0%} of the choices" in str(some)
    cards(10 * total, half)
    assert [fit.experts == 1 for fit in card_fits(folder).values()] == [True, False]
    found = inspect(folder, gpu_memory=half)["fits"]["a card"]
    assert found == json.loads(json.dumps(some.to_dict()))
    (check,) = [c for c in doctor(folder, gpu_memory=half).checks if c.name == "fits on a card"]
    assert (check.state, check.found) == ("ok", str(some))
    (check,) = [c for c in doctor(folder, gpu_memory=9).checks if c.name == "fits on a card"]
    assert (check.state, check.do) == ("missing", "run it on the CPU")


def test_each_rank_takes_the_card_of_its_number_on_the_machine(
    folder: Path, cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    everyone_fits = [True, True]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")  # the fourth of four ranks on two machines
    monkeypatch.setattr(ranks, "_joined", Ranks(3, 4))
    others: list[str | None] = []  # what the other ranks were told, if not the same

    def everyones(self: Ranks, own: tuple[str | None, bool]) -> list[tuple[str | None, bool]]:
        return [own, *((own[0], fits) for fits in everyone_fits), *((o, True) for o in others)]

    monkeypatch.setattr(Ranks, "everyones", everyones)
    need = devices.largest_layer(folder)
    cards(0, 2 * need)
    assert ranks.own_card() == 1
    assert device_to_compress("cuda", folder) == device_to_compress(None, folder) == "cuda:1"
    assert device_to_compress("cpu", folder) == "cpu"
    with pytest.raises(InputError, match="cuda:0 would put 4 ranks on one device"):
        device_to_compress("cuda:0", folder)
    others.append("cuda")
    with pytest.raises(InputError, match="started with different devices"):
        device_to_compress("cpu", folder)
    others.clear()
    everyone_fits[0] = False
    assert device_to_compress(None, folder) == "cpu"
    everyone_fits[0] = True
    cards(2 * need, 0)
    assert device_to_compress(None, folder) == "cpu"
    for count in (1, 0):
        cards(*[2 * need] * count)
        assert ranks.own_card() is None and device_to_compress(None, folder) == "cpu"
        with pytest.raises(InputError, match=f"2 ranks were started on .* has {count} cards"):
            device_to_compress("cuda", folder)


def test_ranks_exchange_through_cards_only_if_each_has_its_own(
    cards: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(ranks, "_joined", Ranks(1, 2))
    own = torch.device("cuda", 1)
    cards(9, 9)
    assert ranks.here(own).device == own
    assert ranks.here(torch.device("cpu")).device.type == ranks.here().device.type == "cpu"
    cards(9)
    assert ranks.here(own).device.type == "cpu"


def test_ranks_wait_for_each_other_on_the_cpu_before_cards_exchange(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    met: list[str] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: met.append(tensor.device.type))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, owner: met.append("broadcast"))
    monkeypatch.setattr(ranks, "_as_bytes", lambda tensor, device: tensor.view(torch.uint8))
    Ranks(1, 2, torch.device("cuda", 1)).give(torch.zeros(3), 0)
    Ranks(1, 2).give(torch.zeros(3), 0)
    assert met == ["cpu", "broadcast", "broadcast"]
