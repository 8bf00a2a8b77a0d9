"""The tensors of a checkpoint, by the names and with the values of an unquantized one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from moepress.errors import FileError
from moepress.original.quantized.config import Quantization
from moepress.original.quantized.forms import Form, Plain, Quantized, Unreadable
from moepress.original.quantized.headers import WIDE, read_headers
from moepress.original.quantized.pairing import find_forms
from moepress.original.read_ahead import Place

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_DTYPES = {  # of tensors that are no weights
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors in the safetensors files of a model; quantized ones are dequantized when read."""

    forms: dict[str, Form]  # by name
    quantization: Quantization | None  # what config.json says

    @classmethod
    def of(
        cls,
        files: Iterable[Path],
        quantization: Quantization | None,
        assigned: Mapping[str, str] = MappingProxyType({}),
    ) -> Checkpoint:
        """Read the headers of the files.

        Args:
            assigned: file name by tensor, as the index says; empty: there is none.

        Raises:
            FileError: a header is damaged, the files contradict each other or the index, or
                scales and codes do not fit.
        """
        return cls(find_forms(read_headers(files, assigned), quantization), quantization)

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self.forms.keys()

    @property
    def quantized(self) -> bool:
        """Whether a tensor is quantized."""
        return any(isinstance(form, Quantized) for form in self.forms.values())

    def describe(self) -> str | None:
        """How the tensors are quantized, for people; None: they are not."""
        return (self.quantization or Quantization()).describe() if self.quantized else None

    @property
    def dtype(self) -> torch.dtype:
        """Of a model whose config names none: that of the first float, bfloat16 if quantized.

        The first as transformers finds it: by name in the first file, not by its place there.
        """
        plain = [form.entry for form in self.forms.values() if isinstance(form, Plain)]
        floats = [entry for entry in plain if entry.dtype in WIDE]
        first = min(floats, key=lambda entry: (entry.path, entry.key), default=None)
        dtype = torch.bfloat16 if first is None else (DTYPES | OTHER_DTYPES)[first.dtype]
        return torch.bfloat16 if self.quantized and dtype == torch.float32 else dtype

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype of a tensor in its file; None: it is quantized, or of a rare one."""
        form = self.forms[name]
        known = DTYPES | OTHER_DTYPES
        return known.get(form.entry.dtype) if isinstance(form, Plain) else None

    def check(self, names: Iterable[str], floats: bool) -> None:
        """Check the dtypes of tensors that go into one parameter or buffer.

        Args:
            floats: whether it is one of floats.

        Raises:
            FileError: a tensor is of the other kind, or cannot be read.
        """
        for name in names:
            form = self.forms[name]
            if isinstance(form, Unreadable):
                raise FileError(f"{form.entry.text} {form.reason}")
            if isinstance(form, Plain) and (form.entry.dtype in WIDE) != floats:
                found, expected = "floats", "integers"
                if floats:
                    found, expected = "integers without scales", "floats"
                raise FileError(
                    f"{form.entry.text} holds {found}. Expected {expected}: fetch the model again, "
                    "or give the original's folder."
                )

    def read_shapes(self, names: Iterable[str]) -> None:
        """Read how many columns packed tensors have: their last words may be filled up.

        Raises:
            FileError: a shape that is stored beside codes does not fit them.
        """
        for name in names:
            form = self.forms[name]
            if isinstance(form, Quantized):
                self.forms[name] = form.without_padding()

    def read(
        self,
        name: str,
        row: int | None,
        dtype: torch.dtype,
        device: torch.device,
        rows: int = 1,
    ) -> Tensor:
        """A tensor, or row `row` of it as [1, ...], on the device; nothing else is read.

        Args:
            dtype: of the result, if the tensor is quantized; others keep theirs.
            rows: number of rows that count as one, [rows, ...]. For all but 1, a quantized tensor
                is read whole.

        Raises:
            FileError: its file is damaged.
            NumericalError: its scales or codes are NaN or infinite.
        """
        form = self.forms[name]
        if rows == 1 or row is None:
            return form.read(row, dtype, device)
        if isinstance(form, Plain):
            return form.read(row, dtype, device, rows)
        return form.read(None, dtype, device)[row * rows : (row + 1) * rows]

    def places(self, name: str, row: int | None, rows: int = 1) -> tuple[Place, ...]:
        """The bytes of the files that `read` reads."""
        return tuple(self.forms[name].places(row, rows))

    def nbytes(self, name: str) -> int:
        """Bytes in the files, with scales."""
        return self.forms[name].nbytes
