"""Round the linears that are not routed experts: attention, shared experts, dense MLPs.

Shared by scoring, which tries every width, and by quantizing, which takes the plan's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from moepress.codec import Codec
from moepress.errors import MoepressError
from moepress.kernels.trellis import rotate
from moepress.quantizers import (
    Factor,
    Hessian,
    QuantizedMatrix,
    TrellisMatrix,
    needs_hessian,
    quantize_matrix,
)
from moepress.recipe import Recipe
from moepress.walk import Walk


def linear_factors(
    walk: Walk, layer: int, modules: Mapping[str, nn.Module], recipe: Recipe
) -> dict[str, Factor]:
    """The factored Hessians of the inputs that linears of a loaded layer have now, by name.

    Inputs are rotated if the recipe's linears are trellis codes. Linears with the same inputs
    (q, k and v) share one Hessian.

    Raises:
        MoepressError: a linear is not called.
    """
    if not modules:
        return {}
    prepare = rotate if recipe.linear_codec == "trellis" else (lambda x: x)
    with hessians_of(modules, prepare) as hessians:
        walk.run_only(layer)
    if silent := sorted(modules.keys() - hessians.keys()):
        raise MoepressError(
            f"{silent[0]} is a linear that its layer never calls, so how to round it is unknown. "
            "Say so in architectures.ROLES (docs/add-a-family.md), with None."
        )
    factors: dict[int, Factor] = {}
    for hessian in hessians.values():
        if id(hessian) not in factors:
            factors[id(hessian)] = hessian.factor(recipe.damping)
    return {name: factors[id(hessian)] for name, hessian in hessians.items()}


@contextmanager
def hessians_of(
    modules: Mapping[str, nn.Module], prepare: Callable[[Tensor], Tensor]
) -> Iterator[dict[str, Hessian]]:
    """Within the block, gathers Hessians of the prepared inputs of linears.

    Which linears share their input is seen in the first batch, by identity: those inputs are held
    until it is over, so that no address is used twice.
    """
    hessians: dict[str, Hessian] = {}
    owner: dict[str, bool] = {}
    seen: list[tuple[Tensor, Hessian]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name in hessians:
                seen.clear()
            else:
                known = next((h for other, h in seen if other is x), None)
                owner[name] = known is None
                hessians[name] = known or Hessian(x.shape[-1], x.device)
                seen.append((x, hessians[name]))
            if owner[name]:
                hessians[name].add(prepare(x.reshape(-1, x.shape[-1]).float()))

        return add

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in modules.items()]
    try:
        yield hessians
    finally:
        for handle in handles:
            handle.remove()


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
