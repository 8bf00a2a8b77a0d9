"""The pretended card refuses what CUDA refuses, and computes what the CPU does."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moepress.kernels import ops, status
from moepress.kernels.cuda.launch import launcher_for
from moepress.memory import free_memory
from tests.card.lacking import LACKING
from tests.card.tensors import Card, CardError, CardTensor

CUDA = torch.device("cuda", 0)


def test_tensors_of_two_devices_do_not_meet(card: Card) -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert x.device == CUDA and x.is_cuda and not x.is_cpu and not x.is_meta
    refused: tuple[Callable[[], object], ...] = (
        lambda: x + torch.ones(3),
        lambda: torch.cat([x, torch.ones(2, 3)]),
        lambda: torch.where(torch.ones(2, 3, dtype=torch.bool), x, 0),
        lambda: F.linear(x, torch.ones(4, 3)),
        lambda: torch.mul(x, 2, out=torch.empty(2, 3)),
        lambda: torch.gather(x, 1, torch.zeros(2, 1, dtype=torch.long)),
        lambda: torch.arange(9)[x.long()],
        lambda: x.long() @ x.long().T,
        lambda: x.view(2, 3).to("cuda:1"),
        lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
    )
    for number, wrong in enumerate(refused):
        with pytest.raises(CardError):
            wrong()
            pytest.fail(f"number {number} was not refused")
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(x)
    assert torch.equal((x + torch.tensor(1.0)).cpu(), torch.arange(1.0, 7).view(2, 3))
    assert x[torch.tensor([1])].device == CUDA  # indices may be on the CPU


def test_ops_refuse_dtypes_that_cuda_lacks(card: Card) -> None:
    whole = torch.arange(6, device="cuda").view(2, 3)
    half = torch.ones(6, dtype=torch.bfloat16, device="cuda")
    refused: tuple[Callable[[], object], ...] = (
        lambda: torch.einsum("ij,kj->ik", whole, whole),
        lambda: torch.zeros(2, 2, dtype=torch.long, device="cuda").addmm_(whole, whole.T),
        lambda: torch.histc(half, 2),
        lambda: half.angle(),
        lambda: F.conv1d(whole[None], torch.ones(2, 2, 2, dtype=torch.long, device="cuda")),
    )
    for number, wrong in enumerate(refused):
        with pytest.raises(CardError, match="no kernel"):
            wrong()
            pytest.fail(f"number {number} was not refused")
    assert torch.histc(half.float(), 2).sum() == 6


def test_dtypes_that_cuda_lacks_are_those_of_torchs_tests() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.card.lacking"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    known = {name: sorted(map(str, dtypes)) for name, dtypes in LACKING.items()}
    found = json.loads(ran.stdout)
    assert {name: known.get(name) for name in found} == found


def test_ops_of_the_card_get_tensors_of_the_card(card: Card) -> None:
    codes = torch.zeros(1024, dtype=torch.uint8, device="cuda")
    index = torch.zeros(2, 2, dtype=torch.long, device="cuda")
    weights = torch.ones(2, 2, device="cuda")
    thresholds = torch.zeros(2)
    assert {s.device: s.backend for s in status()} == {"cpu": "cpu", "cuda:0": "cuda"}
    with pytest.raises(Exception, match="device"):
        ops.drop(index, weights, thresholds, False, None, 4)
    found = ops.drop(index, weights, thresholds.cuda(), False, None, 4)
    assert all(x.device == CUDA for x in found)
    with pytest.raises(CardError, match="gets a tensor"):
        launcher_for(CUDA).launch("moepress_drop", (1, 1, 1), 32, 0, (codes, torch.ones(3)))


def test_what_waits_for_the_card(card: Card) -> None:
    x = torch.arange(6.0, device="cuda")
    pinned = torch.ones(6, pin_memory=True)
    waiting: tuple[Callable[[], object], ...] = (
        x.max().item, lambda: bool((x > 1).any()), lambda: float(x[0]), x.tolist, x.cpu,
        lambda: x[x > 1], lambda: x.nonzero(), lambda: x.masked_select(x > 1),
        lambda: torch.equal(x, x), x.unique, torch.cuda.synchronize,
        lambda: torch.ones(6).copy_(x), lambda: x[torch.tensor([0])],
        lambda: torch.tensor([1.0], device="cuda"), lambda: torch.ones(6).to("cuda"),
        torch.cuda.current_stream().synchronize, lambda: x.allclose(x), lambda: [*map(int, x)],
    )  # fmt: skip
    for number, wait in enumerate(waiting):
        with pytest.raises(CardError, match="waits"), card.without_waits():
            wait()
            print(f"number {number}")
    with card.without_waits():
        y = (x * 2 + 1).sum() + pinned.to("cuda", non_blocking=True)
        y = torch.where(y > 1, y, 0).argmax().expand(3) + torch.zeros(3, device="cuda")
        index = torch.arange(2, device="cuda")
        x[index] = y[:2].float()
        F.one_hot(index, 4)


def test_a_copy_is_there_after_a_wait(card: Card) -> None:
    x = torch.arange(4.0, device="cuda")
    for start in (
        lambda: x.to("cpu", non_blocking=True),
        lambda: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True),
    ):
        arriving = start()
        event = torch.cuda.current_stream().record_event()
        assert not torch.equal(arriving, torch.arange(4.0))
        event.synchronize()
        assert torch.equal(arriving, torch.arange(4.0))
    pinned = torch.ones(4, pin_memory=True)
    pinned.to("cuda", non_blocking=True)
    pinned.zero_()
    with pytest.raises(CardError, match="pinned memory was written"):
        torch.cuda.synchronize()


def test_gradients_cross_the_devices(card: Card) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    expected = torch.autograd.grad((layer(x).tanh() ** 2).sum(), [x, *layer.parameters()])
    on_card = copy.deepcopy(layer).to("cuda")
    assert all(isinstance(p, nn.Parameter) and p.device == CUDA for p in on_card.parameters())
    y = (on_card(x.to("cuda")).tanh() ** 2).to("cpu")
    found = torch.autograd.grad(y.sum(), [x, *on_card.parameters()])
    assert [g.device.type for g in found] == ["cpu", "cuda", "cuda"]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b.cpu())
    assert copy.deepcopy(on_card).weight.device == CUDA
    assert on_card.to("cpu").weight.device.type == "cpu"


def test_devices_of_new_tensors(card: Card, tmp_path: Path) -> None:
    with torch.device("cuda"):
        assert torch.ones(2).device == CUDA and nn.Linear(2, 2).weight.device == CUDA
    with torch.device("meta"):
        assert nn.Linear(2, 2).weight.is_meta
    x = torch.ones(2, 3, device="cuda")
    assert x.new_zeros(3).device == torch.zeros_like(x).device == x.data.device == CUDA
    assert torch.zeros_like(x, device="cpu").device.type == "cpu"
    assert torch.empty_like(torch.empty(2, device="meta"), device="cuda").device == CUDA
    save_file({"a": torch.arange(4.0)}, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors", device="cuda")["a"].device == CUDA
    with safe_open(tmp_path / "a.safetensors", "pt", device="cuda:0") as file:
        assert torch.equal(file.get_slice("a")[1:3].cpu(), torch.tensor([1.0, 2.0]))
    seen: list[Tensor] = []
    thread = threading.Thread(target=lambda: seen.append(torch.ones(2, device="cuda")))
    thread.start()
    thread.join()
    assert isinstance(seen[0], CardTensor)


def test_bytes_of_the_card_are_counted(card: Card) -> None:
    before = card.allocated
    x = torch.zeros(1 << 20, device="cuda")
    y = x[: 1 << 10].view(2, -1)
    assert card.allocated - before == 4 << 20
    assert free_memory(CUDA) == card.total - card.allocated
    del x
    assert card.allocated - before == 4 << 20
    del y
    assert card.allocated == before and card.peak >= 4 << 20
