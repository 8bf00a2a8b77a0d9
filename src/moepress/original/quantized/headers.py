"""The headers of safetensors files: dtype, shape and place of every tensor. No weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moepress.errors import CheckpointError
from moepress.original.folder import opened

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
            CheckpointError: the file is truncated or damaged.
        """
        with opened(self.path) as file:
            whole = file.get_slice(self.key)
            value: Tensor = whole[...] if row is None else whole[row * rows : (row + 1) * rows]
            return value


def read_headers(files: Iterable[Path]) -> dict[str, Entry]:
    """Every tensor of some safetensors files, by key.

    Raises:
        CheckpointError: a header is damaged.
    """
    found: dict[str, Entry] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for key, fields in header.items():
                if key != "__metadata__":
                    start, stop = fields["data_offsets"]
                    shape = tuple(fields["shape"])
                    found[key] = Entry(key, path, fields["dtype"], shape, stop - start)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"The header of {path} cannot be read: {error!r}. Fetch the file again."
            ) from error
    return found
