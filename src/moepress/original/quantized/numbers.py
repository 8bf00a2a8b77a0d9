"""Codes and scales of quantized tensors as float32.

8-bit floats are cast. Everything narrower is looked up byte by byte, low bits first: FP4 E2M1 (OCP
Microscaling formats, version 1.0, table 5) and two's complement integers stored with an offset, as
compressed-tensors packs them. Float32 holds all of these numbers exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
PACKED_BITS = (1, 2, 4, 8)  # of integers that can be unpacked: those that divide a byte


@dataclass(frozen=True)
class Numbers:
    """How the elements of a tensor of codes become numbers.

    Args:
        name: for people, such as "int4".
        values: number of each code of `bits` bits, packed into bytes; empty: the elements are cast.
        bits: of a code.
    """

    name: str
    values: tuple[float, ...] = ()
    bits: int = 8

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    def decode(self, codes: Tensor) -> Tensor:
        """Numbers [R, C] float32 of codes [R, bytes of C codes], or of elements [R, C]."""
        if not self.values:
            return codes.to(torch.float32)
        if codes.stride(-1) != 1:  # a transposed row too, which counts as contiguous
            codes = codes.clone(memory_format=torch.contiguous_format)
        packed = codes.contiguous().view(torch.uint8)
        table = _byte_table(self.values, codes.device)
        return table[packed.int()].flatten(-2)


@lru_cache(maxsize=16)
def _byte_table(values: Sequence[float], device: torch.device) -> Tensor:
    """[256, codes of a byte] float32: the numbers that each byte stands for."""
    bits = len(values).bit_length() - 1
    shifts = torch.arange(0, 8, bits)
    codes = (torch.arange(256)[:, None] >> shifts) & (len(values) - 1)
    return torch.tensor(values, dtype=torch.float32)[codes].to(device)


CAST = Numbers("8 bits")
FP4 = Numbers("FP4", FP4_VALUES, bits=4)


def packed_int(bits: int) -> Numbers:
    """Integers of `bits` bits, stored plus 2^(bits - 1): compressed-tensors' pack-quantized."""
    offset = 1 << (bits - 1)
    return Numbers(f"int{bits}", tuple(float(code - offset) for code in range(1 << bits)), bits)


def scales_as_float(scale: Tensor) -> Tensor:
    """Scales as float32. Bytes are exponents of two, E8M0: 2^(byte - 127), and NaN for 255."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)
