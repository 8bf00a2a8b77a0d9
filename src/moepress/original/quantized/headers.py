"""The headers of safetensors files: dtype, shape and place of every tensor. No weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moepress.errors import FileError
from moepress.original.folder import opened
from moepress.original.read_ahead import Place
from moepress.reading.headers import read_header

WIDE = ("F64", "F32", "BF16", "F16")  # floats that need no scales
FLOAT8 = ("F8_E4M3", "F8_E5M2")
BYTES = ("I8", "U8")


@dataclass(frozen=True)
class Entry:
    """A tensor as a file holds it."""

    key: str
    path: Path
    dtype: str  # safetensors' name, such as "BF16" or "F8_E4M3"
    shape: tuple[int, ...]
    start: int  # byte of the file at which it begins
    nbytes: int

    @property
    def text(self) -> str:
        """Name, dtype and shape, for messages."""
        return f"{self.key} ({self.dtype} {list(self.shape)})"

    def read(self, row: int | None = None, rows: int = 1) -> Tensor:
        """The tensor, or row `row` of it as [1, ...]. Its memory is the mapped file.

        Args:
            rows: number of rows that count as one.

        Raises:
            FileError: the file is truncated or damaged.
        """
        with opened(self.path) as file:
            whole = file.get_slice(self.key)
            value: Tensor = whole[...] if row is None else whole[row * rows : (row + 1) * rows]
            return value

    def place(self, row: int | None = None, rows: int = 1) -> Place:
        """The bytes of the file that `read` reads."""
        if row is None:
            return Place(self.path, self.start, self.start + self.nbytes)
        size = rows * self.nbytes // max(self.shape[0], 1)
        start = self.start + row * size
        return Place(self.path, start, min(start + size, self.start + self.nbytes))


def read_headers(files: Iterable[Path], assigned: Mapping[str, str]) -> dict[str, Entry]:
    """Every tensor of some safetensors files, by key.

    Args:
        assigned: file name by key, as an index says; empty: there is none.

    Raises:
        FileError: a header is damaged, two files hold a tensor of the same name, or a tensor
            is in another file than the index says.
    """
    found: dict[str, Entry] = {}
    for path in files:
        for key, entry in read_header(path).tensors.items():
            if key in found:
                raise FileError(
                    f"{key} is in {found[key].path.name} and in {path.name} of {path.parent}. "
                    "Expected each tensor once: one of the files is stale; fetch the model again."
                )
            if key in assigned and path.name != Path(assigned[key]).name:
                raise FileError(
                    f"The index of {path.parent} says that {key} is in {assigned[key]}, but it is "
                    f"in {path.name}. They do not belong together: fetch the model again."
                )
            found[key] = Entry(key, path, entry.dtype, entry.shape, entry.start, entry.nbytes)
    return found
