"""The original model beside the one that is being rounded: its states, token by token.

quantizers/drift.py says what they are for. A second walk, twin of the one that quantizes, goes
through each layer just before its weights are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from moepress.quantizers import Drift, Hessian
from moepress.recipe import Recipe
from moepress.walk import Walk


def corrected_linears(
    walk: Walk, twin: Walk, layer: int, modules: Mapping[str, nn.Linear], recipe: Recipe
) -> dict[str, Tensor]:
    """Weights [N, K] float32 of a loaded layer's linears that make up for their inputs' drift.

    Linears with the same input (q, k and v) share what is gathered, and are known by it in the
    first batch, as in `round_linear.hessians_of`.

    Args:
        twin: the original model's walk, before the same layer.
        modules: by the name of their weight.
    """
    gathered: dict[str, tuple[Drift, Hessian]] = {}
    owner: dict[str, bool] = {}
    seen: list[tuple[Tensor, tuple[Drift, Hessian]]] = []
    waiting: dict[str, Tensor] = {}  # original inputs of a batch, which goes through twin first

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in waiting:
                waiting[name] = x
                return
            original = waiting.pop(name)
            if name in gathered:
                seen.clear()
            else:
                known = next((sums for other, sums in seen if other is x), None)
                owner[name] = known is None
                width, device = x.shape[-1], x.device
                gathered[name] = known or (Drift(width, device), Hessian(width, device))
                seen.append((x, gathered[name]))
            if owner[name]:
                drift, hessian = gathered[name]
                drift.add(x.flatten(0, -2), original.flatten(0, -2))
                hessian.add(x.flatten(0, -2))

        return see

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        walk.run_only(layer, after=twin)
    wanted = {}
    while gathered:  # each is let go when it has served its last linear
        name, (drift, hessian) = gathered.popitem()
        shared = any(other is hessian for _, other in gathered.values())
        used = hessian.copy() if shared else hessian
        weight = modules[name].weight.detach()
        wanted[name] = drift.corrected(weight, used, recipe.damping, recipe.correction)
    return wanted
