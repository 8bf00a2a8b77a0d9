"""Matrices that vLLM's weight loaders cut as if they were plain, without a copy.

vLLM cuts and places weights in many ways: query, key and value in one layer, heads repeated over
ranks, vocabularies padded, the mixed layers of Mamba. All of them end in

    parameter.data.narrow(...).copy_(loaded.narrow(...))

So both sides are tensors here that carry no numbers. `loaded` is a window of a `Stored` matrix: its
narrows are smaller windows. The parameter is a window of a `Placed` one, which notes what is copied
where. Afterwards the layer knows the rows and columns of each stored matrix that it needs, and cuts
the packed bytes itself (linears.py). Any other operation on a stored matrix sees its plain weights:
correct, and larger in memory. One that changes it in place is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moepress.errors import InputError
from moepress.format.codec import Codec
from moepress.kernels import reference

_ATEN = torch.ops.aten
_CPU, _META = torch.device("cpu"), torch.device("meta")
_SAME = (_ATEN.detach.default, _ATEN.alias.default, _ATEN.lift_fresh.default)


@dataclass(frozen=True)
class Stored:
    """A packed matrix of a folder.

    Attributes:
        name: of the parameter, for messages.
        packed: [codec.nbytes(rows, cols)] uint8.
        dtype: of its plain weights.
    """

    name: str
    packed: Tensor
    rows: int
    cols: int
    codec: Codec
    dtype: torch.dtype

    def plain(self) -> Tensor:
        """The weights, [rows, cols] of `dtype`."""
        return reference.dequantize(self.packed, self.rows, self.cols, self.codec, self.dtype)


@dataclass(frozen=True)
class Copied:
    """Something that was copied to some rows of a `Placed` matrix.

    Attributes:
        rows: where it went.
        value: a window of a stored matrix, or plain weights [len(rows), cols].
    """

    rows: range
    value: Tensor


@dataclass
class Placed:
    """The weight [rows, cols] of a layer before it is loaded.

    Attributes:
        name: of the layer, for messages.
        device: where the layer will be. What is copied may be elsewhere.
    """

    name: str
    rows: int
    cols: int
    dtype: torch.dtype
    device: torch.device = _CPU
    copied: list[Copied] = field(default_factory=list)


class Window(Tensor):
    """Some rows and columns of a `Stored` or `Placed` matrix, as a tensor without storage."""

    base: Stored | Placed
    rows: range
    cols: range

    @staticmethod
    def __new__(
        cls, base: Stored | Placed, rows: range | None = None, cols: range | None = None
    ) -> Window:
        rows = range(base.rows) if rows is None else rows
        cols = range(base.cols) if cols is None else cols
        # vLLM moves parameters that are not on the layer's device.
        device = base.device if isinstance(base, Placed) else _CPU
        made: Window = Tensor._make_wrapper_subclass(
            cls, (len(rows), len(cols)), dtype=base.dtype, device=device
        )
        made.base, made.rows, made.cols = base, rows, cols
        return made

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __repr__(self, **_: object) -> str:  # type: ignore[override]  # used in error messages
        return f"Window({self.base.name}, rows {self.rows}, columns {self.cols})"

    def plain(self) -> Tensor:
        """The weights [rows, columns] of a stored matrix."""
        if isinstance(self.base, Placed):
            raise InputError(
                f"{self.base.name}: vLLM reads its weight before it is loaded. This layer is not "
                "supported."
            )
        first, columns = self.rows.start, self.cols.start
        weights = self.base.plain()
        return weights[first : self.rows.stop, columns : self.cols.stop]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub is of another signature
        cls,
        func: Any,  # an op of torch
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        first = args[0]
        if func in _SAME and isinstance(first, Window):
            return Window(first.base, first.rows, first.cols)
        if func is _ATEN.slice.Tensor and isinstance(first, Window):
            cut = _sliced(*args, **(kwargs or {}))
            if cut is not None:
                return cut
        if isinstance(first, Window) and isinstance(first.base, Placed):
            if func is _ATEN._to_copy.default and kwargs and kwargs.get("device") == _META:
                return torch.empty(
                    first.shape, dtype=first.dtype, device=_META
                )  # vLLM notes how layers began
            return _place(func, first, first.base, args)
        if isinstance(first, Window) and func._schema.is_mutable:
            raise InputError(
                f"{first.base.name}: vLLM does {func} with this packed weight while loading, which "
                "would be lost: this model cannot be served by vLLM from a compressed folder."
            )
        plain_args, plain_kwargs = tree_map(_plain, (args, kwargs or {}))
        return func(*plain_args, **plain_kwargs)


def _sliced(
    window: Window, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Window | None:
    """A window of a window; None: not every row or column in between."""
    if step != 1:
        return None
    ranges = [window.rows, window.cols]
    ranges[dim] = ranges[dim][slice(start, end)]
    return Window(window.base, *ranges)


def _place(func: Any, window: Window, placed: Placed, args: tuple[Any, ...]) -> Any:
    """Note a copy into a placed matrix, or numbers that fill a part of it."""
    shape = len(window.rows), len(window.cols)
    if func is _ATEN.copy_.default and args[1].shape == shape and shape[1] == placed.cols:
        value = args[1] if isinstance(args[1], Window) else args[1].to(placed.dtype)
    elif func in (_ATEN.fill_.Scalar, _ATEN.zero_.default) and shape[1] == placed.cols:
        number = args[1] if len(args) > 1 else 0
        value = torch.full(shape, number, dtype=placed.dtype, device=_CPU)
    else:
        others = [tuple(arg.shape) for arg in args[1:] if isinstance(arg, Tensor)]
        raise InputError(
            f"{placed.name}: vLLM does {func} with its weight {shape} and {others or 'no tensor'} "
            "while loading. Only copies of rows into it are supported: this model cannot be served "
            "by vLLM from a compressed folder."
        )
    if shape[0]:
        placed.copied.append(Copied(window.rows, value))
    return window


def _plain(value: Any) -> Any:
    return value.plain() if isinstance(value, Window) else value
