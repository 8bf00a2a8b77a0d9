"""Output files: what may be replaced, what is refused before any work, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import save_json, save_tensors
from moepress.writing import files
from moepress.writing.files import check_file, check_place, sweep, write_atomically
from moepress.writing.ours import Content, content_of


def test_a_new_file_in_folders_to_be_made(tmp_path: Path) -> None:
    check_file(tmp_path / "a" / "b" / "new.json", "a plan")
    assert not list(tmp_path.iterdir())


def _our_json(path: Path) -> None:
    save_json(path, {"kind": "plan", "provenance": {}})


def _our_tensors(path: Path) -> None:
    save_tensors(path, {"a": torch.zeros(2)}, '{"kind": "moepress scores"}')


@pytest.mark.parametrize(
    ("make", "content"),
    [(_our_json, "a plan"), (_our_tensors, "scores"), (Path.touch, "a report")],
)
def test_a_file_of_ours_or_an_empty_one_may_be_replaced(
    make: Callable[[Path], None], content: Content, tmp_path: Path
) -> None:
    make(tmp_path / "out")
    check_file(tmp_path / "out", content)


@pytest.mark.parametrize(
    ("make", "content", "says"),
    [
        (_our_tensors, "a plan", "holds scores, not a plan"),
        (_our_tensors, "a calibration", "holds scores, not a calibration"),
        (_our_json, "an evaluation", "holds a plan, not an evaluation"),
    ],
)
def test_a_file_of_ours_is_not_replaced_by_one_of_another_kind(
    make: Callable[[Path], None], content: Content, says: str, tmp_path: Path
) -> None:
    make(tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    with pytest.raises(InputError, match=says):
        check_file(tmp_path / "out", content)
    assert (tmp_path / "out").read_bytes() == before


def _text(path: Path) -> None:
    path.write_text("moepress compress model out", encoding="utf-8")


def _other_json(path: Path) -> None:
    path.write_text(json.dumps({"kind": "Pod", "provenance": "moepress"}), encoding="utf-8")


def _damaged_json(path: Path) -> None:
    path.write_text('{"kind": "plan", "provenance"', encoding="utf-8")


def _other_tensors(path: Path) -> None:
    save_file({"moepress": torch.zeros(2)}, path, metadata={"format": "pt"})


def _link(path: Path) -> None:
    _our_json(path.with_name("target"))
    path.symlink_to("target")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_text, "not made by moepress"),
        (_other_json, "not made by moepress"),
        (_damaged_json, "not made by moepress"),
        (_other_tensors, "not made by moepress"),
        (_link, "is a link"),
        (_dangling, "is a link"),
        (Path.mkdir, "is a folder"),
        (os.mkfifo, "is a pipe"),
    ],
)
def test_anything_else_is_refused_and_stays(
    make: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    make(path)
    before = path.lstat()
    with pytest.raises(InputError, match=says):
        check_file(path, "a plan")
    after = path.lstat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_device_is_refused_and_stays() -> None:
    with pytest.raises(InputError, match="is a device"):
        check_file(Path(os.devnull), "a plan")
    with pytest.raises(CheckpointError, match="no regular file"):
        write_atomically(Path(os.devnull), Path.touch)
    assert not Path(os.devnull).is_file()


def test_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path / "file" / "out", "not a folder"),
        (tmp_path / "file" / "deep" / "out", "not a folder"),
        (tmp_path / ("x" * 250), "too long"),  # the temporary name is longer
        (tmp_path / ("x" * 300), "cannot be written"),
        (tmp_path / "a\0b", "cannot be written"),
        (Path("/proc/out"), "cannot be written"),  # a file system that cannot be written to
    ):
        with pytest.raises(InputError, match=says):
            check_file(path, "a plan")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)  # root may write everywhere
    with pytest.raises(InputError, match="Permission denied"):
        check_place(tmp_path / "out")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """The limit of a file's size is the disk: the kernel refuses to write more."""
    _our_tensors(tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from moepress.format.checkpoint import save_json, save_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "for save in (lambda: save_tensors(Path('out'), {'a': torch.zeros(9999)}, 'x'),\n"
        "             lambda: save_json(Path('new'), ['x'] * 9999)):\n"
        "    try:\n"
        "        save()\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(x.startswith("CheckpointError No space left") for x in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_bytes() == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096  # ours is untouched


def test_whatever_ends_the_writing_leaves_no_partial_file(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "out", write)
    assert not list(tmp_path.iterdir())


def test_sweep_deletes_unfinished_files_only(tmp_path: Path) -> None:
    for name in (".a.json.moepress-partial", ".a.json.partial", "a.json", "a.moepress-partial"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".a.json.partial", "a.json", "a.moepress-partial",
    }  # fmt: skip


def test_pages_and_pictures_are_known_by_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html>\n<title>a: moepress report</title>", encoding="utf-8")
    assert content_of(page) == "a report"
    page.write_text("<!doctype html>\n<title>moepress and others</title>", encoding="utf-8")
    assert content_of(page) is None
    assert content_of(tmp_path) is None  # a folder cannot be read as a file


def test_two_that_write_one_file_at_once_each_write_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def second(to: Path) -> None:
        to.write_bytes(b"second")

    def first(to: Path) -> None:
        to.write_bytes(b"first")
        with ThreadPoolExecutor(1) as other:
            other.submit(write_atomically, path, second).result()
        assert path.read_bytes() == b"second"

    write_atomically(path, first)
    assert path.read_bytes() == b"first"
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
