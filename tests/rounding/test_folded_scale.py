"""Norms take scales of their linears' inputs, where all that reads a norm is known."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralAttention

from moepress.compress import compress
from moepress.format.checkpoint import shard_name
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.rounding.folded_scale import Readers, find_readers, fold_scales, scale_readers
from moepress.rounding.same_layer import watch
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model
from tests.uneven import uneven, with_uneven_norms

NORM = "model.layers.0.input_layernorm"
QKV = tuple(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
IDS = torch.arange(40, 120).view(2, 40)


def walk_of(folder: Path, ids: Tensor = IDS) -> Walk:
    return Walk(Source(folder), ids)


def seen_readers(walk: Walk, packed: Collection[str]) -> list[Readers]:
    """`find_readers` in the first layer."""
    return find_readers(walk, 0, packed, watch(walk, 0))


def family_folder(family: str, to: Path, dtype: torch.dtype) -> Path:
    return save_model(make_model(family).to(dtype), to / family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "norm", "offset", "linears"),
    [
        ("mixtral", "input_layernorm", 0, {"q_proj", "k_proj", "v_proj"}),
        ("phimoe", "input_layernorm", 0, {"q_proj", "k_proj", "v_proj"}),  # with biases
        ("qwen3_next", "input_layernorm", 1, {"in_proj_qkvz", "in_proj_ba"}),
    ],
)
def test_the_readers_of_a_norm_are_seen(
    family: str, norm: str, offset: float, linears: set[str], dtype: torch.dtype, tmp_path: Path
) -> None:
    walk = walk_of(family_folder(family, tmp_path, dtype))
    with walk.source.layer_loaded(0):
        kept = {
            name: walk.source.current(name).clone()
            for name in walk.source.names(walk.source.layer_paths[0])
        }
        (found,) = seen_readers(walk, walk.source.packable[0].keys())
        after = {name: walk.source.current(name) for name in kept}
        assert all(torch.equal(value, kept[name]) for name, value in after.items())
    assert found.norm.endswith(norm)
    assert found.offset == offset
    assert {name.split(".")[-2] for name in found.matrices} == linears


def test_a_norm_that_something_else_reads_is_left_alone(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Callable[..., tuple[Tensor, Any]] = MixtralAttention.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = plain(self, hidden_states, *args, **kwargs)
        return out + 0.01 * hidden_states.mean(-1, keepdim=True), weights

    walk = walk_of(model_folder())
    with walk.source.layer_loaded(0):
        assert [one.norm for one in seen_readers(walk, QKV)] == [NORM]
        assert seen_readers(walk, ["model.layers.0.self_attn.o_proj.weight"]) == []
        monkeypatch.setattr(MixtralAttention, "forward", forward)
        assert seen_readers(walk, QKV) == []


@pytest.mark.parametrize(
    ("family", "dtype", "reader"),
    [
        ("glm5_next", torch.float32, "index_kpool_compress_gate"),  # of no linear
        ("hy_v4", torch.bfloat16, "weights_proj.weight"),  # gets a copy in float32
    ],
)
def test_readers_that_matter_to_longer_text_only_are_seen(
    family: str, dtype: torch.dtype, reader: str, tmp_path: Path
) -> None:
    """An indexer chooses among 16 tokens or more: the proof cannot see what it reads."""
    walk = walk_of(family_folder(family, tmp_path, dtype), IDS[:, :8])
    found = []
    for layer in range(len(walk.source.layers)):
        with walk.source.layer_loaded(layer):
            packed = walk.source.packable[layer].keys()
            found += find_readers(walk, layer, packed, watch(walk, layer))
            walk.pass_layer(layer)
    linears = [one.matrices for one in found if any("indexer.wk." in name for name in one.matrices)]
    assert linears
    assert all(any(name.endswith(reader) for name in names) for names in linears)


def test_a_norm_that_another_norm_reads_is_left_alone(tmp_path: Path) -> None:
    """That norm is of an indexer, to which one token makes no difference."""
    walk = walk_of(family_folder("mistral_large4", tmp_path, torch.float32), IDS[:, :1])
    with walk.source.layer_loaded(0):
        found = seen_readers(walk, walk.source.packable[0].keys())
    norms = {one.norm.split("layers.0.")[-1] for one in found}
    assert "self_attn.kv_a_layernorm" in norms
    assert "input_layernorm" not in norms


@pytest.mark.parametrize("used", [False, True])
def test_a_norm_that_an_unused_linear_may_read_is_left_alone(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    """It may be for images. One whose weight the code reads, as of some routers, is no such one."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.o_proj(self.q_proj(hidden_states))
        weights = (self.k_proj.weight, self.v_proj.weight) if used else ()
        return out + sum(weight.mean() for weight in weights), None

    monkeypatch.setattr(MixtralAttention, "forward", forward)
    walk = walk_of(model_folder())
    with walk.source.layer_loaded(0):
        found = seen_readers(walk, QKV)
        assert watch(walk, 0).unused == (() if used else QKV[1:])
    assert [(one.norm, one.matrices) for one in found] == ([(NORM, QKV[:1])] if used else [])


