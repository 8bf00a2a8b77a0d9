"""How the files of an original hold its parameters, and in how many bytes."""

from __future__ import annotations

from moepress.original.quantized.forms import Quantized
from moepress.original.quantized.numbers import Numbers
from moepress.original.source import Source


def disk_bytes(source: Source, name: str) -> int:
    """Bytes in the files of a parameter, routed experts included, with scales."""
    return sum(map(source.checkpoint.nbytes, source.keys_of(name)))


def expert_codes(source: Source) -> Numbers | None:
    """How routed experts are quantized in the files; None: they are not."""
    if not source.checkpoint.quantized:
        return None
    (first, *_) = source.keys_of(source.one_layer_of_experts.matrix_names[0])
    form = source.checkpoint.forms[first]
    return form.numbers if isinstance(form, Quantized) else None


def disk_itemsizes(source: Source) -> tuple[float, float]:
    """Bytes in the files of a weight: of routed experts, and of all other tensors."""
    if not source.checkpoint.quantized:
        return source.dtype.itemsize, source.dtype.itemsize
    layers = source.experts.values()
    stored = sum(disk_bytes(source, name) for experts in layers for name in experts.matrix_names)
    others = sum(source.shape(name).numel() for name in source.all_names)
    of_others = sum(disk_bytes(source, name) for name in source.all_names)
    return stored / sum(experts.weights for experts in layers), of_others / others
