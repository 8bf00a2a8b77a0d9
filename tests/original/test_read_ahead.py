"""Files are read before they are needed: the right bytes, in order, within bounds."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moepress.errors import CheckpointError, FileError
from moepress.original import arriving, read_ahead
from moepress.original.checkpoint import Checkpoint
from moepress.original.quantized.headers import Entry
from moepress.original.read_ahead import Need, Place, ReadAhead
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.progress import Progress
from tests.conftest import FAMILIES
from tests.original.test_quantized import copy_of

Folder = Callable[..., Path]
NAME = "moepress-read-ahead"


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def until(true: Callable[[], bool]) -> None:
    """Wait for a thread to bring something about."""
    gc.collect()  # threads of earlier tests end with their sources, which may be garbage in a cycle
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def free(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(read_ahead, "free_host_memory", lambda: memory)


class Watched:
    """The ranges of bytes that the thread reads, of files of a folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.places: list[Place] = []
        read = ReadAhead._read_place

        def watched(ahead: ReadAhead, place: Place) -> None:
            self.places.append(place)
            read(ahead, place)

        monkeypatch.setattr(ReadAhead, "_read_place", watched)


@pytest.fixture
def needs(tmp_path: Path) -> list[Need]:
    """Ten needs of 1000 bytes in a file."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(250)) * 40)
    return [Need((str(i), None), (Place(path, i * 1000, i * 1000 + 1000),)) for i in range(10)]


# What is read


@pytest.mark.parametrize("kind", [*FAMILIES, "fp8", "mxfp4", "int4 experts, fp8 attention"])
def test_what_is_read_ahead_is_what_is_read(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Every byte that a layer's tensors are made of, in the order of their use, and no other."""
    folder = model_folder(kind) if kind in FAMILIES else copy_of(kind, model_folder, tmp_path)[0]
    source = Source(folder)
    keys: list[tuple[str, int | None]] = []
    entries: list[tuple[Path, bytes]] = []
    read, of_entry = Checkpoint.read, Entry.read

    def by_key(checkpoint: Checkpoint, name: str, row: int | None, *more: Any) -> Tensor:
        keys.append((name, row))
        return read(checkpoint, name, row, *more)

    def by_entry(entry: Entry, row: int | None = None, rows: int = 1) -> Tensor:
        value = of_entry(entry, row, rows)
        entries.append((entry.path, value.contiguous().reshape(-1).view(torch.uint8).numpy().data))
        return value

    monkeypatch.setattr(Checkpoint, "read", by_key)
    monkeypatch.setattr(Entry, "read", by_entry)
    last = len(source.layers) - 1
    with source.layer_loaded(last):
        for number in range(source.experts[last].experts):
            source.expert(last, number)
    found = source.upcoming._layer(last)
    assert [need.key for need in found] == list(dict.fromkeys(keys))
    expected = {(path, bytes(value)) for path, value in entries}
    places = {place for need in found for place in need.places}
    assert {(p.path, p.path.read_bytes()[p.start : p.stop]) for p in places} == expected


