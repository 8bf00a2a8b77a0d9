"""What decoder layers hand to later layers beside their states.

Most layers take states and return states. Some families have more, which a walk has to carry from
layer to layer. Each is a tensor [b, ...] of a batch of b sequences, by name:

    returned.N      value N of the tuple that a layer returns; the model gives it to the next layer.
                    glm_moe_dsa: the tokens that attention has chosen; zaya: states of the router
    shared.KEY.N    a tensor of a mapping that all layers write to and read from.
                    gemma4: keys and values of earlier layers
    blocks          [b, L, blocks, H] states in front of some earlier layers, which the model
                    collects (inkling2)
    previous        [b, L, blocks + 1, H] what the pass before has left, inside a loop (loops.py)
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moepress.errors import InputError, MoepressError
from moepress.original.batches import SHARE_IN_ORDER, empty
from moepress.original.loops import Message
from moepress.original.remote_code import one_line

Carried = dict[str, Tensor]

RETURNED, SHARED, BLOCKS, PREVIOUS = "returned", "shared", "blocks", "previous"
BEFORE_LAYERS = -1  # the number of no layer: what comes out of it is the input of layer 0
BOUNDARY = "is_block_boundary"  # attribute of layers: the states in front of it join the blocks


@dataclass(frozen=True)
class Placeholder:
    """Stands for a carried value in a recorded call, or for what the model makes of it."""

    name: str
    make: Message | None = field(default=None, compare=False)


def returned_values(layer: nn.Module) -> int:
    """Number of values that a decoder layer returns beside its states.

    Raises:
        InputError: its code does not tell.
    """
    kind: Any = type(layer)
    return _returned_values(kind)


@cache
def _returned_values(kind: Any) -> int:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
    except (OSError, TypeError):  # no source file: `taken` checks what is really returned
        return 0
    returned = {
        len(node.value.elts) - 1 if isinstance(node.value, ast.Tuple) else 0
        for node in _own_nodes(ast.parse(source).body[0])
        if isinstance(node, ast.Return) and node.value is not None
    }
    if len(returned) > 1:
        raise InputError(
            f"Layers of {kind.__name__} sometimes return {min(returned) + 1} values and sometimes "
            f"{max(returned) + 1}. Expected one number: this model cannot be walked."
        )
    return returned.pop() if returned else 0


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function, without those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _own_nodes(node)


def stand_in_output(layer: nn.Module, states: Tensor) -> Any:
    """What a layer that is not run returns: states, and placeholders for everything else."""
    count = returned_values(layer)
    if not count:
        return states
    return states, *(Placeholder(f"{RETURNED}.{place}") for place in range(count))


def with_placeholders(
    layer: nn.Module, args: tuple[Any, ...], message: Message | None
) -> tuple[Any, ...]:
    """The arguments of a recorded call, with placeholders for what the model computed of states.

    Args:
        message: makes the messages of a layer from the pass before (loops.py); None: it gets none.
    """
    if not hasattr(layer, BOUNDARY):
        return args
    if message is None:
        return (Placeholder(BLOCKS), *args[1:])
    return (Placeholder(BLOCKS), Placeholder(PREVIOUS, message), *args[2:])


class CarriedCall:
    """One call of a decoder layer, with carried values in place of placeholders.

    Args:
        args, kwargs: of the recorded call, without the states.
        states: [b, L, ...] input of the layer.
        carried: of the batch.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor, carried: Carried
    ) -> None:
        self.states = states
        self.carried = carried
        self.shared: MutableMapping[str, tuple[Tensor, ...]] | None = None
        self.args = tuple(map(self._filled, args))
        self.kwargs = {name: self._filled(value) for name, value in kwargs.items()}

    def _filled(self, value: Any) -> Any:
        if isinstance(value, Placeholder):
            if value.name == BLOCKS and BLOCKS not in self.carried:
                return self.states.new_zeros((*self.states.shape[:2], 0, self.states.shape[-1]))
            known = self.carried.get(value.name)
            return known if value.make is None or known is None else value.make(known)
        if isinstance(value, MutableMapping) and not value:
            if self.shared is None:
                self.shared = type(value)()
                for key in dict.fromkeys(map(_shared_key, self.carried)):
                    if key is not None:
                        found = (f"{SHARED}.{key}.{n}" for n in range(len(self.carried)))
                        given = (self.carried[name] for name in found if name in self.carried)
                        self.shared[key] = tuple(given)
            return self.shared
        return value

    def run(self, layer: nn.Module) -> tuple[Tensor, Carried]:
        """The states after the layer, and what it hands on.

        Raises:
            InputError: the layer's code fails, or returns something else than it tells.
        """
        try:
            out = layer(self.states, *self.args, **self.kwargs)
        except (MoepressError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the model's own code, which may raise anything
            raise InputError(
                f"A layer of {type(layer).__name__} fails with {one_line(error)}. Its config may "
                "be another model's, or transformers too old or too new for the model."
            ) from error
        outputs = out if isinstance(out, tuple) else (out,)
        count = returned_values(layer)
        rest = outputs[1:]
        if len(rest) != count or not all(isinstance(x, Tensor | None) for x in rest):
            raise InputError(
                f"A layer of {type(layer).__name__} returns {[type(x).__name__ for x in outputs]}. "
                f"Expected {count + 1} tensors: this model cannot be walked."
            )
        after = {f"{RETURNED}.{n}": value for n, value in enumerate(rest) if value is not None}
        for key, values in (self.shared or {}).items():
            after |= {f"{SHARED}.{key}.{n}": value for n, value in enumerate(values)}
        if hasattr(layer, BOUNDARY):
            after |= self._blocks(bool(getattr(layer, BOUNDARY)))
        if PREVIOUS in self.carried:
            after[PREVIOUS] = self.carried[PREVIOUS]
        return outputs[0], after

    def _blocks(self, grow: bool) -> Carried:
        before = self.carried.get(BLOCKS)
        if not grow:
            return {} if before is None else {BLOCKS: before}
        added = self.states.unsqueeze(-2)
        return {BLOCKS: added if before is None else torch.cat([before, added], dim=-2)}


def _shared_key(name: str) -> str | None:
    """The key of a tensor of the shared mapping; None: it is none."""
    kind, _, rest = name.partition(".")
    return rest.rpartition(".")[0] if kind == SHARED else None


def states_between(layers: nn.ModuleList, carried: Carried) -> dict[int, Tensor]:
    """The states after those layers whose outputs are among the carried values, by layer.

    The input of layer 0 counts as the output of layer BEFORE_LAYERS.
    """
    boundaries = [i for i, layer in enumerate(layers) if getattr(layer, BOUNDARY, False)]
    blocks = carried.get(BLOCKS)
    if blocks is None:
        return {}
    return {
        layer - 1: blocks[..., number, :]
        for number, layer in enumerate(boundaries[: blocks.shape[-2]])
    }


class Gathered:
    """The carried values of all sequences, gathered from those of batches.

    Args:
        before: [S, ...] before the layer.
        sequences: S.
    """

    def __init__(self, before: Carried, sequences: int, device: torch.device) -> None:
        self._before = before
        self._sequences = sequences
        self._device = device
        self.values: Carried = {}

    def add(self, batch: slice, given: Carried, after: Carried) -> None:
        """Add the values of a batch.

        Args:
            given: to the layer. A value that the layer has left alone is not copied.

        Raises:
            InputError: a value does not have one entry for each sequence.
        """
        for name, value in after.items():
            if name in given and value is given[name]:
                self.values[name] = self._before[name]
                continue
            if len(value) != batch.stop - batch.start:
                raise InputError(
                    f"Layers hand {name} of shape {tuple(value.shape)} on, for "
                    f"{batch.stop - batch.start} sequences. Expected one entry for each sequence: "
                    "this model cannot be walked."
                )
            if name not in self.values:
                shape = (self._sequences, *value.shape[1:])
                with torch.inference_mode(False):  # a backward walk differentiates through them
                    self.values[name] = empty(shape, value.dtype, self._device, SHARE_IN_ORDER)
            self.values[name][batch] = value
