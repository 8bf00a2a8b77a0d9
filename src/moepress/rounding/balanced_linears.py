"""Balanced channels (balance.py) between two linears: values and output, up and down.

Rows of the first divided by s, and columns of the second times s, compute the same where nothing
but products and sums over tokens lies between them. Whether that is so is asked of the layer
(same_layer.py): there may be a norm between, or a later layer may use the values again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.rounding.balance import channel_scales, norms
from moepress.rounding.same_layer import Watched, powers_of_two, put, that_hold

PAIRS = (("v_proj", "o_proj"), ("up_proj", "down_proj"), ("w3", "w2"))  # last parts of the paths
LARGE = 1024  # power of two that limits of a function show at


@dataclass(frozen=True)
class Pair:
    """Two linears, the first of N rows, the second of K columns."""

    first: str  # name of its weight [N, .]
    second: str  # name of its weight [., K]
    run: int  # rows that stay together: those of a head
    repeats: int  # K / N: how often in a row each run of rows is read

    def of_columns(self, scale: Tensor) -> Tensor:
        """[K], from a number for each row [N]."""
        runs = scale.view(-1, 1, self.run).expand(-1, self.repeats, -1)
        return runs.reshape(-1)

    def of_rows(self, squares: Tensor) -> Tensor:
        """[N], sums of a number for each column [K]."""
        return squares.view(-1, self.repeats, self.run).sum(1).view(-1)


@torch.inference_mode()
def balance_linears(source: Source, pairs: Iterable[Pair]) -> None:
    """Balance the channels between linears of a loaded layer.

    Sensitivities that were measured before hold on: the gradient at an output of a first linear is
    about as large as its column, and the root mean square of the columns' norms stays.

    Args:
        pairs: of `find_pairs`.
    """
    for pair in pairs:
        first, second = source.current(pair.first), source.current(pair.second)
        columns = pair.of_rows(norms(second, 0).square()).sqrt()
        # In 16 bits, so that norms summed in another order give the same.
        scale = channel_scales(norms(first, 1), columns).bfloat16().float()
        put(source, scaled_pair(source, pair, scale))


@torch.inference_mode()
def find_pairs(walk: Walk, layer: int, packed: Collection[str], watched: Watched) -> list[Pair]:
    """The pairs of rounded linears of a loaded layer whose channels can be balanced."""
    if watched.unused:  # values of images may come from other linears
        return []
    pairs = _candidates(walk.source, layer, packed)
    changes = {pair: scaled_pair(walk.source, pair, _powers(walk.source, pair)) for pair in pairs}
    return that_hold(walk, layer, watched.given, changes)


def scaled_pair(source: Source, pair: Pair, scale: Tensor) -> dict[str, Tensor]:
    """New tensors of a pair, by name: rows of the first over `scale` [N], columns times it."""
    first, second = source.current(pair.first), source.current(pair.second)
    scale = scale.to(first.device).float()
    tensors = {
        pair.first: (first.float() / scale[:, None]).to(first),
        pair.second: (second.float() * pair.of_columns(scale)).to(second),
    }
    if source.module(pair.first).bias is not None:
        name = pair.first.removesuffix("weight") + "bias"
        bias = source.current(name)
        tensors[name] = (bias.float() / scale).to(bias)
    return tensors


def _candidates(source: Source, layer: int, packed: Collection[str]) -> list[Pair]:
    """Pairs by their names and sizes."""
    found = []
    names = [name for name in source.packable[layer] if name in packed]
    for first in names:
        path, _, last = first.removesuffix(".weight").rpartition(".")
        second = next((f"{path}.{b}.weight" for a, b in PAIRS if a == last), None)
        if second not in names:
            continue
        rows, columns = source.shape(first)[0], source.shape(second)[1]
        parent = source.model.get_submodule(path)
        run = rows if rows == columns else getattr(parent, "head_dim", rows)
        if rows % run == 0 and columns % rows == 0:
            found.append(Pair(first, second, run, columns // rows))
    return found


def _powers(source: Source, pair: Pair) -> Tensor:
    """A scale [N] for products that are exact; rows are not made smaller, so limits show."""
    return 1 / powers_of_two(torch.empty(source.shape(pair.first)[0]), LARGE)
