"""Scales of the inputs of linears (channel_scale.py), put into the norm that gives these inputs.

A norm multiplies its outputs by weights of its own. These times s, and the columns of what reads
the norm divided by s, compute the same: nothing is stored beside them, and nothing is multiplied
while the model runs. But all that reads the norm must be known. Which matrices do is seen while the
layer runs: those of an indexer too, which makes no difference to text that is shorter than what it
chooses. That nothing else does is proven by running it again with powers of two for s
(same_layer.py). A linear that makes no difference to text may be for images: norms that it could
read are left alone. So are those in front of routed experts (pre_quant_scale.py), and those that
another norm reads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moepress.original.architectures import reads_experts
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.rounding.channel_scale import LEAST_GAIN, TOKENS, best_scale
from moepress.rounding.same_layer import (
    Call,
    Product,
    Watched,
    powers_of_two,
    put,
    run_batch,
    that_hold,
)

OFFSETS = (0.0, 1.0)  # norms multiply by w + offset; those of Qwen3-Next and MiniMax-M3 by w + 1


@dataclass(frozen=True)
class Readers:
    """A norm, and all that reads it."""

    norm: str  # path of the module
    offset: float  # it multiplies by w + offset
    matrices: tuple[str, ...]  # their names: weights of linears, or of other code


@torch.inference_mode()
def fold_scales(
    walk: Walk, layer: int, all_readers: Sequence[Readers], packed: Collection[str]
) -> None:
    """Scale norms of a loaded layer, and the weights that read them, where that gains enough.

    Args:
        all_readers: of `find_readers`, the same on all ranks.
        packed: names of the linears' weights that are rounded; others may be among them.
    """
    inputs = _inputs(walk, layer, all_readers)
    for readers, parts in zip(all_readers, inputs, strict=True):
        rounded = [walk.source.current(name) for name in readers.matrices if name in packed]
        scale, gain = walk.ranks.agreed(partial(best_scale, rounded, parts))
        if gain > LEAST_GAIN:
            scale_readers(walk.source, readers, scale)


@torch.inference_mode()
def find_readers(
    walk: Walk, layer: int, packed: Collection[str], watched: Watched
) -> list[Readers]:
    """The norms of a loaded layer whose readers are known, and some of these rounded."""
    unused = {walk.source.shape(name)[1] for name in watched.unused}
    changes = {
        readers: _times_powers(walk.source, readers)
        for readers in _readers(walk, layer, watched)
        if walk.source.shape(readers.matrices[0])[1] not in unused
        and any(name in packed for name in readers.matrices)
        and not any(reads_experts(name) for name in readers.matrices)
    }
    return that_hold(walk, layer, watched.given, changes)


@torch.inference_mode()
def scale_readers(source: Source, readers: Readers, scale: Tensor) -> None:
    """Multiply the outputs of a norm by a scale, and divide the columns of its readers by it.

    Args:
        scale: [K] above 0. The weights of the norm are numbers of its stored dtype, so each channel
            gets the nearest scale that these allow.
    """
    name = f"{readers.norm}.weight"
    weight = source.current(name)
    scaled = _times(weight.float(), scale.to(weight.device), readers.offset)
    scaled = scaled.to(source.stored_dtype(name)).to(weight)
    before, after = (value.float() + readers.offset for value in (weight, scaled))
    stays = (before == 0) | (after == 0)  # in 16 bits w + 1 may be lost
    scaled = torch.where(stays, weight, scaled)
    put(source, _scaled(source, readers, scaled, torch.where(stays, 1.0, after / before)))


def _inputs(walk: Walk, layer: int, all_readers: Sequence[Readers]) -> list[list[Tensor]]:
    """Outputs [t, K] float32 of each norm, of some batches; on rank 0.

    The same batches for any number of ranks, at equal distances.
    """
    kept: list[list[Tensor]] = [[] for _ in all_readers]
    if not all_readers:
        return kept
    batches, own = walk.division.batches, iter(range(len(walk.batches)))
    norms = [walk.source.model.get_submodule(one.norm) for one in all_readers]
    widths = [walk.source.shape(f"{one.norm}.weight")[-1] for one in all_readers]
    tokens = [walk.division.tokens(batch) for _, batch in batches]
    wanted = -(-TOKENS // (tokens[0].stop - tokens[0].start))
    for number, (owner, _) in enumerate(batches):
        mine = next(own) if owner == walk.ranks.rank else None
        if number % max(1, len(batches) // wanted):
            continue
        rows = tokens[number].stop - tokens[number].start
        if mine is None:
            of_batch = [torch.empty(rows, width) for width in widths]
        else:
            of_batch = _inputs_of_batch(walk, layer, mine, norms)
        for x, parts in zip(of_batch, kept, strict=True):
            walk.ranks.give_first(x, owner)
            if walk.ranks.first:
                parts.append(x)
    return kept


def _inputs_of_batch(
    walk: Walk, layer: int, number: int, norms: Sequence[nn.Module]
) -> list[Tensor]:
    """Outputs [t, K] float32 of some norms in a batch of this rank."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(norm: nn.Module, args: Any, output: Tensor) -> None:
        seen[norm] = output.flatten(0, -2).float()

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(keep).remove)
        run_batch(walk, layer, number)
    return [seen[norm] for norm in norms]


