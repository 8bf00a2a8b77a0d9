"""Digests of tensors: SHA-256 as it was for small ones, a tree of it for large ones."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moepress.errors import FileError
from moepress.format import digest
from moepress.format.digest import PIECE, tensors_digest
from moepress.format.unfinished import load_unfinished, save_unfinished

FILE = "states-0001.safetensors"


def head(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode()


def content(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def plain(tensors: Mapping[str, Tensor]) -> str:
    """As files of all sizes were hashed before there were trees."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(head(name, tensor) + content(tensor))
    return found.hexdigest()


def tree(tensors: Mapping[str, Tensor], piece: int) -> str:
    """What is hashed, put together in memory."""
    text = b""
    for name, tensor in sorted(tensors.items()):
        data = content(tensor)
        if len(data) > piece:
            parts = [data[i : i + piece] for i in range(0, len(data), piece)]
            data = b"".join(hashlib.sha256(part).digest() for part in parts)
        text += head(name, tensor) + data
    return hashlib.sha256(text).hexdigest()


def some(items: int) -> dict[str, Tensor]:
    """Tensors of many kinds, in no order, the largest with `items` float32."""
    generator = torch.Generator().manual_seed(items)
    large = torch.randn(items, generator=generator)
    return {
        "states": large.view(1, -1, 1),
        "carried": torch.randn(5, 3, generator=generator).bfloat16().T,  # not contiguous
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "more": large[: items // 2],
        "ids": torch.arange(7),
    }


@pytest.mark.parametrize("items", [0, 1, PIECE // 4 - 1, PIECE // 4])
def test_small_tensors_have_the_digest_that_they_had(items: int) -> None:
    assert tensors_digest(some(items)) == plain(some(items))


def test_a_digest_of_an_older_version() -> None:
    tensors = {"b": torch.tensor([1, 2], dtype=torch.int32), "a": torch.tensor([0.5])}
    text = b"a torch.float32 [1]\n" + struct.pack("<f", 0.5)
    text += b"b torch.int32 [2]\n" + struct.pack("<ii", 1, 2)
    assert tensors_digest(tensors) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("items", [PIECE // 4 + 1, PIECE // 2, PIECE // 2 + 3])
def test_large_tensors_have_the_digest_of_a_tree(items: int) -> None:
    found = tensors_digest(some(items))
    assert found == tree(some(items), PIECE) != plain(some(items))


@pytest.mark.parametrize("items", [1, 2, 15, 16, 17, 1000])
def test_the_number_of_threads_changes_nothing(items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PIECE", 8)
    found = {tensors_digest(some(items), threads) for threads in (1, 2, 7, None)}
    assert found == {tree(some(items), 8)}


def test_every_byte_name_dtype_and_shape_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "PIECE", 8)
    data = torch.arange(37, dtype=torch.uint8)
    seen = {tensors_digest({"x": data})}
    for place in range(len(data)):
        changed = data.clone()
        changed[place] ^= 1
        seen.add(tensors_digest({"x": changed}))
    swapped = torch.cat([data[8:16], data[:8], data[16:]])  # whole pieces change places
    for other in (swapped, data[:-1], data.view(1, -1), data.view(torch.int8), data.flip(0)):
        seen.add(tensors_digest({"x": other}))
    seen |= {tensors_digest({"y": data}), tensors_digest({"x": data, "y": data[:0]})}
    parts = [hashlib.sha256(data[i : i + 8].numpy().tobytes()).digest() for i in range(0, 37, 8)]
    seen.add(tensors_digest({"x": torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)}))
    assert len(seen) == 1 + 37 + 5 + 2 + 1


def test_a_changed_byte_of_a_large_file_is_found(tmp_path: Path) -> None:
    tensors = {"states": torch.arange(PIECE // 4 + 1000), "small": torch.ones(3)}
    path = tmp_path / FILE
    save_unfinished(path, tensors)
    loaded = load_unfinished(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    whole = bytearray(path.read_bytes())
    start = int.from_bytes(whole[:8], "little") + 8
    for place in (start, start + PIECE - 1, start + PIECE, start + 2 * PIECE + 7, len(whole) - 1):
        whole[place] ^= 128
        path.write_bytes(whole)
        with pytest.raises(FileError, match="another checksum, or an older moepress"):
            load_unfinished(path)
        whole[place] ^= 128
    path.write_bytes(whole)
    assert load_unfinished(path).keys() == tensors.keys()
