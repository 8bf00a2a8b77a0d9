"""Our reader of safetensors headers against safetensors' own, on good files and on damaged ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moepress.errors import FileError
from moepress.reading.headers import read_header

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: Any, data: bytes = bytes(8), length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def test_good_files_are_read_as_safetensors_does(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "b": torch.arange(6).view(2, 3),
        "a": torch.zeros(0, 4, dtype=torch.bfloat16),
        "c": torch.tensor(1.5),
        "é": torch.zeros(3, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, path, metadata={"format": "pt", "moepress": "{}"})
    header = read_header(path)
    raw = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        assert header.metadata == file.metadata() and set(header.tensors) == set(file.keys())
        for name, entry in header.tensors.items():
            stored = file.get_slice(name)
            assert (entry.dtype, list(entry.shape)) == (stored.get_dtype(), stored.get_shape())
            assert (
                raw[entry.start : entry.stop]
                == tensors[name].view(-1).view(torch.uint8).numpy(force=True).tobytes()
            )
    assert header.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())


DAMAGED: dict[str, tuple[Any, bytes]] = {
    "array": ([], b""),
    "not json": (b"{", b""),
    "not utf-8": (b'{"\xff": 1}', b""),
    "twice": (b'{"a": {}, "a": {}}', b""),
    "more bytes": ({"a": ONE}, bytes(9)),
    "fewer bytes": ({"a": ONE}, bytes(7)),
    "gap": ({"a": {**ONE, "data_offsets": [1, 9]}}, bytes(9)),
    "overlap": ({"a": ONE, "b": ONE}, bytes(8)),
    "backwards": ({"a": {**ONE, "data_offsets": [8, 0]}}, bytes(8)),
    "dtype": ({"a": {**ONE, "dtype": "F31"}}, bytes(8)),
    "dtype null": ({"a": {**ONE, "dtype": None}}, bytes(8)),
    "shape": ({"a": {**ONE, "shape": [3]}}, bytes(8)),
    "huge": ({"a": {**ONE, "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}}, bytes(8)),
    "negative": ({"a": {**ONE, "shape": [-2]}}, bytes(8)),
    "float": ({"a": {**ONE, "shape": [2.0]}}, bytes(8)),
    "true": ({"a": {**ONE, "shape": [True, 2]}}, bytes(8)),
    "missing": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "tensor": ({"a": 3}, bytes(8)),
    "metadata": ({"a": ONE, "__metadata__": {"a": 1}}, bytes(8)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_as_safetensors_does(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    write(path, *DAMAGED[name])
    with pytest.raises(FileError, match="cannot be read as safetensors") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SafetensorError):
        safe_open(path, framework="pt").__enter__()


def test_no_memory_is_asked_for_by_a_lying_length(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for content in (b"", b"1234567", b"\xff" * 8, struct.pack("<Q", 1 << 40) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(FileError, match="Expected a header inside the file"):
            read_header(path)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate(1 << 41)
    with pytest.raises(FileError, match="Expected a header inside the file"):
        read_header(path)
