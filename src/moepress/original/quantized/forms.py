"""Read a tensor of a checkpoint as the unquantized model has it.

A quantized tensor is a code times a scale. The product is taken in float32 and rounded once, to the
dtype of the model, as transformers' and compressed-tensors' own dequantization do (they agree bit
for bit if the scales are float32, powers of two, or of the model's dtype).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from moepress.errors import FileError, WeightsError
from moepress.original.quantized.grids import Blocks
from moepress.original.quantized.headers import Entry
from moepress.original.quantized.numbers import CAST, Numbers, scales_as_float
from moepress.original.read_ahead import Place
from moepress.original.values import all_finite

ON_CPU, ON_CARD = 1 << 20, 1 << 25  # weights that are held as float32 at a time


class Form(Protocol):
    """How the files hold one tensor of the unquantized checkpoint."""

    @property
    def nbytes(self) -> int:
        """Bytes in the files, with scales."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the unquantized checkpoint."""

    def places(self, row: int | None, rows: int = 1) -> Iterator[Place]:
        """The bytes of the files that the tensor, or row `row` of it, is read from.

        Args:
            rows: number of rows that count as one.
        """

    def read(self, row: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor, or row `row` of it as [1, ...], on the device.

        Args:
            dtype: of the result, if the tensor is quantized; others keep theirs.

        Raises:
            FileError: a file is damaged, or holds something that cannot be read.
            WeightsError: scales or codes are NaN or infinite.
        """


@dataclass(frozen=True)
class Plain:
    """A tensor that is not quantized."""

    entry: Entry

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def places(self, row: int | None, rows: int = 1) -> Iterator[Place]:
        yield self.entry.place(row, rows)

    def read(
        self, row: int | None, dtype: torch.dtype, device: torch.device, rows: int = 1
    ) -> Tensor:
        value = self.entry.read(row, rows)
        return value.clone() if device.type == "cpu" else value.to(device)


@dataclass(frozen=True)
class Unreadable:
    """A tensor whose numbers are unknown. It matters only if the model needs it."""

    entry: Entry
    reason: str

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def places(self, row: int | None, rows: int = 1) -> Iterator[Place]:
        yield from ()

    def read(self, row: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        raise FileError(f"{self.entry.text} {self.reason}")


@dataclass(frozen=True)
class Quantized:
    """Codes of matrices [..., N, K] and the scales of their blocks."""

    codes: Entry
    numbers: Numbers
    scale: Entry  # [..., blocks of rows, blocks of columns], or fewer dimensions
    rows: Blocks
    columns: Blocks
    flattened: int = 1  # last dimensions of the codes that are one row of a matrix
    transposed: bool = False  # the model has [..., K, N]
    zero: Entry | None = None  # of scalar grids: subtracted from the code; shaped as `scale`
    zero_numbers: Numbers = CAST  # packed ones: [bytes of N codes, blocks of columns]
    divisor: Entry | None = None  # one number, by which scales are divided
    factor: tuple[Entry, Entry] | None = None  # numerator and denominator: one number per matrix
    shape_entry: Entry | None = None  # holds [N, K], after the leading dimensions or alone
    padding: int = 0  # codes at the end of a row that only fill its last word

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All tensors of the files that belong to it."""
        optional = (self.zero, self.divisor, *(self.factor or ()), self.shape_entry)
        return (self.codes, self.scale, *(e for e in optional if e is not None))

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def matrix(self) -> tuple[int, int]:
        """N and K."""
        shape = self.codes.shape
        columns = math.prod(shape[len(shape) - self.flattened :]) * self._per_element
        return shape[-1 - self.flattened], columns - self.padding

    @property
    def _per_element(self) -> int:
        """Codes in an element of the tensor of codes."""
        return self.numbers.per_byte * (4 if self.codes.dtype == "I32" else 1)

    @property
    def leading(self) -> tuple[int, ...]:
        """Dimensions before N and K: (E,) or ()."""
        return self.codes.shape[: -1 - self.flattened]

    @property
    def shape(self) -> tuple[int, ...]:
        length, width = self.matrix
        return (*self.leading, *((width, length) if self.transposed else (length, width)))

    def places(self, row: int | None, rows: int = 1) -> Iterator[Place]:
        by_row = rows == 1  # else the tensor is read whole
        yield self.codes.place(row if by_row else None)
        for entry in self.entries[1:]:
            yield entry.place(row if by_row and self._has_rows(entry) else None)

    def read(self, row: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._check_shape()
        length, width = self.matrix
        codes = self.codes.read(row).to(device)
        count = codes.shape[: -1 - self.flattened].numel()  # matrices
        scale = self._scales(self.scale, row, count, device)
        zero = None if self.zero is None else self._zeros(row, count, device)
        index = self.rows.index(length).to(device)
        blocks = self.rows.count(length)
        first = torch.arange(count, device=device)[:, None] * blocks
        value = products(
            codes.reshape(count * length, -1),
            self.numbers,
            scale,
            zero,
            (first + index).flatten(),
            self.columns.size,
            self._factors(row, count, device),
            torch.empty(count * length, width, dtype=dtype, device=device),
        )
        self._check_finite(value)
        value = value.view(*codes.shape[: -1 - self.flattened], length, width)
        return value.mT if self.transposed else value

    def _scales(self, entry: Entry, row: int | None, count: int, device: torch.device) -> Tensor:
        """[matrices * blocks of rows, blocks of columns] float32, checked to be finite."""
        scale = scales_as_float(self._of_row(entry, row).to(device))
        if not torch.isfinite(scale).all():
            raise WeightsError(
                f"{entry.text} contains NaN or infinite scales. Expected finite numbers: the file "
                "is damaged; fetch it again."
            )
        if self.divisor is not None:
            scale = scale / self.divisor.read().to(device, torch.float32).reshape(())
        blocks = self.rows.count(self.matrix[0]), self.columns.count(self.matrix[1])
        if scale.numel() == 1:
            scale = scale.reshape(1, 1).expand(count * blocks[0], blocks[1])
        return scale.reshape(count * blocks[0], blocks[1])

    def _zeros(self, row: int | None, count: int, device: torch.device) -> Tensor:
        """[matrices * blocks of rows, blocks of columns] float32."""
        assert self.zero is not None
        zero = self._of_row(self.zero, row).to(device)
        if self.zero_numbers.values:
            zero = self.zero_numbers.decode(zero.mT)[..., : self.matrix[0]].mT
        blocks = self.rows.count(self.matrix[0]), self.columns.count(self.matrix[1])
        if zero.numel() == 1:
            zero = zero.reshape(1, 1).expand(count * blocks[0], blocks[1])
        return zero.to(torch.float32).reshape(count * blocks[0], blocks[1])

    def _factors(self, row: int | None, count: int, device: torch.device) -> Tensor | None:
        """[rows of all matrices] float32; None: there are none."""
        if self.factor is None:
            return None
        above, below = (self._of_row(e, row).to(device, torch.float32) for e in self.factor)
        return (above / below).reshape(-1).expand(count).repeat_interleave(self.matrix[0])

    def _of_row(self, entry: Entry, row: int | None) -> Tensor:
        """A companion tensor, or row `row` of it if it has one for each row."""
        return entry.read(row if self._has_rows(entry) else None)

    def _has_rows(self, entry: Entry) -> bool:
        """Whether a companion tensor has something for each row of the codes."""
        return bool(self.leading) and entry.shape[:1] == self.leading[:1]

    def without_padding(self) -> Quantized:
        """The same with the number of columns that is stored beside the codes.

        Raises:
            FileError: it is not that of the codes.
        """
        if self.shape_entry is None:
            return self
        whole = replace(self, padding=0)
        stored = self._stored_shape(self.shape_entry)
        padding = whole.matrix[1] - stored[-1] if stored else 0
        exact = replace(self, padding=padding) if 0 <= padding < self._per_element else whole
        exact._check_shape()
        return exact

    def _check_shape(self) -> None:
        """Raise FileError if the stored shape is not that of the codes."""
        if self.shape_entry is None:
            return
        stored = self._stored_shape(self.shape_entry)
        if stored not in (self.matrix, (*self.leading, *self.matrix)):
            raise FileError(
                f"{self.shape_entry.key} says {list(stored)}, but {self.codes.text} holds "
                f"{list(self.matrix)} {self.numbers.name}. The file is damaged: fetch it again."
            )

    @staticmethod
    def _stored_shape(entry: Entry) -> tuple[int, ...]:
        return tuple(int(size) for size in entry.read().flatten())

    def _check_finite(self, value: Tensor) -> None:
        if not all_finite(value):
            raise WeightsError(
                f"{self.codes.text} contains NaN or, times its scales, infinite weights. Expected "
                "finite numbers: the file is damaged or the model is broken; fetch it again."
            )


def products(
    codes: Tensor,
    numbers: Numbers,
    scale: Tensor,
    zero: Tensor | None,
    block_of: Tensor,
    size: int,
    factor: Tensor | None,
    out: Tensor,
) -> Tensor:
    """(number of the code - zero) * scale * factor, a few rows at a time.

    Args:
        codes: [R, codes of K columns, and of others that only fill the last element].
        scale, zero: [blocks of rows, blocks of columns] float32.
        block_of: [R] int64, the block of each row.
        size: columns of a block.
        factor: [R] float32; None: 1.
        out: [R, K] of the dtype of the result; filled.
    """
    width = out.shape[1]
    step = max(1, (ON_CPU if out.device.type == "cpu" else ON_CARD) // width)
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        value = numbers.decode(codes[part])[:, :width]
        if zero is not None:
            _by_block(value, zero[block_of[part]], size, torch.Tensor.sub_)
        _by_block(value, scale[block_of[part]], size, torch.Tensor.mul_)
        if factor is not None:
            value.mul_(factor[part, None])
        out[part] = value
    return out


def _by_block(value: Tensor, operand: Tensor, size: int, change: Callable[..., Tensor]) -> None:
    """Change values [R, K] in place by operands [R, blocks of `size` columns]."""
    full = value.shape[1] // size
    if full:
        blocks = value[:, : full * size].view(len(value), full, size)
        change(blocks, operand[:, :full, None])
    if value.shape[1] > full * size:
        change(value[:, full * size :], operand[:, full:])
