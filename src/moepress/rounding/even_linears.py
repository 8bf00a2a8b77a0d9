"""Linears of a layer that are easier to round: balanced_linears.py, folded_scale.py."""

from __future__ import annotations

from collections.abc import Collection

from moepress.original.walk import Walk
from moepress.rounding.balanced_linears import Pair, balance_linears, find_pairs
from moepress.rounding.folded_scale import Readers, find_readers, fold_scales
from moepress.rounding.same_layer import watch


def even_linears(walk: Walk, layer: int, packed: Collection[str]) -> None:
    """Scale channels of a loaded layer's linears evenly. It computes the same as before.

    The weights are changed in the skeleton, on all ranks, until the layer is unloaded.

    Args:
        packed: names of the linears' weights that are rounded; others may be among them.
    """
    pairs, all_readers = walk.ranks.agreed(lambda: _found(walk, layer, packed))
    balance_linears(walk.source, pairs)
    fold_scales(walk, layer, all_readers, packed)


def _found(walk: Walk, layer: int, packed: Collection[str]) -> tuple[list[Pair], list[Readers]]:
    watched = watch(walk, layer)
    return (
        find_pairs(walk, layer, packed, watched),
        find_readers(walk, layer, packed, watched),
    )
