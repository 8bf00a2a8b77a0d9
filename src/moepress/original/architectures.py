"""Where a model keeps its routed experts, and the roles of its other linears.

Most families of transformers 5 share one interface for experts (docs/add-a-family.md): a module
with fused parameters, called with (hidden [N, H], top_k_index [N, k], top_k_weights [N, k]). Such
modules are found by their attributes, never by model type (moepress.blocks), so a new family with
this interface needs no change here. The roles of the other linears depend on their names: `ROLES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from moepress.blocks import adapt
from moepress.blocks.form import Form, form_of
from moepress.blocks.form import is_experts as is_experts
from moepress.errors import InputError
from moepress.original.composite import NOT_FOR_TEXT, decoder, lists_of_layers

if TYPE_CHECKING:
    from moepress.blocks.layout import Part

# The first pattern found in a linear's path inside its decoder layer gives its role. A role is the
# name, without "_bits", of the Recipe field that holds the width; None: never quantized.
ROLES: tuple[tuple[str, str | None], ...] = (
    (
        r"(^|\.)(gate|router|router_gate|shared_expert_gate)(\.|$)",
        None,
    ),  # few bytes, and they choose experts
    (r"message_gate(\.|$)", None),  # of a loop (loops.py): few bytes, not called in the first pass
    (r"norm\.(?!attn\.)", None),  # small networks inside a norm; dbrx has attention in one
    (r"(^|\.)indexer(\.|$)", None),  # chooses what attention sees: no gradient gives its cost
    (r"(^|\.)dt_proj(\.|$)", None),  # Mamba reads its weight without calling it
    (r"shared_(expert|experts|mlp)(\.|$)", "shared_expert"),
    (r"(^|\.)(mlps?|feed_forward|ffn|block_sparse_moe)(\.|$)", "dense_mlp"),
    (r"(^|\.)mixer\.(up|down|fc\d_latent)_proj$", "dense_mlp"),  # Nemotron's layers are all mixers
    (r"", "attention"),  # every other linear mixes tokens: attention, linear attention, Mamba
)

# Linears whose inputs are the sum of the routed experts' outputs: they lead from a latent space, in
# which the experts compute, back to the states. They are measured and rounded after the experts.
READS_EXPERTS = re.compile(r"(^|\.)(fc2_latent_proj|post_expert_proj)(\.weight)?$")


class Bias(NamedTuple):
    """The biases of one matrix of every expert, which are stored in the order of its rows."""

    part: Part
    parts: int  # matrices below each other in it: 2 for gate and up
    rows: int  # of each of these, padded


@dataclass(frozen=True)
class Experts:
    """The routed experts of one decoder layer, as transformers' meta model describes them."""

    layer: int  # index of the decoder layer
    path: str  # module path in the model, e.g. "model.layers.3.mlp.experts"
    form: Form

    @property
    def experts(self) -> int:
        """E"""
        return self.form.experts

    @property
    def hidden(self) -> int:
        """H, the size of their inputs and outputs: that of the states, unless they are projected"""
        return self.form.hidden

    @property
    def intermediate(self) -> int:
        """I"""
        return self.form.intermediate

    @property
    def parameters(self) -> tuple[str, str]:
        """Names of the two packed parameters: gate and up (or up alone), and down."""
        if self.form.by_neuron:
            (first,), (down,) = self.form.gate_up.names, self.form.down.names
            return first, down
        first, down = self.form.names
        return f"{self.path}.{first}", f"{self.path}.{down}"

    @property
    def biases(self) -> dict[str, Bias]:
        """The parameters [E, N] of biases, by name."""
        form, (hidden, inner) = self.form, self.down_shape
        both = Bias(form.gate_up, form.parts, inner), Bias(form.down, 1, hidden)
        return {bias.part.bias: bias for bias in both if bias.part.bias is not None}

    @property
    def matrix_names(self) -> tuple[str, ...]:
        """Names of the original's parameters that hold the experts' matrices."""
        return (*self.form.gate_up.names, *self.form.down.names)

    @property
    def weights(self) -> int:
        """Number of weights of all experts of the layer, without padding and biases."""
        return self.form.weights

    @property
    def gate_up_shape(self) -> tuple[int, int]:
        """Rows and columns of an expert's gate and up as they are packed: padded."""
        return self.form.packed_shapes[0]

    @property
    def down_shape(self) -> tuple[int, int]:
        """Rows and columns of an expert's down as it is packed: padded."""
        return self.form.packed_shapes[1]


def decoder_layers(model: Any) -> Any:
    """The nn.ModuleList of decoder layers of a transformers causal LM.

    Raises:
        InputError: the model has none, or several lists.
    """
    found = decoder(model)
    layers: Any = getattr(found, "layers", None)
    return lists_of_layers(found)[0] if layers is None else layers


def text_experts(layer: Any) -> list[Any]:
    """The modules of a decoder layer with fused experts that tokens of text choose."""
    return [
        module
        for path, module in layer.named_modules()
        if is_experts(module) and not NOT_FOR_TEXT.search(path)
    ]


def find_experts(model: Any) -> dict[int, Experts]:
    """The routed experts of every decoder layer that has them, by layer index.

    Raises:
        InputError: there are none, or layers differ in them.
    """
    adapt(model)
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[int, Experts] = {}
    for index, layer in enumerate(decoder_layers(model)):
        modules = text_experts(layer)
        if len(modules) > 1:
            raise InputError(
                f"Layer {index} of {type(model).__name__} has {len(modules)} expert collections; "
                "expected at most one. This family is not supported yet."
            )
        for module in modules:
            path = paths[id(module)]
            found[index] = Experts(index, path, form_of(module, path))
    if not found:
        raise InputError(
            f"{type(model).__name__} has no routed experts in the form of transformers 5's "
            "experts interface. Expected a Mixture-of-Experts causal LM such as Mixtral, "
            "Qwen3-MoE, OLMoE or DeepSeek-V3; dense models gain nothing from moepress."
        )
    shapes = {(e.experts, *e.form.shapes) for e in found.values()}
    if len(shapes) > 1:
        raise InputError(
            f"The layers of {type(model).__name__} have experts of different number or shape: "
            f"{sorted(shapes)}. Expected the same in every layer; not supported yet."
        )
    return found


def reads_experts(name: str) -> bool:
    """Whether a linear, by its path or its weight's name, reads the routed experts' outputs."""
    return READS_EXPERTS.search(name) is not None


def linear_role(path: str, in_moe_layer: bool) -> str | None:
    """Role of the linear at `path` inside its decoder layer, see `ROLES`.

    If the layer has routed experts, a linear of its MLP is neither routed nor dense: it is a shared
    expert under another name.
    """
    role = next(role for pattern, role in ROLES if re.search(pattern, path))
    return "shared_expert" if role == "dense_mlp" and in_moe_layer else role
