"""Where a model keeps its routed experts, and the roles of its other linears.

In transformers 5, 48 families of causal LMs share one interface for experts (docs/add-a-family.md).
It is a module with fused parameters `gate_up_proj` [E, 2I, H] (gate rows first) and `down_proj`
[E, H, I]. It is called with (hidden [N, H], top_k_index [N, k], top_k_weights [N, k]) and computes
down(act(gate x) * up x). Such modules are found by their attributes, never by model type, so a new
family with this interface needs no change here. The roles of the other linears depend on their
names: `ROLES`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moepress.errors import InputError
from moepress.original.composite import NOT_FOR_TEXT, decoder

if TYPE_CHECKING:
    from torch import nn

# The first pattern found in a linear's path inside its decoder layer gives its role. A role is the
# name, without "_bits", of the Recipe field that holds the width; None: never quantized.
ROLES: tuple[tuple[str, str | None], ...] = (
    (r"(^|\.)(gate|router|shared_expert_gate)(\.|$)", None),  # few bytes, and they choose experts
    (r"norm\.", None),  # small networks inside a norm
    (r"(^|\.)indexer(\.|$)", None),  # chooses what attention sees: no gradient gives its cost
    (r"(^|\.)dt_proj(\.|$)", None),  # Mamba reads its weight without calling it
    (r"shared_(expert|experts|mlp)(\.|$)", "shared_expert"),
    (r"(^|\.)(mlp|feed_forward|ffn|block_sparse_moe)(\.|$)", "dense_mlp"),
    (r"", "attention"),  # every other linear mixes tokens: attention, linear attention, Mamba
)


@dataclass(frozen=True)
class Experts:
    """The routed experts of one decoder layer, as transformers' meta model describes them."""

    layer: int  # index of the decoder layer
    path: str  # module path in the model, e.g. "model.layers.3.mlp.experts"
    experts: int  # E
    hidden: int  # H
    intermediate: int  # I

    @property
    def parameters(self) -> tuple[str, str]:
        """Names of the two fused parameters: gate and up [E, 2I, H], down [E, H, I]."""
        return f"{self.path}.gate_up_proj", f"{self.path}.down_proj"

    @property
    def weights(self) -> int:
        """Number of weights of all experts of the layer."""
        return 3 * self.experts * self.hidden * self.intermediate

    @property
    def gate_up_shape(self) -> tuple[int, int]:
        return 2 * self.intermediate, self.hidden

    @property
    def down_shape(self) -> tuple[int, int]:
        return self.hidden, self.intermediate


def decoder_layers(model: Any) -> Any:
    """The nn.ModuleList of decoder layers of a transformers causal LM.

    Raises:
        InputError: the model has none where it is expected.
    """
    return decoder(model).layers


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts by transformers' experts interface."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def text_experts(layer: nn.Module) -> list[Any]:
    """The modules of a decoder layer with fused experts that tokens of text choose."""
    return [
        module
        for path, module in layer.named_modules()
        if is_experts(module) and not NOT_FOR_TEXT.search(path)
    ]


def find_experts(model: Any) -> dict[int, Experts]:
    """The routed experts of every decoder layer that has them, by layer index.

    Raises:
        InputError: there are none, or they are not of a supported form.
    """
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
            check_supported(module, path)
            count, rows, hidden = module.gate_up_proj.shape
            found[index] = Experts(index, path, count, hidden, rows // 2)
    if not found:
        raise InputError(
            f"{type(model).__name__} has no routed experts in the form of transformers 5's "
            "experts interface. Expected a Mixture-of-Experts causal LM such as Mixtral, "
            "Qwen3-MoE, OLMoE or DeepSeek-V3; dense models gain nothing from moepress."
        )
    shapes = {(e.experts, e.gate_up_shape, e.down_shape) for e in found.values()}
    if len(shapes) > 1:
        raise InputError(
            f"The layers of {type(model).__name__} have experts of different number or shape: "
            f"{sorted(shapes)}. Expected the same in every layer; not supported yet."
        )
    return found


def check_supported(module: Any, path: str) -> None:
    """Raise InputError if an experts module differs from the common interface."""
    differs = [
        text
        for text, wrong in (
            ("has no gate", not module.has_gate),
            ("is transposed", module.is_transposed),
            ("has biases", getattr(module, "has_bias", False)),
            ("interleaves gate and up", not getattr(module, "is_concatenated", True)),
            ("has a norm after the experts", getattr(module, "has_post_expert_norm", False)),
            ("has a gate function of its own", not _default_gate(module)),
        )
        if wrong
    ]
    if differs:
        raise InputError(
            f"{path} ({type(module).__name__}) {', '.join(differs)}. Supported: fused "
            "gate_up_proj [E, 2I, H] and down_proj [E, H, I] with act(gate) * up."
        )


def _default_gate(module: Any) -> bool:
    """Whether an experts module computes act(gate) * up as transformers' default does."""
    from transformers.integrations import moe

    return type(module)._apply_gate is moe._default_apply_gate


def linear_role(path: str, in_moe_layer: bool) -> str | None:
    """Role of the linear at `path` inside its decoder layer, see `ROLES`.

    If the layer has routed experts, a linear of its MLP is neither routed nor dense: it is a shared
    expert under another name.
    """
    role = next(role for pattern, role in ROLES if re.search(pattern, path))
    return "shared_expert" if role == "dense_mlp" and in_moe_layer else role