def _readers(walk: Walk, layer: int, watched: Watched) -> list[Readers]:
    """The norms that are called once, with the matrices that get their outputs.

    Those in front of routed experts and of other norms are left out.
    """
    source, to_experts = walk.source, watched.given[-1]
    own = set(source.names(source.layer_paths[layer]))
    of_norms = (one for calls in watched.norms.values() for one in calls)
    others = [to_experts, *(x for one in of_norms for x in (*one.args, *one.kwargs.values()))]
    calls = {name: of_one[0] for name, of_one in watched.norms.items() if len(of_one) == 1}
    return [
        Readers(name, offset, weights)
        for name, call in calls.items()
        if f"{name}.weight" in own
        and not any(_is_same(x, call.output) for x in others)
        and (weights := _matrices_with_input(watched.products, call.output))
        and all(one in own and source.shape(one)[-1] == call.output.shape[-1] for one in weights)
        and (offset := _offset(source.model.get_submodule(name), call)) is not None
    ]


def _matrices_with_input(products: Sequence[Product], x: Tensor) -> tuple[str, ...]:
    """Names of the matrices that are multiplied with `x`, in their order."""
    return tuple(dict.fromkeys(one.weight for one in products if _is_same(one.x, x)))


def _is_same(x: Any, other: Any) -> bool:
    """Whether two tensors are the same memory in whatever shape, or a copy in another dtype."""
    if not (isinstance(x, Tensor) and isinstance(other, Tensor)) or x.numel() != other.numel():
        return False
    if x.dtype == other.dtype:
        return x.data_ptr() == other.data_ptr()
    return torch.equal(x.flatten(), other.flatten().to(x.dtype))


def _offset(norm: nn.Module, call: Call) -> float | None:
    """The `offset` of a norm that multiplies by w + offset; None: it is no such norm."""
    kept = dict(norm.named_parameters(recurse=False))
    for offset in OFFSETS:
        doubled = {name: 2 * value for name, value in kept.items()}
        doubled["weight"] = _times(kept["weight"], 2, offset)
        try:
            found = functional_call(norm, doubled, call.args, call.kwargs)
        except RuntimeError:  # it wants weights of one dtype
            continue
        if isinstance(found, Tensor) and torch.equal(found, 2 * call.output):
            return offset
    return None


def _times(weight: Tensor, scale: Tensor | float, offset: float) -> Tensor:
    """The weights of a norm whose outputs are multiplied by a scale, in float32 with an offset."""
    return (weight.float() + offset) * scale - offset if offset else weight * scale


def _times_powers(source: Source, readers: Readers) -> dict[str, Tensor]:
    """`_scaled` for products that are exact."""
    weight = source.current(f"{readers.norm}.weight")
    power = powers_of_two(weight)
    return _scaled(source, readers, _times(weight, power, readers.offset), power)


def _scaled(source: Source, readers: Readers, weight: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """New tensors of a norm and of its readers, by name.

    Args:
        weight: of the norm.
        scale: [K], what its outputs are multiplied by then.
    """
    tensors = {f"{readers.norm}.weight": weight}
    if getattr(source.module(f"{readers.norm}.weight"), "bias", None) is not None:
        bias = source.current(f"{readers.norm}.bias")
        tensors[f"{readers.norm}.bias"] = (bias.float() * scale.float()).to(bias)
    for name in readers.matrices:
        value = source.current(name)
        tensors[name] = (value.float() / scale.float()).to(value)
    return tensors
