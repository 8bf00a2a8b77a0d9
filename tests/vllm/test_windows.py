"""Windows of packed matrices: what vLLM's weight loaders do with them. Needs no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from moepress.compress import compress
from moepress.errors import InputError
from moepress.format.codec import Codec
from moepress.original.folder import weight_files
from moepress.vllm.placement import balanced
from moepress.vllm.stored import StoredModel
from moepress.vllm.versions import check_version
from moepress.vllm.windows import Placed, Stored, Window
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model
from tests.kernels.test_shards import some_packed


def stored(rows: int = 64, cols: int = 128, seed: int = 0) -> Stored:
    codec = Codec(3, 32)
    packed = some_packed(rows, cols, codec, seed)
    return Stored("q_proj", packed, rows, cols, codec, torch.float32)


def placed(rows: int, cols: int = 128) -> nn.Parameter:
    return nn.Parameter(Window(Placed("qkv_proj", rows, cols, torch.float32)), requires_grad=False)


def test_copies_are_noted_with_their_rows_and_columns() -> None:
    parameter, one, other = placed(96), Window(stored()), Window(stored(seed=1))
    parameter.data.narrow(0, 0, 32).copy_(one.narrow(0, 32, 32))
    parameter.data[32:96].copy_(other)
    base = parameter.base  # type: ignore[attr-defined]
    first, second = base.copied
    assert first.rows == range(32) and second.rows == range(32, 96)
    assert first.value.rows == range(32, 64) and first.value.cols == range(128)
    assert second.value.rows == range(64) and second.value.cols == range(128)


def test_a_rank_gets_its_columns_or_its_rows() -> None:
    parameter, matrix = placed(64, 64), Window(stored())
    parameter.data.copy_(matrix.narrow(1, 64, 64))
    (copied,) = parameter.base.copied  # type: ignore[attr-defined]
    assert copied.value.cols == range(64, 128)
    assert torch.equal(copied.value.plain(), stored().plain()[:, 64:])


def test_plain_weights_and_padding_are_noted() -> None:
    parameter = placed(6)
    weights = torch.randn(4, 128)
    parameter[:4].data.copy_(weights)
    parameter[4:].data.fill_(0)
    values = [one.value for one in parameter.base.copied]  # type: ignore[attr-defined]
    assert torch.equal(torch.cat(values), torch.cat([weights, torch.zeros(2, 128)]))


def test_other_operations_see_plain_weights() -> None:
    matrix, plain = Window(stored()), stored().plain()
    target = torch.zeros(64, 128)
    target.copy_(matrix)
    assert torch.equal(target, plain)
    assert torch.equal(matrix.t().contiguous(), plain.t())
    assert torch.equal(torch.cat([matrix, matrix]), torch.cat([plain, plain]))
    assert torch.equal(matrix[::2], plain[::2])


@pytest.mark.parametrize(
    "do", [lambda p: p.data.narrow(1, 0, 64).copy_(torch.zeros(64, 64)), lambda p: p.data.add_(1)]
)
def test_what_cannot_be_noted_is_refused(do: object) -> None:
    with pytest.raises(InputError, match="Only copies of rows into it are supported"):
        do(placed(64))  # type: ignore[operator]


def test_experts_are_balanced_by_bytes_and_tokens() -> None:
    sizes, tokens = [4, 4, 2, 2, 2, 2], [60, 1, 50, 50, 1, 1]
    owners = balanced(sizes, tokens, 2)
    for values in (sizes, [n * size for n, size in zip(tokens, sizes, strict=True)]):
        held = [sum(v for v, o in zip(values, owners, strict=True) if o == r) for r in (0, 1)]
        assert max(held) <= 0.6 * sum(held)
    assert sorted(balanced([1] * 8, None, 4)) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert balanced([0, 0], [0, 0], 2) in ([0, 0], [0, 1])


def test_a_left_out_expert_needs_no_rank() -> None:
    assert len(balanced([0, 5, 5], [7, 1, 1], 2)) == 3


@pytest.mark.parametrize("version", ["0.32.0", "0.32.5.post1", "0.32.0+cpu"])
def test_versions_inside(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0rc1", "1.0.0", "dev"])
def test_versions_outside(version: str) -> None:
    with pytest.raises(InputError, match="Install one of these"):
        check_version(version)


def test_a_stored_matrix_cannot_be_changed_in_place() -> None:
    """It was changed in a copy that nobody read."""
    matrix = Window(stored())
    for change in (lambda: matrix.data.mul_(2), lambda: matrix[:4].zero_()):
        with pytest.raises(InputError, match=r"q_proj: vLLM does aten\..*_.* would be lost"):
            change()
    torch.testing.assert_close(matrix * 2, stored().plain() * 2)


def test_tensors_are_joined_across_files(
    tokenizer_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """`save_pretrained` may divide a layer: one tensor of the original was given in parts."""
    original = save_model(make_model("lara_mini"), tmp_path / "original", tokenizer_folder)
    packed = compress(original, tmp_path / "packed", small_recipe(text_file, bits=2.5))
    model = AutoModelForCausalLM.from_pretrained(packed)
    model.save_pretrained(tmp_path / "saved", max_shard_size="1KB")
    whole, saved = (
        list(StoredModel(folder, torch.float32, False).tensors([*map(str, weight_files(folder))]))
        for folder in (packed, tmp_path / "saved")
    )
    assert len(saved) == len(whole) and dict(saved).keys() == dict(whole).keys()
    assert all(torch.equal(value + 0, dict(saved)[name] + 0) for name, value in whole)
