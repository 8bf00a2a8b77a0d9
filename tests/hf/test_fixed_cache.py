"""The cache of captured steps: what its layers give is what transformers' give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.cache_utils import DynamicCache, StaticLayer

from moepress import kernels
from moepress.errors import InputError
from moepress.hf import fixed_cache
from moepress.hf.fixed_cache import FixedCache
from moepress.kernels.cuda import launch
from tests.kernels.cuda import emulate

ROOM, PROMPT, WINDOW = 12, 5, 4
HEADS, SIZE = 2, 16


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that the op writes."""
    seen: list[int] = []
    plain = fixed_cache.cache_write

    def counted(keys: Tensor, values: Tensor, key: Tensor, *rest: Tensor) -> None:
        seen.append(key.shape[-2])
        plain(keys, values, key, *rest)

    monkeypatch.setattr(fixed_cache, "cache_write", counted)
    return seen


@pytest.fixture(params=["reference", "kernels"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The op as it is on a CPU, and with a card's kernel in the emulator."""
    if request.param == "reference":
        yield "reference"
        return
    if emulate.COMPILER is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setitem(launch.LAUNCHERS, "cpu", lambda device: launch.Launcher(emulate.launch, 8))
    cuda = kernels.BACKENDS["cuda"]
    everywhere = replace(cuda, rank=99, device_types=(), refuses=lambda device: None)
    kernels.register_backend(everywhere)
    yield "kernels"
    kernels.register_backend(cuda)


def states(tokens: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Keys and values of tokens as attention makes them, [1, HEADS, tokens, SIZE]."""
    return [torch.randn(1, tokens, HEADS, SIZE).to(dtype).transpose(1, 2) for _ in range(2)]


def prompted(window: int | None) -> DynamicCache:
    kind = "sliding_attention" if window else "full_attention"
    config = MixtralConfig(
        num_hidden_layers=1, sliding_window=window, layer_types=[kind], num_key_value_heads=HEADS
    )
    cache = DynamicCache(config=config)
    cache.update(*states(PROMPT), 0)
    return cache


@pytest.mark.parametrize("window", [None, WINDOW])
def test_tokens_are_written_as_by_transformers(
    window: int | None, backend: str, writes: list[int]
) -> None:
    torch.manual_seed(0)
    growing = prompted(window)
    plain = StaticLayer(max_cache_len=ROOM)
    held = growing.layers[0]
    if window is None:
        plain.update(held.keys, held.values)
    fixed = FixedCache(growing, ROOM)
    fixed.load(growing)
    layer = fixed.layers[0]
    for step in range(ROOM - PROMPT):
        sizes = layer.get_mask_sizes(1)
        token = states(1)
        found = fixed.update(*token, 0)
        assert int(layer.cumulative_length) == PROMPT + step  # until the step ends
        for whole, one in zip((layer.keys, layer.values), token, strict=True):
            assert torch.equal(whole[:, :, PROMPT + step], one[:, :, 0])
        if window is None:
            for one, other in zip(found, plain.update(*token), strict=True):
                assert torch.equal(one, other)
            assert found[0] is layer.keys and sizes == (ROOM, 0)
        else:
            for one, other in zip(found, growing.update(*token, 0), strict=True):
                assert torch.equal(one, other)
            assert (sizes[0], int(sizes[1])) == (WINDOW, PROMPT + step + 1 - WINDOW)
        fixed.position.move_on()
        fixed.advance()
    assert writes == [1] * (ROOM - PROMPT)


def test_other_updates_are_refused() -> None:
    """Several tokens; another dtype, which transformers refuses too."""
    growing = prompted(None)
    fixed: Any = FixedCache(growing, ROOM)
    fixed.load(growing)
    before = fixed.layers[0].keys.clone()
    for wrong in (states(3), states(1, torch.float32)):
        with pytest.raises(InputError, match="a token"):
            fixed.update(*wrong, 0)
    assert torch.equal(fixed.layers[0].keys, before)
