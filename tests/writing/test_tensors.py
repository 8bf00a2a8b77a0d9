"""Safetensors files: what the library reads is what was written, at whole cache lines."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moepress.errors import InputError
from moepress.reading.headers import read_header
from moepress.writing.tensors import LINE, NAMES, align, write_tensors

METADATA = {"format": "pt"}


def tensors_of(dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of whole cache lines and of parts of one, of no items and of no sizes."""
    shapes = {"whole": (2, 64), "ünë": (3,), "empty": (0, 5), "one": (), "more": (16, 8)}
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        data = torch.randint(0, 2, (size,), dtype=torch.uint8, generator=generator)
        made[name] = data.view(dtype).reshape(shape)
    return made


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_the_library_reads_what_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = tensors_of(dtype) | {"other": torch.ones(3, dtype=torch.uint8)}
    write_tensors(tmp_path / "ours", tensors, METADATA)
    save_file(tensors, tmp_path / "library", METADATA)
    with safe_open(tmp_path / "ours", "pt") as ours:
        assert ours.metadata() == METADATA
    read, expected = load_file(tmp_path / "ours"), load_file(tmp_path / "library")
    assert read.keys() == expected.keys()
    for name, value in read.items():
        assert value.dtype == dtype or name == "other"
        assert value.shape == tensors[name].shape
        assert torch.equal(value.reshape(-1).view(torch.uint8), bytes_of(expected[name]))
        assert torch.equal(bytes_of(value), bytes_of(tensors[name]))


def bytes_of(value: Tensor) -> Tensor:
    return value.reshape(-1).view(torch.uint8)


def aligned(path: Path) -> bool:
    whole = [e for e in read_header(path).tensors.values() if e.nbytes and e.nbytes % LINE == 0]
    return bool(whole) and all(entry.start % LINE == 0 for entry in whole)


def test_whole_cache_lines_begin_at_one(tmp_path: Path) -> None:
    tensors = tensors_of(torch.float32) | {f"packed{i}": torch.ones(64 * i) for i in range(1, 5)}
    write_tensors(tmp_path / "a", tensors, METADATA)
    assert aligned(tmp_path / "a")
    for name, entry in read_header(tmp_path / "a").tensors.items():
        assert entry.start % tensors[name].itemsize == 0


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    tensors = tensors_of(torch.int16)
    write_tensors(tmp_path / "a", tensors, METADATA)
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), METADATA)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_of_the_library_is_aligned_once(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = tensors_of(torch.bfloat16) | {"odd": torch.ones(3, dtype=torch.int64)}
    for length in range(1, 9):  # of a name: the header of one of them ends at a line by chance
        save_file(tensors | {"x" * 9 * length: torch.ones(1)}, path, METADATA)
        if not aligned(path):
            break
    assert not aligned(path)
    expected = load_file(path)
    align(path)
    assert aligned(path)
    read = load_file(path)
    assert read.keys() == expected.keys()
    assert all(torch.equal(bytes_of(read[n]), bytes_of(expected[n])) for n in read)
    before = path.stat().st_ino
    align(path)
    assert path.stat().st_ino == before


def test_a_dtype_that_safetensors_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"a has the dtype torch.complex128, .*Expected one of BF16"
    ):
        write_tensors(tmp_path / "a", {"a": torch.zeros(2, dtype=torch.complex128)}, METADATA)
