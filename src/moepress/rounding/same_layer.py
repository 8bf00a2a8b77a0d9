"""Whether a layer computes the same with other weights: asked of the layer, not of its code.

Where weights are multiplied by powers of two here and divided by them there, products are exact, so
a layer that computes the same gives the same numbers, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from moepress.original.calls import replaced_forward
from moepress.original.source import Source
from moepress.original.walk import Walk

T = TypeVar("T", bound=Hashable)


class Call(NamedTuple):
    """What a norm was called with, and what it returned: kept, so that no address is reused."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class Product(NamedTuple):
    """A matrix that a tensor was multiplied with, by a linear or by other code."""

    x: Tensor
    weight: str  # name of the matrix; empty: it is no parameter of the layer


@dataclass(frozen=True)
class Watched:
    """What a loaded layer does with a batch."""

    norms: Mapping[str, Sequence[Call]]  # by path
    products: Sequence[Product]
    given: Sequence[Tensor]  # of `run_batch`
    unused: tuple[str, ...]  # weights of linears that make no difference: they may be for images


class _Products(TorchFunctionMode):
    """Keeps the products with matrices while it is on.

    Args:
        names: of parameters, by their ids.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.kept: list[Product] = []
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight = (*args, *(kwargs or {}).values())[:2]
            self.kept.append(Product(x, self._names.get(id(weight), "")))
        return func(*args, **(kwargs or {}))


def powers_of_two(like: Tensor, power: int = 2) -> Tensor:
    """1 or a power of two, drawn for each channel, of a shape, dtype and device.

    The same on all machines. None is less than 1: so a norm's w + 1 times it, less 1, is exact.
    """
    generator = torch.Generator().manual_seed(like.numel())
    ones = torch.ones(like.shape)
    return torch.where(torch.rand(like.shape, generator=generator) < 0.5, ones, power).to(like)


def that_hold(
    walk: Walk, layer: int, before: Sequence[Tensor], changes: Mapping[T, Mapping[str, Tensor]]
) -> list[T]:
    """Those changes of a loaded layer with which it gives a batch the same, bit by bit.

    They are tried together first, which takes one run if all hold. The layer is left as it was.

    Args:
        before: what the layer gives now, of `run_batch`.
        changes: tensors by name, no tensor twice.
    """

    def hold(some: Sequence[T]) -> bool:
        tensors = {name: value for one in some for name, value in changes[one].items()}
        kept = {name: walk.source.current(name) for name in tensors}
        put(walk.source, tensors)
        after = run_batch(walk, layer, 0)
        put(walk.source, kept)
        return all(map(torch.equal, before, after))

    every = list(changes)
    if not every or hold(every):
        return every
    return [one for one in every if len(every) > 1 and hold([one])]


@torch.inference_mode()
def watch(walk: Walk, layer: int) -> Watched:
    """Run a batch through a loaded layer, and see what its norms and matrices are called with."""
    source, path = walk.source, walk.source.layer_paths[layer]
    part = source.model.get_submodule(path)
    modules = dict(part.named_modules(prefix=path))
    norms: dict[str, list[Call]] = {name: [] for name, one in modules.items() if is_norm(one)}

    def keep(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            norms[name].append(Call(args, kwargs, output))

        return see

    with ExitStack() as stack:
        for name in norms:
            hook = modules[name].register_forward_hook(keep(name), with_kwargs=True)
            stack.callback(hook.remove)
        names = {id(value): name for name, value in part.named_parameters(prefix=path)}
        products = stack.enter_context(_Products(names)).kept
        given = run_batch(walk, layer, 0)
    own, used = set(source.names(path)), {one.weight for one in products}
    linears = [f"{name}.weight" for name, one in modules.items() if isinstance(one, nn.Linear)]
    # The code of some routers reads the weight of a linear that it does not call.
    others = (
        {name: {name: 1 - 3 * source.current(name)}}
        for name in linears
        if name in own - used and source.current(name).dim() == 2
    )
    unused = [name for other in others for name in that_hold(walk, layer, given, other)]
    return Watched(norms, products, given, tuple(unused))


def is_norm(module: nn.Module) -> bool:
    """Whether a module can be a norm: it has one weight a channel, and maybe a bias."""
    own = dict(module.named_parameters(recurse=False))
    alike = all(value.dim() == 1 and value.is_floating_point() for value in own.values())
    return "weight" in own and own.keys() <= {"weight", "bias"} and alike


def put(source: Source, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into the skeleton, by name."""
    for name, value in tensors.items():
        source.put(name, value)


def run_batch(walk: Walk, layer: int, number: int) -> list[Tensor]:
    """All that a batch of this rank gets from a layer; last the inputs of its experts, if any.

    In place of the experts' outputs it gets their inputs.
    """
    given: list[Tensor] = []

    def give(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        given.extend((weight, index, x))
        return x

    batch = walk.batches[number]
    experts = walk.experts_module(layer) if layer in walk.source.experts else None
    with replaced_forward(experts, give):
        carried = walk.carried_of(batch)
        states, handed_on = walk.run(layer, number, walk.states_of(batch), carried)
    return [states, *handed_on.values(), *given]
