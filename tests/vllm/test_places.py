"""Layers are on the device that vLLM makes its model on, wherever the folder's tensors are.

Needs no vLLM: without it, its few classes that ours derive from stand for themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from moepress import kernels
from moepress.format.codec import Codec, PackedSpec
from moepress.kernels import Gate
from moepress.kernels.modules import PackedExperts
from moepress.vllm.windows import Stored, Window
from tests.kernels.test_shards import some_packed

META = torch.device("meta")  # stands for a card
OURS = ("moepress.vllm.linears", "moepress.vllm.experts")


class Plain:
    def process_weights_after_loading(self, layer: Any) -> None: ...


LAYERS = "vllm.model_executor.layers"
STANDINS: dict[str, dict[str, Any]] = {
    f"{LAYERS}.quantization.base_config": {"QuantizeMethodBase": object},
    f"{LAYERS}.fused_moe.fused_moe_method_base": {"FusedMoEMethodBase": object},
    f"{LAYERS}.linear": {"LinearBase": nn.Module, "UnquantizedLinearMethod": Plain},
    f"{LAYERS}.vocab_parallel_embedding": {"UnquantizedEmbeddingMethod": Plain},
    "vllm.model_executor.utils": {
        "set_weight_attrs": lambda x, named: [setattr(x, k, v) for k, v in named.items()]
    },
}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The modules linears and experts of the plugin."""
    if find_spec("vllm") is not None:
        pytest.skip("the classes are stood in for")
    parents = {name.rpartition(".")[0] for name in STANDINS} | {LAYERS, "vllm.model_executor"}
    for name in ("vllm", *parents, *STANDINS):
        module = ModuleType(name)
        vars(module).update(STANDINS.get(name, {}), __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    for ours in OURS:
        sys.modules.pop(ours, None)
    modules = tuple(map(import_module, OURS))
    for module in modules:
        assert module.default_device() == torch.device("cpu")
        monkeypatch.setattr(module, "default_device", lambda: META)
    yield modules  # type: ignore[misc]
    for ours in OURS:
        del sys.modules[ours]


def layer_of(linears: Any, rows: list[int]) -> tuple[Any, Any]:
    layer: Any = nn.Module()
    layer.prefix = "layer"
    method = linears.LinearMethod()
    method.create_weights(layer, 128, rows, 128, sum(rows), torch.float32)
    return layer, method


def devices(module: nn.Module) -> set[torch.device]:
    return {x.device for x in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("packed", [True, False])
def test_linears_come_to_the_device_of_the_model(plugin: tuple[Any, Any], packed: bool) -> None:
    layer, method = layer_of(plugin[0], [64, 32])
    assert devices(layer) == {META}  # else vLLM would move what has no numbers yet
    codec, plain = Codec(3, 32), torch.ones(64, 128)
    stored = Stored("q_proj", some_packed(64, 128, codec, 0), 64, 128, codec, torch.float32)
    layer.weight.data[:64].copy_(Window(stored) if packed else plain)
    layer.weight.data[64:].fill_(0)
    method.process_weights_after_loading(layer)
    assert devices(layer) == {META} and hasattr(layer, "pieces") == packed
    if packed:
        assert [piece.count for piece in layer.pieces] == [64, 32]


def thresholds(experts: Any) -> Any:
    return experts.Thresholds((0.0, 0.5), False, (1, 3), 4)


def test_experts_come_to_the_device_of_the_model(plugin: tuple[Any, Any]) -> None:
    _, experts = plugin
    layer: Any = nn.Module()
    layer.global_num_experts, layer.top_k, layer.layer_name = 4, 2, "layer"
    experts.ExpertsMethod.create_weights(None, layer)
    spec = PackedSpec((2,) * 4, 32)
    packed = PackedExperts(4, 64, 32, spec, spec, Gate("silu"))
    experts.give_experts(layer, packed, thresholds(experts))
    assert devices(layer.packed) == devices(layer.pruned) == {META}


def test_left_out_experts_are_none_of_the_choices(plugin: tuple[Any, Any]) -> None:
    pruned = thresholds(plugin[1])
    index = torch.tensor([[0, 1], [2, 0], [3, -1], [4, 2], [1, 3]])
    weights = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.6, 0.4], [0.7, 0.3]])
    found, kept = pruned(index, weights)
    left = index.masked_fill(torch.isin(index, torch.tensor([1, 3])), -1)
    ranked, expected, dropped = kernels.drop(left, weights, pruned.thresholds, False, None, 4)
    assert torch.equal(found, ranked.masked_fill(dropped, -1)) and torch.equal(kept, expected)
    assert not ((found == 1) | (found == 3)).any()
