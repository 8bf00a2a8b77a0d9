"""Files that are no files, and bytes that are no text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moepress.errors import CheckpointError, FileError, InputError, printable
from moepress.reading.files import read_bytes, read_text, regular_file


def circle(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "pipe": (os.mkfifo, "is a pipe"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "circle": (circle, "leads back to it"),
    "nowhere": (lambda path: path.symlink_to("../gone"), "is a link to ../gone, which does not"),
    "inside a file": (Path.touch, "does not exist"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_only_regular_files_are_opened(tmp_path: Path, name: str) -> None:
    make, expected = STRANGE[name]
    path = tmp_path / "x"
    make(path)
    path = path / "y" if name == "inside a file" else path
    with pytest.raises(FileError, match=f"^The plan .*{expected}"):
        regular_file(path, "The plan")


def test_a_path_that_no_system_has() -> None:
    for path in ("a\0b", "x" * 5000):
        with pytest.raises(FileError, match="cannot be read"):
            regular_file(path, "The plan")


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes("é\r\n".encode())
    assert read_text(path, "The text") == "é\r\n"
    for content, expected in ((b"\xe9", "not UTF-8"), (b"a\0b", "NUL at character 1")):
        path.write_bytes(content)
        with pytest.raises(FileError, match=expected):
            read_text(path, "The text")


def test_sizes_are_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # no blocks on the disk
    with pytest.raises(FileError, match=r"1,099,511,627,776 bytes"):
        read_bytes(path, "The plan")
    path.write_bytes(b"four")
    assert read_bytes(path, "The plan", 4) == b"four"
    with pytest.raises(FileError, match="at most 3"):
        read_bytes(path, "The plan", 3)


def test_a_file_error_is_wrong_input_and_a_damaged_file() -> None:
    assert issubclass(FileError, InputError) and issubclass(FileError, CheckpointError)


def test_messages_have_no_control_characters() -> None:
    assert str(InputError("\x1b[2J\u202eé\n\t\ud800")) == "\\x1b[2J\\u202eé\n\t\\ud800"
    assert printable("plain é") == "plain é"


def test_long_messages_keep_their_beginning_and_their_end() -> None:
    message = str(InputError("What " + "y" * 100_000 + " do."))
    assert message.startswith("What y") and message.endswith("y do.") and len(message) == 1400
