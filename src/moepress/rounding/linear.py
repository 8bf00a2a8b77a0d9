"""Round the linears that are not routed experts: attention, shared experts, dense MLPs.

Scoring rounds at every width, quantizing at the width of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from torch import Tensor, nn

from moepress.errors import MoepressError
from moepress.format.codec import Codec
from moepress.original.walk import Walk
from moepress.rounding.hessian import Factor
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
    family: str,
    original: Walk | None = None,
) -> list[SharedInputs]:
    """Statistics of the inputs of a loaded layer's linears, before any of them is rounded.

    Linears share one `Inputs` if they get the same tensor in the first batch. Tensors are compared
    by identity, so all inputs of that batch are held until it is over: the address of a freed
    tensor could be used again.

    Args:
        modules: linears of the layer, by the name of their weight.
        family: of the codecs that they are rounded to.
        original: a walk of the original model that has come to the same layer; None: no correction
            is gathered.

    Raises:
        MoepressError: the layer never calls one of the linears.
    """
    gathered: dict[str, Inputs] = {}
    owners: set[str] = set()  # of linears that share their inputs, the one that adds them
    seen: list[tuple[Tensor, Inputs]] = []
    originals: dict[str, list[Tensor]] = {name: [] for name in modules}  # of a batch, by call
    original_runs = False

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if original_runs:
                originals[name].append(x)
                return
            before = originals[name].pop(0) if original is not None else None
            if name in gathered:
                seen.clear()
            else:
                shared = next((inputs for other, inputs in seen if other is x), None)
                if shared is None:
                    owners.add(name)
                    shared = Inputs(x.shape[-1], x.device, family, original is not None)
                gathered[name] = shared
                seen.append((x, shared))
            if name in owners:
                rows = None if before is None else before.flatten(0, -2)
                gathered[name].add(x.flatten(0, -2), rows)

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
            walk.run_for_hooks(layer, run_original)
    if never_called := sorted(modules.keys() - gathered.keys()):
        raise MoepressError(
            f"{never_called[0]} is a linear that its layer never calls, so how to round it is "
            "unknown. Say so in architectures.ROLES (docs/add-a-family.md), with None."
        )
    return [
        SharedInputs(tuple(n for n in modules if gathered[n] is gathered[owner]), gathered[owner])
        for owner in modules
        if owner in owners
    ]


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
    left = error @ factor.feedback
    return float((left.square() @ factor.curvature).double().sum())
