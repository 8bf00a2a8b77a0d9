"""Round the linears that are not routed experts: attention, shared experts, dense MLPs.

Shared by scoring, which tries every width, and by quantizing, which takes the plan's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

from torch import Tensor, nn

from moepress.errors import MoepressError
from moepress.format.codec import Codec
from moepress.kernels.trellis import rotate
from moepress.original.walk import Walk
from moepress.recipe import Recipe
from moepress.rounding.methods import (
    Factor,
    Inputs,
    QuantizedMatrix,
    TrellisMatrix,
    needs_hessian,
    quantize_matrix,
)


class Shared(NamedTuple):
    """Linears, by the names of their weights, and the inputs that all of them have."""

    names: tuple[str, ...]
    inputs: Inputs


def linear_inputs(
    walk: Walk,
    layer: int,
    modules: Mapping[str, nn.Module],
    recipe: Recipe,
    twin: Walk | None = None,
) -> list[Shared]:
    """What linears of a loaded layer get as inputs now; nothing of it is rounded yet.

    Linears with the same input (q, k and v) share what is gathered. They are known by it in the
    first batch, by identity: those inputs are held until it is over, so that no address is used
    twice.

    Args:
        modules: by the name of their weight.
        twin: the original model's walk, before the same layer; None: its inputs are not wanted.

    Raises:
        MoepressError: a linear is not called.
    """
    gathered: dict[str, Inputs] = {}
    owners: set[str] = set()
    seen: list[tuple[Tensor, Inputs]] = []
    originals: dict[str, list[Tensor]] = {name: [] for name in modules}  # of a batch, by call
    twins_turn = False

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if twins_turn:
                originals[name].append(x)
                return
            original = originals[name].pop(0) if twin is not None else None
            if name in gathered:
                seen.clear()
            else:
                known = next((inputs for other, inputs in seen if other is x), None)
                if known is None:
                    owners.add(name)
                    drifts = twin is not None
                    known = Inputs(x.shape[-1], x.device, recipe.linear_codec, drifts)
                gathered[name] = known
                seen.append((x, known))
            if name in owners:
                rows = None if original is None else original.flatten(0, -2)
                gathered[name].add(x.flatten(0, -2), rows)

        return see

    def run_twin(batch: int) -> None:
        nonlocal twins_turn
        if twin is not None:
            twins_turn = True
            twin.run_batch(layer, batch)
            twins_turn = False

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        if modules:
            walk.run_only(layer, run_twin)
    if silent := sorted(modules.keys() - gathered.keys()):
        raise MoepressError(
            f"{silent[0]} is a linear that its layer never calls, so how to round it is unknown. "
            "Say so in architectures.ROLES (docs/add-a-family.md), with None."
        )
    return [
        Shared(tuple(n for n in modules if gathered[n] is gathered[owner]), gathered[owner])
        for owner in modules
        if owner in owners
    ]


def round_linear(
    weight: Tensor, codec: Codec, factor: Factor | None, recipe: Recipe, quantizer: str
) -> QuantizedMatrix | TrellisMatrix:
    """A linear's weight [N, K] at one codec.

    A codec that is not of the recipe's family (8 bits beside trellis codes) is rounded to nearest:
    the factor is of rotated inputs, and at 8 bits feedback gains nothing.
    """
    if codec.family != recipe.linear_codec:
        return quantize_matrix("rtn", weight, codec, None)
    return quantize_matrix(quantizer, weight, codec, factor if needs_hessian(quantizer) else None)


def output_cost(weight: Tensor, rounded: Tensor, factor: Factor, recipe: Recipe) -> float:
    """trace(E H E^T) of the damped Hessian: the squared error of a linear's outputs, all tokens.

    Args:
        weight, rounded: [N, K].
        factor: of the inputs, rotated if the recipe's linears are trellis codes.
    """
    error = weight.float() - rounded.float()
    if recipe.linear_codec == "trellis":
        error = rotate(error)
    left = error @ factor.feedback
    return float((left.square() @ factor.curvature).double().sum())
