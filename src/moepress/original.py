"""The original model beside the one that is being rounded: its states, token by token.

quantizers/drift.py says what they are for. A second walk, twin of the one that quantizes, goes
through each layer just before its weights are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from moepress.quantizers import Drift
from moepress.walk import Walk


def pass_layer(twin: Walk, layer: int) -> Tensor | None:
    """Bring the original states through a layer whose own weights are loaded.

    Returns:
        [T, H] what reaches the layer's routed experts; None if it has none.
    """
    if layer not in twin.source.experts:
        twin.advance(layer, None)
        return None
    routed = twin.route(layer)
    twin.advance(layer, twin.experts_output(layer, routed))
    return routed.hidden


def linear_drifts(
    walk: Walk, twin: Walk, layer: int, modules: Mapping[str, nn.Module]
) -> dict[str, Drift]:
    """How far the inputs of a loaded layer's linears are from those of the original model.

    Linears with the same input (q, k and v) have one drift between them; `shared_hessians` says how
    they are known.

    Args:
        twin: the original model's walk, before the same layer.
        modules: by name.
    """
    drifts: dict[str, Drift] = {}
    owner: dict[str, bool] = {}
    seen: list[tuple[Tensor, Drift]] = []
    waiting: dict[str, Tensor] = {}  # original inputs of a batch, which goes through twin first

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in waiting:
                waiting[name] = x
                return
            original = waiting.pop(name)
            if name in drifts:
                seen.clear()
            else:
                known = next((drift for other, drift in seen if other is x), None)
                owner[name] = known is None
                drifts[name] = known or Drift(x.shape[-1], x.device)
                seen.append((x, drifts[name]))
            if owner[name]:
                drifts[name].add(x.flatten(0, -2), original.flatten(0, -2))

        return see

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        walk.run_only(layer, after=twin)
    return drifts
