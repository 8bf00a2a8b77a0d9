"""Signs that the files of a model are still on their way: what is unfinished, and what to do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from moepress.byte_units import size_text
from moepress.original.unneeded import some_of

LATELY = 120.0  # seconds; a file written to since then is taken to be growing
LFS = b"version https://git-lfs"  # how a file begins that stands for one in Git LFS
# Endings of unfinished files: huggingface_hub, browsers, aria2, curl and rsync.
UNFINISHED = (".incomplete", ".part", ".crdownload", ".download", ".aria2", ".partial")


def missing_files(folder: Path, names: Sequence[str], listed_by: str) -> str:
    """The message for files of a model that are not there.

    Args:
        names: of the missing files.
        listed_by: the file that names them.
    """
    files = "1 file" if len(names) == 1 else f"{len(names)} files"
    return f"{listed_by} names {files} that {folder} lacks: {some_of(names)}. " + (
        what_to_do(folder) or "Fetch what is missing, then run the same command again."
    )


def what_to_do(folder: Path) -> str:
    """Advice for a folder that lacks files; empty: there is no sign of an unfinished download."""
    unfinished = list(_unfinished(folder))
    if not unfinished:
        return ""
    there = sum(size for size, _ in unfinished)
    last = max(0.0, time.time() - max(written for _, written in unfinished))
    so_far = f"{len(unfinished)} unfinished files, {size_text(there)} so far"
    if last < LATELY:
        return (
            f"A download is under way ({so_far}, the last bytes {last:.0f} s ago): wait until it "
            "has ended, then run the same command again."
        )
    return (
        f"A download was broken off ({so_far}, the last bytes {last / 60:.0f} minutes ago): start "
        "it again, it goes on from there; then run the same command again."
    )


def growing(path: Path) -> str:
    """What may be wrong with a file that is not whole, beside damage; empty: nothing is known."""
    if not path.is_file():  # opening a named pipe would wait for its other end
        return ""
    try:
        with path.open("rb") as file:
            if file.read(len(LFS)) == LFS:
                return " It only stands for the file in Git LFS: run `git lfs pull` in its folder."
        last = max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return ""
    if last >= LATELY:
        return ""
    return (
        f" The file was written to {last:.0f} s ago: if it is still being copied or downloaded, "
        "wait for the end of that and run the same command again."
    )


def _unfinished(folder: Path) -> Iterator[tuple[int, float]]:
    """Bytes and time of the last change of the unfinished files of downloads into a folder."""
    places = [folder, folder / ".cache" / "huggingface" / "download"]
    if folder.parent.name == "snapshots":  # of the hub's cache
        places.append(folder.parent.parent / "blobs")
    for place in places:
        try:
            for path in place.iterdir():
                if path.name.endswith(UNFINISHED):
                    status = path.stat()
                    yield status.st_size, status.st_mtime
        except OSError:  # it is not there, or ended meanwhile
            continue
