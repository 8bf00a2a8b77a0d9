"""Files are written whole or not at all, and the same tensors give the same bytes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from moepress.errors import CheckpointError, InputError
from moepress.format import checkpoint
from moepress.format.checkpoint import (
    Writer,
    folder_bytes,
    load_json,
    load_tensors,
    read_about,
    save_json,
    save_tensors,
    tensor_bytes,
    write_atomically,
)
from moepress.format.codec import Codec, PackedSpec, fitting_group_size
from moepress.format.quantization import packed_specs
from moepress.hf import MoePressConfig

FILE = "x.safetensors"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails(to: Path) -> None:
        to.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write_atomically(path, fails)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_real_full_disk(tmp_path: Path) -> None:
    """/dev/full takes opening and refuses writing, as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("only Linux has /dev/full")
    with pytest.raises(CheckpointError, match="No space left"):
        write_atomically(tmp_path / "a", lambda _: _fill())
    assert not list(tmp_path.iterdir())


def _fill() -> None:
    with Path("/dev/full").open("w") as file:
        file.write("x" * 100_000)


def test_tensors_round_trip_in_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5), "a": torch.ones(2, 3, dtype=torch.bfloat16).T}
    save_tensors(tmp_path / FILE, tensors, "words")
    first = (tmp_path / FILE).read_bytes()
    save_tensors(tmp_path / FILE, dict(reversed(tensors.items())), "words")
    assert (tmp_path / FILE).read_bytes() == first
    loaded = load_tensors(tmp_path / FILE)
    assert all(torch.equal(loaded[k], v) for k, v in tensors.items())
    assert read_about(tmp_path / FILE) == "words"
    assert tensor_bytes(tmp_path / FILE) == 5 * 8 + 6 * 2


def test_files_written_beside_the_work_of_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    writer = Writer(torch.device("cuda:0"))
    states, order = torch.arange(4), []
    for layer in range(3):
        files = {tmp_path / f"{name}-{layer}": {"x": states} for name in ("states", "result")}
        writer.save(files, then=lambda layer=layer: order.append(layer))
        states += 1  # the next layer changes them at once
    writer.finish()
    assert order == [0, 1, 2] and len(list(tmp_path.iterdir())) == 6
    for layer in range(3):
        kept = load_tensors(tmp_path / f"states-{layer}")["x"]
        assert kept.equal(torch.arange(4) + layer)
    (tmp_path / "taken").mkdir()
    writer.save({tmp_path / "taken": {"x": states}})
    with pytest.raises(CheckpointError, match="is no regular file"):
        writer.save({tmp_path / "next": {"x": states}})


def test_copies_are_let_go_as_soon_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    copies: list[weakref.ref[torch.Tensor]] = []
    kept: list[int] = []

    def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        kept.append(sum(copy() is not None for copy in copies))
        copies.append(weakref.ref(tensors["x"]))

    writer = Writer(torch.device("cuda:0"), write)
    for _ in range(2):
        writer.save({tmp_path / name: {"x": torch.ones(4)} for name in "abc"})
    writer.finish()
    assert kept == [0] * 6 and not any(copy() is not None for copy in copies)


def test_large_arrays_on_the_cpu_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MOST_COPIED", 8)
    monkeypatch.setattr(checkpoint, "SHARE_COPIED", 0)
    writer = Writer(torch.device("cuda:0"))  # a copy would wait for the card and fail
    done: list[int] = []
    writer.save({tmp_path / FILE: {"x": torch.arange(2)}}, then=lambda: done.append(1))
    assert done == [1] and load_tensors(tmp_path / FILE)["x"].tolist() == [0, 1]


def test_damaged_files_are_one_error(tmp_path: Path) -> None:
    save_tensors(tmp_path / FILE, {"a": torch.ones(100)})
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        load_tensors(tmp_path / FILE)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"x\.json"):
        load_json(tmp_path / "x.json")


def test_folder_bytes_counts_files_that_show(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / ".hidden").write_bytes(b"123")
    (tmp_path / "sub").mkdir()
    assert folder_bytes(tmp_path) == 3


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "moepress", "format_version": 99}}
    save_json(tmp_path / "config.json", config)
    with pytest.raises(InputError, match="format version 99"):
        packed_specs(tmp_path)


@pytest.mark.parametrize("version", [2, 3])
def test_trellis_codes_of_an_older_rotation_are_refused(tmp_path: Path, version: int) -> None:
    modules = {"w": {"bits": "2", "group_size": 32, "family": "trellis"}}
    quantization = {"quant_method": "moepress", "format_version": version, "modules": modules}
    save_json(tmp_path / "config.json", {"quantization_config": quantization})
    message = f"trellis codes of format version {version}.*Compress the original model again"
    with pytest.raises(InputError, match=message):
        packed_specs(tmp_path)
    with pytest.raises(InputError, match=message):
        MoePressConfig(**quantization)
    del modules["w"]["family"]  # scalar codes are as they were
    save_json(tmp_path / "config.json", {"quantization_config": quantization})
    assert packed_specs(tmp_path)["w"].family == MoePressConfig(**quantization).specs()["w"].family


def test_byte_accounting() -> None:
    assert Codec(2, 128).nbytes(16, 128) == 576  # 512 of codes, 32 of scales, 16 of zeros, 16 pad
    assert Codec(1, 32).nbytes(1, 32) == 128  # a block of 16 rows: 64 codes, 32 scales, 32 pad
    spec = PackedSpec((2, 3, 2), 128)
    assert spec.offsets(16, 128) == (0, 576, 576 + 832, 2 * 576 + 832)
    assert PackedSpec.from_json(spec.to_json()) == spec
    assert fitting_group_size(704, 128) == 64 and fitting_group_size(72, 128) is None
    with pytest.raises(InputError, match="does not divide a row of 96"):
        Codec(2, 64).nbytes(4, 96)
