"""The work folder of a run: held by one process, swept at the start, removed at the end.

A lock of the operating system (flock) says that a process is at work. It ends with the process,
however that ends; network file systems hand it on to other machines. The lock file names process
and machine, for the message to the next run only: nothing is concluded from them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from moepress.errors import CheckpointError, InputError
from moepress.writing.files import is_of_finder, is_partial, sweep

logger = logging.getLogger(__name__)

LOCK = "lock"
# Names of the files and folders of unfinished work, at any depth. Nothing else is deleted.
FILES = (
    LOCK,
    "identity.json",
    "compress.json",
    "text.safetensors",
    "layer-*.safetensors",
    "states-*.safetensors",
    "gradient-*.safetensors",
    "sensitivity-*.safetensors",
    "drops-*.safetensors",
    "sums-*.json",
)
FOLDERS = ("score", "quantize", "sensitivity")
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of a file system


@contextmanager
def held(folder: Path, kept: Callable[[], str] = lambda: "") -> Iterator[Path]:
    """Hold a work folder inside the `with` statement; make it, or sweep what a killed run left.

    A folder that was made here and stays empty is removed again, with the folders around it.

    Args:
        kept: says what is kept, for the note on an exception that stops the run (Ctrl-C, SIGTERM).

    Raises:
        InputError: another process holds the folder, it has files that are not of moepress, or it
            cannot be made.
    """
    check_work(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder)
    except OSError as error:
        _remove_empty(made)
        raise InputError(
            f"{folder} cannot be made: {error.strerror}. Choose another output."
        ) from error
    with lock:
        try:
            for inside, _, _ in os.walk(folder):
                sweep(Path(inside))
            yield folder
        except BaseException as error:
            if not isinstance(error, Exception) and (text := kept()):
                error.add_note(text)
            raise
        finally:
            with suppress(OSError):
                (folder / LOCK).unlink(missing_ok=True)
            _remove_empty(made or [folder])


def check_work(folder: Path) -> None:
    """Raise InputError if a work folder is something else, or has files that are not of moepress.

    Nothing is written. It need not exist.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder} is not a folder. Move it away, or choose another output.")
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob("*")):
        if not _is_work(path, folder):
            raise InputError(
                f"{folder} has {path.relative_to(folder)}, which is not of moepress. The folder is "
                "for unfinished work: move that away, or choose another output."
            )


def discard(folder: Path) -> None:
    """Delete finished work: the files of moepress, and the folders that are empty then.

    Raises:
        CheckpointError: a file cannot be deleted.
    """
    try:
        for path in sorted(folder.rglob("*"), reverse=True):  # inner ones first
            if _is_work(path, folder):
                _remove_empty([path]) if path.is_dir() else path.unlink(missing_ok=True)
        _remove_empty([folder])
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} cannot be deleted ({error.strerror}). The work is finished; delete "
            f"{folder}."
        ) from error


def _is_work(path: Path, folder: Path) -> bool:
    """Whether a file or folder inside a work folder has a name and a place that moepress gives."""
    *around, name = path.relative_to(folder).parts
    if path.is_symlink() or not all(outer in FOLDERS for outer in around):
        return False
    if path.is_dir():
        return name in FOLDERS
    expected = is_partial(name) or is_of_finder(name) or any(fnmatch(name, one) for one in FILES)
    return expected and path.is_file()


def _locked(folder: Path) -> IO[str]:
    """The lock file, open and locked.

    Raises:
        InputError: another process has the lock.
    """
    path = folder / LOCK
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                raise InputError(
                    f"{folder.parent} is in use{_holder(file.read())}: two runs cannot write one "
                    "output. Wait until it ends, or choose another output."
                ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s is on a file system without locks: start no second run.", folder)
        # The process before may have deleted the file between the two calls above.
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        file.close()
    with suppress(OSError):  # a full disk: the work itself will say so
        file.truncate(0)
        since = datetime.now().isoformat(" ", "seconds")
        json.dump({"pid": os.getpid(), "host": platform.node(), "since": since}, file)
        file.flush()
    return file


def _holder(content: str) -> str:
    try:
        fields = json.loads(content)
        return f" by process {fields['pid']} on {fields['host']} since {fields['since']}"
    except (ValueError, KeyError, TypeError):
        return " by another process"


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of some folders that are empty, inner ones first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