def test_the_next_layer_is_read_during_this_one(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(model_folder())
    keys = [[need.key for need in source.upcoming._layer(layer)] for layer in (0, 1)]
    assert source.upcoming._layer(2) == source.upcoming._layer(-1) == []
    begun: list[list[Any]] = []
    begin = ReadAhead.__init__

    def watched(ahead: ReadAhead, needs: list[Need], what: str) -> None:
        begun.append([need.key for need in needs])
        begin(ahead, needs, what)

    monkeypatch.setattr(ReadAhead, "__init__", watched)
    with source.layer_loaded(0):
        list(source.experts_in_turn(0, [3, 1]))
    first, then = begun
    assert first == keys[0]
    assert then[-len(keys[1]) :] == keys[1]
    assert {key for key, _ in then[: -len(keys[1])]} < {key for key, _ in keys[0]}
    with source.layer_loaded(1, following=0):
        list(source.experts_in_turn(1, range(4)))
    assert begun[-1][-len(keys[0]) :] == keys[0]
    walk = Walk(source, torch.arange(32).view(1, 32))
    with Progress("finish", 2) as progress:
        walk.finish(progress)
    until(lambda: not threads())  # all that was begun is read, and then nothing is left


def test_who_waits_while_a_walk_goes_on_waits_for_what_is_read_then(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread may read the experts of a layer while the walk comes to that layer."""
    source = Source(model_folder())
    key = source.upcoming._layer(1)[-1].key
    gate = threading.Event()
    read = ReadAhead._read_place

    def slow(ahead: ReadAhead, place: Place) -> None:
        gate.wait()
        read(ahead, place)

    monkeypatch.setattr(ReadAhead, "_read_place", slow)
    source.upcoming.experts(1, range(source.experts[1].experts))
    first = source.upcoming._reading
    waiting = threading.Thread(target=source.upcoming.wait_for, args=(key,))
    waiting.start()
    until(lambda: first._used > 0)  # it waits
    source.upcoming.layer(1, 2)
    second = source.upcoming._reading
    until(lambda: second._used > 0 or not waiting.is_alive())
    assert waiting.is_alive() and second._read == 0
    gate.set()
    waiting.join()
    assert second._read == len(second._needs) > 0
    until(lambda: not threads())


# How much is read


def test_reading_stays_within_the_memory_that_is_free(
    needs: list[Need], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    free(monkeypatch, 5000)  # half of it: two needs more
    ahead = ReadAhead(needs, "file")
    until(lambda: len(watched.places) == 3)
    time.sleep(0.02)
    assert len(watched.places) == 3
    ahead.wait_for(("4", None))
    until(lambda: len(watched.places) == 7)
    ahead.wait_for(("other", None))  # nothing that was begun
    ahead.wait_for(("0", None))
    time.sleep(0.02)
    assert watched.places == [need.places[0] for need in needs[:7]]
    ahead.stop()
    until(lambda: not threads())


def test_without_memory_only_what_is_needed_is_read(
    needs: list[Need], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    free(monkeypatch, 0)
    ahead = ReadAhead(needs, "file")
    for number in range(10):
        ahead.wait_for((str(number), None))
        time.sleep(0.002)
        assert len(watched.places) == number + 1
    until(lambda: not threads())


def test_several_threads_share_the_bytes_of_a_tensor(
    needs: list[Need], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(read_ahead, "PIECE", 128)
    monkeypatch.setattr(os, "cpu_count", lambda: 3 * read_ahead.CORES_PER_READER)
    watched = Watched(monkeypatch)
    ReadAhead(needs[:2], "file").wait_for(("1", None))
    mine = (p for p in watched.places if p.path == tmp_path / "file")  # other tests may still read
    parts = sorted((place.start, place.stop) for place in mine)
    assert parts == [(0, 384), (384, 768), (768, 1000), (1000, 1384), (1384, 1768), (1768, 2000)]
    os.truncate(tmp_path / "file", 1500)  # another thread's part than the first
    reading = ReadAhead(needs[:2], "file")
    for part in parts[-2:]:  # the thread of either may be the first to see it
        with pytest.raises(CheckpointError, match=r"file ends at byte 1,500"):
            reading._read_place(Place(tmp_path / "file", *part))
    with pytest.raises(CheckpointError, match=r"file ends at byte 1,500"):
        reading.wait_for(("1", None))
    until(lambda: not threads())


def test_the_thread_ends_with_its_source(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 0)
    source = Source(model_folder())
    source.load(source.layer_paths[0])
    source.upcoming.layer(0, 1)
    assert threads()
    del source
    gc.collect()
    until(lambda: not threads())


# What goes wrong


def test_a_slow_file_is_told(needs: list[Need], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(read_ahead, "TELL_AFTER", 0.02)
    monkeypatch.setattr(read_ahead, "announce", lambda name, text: told.append(f"{name}: {text()}"))
    gate = threading.Event()
    read = ReadAhead._read_place

    def slow(ahead: ReadAhead, *rest: Any) -> None:
        if ahead._read == 1:
            gate.wait()
        read(ahead, *rest)

    monkeypatch.setattr(ReadAhead, "_read_place", slow)
    ahead = ReadAhead(needs, "layer 3 of 61")
    waiting = threading.Thread(target=ahead.wait_for, args=(("5", None),))
    waiting.start()
    until(lambda: bool(told))
    gate.set()
    waiting.join()
    (line,) = told
    assert line.startswith("waiting: for layer 3 of 61: file comes at ")


def test_a_file_that_cannot_be_read_any_more_is_an_error_of_the_work(
    model_folder: Folder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder(max_shard_size="100KB"), tmp_path / "copy"))
    source = Source(folder)
    path = source.upcoming._layer(1)[-1].places[0].path
    assert path not in {place.path for need in source.upcoming._layer(0) for place in need.places}
    path.unlink()
    walk = Walk(source, torch.arange(32).view(1, 32))
    with source.layer_loaded(0):
        walk.pass_layer(0)  # the next layer's error is not this one's
    with (
        pytest.raises(CheckpointError, match=f"{path.name} cannot be read: No such file"),
        source.layer_loaded(1),
    ):
        walk.pass_layer(1)


def test_a_file_that_is_cut_meanwhile_is_an_error(needs: list[Need], tmp_path: Path) -> None:
    os.truncate(tmp_path / "file", 4500)
    ahead = ReadAhead(needs, "file")
    ahead.wait_for(("3", None))
    for key in ("4", "9"):
        with pytest.raises(CheckpointError, match=r"file ends at byte 4,500. Expected 5,000 "):
            ahead.wait_for((key, None))
    until(lambda: not threads())


# Files that are still on their way


def test_missing_shards_are_told_with_the_state_of_their_download(
    model_folder: Folder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model_folder(max_shard_size="100KB"), tmp_path / "copy"))
    lost = sorted(folder.glob("*.safetensors"))[1:3]
    for path in lost:
        path.unlink()
    names = f"names 2 files that .* lacks: {lost[0].name}, {lost[1].name}. "
    with pytest.raises(CheckpointError, match=f"{names}Fetch what is missing"):
        Source(folder)
    unfinished = folder / ".cache" / "huggingface" / "download" / "abc.def.incomplete"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(bytes(20_000_000))
    with pytest.raises(
        CheckpointError, match=names + r"A download is under way \(1 unfinished files, 20.0 MB"
    ):
        Source(folder)
    hour_ago = time.time() - 3600
    os.utime(unfinished, (hour_ago, hour_ago))
    with pytest.raises(CheckpointError, match=r"A download was broken off .* 60 minutes ago"):
        Source(folder)


def test_downloads_into_the_cache_of_the_hub_are_found(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "123", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    assert arriving.what_to_do(snapshot) == ""
    (blobs / "abc.incomplete").write_bytes(b"1")
    assert "A download is under way" in arriving.what_to_do(snapshot)


def test_a_file_that_grows_is_told(model_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder(), tmp_path / "copy"))
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(FileError, match=r"cut or damaged.* was written to \d+ s ago: if it is"):
        Source(folder)
    os.utime(path, (0, 0))
    with pytest.raises(FileError) as error:
        Source(folder)
    assert "was written" not in str(error.value)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(FileError, match="git lfs pull"):
        Source(folder)
    path.unlink()
    os.mkfifo(path)  # opening it would wait for ever
    with pytest.raises(FileError, match="pipe"):
        Source(folder)
