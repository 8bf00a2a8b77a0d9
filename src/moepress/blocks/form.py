"""The form of an experts module: what its experts compute, and where their weights lie.

transformers' experts interface (`use_experts_implementation`) tells the form by attributes of the
module: `has_gate`, `has_bias`, `is_transposed`, `is_concatenated`, `has_post_expert_norm`, and
the method `_apply_gate`. Modules of another interface get these attributes from an adapter
(`moepress.blocks.adapt`). No model type is named here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moepress.blocks.layout import Part
from moepress.format.codec import padded_shapes
from moepress.kernels.gate import packed_names


@dataclass(frozen=True)
class Form:
    """The experts of one layer. E experts, H their input and output size, I their inner size."""

    experts: int  # E
    hidden: int  # H
    intermediate: int  # I
    gate_up: Part
    down: Part
    gated: bool = True  # False: h = act(up x), and gate_up holds the up rows alone
    scales_input: bool = False  # f(w x) in place of w f(x), with the routing weight w
    # A choice e I + i is neuron i of expert e, and uses only that. Then gate_up and down are both
    # tables [I, H] with a row for each neuron, of modules that are packed as embeddings.
    by_neuron: bool = False

    @property
    def parts(self) -> int:
        """Matrices [I, H] in gate_up: gate and up, or only up."""
        return 2 if self.gated else 1

    @property
    def names(self) -> tuple[str, str]:
        """Names of the packed parameters, as in transformers: of gate and up, and of down."""
        return packed_names(self.gated)

    @property
    def weights(self) -> int:
        """Number of weights of all experts, without padding and biases."""
        return self.experts * (self.parts + 1) * self.hidden * self.intermediate

    @property
    def choices(self) -> int:
        """How many experts a router chooses from, or neurons."""
        return self.experts * self.intermediate if self.by_neuron else self.experts

    def split(self, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
        """The experts that a router has chosen, and, by neuron, which of their neurons.

        Args:
            chosen: [T, k] int64; from `choices` on it means no expert, and so do the results.
        """
        if not self.by_neuron:
            return chosen, None
        return chosen // self.intermediate, chosen % self.intermediate

    @property
    def common(self) -> bool:
        """Whether every format version has this form: gate and up, no biases, not padded.

        The matrices of the class lie there as they are packed: [E, 2I, H] and [E, H, I]. Tables of
        neurons are embeddings to the format.
        """
        if self.by_neuron:
            return True
        plain = all(part == Part(part.names) for part in (self.gate_up, self.down))
        single = len(self.gate_up.names) == 1 and self.gate_up.names[0].endswith(".gate_up_proj")
        whole = self.packed_shapes == self.shapes
        return plain and single and whole and self.gated and not self.scales_input

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of gate_up and of down, without padding."""
        rows = self.parts * self.intermediate
        if self.by_neuron:
            return (rows, self.hidden), (rows, self.hidden)
        return (rows, self.hidden), (self.hidden, self.intermediate)

    @property
    def packed_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of gate_up and of down, with H and I padded to what can be packed."""
        return padded_shapes(*self.shapes)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds routed experts by transformers' experts interface.

    That is, it has the interface's attributes, from transformers or from an adapter, or the fused
    parameters and the gate function of a class that has them without the decorator.
    """
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        return True
    fused = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    return hasattr(module, "_apply_gate") and all(
        isinstance(parameter, Tensor) and parameter.dim() == 3 for parameter in fused
    )


def form_of(module: Any, path: str) -> Form:
    """The form of an experts module.

    Args:
        path: of the module in the model, which starts the names of its parameters.
    """
    if hasattr(module, "moepress_form"):  # an adapter's
        form: Form = module.moepress_form(path)
        return form
    is_gated = bool(getattr(module, "has_gate", True))
    transposed = bool(getattr(module, "is_transposed", False))
    biased = bool(getattr(module, "has_bias", False))
    interleaved = is_gated and not getattr(module, "is_concatenated", True)
    first, down = packed_names(is_gated)
    shape = tuple(getattr(module, first).shape)
    experts, rows, hidden = (shape[0], shape[2], shape[1]) if transposed else shape

    def part(name: str, interleaved: bool = False) -> Part:
        bias = f"{path}.{name}_bias" if biased else None
        return Part((f"{path}.{name}",), bias, transposed, interleaved)

    return Form(
        experts=experts,
        hidden=hidden,
        intermediate=rows // (2 if is_gated else 1),
        gate_up=part(first, interleaved),
        down=part(down),
        gated=is_gated,
        scales_input=bool(getattr(module, "scales_input", False)),
    )


def apply_gate(module: Any, first: Tensor) -> Tensor:
    """The inputs [..., I] of down, by the module's own function.

    Args:
        first: [..., R] outputs of gate and up, gate rows first, or of up alone.
    """
    if not getattr(module, "has_gate", True):
        inner: Tensor = module.act_fn(first)
        return inner
    if not getattr(module, "is_concatenated", True):
        first = torch.stack(first.chunk(2, dim=-1), dim=-1).flatten(-2)
    gated: Tensor = module._apply_gate(first)
    return gated


def is_normed(module: Any) -> bool:
    """Whether a norm follows down in every expert."""
    return bool(getattr(module, "has_post_expert_norm", False))


def finish(module: Any, output: Tensor) -> Tensor:
    """The output [..., H] of an expert, from what down gives: a norm in the families with one."""
    if is_normed(module):
        normed: Tensor = module.post_expert_norm(output)
        return normed
    return output
