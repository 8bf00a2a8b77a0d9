"""Codecs: how the weights of a matrix are stored, and in how many bytes.

The scalar family (`int`) stores every weight as an integer code on a uniform grid. Each group of
`group_size` consecutive weights of a row has its own grid:

    w = scale * (code - zero),   code in 0 .. 2**bits - 1

`scale` is bfloat16. `zero` is one byte: zero = zero_code * (2**bits - 1) / 255, so it can lie
anywhere inside the grid in steps of 1/255 of the grid's width. 1-bit (sign) and 8-bit grids are
symmetric, zero = (2**bits - 1) / 2, and store no zero.

The trellis family stores `bits` bits for every weight. A weight's bits and those of the weights
before it on its path choose one of 2**12 fixed values. Each row has one scale:

    w' = scale * value(state),   w' a weight of the rotated matrix

`kernels/trellis.py` defines paths, values and the rotation. Half widths, such as 1.5 bits, spend
the whole numbers below and above in turn. Widths are numbers of bits, `int` where they are whole.
In ops and their tables ten times the bits stand for half widths (`width_number`).
The `group_size` of a trellis codec
changes no stored byte: it is the number of columns whose activations share a scale in kernels that
round activations.

`docs/format.md` specifies the bytes of a matrix. `kernels/scalar.py` and `kernels/trellis.py` pack
and unpack them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from moepress.errors import InputError

FAMILIES = ("int", "trellis")
GRID_BITS = (1, 2, 3, 4, 8)
HALF_WIDTHS = (1.5, 2.5, 3.5)
TRELLIS_BITS = (1, 1.5, 2, 2.5, 3, 3.5, 4)
CODE_BITS: dict[str, tuple[float, ...]] = {"int": GRID_BITS, "trellis": TRELLIS_BITS}
GROUP_SIZES = (128, 64, 32)  # tried in this order if the requested one does not divide a row
ROWS_PER_BLOCK = 16  # one row for each int32 lane of a 512-bit register
ROWS_PER_SLAB = 64  # the rows of a trellis matrix are padded to a multiple of this
ALIGNMENT = 64  # every matrix starts at a multiple of this many bytes: one cache line
LEFT_OUT = 0  # code bits of an expert that is left out: it has no bytes and no output


def width(bits: float) -> float:
    """A width as it is written: an int where it is whole, so that 2.0 becomes 2."""
    return int(bits) if float(bits).is_integer() else float(bits)


def width_number(bits: float) -> int:
    """The integer that stands for a width in the ops: the bits, or ten times those of half widths.

    1, 2, 3, 4 and 8 are themselves; 15, 25 and 35 are 1.5, 2.5 and 3.5 bits.
    """
    return int(bits * 10) if bits in HALF_WIDTHS else int(bits)


def width_of(number: int) -> float:
    """The inverse of `width_number`."""
    half = number / 10
    return half if half in HALF_WIDTHS else number


def spell_widths(widths: Sequence[float]) -> str:
    """Widths as text: one digit each or, with half widths among them, separated by commas."""
    between = "," if any(bits in HALF_WIDTHS for bits in widths) else ""
    return between.join(str(width(bits)) for bits in widths)


def read_widths(text: str) -> tuple[float, ...]:
    """The inverse of `spell_widths`.

    Raises:
        ValueError: the text is of another form.
    """
    return tuple(width(float(bits)) for bits in (text.split(",") if "." in text else text))


@dataclass(frozen=True, order=True)
class Codec:
    """How one matrix is stored: a family, its code bits, and a group size."""

    bits: float
    group_size: int
    family: str = "int"  # one of FAMILIES

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", width(self.bits))
        if self.family not in FAMILIES:
            raise InputError(f"No codec family '{self.family}'. Expected one of {list(FAMILIES)}.")
        if self.bits not in CODE_BITS[self.family]:
            raise InputError(
                f"{self.bits}-bit codes do not exist in family '{self.family}'. Expected one of "
                f"{list(CODE_BITS[self.family])} bits."
            )
        if self.group_size not in GROUP_SIZES:
            raise InputError(
                f"group size {self.group_size} is not offered. Use one of {list(GROUP_SIZES)}."
            )

    @property
    def name(self) -> str:
        return f"{self.family}{self.bits}-g{self.group_size}"

    @property
    def number(self) -> int:
        """The integer that stands for the width in the ops, see `width_number`."""
        return width_number(self.bits)

    @property
    def levels(self) -> int:
        """The largest code of the scalar family, 2**bits - 1."""
        return (1 << int(self.bits)) - 1

    @property
    def has_zero(self) -> bool:
        """Whether zeros are stored. Sign grids, 8-bit grids and trellis codes are symmetric."""
        return self.family == "int" and self.bits not in (1, 8)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, with the scales and zeros of groups, without padding.

        The scale of each row of trellis codes is not counted.
        """
        if self.family == "trellis":
            return self.bits
        return self.bits + (16 + 8 * self.has_zero) / self.group_size

    def groups(self, cols: int) -> int:
        """Number of groups in a row of `cols` weights.

        Raises:
            InputError: the group size does not divide `cols`.
        """
        if cols % self.group_size:
            raise InputError(
                f"group size {self.group_size} does not divide a row of {cols} weights. "
                f"Use one of {[g for g in GROUP_SIZES if cols % g == 0] or 'no quantization'}."
            )
        return cols // self.group_size

    def block_bytes(self, cols: int) -> int:
        """Bytes of a block: 16 rows of a scalar matrix."""
        side = 2 + self.has_zero  # bf16 scale, uint8 zero
        return ROWS_PER_BLOCK * (cols * int(self.bits) // 8 + self.groups(cols) * side)

    def slab_bytes(self, cols: int) -> int:
        """Bytes of the codes of a slab: 64 rows of a trellis matrix."""
        return int(ROWS_PER_SLAB // 8 * self.groups(cols) * self.group_size * self.bits)

    def nbytes(self, rows: int, cols: int) -> int:
        """Stored bytes of a [rows, cols] matrix, padding included."""
        if self.family == "trellis":
            return -(-rows // ROWS_PER_SLAB) * (self.slab_bytes(cols) + 2 * ROWS_PER_SLAB)
        blocks = -(-rows // ROWS_PER_BLOCK)
        return -(-blocks * self.block_bytes(cols) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class PackedSpec:
    """How one packed tensor (docs/format.md) is stored: the code bits of its matrices, in order.

    A linear is one matrix. A fused expert parameter is one matrix per expert, one after another,
    each starting at a multiple of 64 bytes.
    """

    bits: tuple[float, ...]  # one per matrix; LEFT_OUT: the matrix does not exist
    group_size: int
    family: str = "int"
    # Whether a vector is stored beside it (`pre_quant_scale_of`) that its inputs are multiplied by.
    pre_quant_scale: bool = False

    def __post_init__(self) -> None:
        if not self.bits:
            raise InputError("A packed tensor needs at least one matrix, got no code bits.")
        object.__setattr__(self, "bits", tuple(map(width, self.bits)))
        for bits in set(self.bits) - {LEFT_OUT}:
            self._codec(bits)  # raises InputError if the width does not exist

    def _codec(self, bits: float) -> Codec:
        return Codec(bits, self.group_size, self.family)

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """The codec of each matrix.

        Raises:
            InputError: a matrix is left out.
        """
        return tuple(map(self._codec, self.bits))

    def codec(self, number: int) -> Codec:
        """The codec of one matrix.

        Raises:
            InputError: it is left out.
        """
        return self._codec(self.bits[number])

    def offsets(self, rows: int, cols: int) -> tuple[int, ...]:
        """Offset in bytes of each [rows, cols] matrix, followed by the total number of bytes."""
        sizes = {b: self._codec(b).nbytes(rows, cols) for b in set(self.bits) - {LEFT_OUT}}
        return (0, *accumulate(sizes.get(bits, 0) for bits in self.bits))

    def table(self, rows: int, cols: int) -> list[tuple[int, int]]:
        """(offset in bytes, `width_number`) of each [rows, cols] matrix."""
        return list(zip(self.offsets(rows, cols)[:-1], self.numbers, strict=True))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The integers that stand for the widths in tables of the ops, see `width_number`."""
        return tuple(map(width_number, self.bits))

    def nbytes(self, rows: int, cols: int) -> int:
        """Stored bytes of all matrices, each [rows, cols]."""
        return self.offsets(rows, cols)[-1]

    @property
    def has_half_widths(self) -> bool:
        """Whether a matrix has 1.5, 2.5 or 3.5 bits."""
        return any(bits in HALF_WIDTHS for bits in self.bits)

    def to_json(self) -> dict[str, str | int]:
        fields: dict[str, str | int] = {
            "bits": spell_widths(self.bits),
            "group_size": self.group_size,
        }
        if self.family != "int":
            fields["family"] = self.family
        return fields | {"pre_quant_scale": True} if self.pre_quant_scale else fields

    @classmethod
    def from_json(cls, fields: dict[str, str | int]) -> PackedSpec:
        return cls(
            read_widths(str(fields["bits"])),
            int(fields["group_size"]),
            str(fields.get("family", "int")),
            bool(fields.get("pre_quant_scale", False)),
        )


def pre_quant_scale_of(name: str) -> str:
    """Name of the vector that inputs of a packed parameter are multiplied by."""
    return f"{name}_pre_quant_scale"


def fitting_group_size(cols: int, group_size: int) -> int | None:
    """The largest offered group size up to `group_size` that divides `cols`; None if none does."""
    return next((g for g in GROUP_SIZES if g <= group_size and cols % g == 0), None)


def padded(cols: int) -> int:
    """The columns that a row of an expert is padded to with zeros: the next multiple of 32."""
    least = GROUP_SIZES[-1]
    return -(-cols // least) * least


def padded_shapes(
    gate_up: tuple[int, int], down: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of an expert's gate_up [R, H] and down [H, I], with H and I padded.

    R is a multiple of I: gate and up, or up alone, each padded to as many rows as down has columns.
    Tables of neurons (`Form.by_neuron`), which both have shape [I, H], are not padded.
    """
    if gate_up == down and gate_up[1] == padded(gate_up[1]):  # tables, or I = H: nothing to add
        return gate_up, down
    parts = gate_up[0] // down[1]
    hidden, inner = padded(gate_up[1]), padded(down[1])
    return (parts * inner, hidden), (hidden, inner)


def stored_family(bits: float, family: str) -> str:
    """The family that stores a width: `family`, or the scalar one for widths that it lacks."""
    return family if bits in CODE_BITS[family] else "int"


def codec_for(bits: float, cols: int, group_size: int, family: str = "int") -> Codec:
    """The codec of `bits` for rows of `cols` weights, with that group size or a smaller one.

    Raises:
        InputError: no group size divides the row.
    """
    group = fitting_group_size(cols, group_size)
    if group is None:
        raise InputError(
            f"No group size up to {group_size} divides a row of {cols} weights. Expected rows of "
            "a multiple of 32 weights."
        )
    return Codec(bits, group, family)