def test_weights_of_a_norm_that_are_zero_stay(model_folder: Callable[..., Path]) -> None:
    walk = walk_of(model_folder())
    source = walk.source
    with source.layer_loaded(0):
        weight = source.current(f"{NORM}.weight").clone()
        weight[5] = 0
        source.put(f"{NORM}.weight", weight)
        (readers,) = seen_readers(walk, QKV)
        before = source.current(QKV[0])
        scale_readers(source, readers, uneven(len(weight)))
        changed = before / source.current(QKV[0])
        assert source.current(f"{NORM}.weight")[5] == 0
    expected = uneven(len(weight))
    expected[5] = 1
    torch.testing.assert_close(changed, expected.expand_as(changed))


def test_weights_of_a_norm_are_numbers_of_its_dtype(tmp_path: Path) -> None:
    """The columns of the readers are divided by what the norm then multiplies by."""
    walk = walk_of(family_folder("qwen3_next", tmp_path, torch.bfloat16))
    source = walk.source
    with source.layer_loaded(0):
        (readers,) = seen_readers(walk, source.packable[0].keys())
        name, reader = f"{readers.norm}.weight", readers.matrices[0]
        before, columns = source.current(name).float() + 1, source.current(reader).double()
        scale = 1 + 0.001 * torch.randn(len(before))
        scale[3] = 2.0**-11  # w + 1 would be 0
        scale_readers(source, readers, scale)
        after = source.current(name).float() + 1
        assert torch.equal(source.current(name).bfloat16(), source.current(name))
        assert after[3] == before[3]
        expected = columns * (before / after).double()
        allowed = 2.0**-8 if source.compute_dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(source.current(reader).double(), expected, rtol=allowed, atol=0)


def test_uneven_norms_are_folded_and_few_tokens_are_not(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    uneven_folder = with_uneven_norms(model_folder(), tmp_path / "uneven")

    def changed(folder: Path, ids: Tensor) -> Tensor:
        walk = walk_of(folder, ids)
        with walk.source.layer_loaded(0):
            before = walk.source.current(f"{NORM}.weight")
            fold_scales(walk, 0, seen_readers(walk, QKV), QKV)
            return walk.source.current(f"{NORM}.weight") / before

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 120, (16, 64), generator=generator)
    scale = changed(uneven_folder, ids)
    undone = (scale * uneven(len(scale))).log()
    assert undone.std() < 0.3 * uneven(len(scale)).log().std()
    for count in (2, 8, 40):
        assert torch.equal(changed(model_folder(), IDS[:1, :count]), torch.ones(len(scale)))


def test_without_balance_all_that_is_not_packed_stays(
    model_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    folder = with_uneven_norms(model_folder(), tmp_path / "uneven")
    original = Source(folder).tensor(f"{NORM}.weight")
    for balance in (False, True):
        recipe = small_recipe(text_file, bits=2, balance=balance)
        out = compress(folder, tmp_path / f"{balance}", recipe)
        stored = load_file(out / shard_name(0))[f"{NORM}.weight"]
        assert stored.dtype == original.dtype
        assert torch.equal(stored, original) != balance
