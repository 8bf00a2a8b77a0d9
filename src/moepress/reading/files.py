"""Read files that somebody else may have made: regular ones only, of limited size, as UTF-8."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from moepress.errors import FileError, printable

TEXT_LIMIT = 64 << 20  # bytes of a document: the longest index of a hub model has 25 MB

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of_file(mode: int) -> str:
    """What a file is that is not regular, in words.

    Args:
        mode: `st_mode` of its status.
    """
    return next((name for is_kind, name in KINDS if is_kind(mode)), "a special file")


def regular_file(path: str | Path, what: str) -> Path:
    """The path of a file that can be read to its end.

    Args:
        what: what the file is for the caller, such as "the plan"; begins the message.

    Raises:
        FileError: there is no such file, it is a folder, pipe, socket or device, its links lead
            in a circle, or it may not be read.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL, or letters the system cannot have
        raise _unreadable(path, what, error) from error
    if not stat.S_ISREG(mode):
        raise FileError(
            f"{what} {path} is {kind_of_file(mode)}. Expected a regular file: give its path."
        )
    if not os.access(path, os.R_OK):
        raise FileError(
            f"{what} {path} may not be read by this user. Expected a readable file: change its "
            "permissions."
        )
    return path


def read_bytes(path: str | Path, what: str, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a regular file.

    Args:
        what: as of `regular_file`.
        limit: the most bytes it may have.

    Raises:
        FileError: as of `regular_file`, or it is larger, or reading fails.
    """
    path = regular_file(path, what)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = b"" if size > limit else file.read(limit + 1)
    except OSError as error:
        raise _unreadable(path, what, error) from error
    if max(size, len(content)) > limit:
        raise FileError(
            f"{what} {path} has {size:,} bytes. Expected at most {limit:,}: it is not what its "
            "name says; restore it."
        )
    return content


def read_text(path: str | Path, what: str, limit: int = TEXT_LIMIT) -> str:
    """The content of a text file, in UTF-8 whatever the locale is.

    Args:
        what, limit: as of `read_bytes`.

    Raises:
        FileError: as of `read_bytes`, or the content is not UTF-8, or has a NUL.
    """
    content = read_bytes(path, what, limit)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(
            f"{what} {path} is not UTF-8 text: {error.reason} at byte {error.start:,}. Convert it "
            "to UTF-8, or restore it."
        ) from error
    if "\0" in text:
        raise FileError(
            f"{what} {path} has a NUL at character {text.index(chr(0)):,}. Expected text: the "
            "file is damaged; restore it."
        )
    return text


def _unreadable(path: Path, what: str, error: OSError | ValueError) -> FileError:
    """The error of a file that cannot be opened or read."""
    code = getattr(error, "errno", None)
    if code in (errno.ENOENT, errno.ENOTDIR):
        if path.is_symlink():  # as in copies of the hub's cache
            return FileError(
                f"{what} {path} is a link to {path.readlink()}, which does not exist. Expected a "
                "file: copy or fetch the file itself."
            )
        return FileError(f"{what} {path} does not exist. Expected a file: check the path.")
    if code == errno.ELOOP:
        return FileError(
            f"{what} {path} is a link whose target leads back to it. Expected a file: mend the "
            "link."
        )
    reason = getattr(error, "strerror", None) or str(error)
    return FileError(
        f"{what} {printable(str(path))} cannot be read: {reason}. Expected a file that can be read."
    )
