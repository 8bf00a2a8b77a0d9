"""A file that a command writes: checked before the work, then written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from moepress.errors import CheckpointError, InputError
from moepress.reading.files import kind_of_file
from moepress.writing.ours import Content, content_of

PARTIAL = ".moepress-partial"  # how the names of unfinished files end
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, the size of a file


def check_file(path: Path, content: Content) -> None:
    """Check, before any work, that `path` can be written: it is new, empty, or one of the same.

    Missing folders are made when it is written.

    Args:
        content: what will be written. Another file of moepress, which may have taken hours, stays.

    Raises:
        InputError: it is a folder, a link, a device or a file of anything else, or its folder
            cannot be written.
    """
    found = _mode(path)
    if found is not None:
        if stat.S_ISLNK(found):
            raise InputError(f"{path} is a link. Give the file that it should point to, or a name.")
        if not stat.S_ISREG(found):
            raise InputError(
                f"{path} is {kind_of_file(found)}. Expected the name of a file that is new or that "
                "moepress wrote."
            )
        held = content_of(path)
        if held != content and path.stat().st_size:
            what = "was not made by moepress" if held is None else f"holds {held}, not {content}"
            raise InputError(
                f"{path} exists and {what}, so it is not replaced. Choose another name, or delete "
                "that file."
            )
    check_place(path)


def check_place(path: Path) -> None:
    """Check that a file or folder `path` could be made: its folders exist or can be made.

    Nothing is left behind: the test is a file without a name in the nearest folder that exists.

    Raises:
        InputError: a part of the path is a file, or the folder cannot be written.
    """
    missing = [_partial(path).name, path.name]
    folder = path.absolute().parent
    while _mode(folder) is None:
        missing.append(folder.name)
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{path} cannot be made: {folder} is not a folder. Choose another output.")
    try:
        longest = os.pathconf(folder, "PC_NAME_MAX")
        if long := [name for name in missing if len(os.fsencode(name)) > longest]:
            raise InputError(f"{long[0][:40]}... is too long for a name in {folder}. Shorten it.")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{path} cannot be made: {folder} cannot be written ({error.strerror}). Choose another "
            "output, or change the folder's permissions."
        ) from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, sync it to disk, then rename it to `path`.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or `path` is no regular
            file; `path` is unchanged.
    """
    temporary = _partial(path)
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no regular file, so it is not replaced.")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a killed run with this number, or not ours
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~current_umask())  # safetensors makes files private
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        _forget(temporary)
        if is_full(error):
            raise CheckpointError(
                f"No space left while writing {path}. Everything finished before is kept: free "
                "some space and run the same command again to go on."
            ) from error
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise CheckpointError(f"Cannot write {path}: {error}.") from error
        raise


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full. safetensors says it only in words."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return type(error).__name__ == "SafetensorError" and any(
        f"os error {number}" in str(error) for number in FULL
    )


def is_partial(name: str) -> bool:
    """Whether a file with this name is unfinished: what a killed run leaves behind."""
    return name.startswith(".") and name.endswith(PARTIAL)


def is_of_finder(name: str) -> bool:
    """Whether macOS makes a file with this name unasked: in folders that were looked at, and beside
    files on drives of other systems (exFAT)."""
    return name == ".DS_Store" or name.startswith("._")


def sweep(folder: Path) -> None:
    """Delete the unfinished files in a folder. No other process may be writing there."""
    for path in folder.iterdir():
        if is_partial(path.name) and not path.is_dir():
            _forget(path)


_umask = threading.Lock()  # two threads could each take the other's mask for the process's


def current_umask() -> int:
    """The umask of the process. It can only be read by setting it, so it is set twice."""
    with _umask:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that renames inside it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _partial(path: Path) -> Path:
    """The unfinished file of this thread: two programs may write one file at the same time."""
    return path.with_name(f".{path.name}.{threading.get_native_id()}{PARTIAL}")


def _forget(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a read-only disk: the error that led here says so
        return


def _mode(path: Path) -> int | None:
    """The mode of what is at `path`, of a link itself; None: nothing is there."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a name too long, no permission, NUL in the name
        raise InputError(f"{str(path)[:80]!r} cannot be written: {error}.") from error
