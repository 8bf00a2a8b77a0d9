"""Bytes on disk while a stage runs."""

from __future__ import annotations

from moepress.original.batches import IN_MEMORY
from moepress.rounding.options import Rounding
from moepress.workload.task import Task


def sensitivity(task: Task) -> int:
    """The states before every layer and after the last, and two gradients (sensitivity.py).

    Sensitivities take the place of states on the way back. Where a card computes this is an upper
    bound: states that have room in memory are files only once a minute (kept_states.py).
    """
    return task.tokens * sum(task.between) + 2 * task.states


def score(task: Task) -> int:
    """Sensitivities, and the states before and after a layer, which the next one continues from."""
    linears = sum(len(layer.linears) + 1 for layer in task.shape.layers)
    return linears * task.tokens * 4 * (task.recipe.sensitivity != "none") + 2 * task.states


def quantize(task: Task, folder: int) -> int:
    """The compressed model, and the states before and after a layer, of one walk or two.

    Packed experts of a layer that are too large for memory are a temporary file first.
    """
    corrects = Rounding.of_experts(task.recipe, task.recipe.quantizer).corrects
    packed = folder // task.shape.moe_layers
    written = folder + packed * (packed > IN_MEMORY)
    return written + 2 * (1 + corrects) * task.states + task.tokens * 8


def temporary(task: Task) -> int:
    """Temporary files of arrays too large for memory.

    They are states, inputs and outputs of experts, and of one expert the inputs of down.
    """
    shape, most = task.shape, task.at_most.tokens
    tokens, inner = most * shape.hidden, shape.expert_tokens(most) * shape.inner
    sizes = [shape.compute_itemsize * number for number in (tokens, inner)]
    sizes += [task.states] * 3 + [4 * tokens] * 3
    return sum(size for size in sizes if size > IN_MEMORY)
