"""Experts of every form: read, walked, packed and run, they compute what the model's own do."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from moepress.allocation.plan import BitAllocation
from moepress.blocks.form import form_of
from moepress.compress import compress
from moepress.format.checkpoint import PLAN, load_json, tensor_bytes
from moepress.format.codec import Codec, PackedSpec, padded_shapes
from moepress.hf import load_model
from moepress.hf.packing import pack_modules
from moepress.kernels.modules import PackedExperts
from moepress.kernels.reference import dequantize
from moepress.kernels.uncommon import UncommonExperts
from moepress.original.folder import weight_files
from moepress.original.sizes import bytes_by_part
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.progress import Progress
from moepress.rounding.methods import quantize_matrix
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model

EXPERTS, CHOSEN, TOKENS = 4, 2, 9
FORMS = {  # sizes that 32 does not divide
    "gpt_oss": {"intermediate_size": 80, "hidden_size": 72},
    "aria_text": {"intermediate_size": 40},
    "nemotron_h": {"moe_intermediate_size": 40, "moe_latent_size": 48},
    "llama4_text": {"intermediate_size": 40},
    "dbrx": {},
    "jetmoe": {},
    "longcat_flash": {"expert_ffn_hidden_size": 40},
    "inkling2_text": {"n_layers_per_attn_res_block": 6},
}


@pytest.mark.parametrize("family", FORMS)
def test_a_walk_gives_the_logits_of_the_model(family: str, tmp_path: Path) -> None:
    model = make_model(family, **FORMS[family])
    source = Source(save_model(model, tmp_path))
    ids = torch.randint(2, 380, (2, 12), generator=torch.Generator().manual_seed(0))
    walk = Walk(source, ids)
    with Progress("walk", total=len(source.layers)) as progress:
        walk.finish(progress)
    found = torch.cat([logits for _, logits in walk.logits()])
    with torch.inference_mode():
        wanted = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_padded_folder_has_the_predicted_bytes(
    tokenizer_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Biases and the padding of matrices and biases are counted, and the version says that."""
    model = make_model("gpt_oss", **FORMS["gpt_oss"])
    original = save_model(model, tmp_path / "original", tokenizer_folder)
    source, out = Source(original), tmp_path / "out"
    form = source.experts[0].form
    assert form.shapes == ((160, 72), (72, 80)) and form.packed_shapes == ((192, 96), (96, 96))
    assert form.weights == EXPERTS * 3 * 72 * 80
    compress(source.folder, out, small_recipe(text_file, bits=2, balance=False))
    plan = BitAllocation.load(out / PLAN)
    assert plan.total_bytes == sum(map(tensor_bytes, weight_files(out)))
    assert 1.9 < plan.average_bits <= 2
    assert load_json(out / "config.json")["quantization_config"]["format_version"] == 5
    sizes = bytes_by_part(out)["routed experts"]
    assert sizes.original == 3 * 4 * form.weights + 3 * 4 * EXPERTS * (192 + 96)
    packed = load_model(out)
    experts = packed.model.layers[1].mlp.experts
    bias = model.model.layers[1].mlp.experts.gate_up_proj_bias
    assert torch.equal(experts.gate_up_proj_bias[:, :80], bias[:, ::2])
    assert torch.equal(experts.gate_up_proj_bias[:, 96:176], bias[:, 1::2])
    assert len(packed.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)[0]) == 5


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight)


class _Experts(nn.Module):
    """Experts with an activation that no kernel has and, if asked for, a norm."""

    def __init__(self, config: SimpleNamespace, size: int = 40, inner: int = 48) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * inner, size))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, size, inner))
        self.act_fn = ACT2FN[config.activation]
        if config.normed:
            self.post_expert_norm = _Norm(size)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise NotImplementedError


# Some versions of transformers have no norms of experts.
NORMS = "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters
NORM = {"has_post_expert_norm": True} if NORMS else {}
Plain = use_experts_implementation(type("Plain", (_Experts,), {}))
Normed = use_experts_implementation(**NORM)(type("Normed", (_Experts,), {}))
MODULES = {
    "own activation": (Plain, "leaky_relu", False),
    "norm": (Normed, "silu", False),
    "both": (Normed, "leaky_relu", False),
    "scaled inputs": (Plain, "silu", True),
    "scaled inputs, own activation": (Plain, "leaky_relu", True),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("family", ["int", "trellis"])
@pytest.mark.usefixtures("reference_backend")
def test_uncommon_experts_by_hand(name: str, family: str) -> None:
    kind, activation, scales_input = MODULES[name]
    if kind is Normed and not NORMS:
        pytest.skip("this transformers has no norms of experts")
    torch.manual_seed(0)
    config = SimpleNamespace(
        activation=activation, normed=kind is Normed, _experts_implementation="eager"
    )
    module = kind(config)
    module.scales_input = scales_input
    form = form_of(module, "experts")
    bits = (1, 3, 0, 4)  # one is left out
    packed, gate_up, down = _rounded(module, bits, family)
    model = nn.ModuleDict({"experts": module})
    spec = PackedSpec(bits, 32, family)
    pack_modules(model, {"experts.gate_up_proj": spec, "experts.down_proj": spec})
    experts = model["experts"]
    assert type(experts) is UncommonExperts and isinstance(experts, PackedExperts)
    assert (experts.own is None) == (name == "scaled inputs")
    for parameter, data in packed.items():
        getattr(experts, parameter).data = data

    x = torch.randn(TOKENS, form.hidden)
    index = torch.stack([torch.randperm(EXPERTS + 1)[:CHOSEN] for _ in range(TOKENS)])
    weight = torch.rand(TOKENS, CHOSEN)
    wanted = torch.zeros(TOKENS, form.hidden)
    for token, place in torch.cartesian_prod(torch.arange(TOKENS), torch.arange(CHOSEN)).tolist():
        expert, w = int(index[token, place]), weight[token, place]
        if expert == EXPERTS or bits[expert] == 0:
            continue
        state = x[token] * w if scales_input else x[token]
        gate, up = (gate_up[expert] @ state).chunk(2)
        y = down[expert] @ (ACT2FN[activation](gate) * up)
        y = module.post_expert_norm(y) if kind is Normed else y
        wanted[token] += y if scales_input else w * y
    torch.testing.assert_close(experts(x, index, weight), wanted, rtol=1e-4, atol=1e-3)
    if kind is Normed:
        assert "post_expert_norm.weight" in experts.state_dict()


def _rounded(
    module: nn.Module, bits: tuple[int, ...], family: str
) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Packed parameters, and what they stand for without padding."""
    form = form_of(module, "")
    packed, made = {}, []
    names = "gate_up_proj", "down_proj"
    shapes = zip(names, form.shapes, padded_shapes(*form.shapes), strict=True)
    for name, (n, k), (rows, cols) in shapes:
        parts = form.parts if name == names[0] else 1
        pieces, matrices = [], []
        for weight, width in zip(getattr(module, name), bits, strict=True):
            whole = torch.zeros(parts, rows // parts, cols)
            whole[:, : n // parts, :k] = weight.detach().view(parts, -1, k)
            if width == 0:
                matrices.append(torch.zeros(n, k))
                continue
            codec = Codec(width, 32, family)
            pieces.append(quantize_matrix("rtn", whole.view(rows, cols), codec).pack())
            whole = dequantize(pieces[-1], rows, cols, codec).view(parts, -1, cols)
            matrices.append(whole[:, : n // parts, :k].reshape(n, k))
        packed[name] = torch.cat(pieces)
        made.append(matrices)
    return packed, made[0], made[1]
