"""Round the linears that are not routed experts: attention, shared experts, dense MLPs.

Scoring rounds at every width, quantizing at the width of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moepress.errors import MoepressError
from moepress.format.codec import Codec, PackedSpec
from moepress.original.walk import Walk
from moepress.rounding.factor import Factor
from moepress.rounding.gathering import Gathering
from moepress.rounding.inputs import Inputs
from moepress.rounding.methods import Matrix, Unrounded, quantize_matrices, quantize_matrix
from moepress.rounding.options import Rounding
from moepress.rounding.rotation import rotate


class SharedInputs(NamedTuple):
    """Linears that have the same inputs (such as q, k and v), and the inputs' statistics."""

    names: tuple[str, ...]  # of the linears' weights
    inputs: Inputs


def linear_inputs(
    walk: Walk,
    layer: int,
    modules: Mapping[str, nn.Module],
    rounding: Rounding,
    original: Walk | None = None,
    experts_output: Tensor | None = None,
) -> list[SharedInputs]:
    """Statistics of the inputs of a loaded layer's linears, before any of them is rounded.

    Of all ranks' tokens, for this rank's share of the linears.

    Linears share one `Inputs` if they get the same tensor in the first batch. Tensors are compared
    by identity, so all inputs of that batch are held until it is over: the address of a freed
    tensor could be used again.

    Args:
        modules: linears of the layer, by the name of their weight.
        rounding: of the linears.
        original: a walk of the original model that has come to the same layer; None: no correction
            is gathered.
        experts_output: [T, H] of the layer's routed experts, for linears that read it
            (`architectures.reads_experts`); None: for others. Then `original` must be None.

    Raises:
        MoepressError: the layer never calls one of the linears.
    """
    gathering = Gathering(walk.ranks, rounding, original is not None)
    owners: dict[str, str] = {}  # by linear, the one that adds the inputs that they share
    seen: list[tuple[Tensor, str]] = []
    originals: dict[str, list[Tensor]] = {name: [] for name in modules}  # of a batch, by call
    original_runs = False

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if original_runs:
                originals[name].append(x)
                return
            before = originals[name].pop(0) if original is not None else None
            if name in owners:
                seen.clear()
            else:
                owners[name] = next((owner for other, owner in seen if other is x), name)
                seen.append((x, owners[name]))
            if owners[name] == name:
                gathering.add(name, x, before)

        return see

    def run_original(batch: int) -> None:
        nonlocal original_runs
        if original is not None:
            original_runs = True
            original.run_batch(layer, batch)
            original_runs = False

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        if modules:
            walk.run_for_hooks(layer, run_original, gathering.end_batch, experts_output)
            gathering.finish()
    owners = walk.ranks.agreed(lambda: owners)
    if never_called := sorted(modules.keys() - owners.keys()):
        raise MoepressError(
            f"{never_called[0]} is a linear that its layer never calls, so how to round it is "
            "unknown. Say so in architectures.ROLES (docs/add-a-family.md), with None."
        )
    return [
        SharedInputs(tuple(n for n in modules if owners[n] == owner), gathering.inputs[owner])
        for owner in modules
        if owner in gathering.inputs
    ]


def quantize_linears(
    walk: Walk,
    names: Collection[str],
    packed: Mapping[str, PackedSpec],
    rounding: Rounding,
    inputs: list[SharedInputs],
) -> dict[str, Tensor]:
    """Round a layer's linears in place.

    Args:
        names: of the linears' weights.
        inputs: statistics of the inputs of this rank's linears; emptied. An empty list: the
            quantizer needs none, or other ranks have all linears.

    Returns:
        Their packed bytes, by name; on rank 0.
    """
    source, ranks = walk.source, walk.ranks
    tensors: dict[str, Tensor] = {}

    def put(name: str, target: Tensor, factor: Factor | None) -> None:
        (codec,) = packed[name].codecs
        matrix = round_linear(target, codec, factor, rounding)
        tensors[name] = packed_bytes(matrix)
        source.put(name, matrix.dequantize(source.current(name).dtype))

    if not rounding.needs_hessian:
        owners = ranks.owners([source.current(name).numel() for name in names])
        for name, owner in zip(names, owners, strict=True):
            if owner == ranks.rank:
                put(name, source.current(name), None)
    while inputs:  # a Hessian and a correction may take gigabytes: freed after use
        sharing, shared = inputs.pop()
        targets = [
            shared.corrected(source.current(name), rounding.damping, rounding.correction)
            for name in sharing
        ]
        factor = shared.factor(rounding.damping)
        del shared
        for name, target in zip(sharing, targets, strict=True):
            put(name, target, factor)
    _exchange_linears(walk, tensors)
    return tensors


def _exchange_linears(walk: Walk, tensors: dict[str, Tensor]) -> None:
    """Put the rounded linears of all ranks in place, and add their packed bytes on rank 0.

    Args:
        tensors: packed bytes of this rank's linears, by name.
    """
    source, ranks = walk.source, walk.ranks
    sizes = ranks.everyones({name: len(packed) for name, packed in tensors.items()})
    for owner, of_one in enumerate(sizes):
        for name, size in of_one.items():
            if owner == ranks.rank:
                rounded, packed = source.current(name), tensors[name]
            else:  # never in place: a weight may be mapped from a file
                rounded = torch.empty_like(source.current(name))
                packed = torch.empty(size, dtype=torch.uint8)
            ranks.give(rounded, owner)
            ranks.give_first(packed, owner)
            source.put(name, rounded)
            if ranks.first:
                tensors[name] = packed


def round_linear(weight: Tensor, codec: Codec, factor: Factor | None, rounding: Rounding) -> Matrix:
    """Round a linear's weight [N, K] to one codec, see `round_linear_to_all`."""
    (matrix,) = round_linear_to_all(weight, [codec], factor, rounding)
    return matrix


def round_linear_to_all(
    weight: Tensor, codecs: Sequence[Codec], factor: Factor | None, rounding: Rounding
) -> list[Matrix]:
    """Round a linear's weight [N, K] to each of several codecs.

    A codec of another family than that of `rounding` (8 bits beside trellis codes) is rounded to
    nearest: the factor is of rotated inputs, and at 8 bits feedback gains nothing.
    """
    used = factor if rounding.needs_hessian else None
    alike = [Unrounded(weight, codec, used) for codec in codecs if codec.family == rounding.family]
    matrices = iter(quantize_matrices(rounding.quantizer, alike) if alike else [])
    return [
        next(matrices)
        if codec.family == rounding.family
        else quantize_matrix("rtn", weight, codec, None)
        for codec in codecs
    ]


def output_cost(weight: Tensor, rounded: Tensor, factor: Factor, family: str) -> float:
    """Squared error of a linear's outputs, summed over tokens: trace(E H E^T), H damped.

    Args:
        weight, rounded: [N, K].
        factor: of the inputs, rotated if `family` is trellis.
    """
    error = weight.float() - rounded.float()
    if family == "trellis":
        error = rotate(error)
    left = torch.cat(list(factor.products(error.T)))
    return float((factor.curvature @ left.square()).double().sum())


def packed_bytes(matrix: Matrix) -> Tensor:
    """The bytes that are stored, on the CPU."""
    return matrix.pack().to("cpu")
