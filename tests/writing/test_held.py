"""Work folders: one process at a time, nothing foreign is deleted, nothing is left behind."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moepress.errors import InputError
from moepress.writing.held import LOCK, check_work, discard, held


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_folder_that_stays_empty_is_removed_again(tmp_path: Path) -> None:
    with held(tmp_path / "a" / "work") as work:
        assert names(work) == {LOCK}
    assert not names(tmp_path)
    with pytest.raises(InputError), held(tmp_path / "a" / "work"):
        raise InputError("no text")
    assert not names(tmp_path)


def test_unfinished_files_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / ".layer-0001.safetensors.moepress-partial").touch()
    (tmp_path / "score" / "layer-0000.safetensors").touch()
    (tmp_path / LOCK).touch()
    with held(tmp_path):
        assert names(tmp_path) == {LOCK, "score", "score/layer-0000.safetensors"}
    assert names(tmp_path) == {"score", "score/layer-0000.safetensors"}


def test_the_second_is_told_who_holds_it_and_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from moepress.writing.held import held\n"
        "with held(Path(sys.argv[1]) / 'work'):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        says = f"in use by process {holder.pid} on {platform.node()} since 2"
        with pytest.raises(InputError, match=says), held(tmp_path / "out" / "work"):
            pass
        assert names(tmp_path / "out" / "work") == {LOCK}
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    with held(tmp_path / "out" / "work") as work:
        assert str(os.getpid()) in (work / LOCK).read_text(encoding="utf-8")


def test_files_that_are_not_of_moepress_are_refused_and_kept(tmp_path: Path) -> None:
    for place in ("notes.txt", "score/notes.txt", "other/layer-0000.safetensors"):
        work = tmp_path / place.replace("/", "-")
        (work / place).parent.mkdir(parents=True)
        (work / place).write_text("precious", encoding="utf-8")
        (work / "text.safetensors").touch()
        says = f"has {place.split('/')[0]}.*not of moepress"
        with pytest.raises(InputError, match=says), held(work):
            pass
        discard(work)  # as if it had come during the run
        assert (work / place).read_text(encoding="utf-8") == "precious"
        assert not (work / "text.safetensors").exists()


def test_files_of_macos_go_with_the_work(tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "score").mkdir(parents=True)
    for name in (".DS_Store", "._score", "score/._layer-0000.safetensors", "score/.DS_Store"):
        (work / name).write_bytes(bytes(8))
    with held(work):
        pass
    discard(work)
    assert not work.exists()


def test_links_and_files_in_its_place_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(InputError, match="not a folder"):
            check_work(tmp_path / name)
    (tmp_path / "folder" / "text.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="not of moepress"):
        check_work(tmp_path / "folder")


def test_a_stop_tells_what_is_kept_and_an_error_does_not(tmp_path: Path) -> None:
    for error, notes in ((KeyboardInterrupt(), ["Kept: all."]), (ValueError(), None)):
        with pytest.raises(type(error)) as caught, held(tmp_path / "work", lambda: "Kept: all."):
            raise error
        assert getattr(caught.value, "__notes__", None) == notes
