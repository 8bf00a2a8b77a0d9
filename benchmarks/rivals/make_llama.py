"""llama.cpp: its lattice and k quants with an importance matrix, in its own mix of types.

    pip install llama-cpp-python==0.3.36 gguf==0.19.0 && pip install -e .   # compiles llama.cpp
    python benchmarks/rivals/make_llama.py MODEL --calib calib/*.txt --out FOLDER

The model is written as a float32 GGUF file, quantized by `llama_model_quantize` with its default
mix for the file type, and dequantized by the `gguf` package. The importance matrix is computed as
llama-imatrix does: the mean square of each input, for every linear, and for every expert over its
own tokens, here over the calibration sequences that moepress draws. Embedding and head stay float32
and do not count, as for every method. Routers are float32 in GGUF and count as such. Rows whose
length is no multiple of 256 get llama.cpp's fallback (IQ4_NL for the small types) and count as
stored.

File types are mixes: the one called IQ2_S takes iq2_xs for the experts, IQ2_M takes iq2_s.

Rows of q and k keep transformers' order, because every row is quantized alone and the file is never
run. Instead of llama-cpp-python's own library, a build of the `llama` target of llama.cpp's sources
will do: set LLAMA_CPP_LIB_PATH to its folder.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folder import Stored, given, save, text
from torch import Tensor, nn

from measuring import WINDOWS_AT_A_TIME, layer_weights, opened
from moepress.original.architectures import decoder_layers, is_experts
from moepress.original.experts import expert_hidden

try:
    import gguf
    import llama_cpp
except ImportError as error:
    raise SystemExit(
        f"{error}. Install it: pip install llama-cpp-python==0.3.36 gguf==0.19.0"
    ) from error

TYPES = ("IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K", "IQ3_XXS")
NAMES = {f"llama-{t}": getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{t}") for t in TYPES}
ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
# transformers' name inside a decoder layer -> GGUF's name, of tensors that are not split
LINEARS = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
}
FUSED = "mlp.experts.gate_up_proj"  # two tensors in GGUF
HALVES = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
F32 = 0  # enum ggml_type


def gguf_names(name: str) -> tuple[str, ...]:
    """GGUF's names for a tensor of a decoder layer."""
    layer, _, inside = name.split(".layers.")[1].partition(".")
    parts = HALVES if inside == FUSED else (LINEARS[inside],)
    return tuple(f"blk.{layer}.{part}" for part in parts)


def write_gguf(model: Any, path: Path) -> None:
    """Write the model as float32, without a tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(
        getattr(config, "moe_intermediate_size", config.intermediate_size)
    )
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    outside_layers = {
        "token_embd.weight": model.get_input_embeddings().weight,
        "output_norm.weight": model.get_decoder().norm.weight,
        "output.weight": model.get_output_embeddings().weight,
    }
    for name, tensor in outside_layers.items():
        writer.add_tensor(name, tensor.data.numpy())
    for name, tensor in model.state_dict().items():
        if ".layers." in name:
            names = gguf_names(name)
            parts = tensor.chunk(len(names), dim=-2) if len(names) > 1 else (tensor,)
            for other, part in zip(names, parts, strict=True):
                writer.add_tensor(other, np.ascontiguousarray(part.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Means:
    """Mean squares of inputs by GGUF's name: [K] of a linear, [E, K] of experts."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = defaultdict(lambda: torch.zeros(1))

    def add(self, name: str, x: Tensor, row: int = 0, rows: int = 1) -> None:
        """Add inputs [T, K] of matrix `row` of `rows`."""
        if name not in self._sums:
            self._sums[name] = torch.zeros(rows, x.shape[-1])
            self._counts[name] = torch.zeros(rows, 1)
        self._sums[name][row] += x.flatten(0, -2).square().sum(0)
        self._counts[name][row] += x.flatten(0, -2).shape[0]

    def result(self) -> dict[str, np.ndarray]:
        """The means, float32; 1 for an expert without tokens, as llama.cpp reads its own files."""
        return {
            name: torch.where(self._counts[name] > 0, sums / self._counts[name].clamp(min=1), 1.0)
            .numpy()
            .astype(np.float32)
            .ravel()
            for name, sums in self._sums.items()
        }


@torch.inference_mode()
def importance(model: Any, ids: Tensor) -> dict[str, np.ndarray]:
    """The importance matrix of calibration sequences [S, L], by GGUF's name."""
    means = Means()
    paths = {id(module): path for path, module in model.named_modules()}
    with listening(model, paths, means):
        for batch in ids.split(WINDOWS_AT_A_TIME):
            model(input_ids=batch, use_cache=False)
    return means.result()


@contextmanager
def listening(model: Any, paths: Mapping[int, str], means: Means) -> Iterator[None]:
    """Within the block, add the inputs of the decoder layers' linears and experts to `means`."""

    def linear(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        means.add(name, args[0])

    def experts(path: str, module: Any, args: tuple[Tensor, ...]) -> None:
        hidden, index, _ = args
        count = module.gate_up_proj.shape[0]
        for expert in range(count):
            x = hidden[(index == expert).any(-1)]
            for name in gguf_names(f"{path}.gate_up_proj"):
                means.add(name, x, expert, count)
            inner = expert_hidden(module, module.gate_up_proj[expert], x)
            means.add(*gguf_names(f"{path}.down_proj"), inner, expert, count)

    handles = []
    for layer in decoder_layers(model):
        for module in layer.modules():
            path = paths[id(module)]
            if is_experts(module):
                hook = partial(experts, path)
            elif type(module) is nn.Linear:
                hook = partial(linear, *gguf_names(f"{path}.weight"))
            else:
                continue
            handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def quantize(source: Path, target: Path, kind: int, matrix: Mapping[str, np.ndarray]) -> None:
    """Quantize a GGUF file with llama.cpp."""
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [
        llama_cpp.llama_model_imatrix_data(name.encode(), value.ctypes.data_as(pointer), value.size)
        for name, value in matrix.items()
    ]
    end = llama_cpp.llama_model_imatrix_data()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = kind
    params.nthread = torch.get_num_threads()
    params.output_tensor_type = params.token_embedding_type = F32
    params.imatrix = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries, end)
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if failed:
        raise SystemExit(f"llama_model_quantize returned {failed}")


def dequantized(path: Path, shapes: Mapping[str, Tensor]) -> tuple[dict[str, Stored], str]:
    """The matrices of a GGUF file by transformers' names, and a list of their types."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    made, kinds = {}, defaultdict(set)
    for name, original in shapes.items():
        parts = [tensors[other] for other in gguf_names(name)]
        for part in parts:
            kinds[part.tensor_type.name].add(part.name.split(".")[2])
        values = [
            torch.from_numpy(gguf.quants.dequantize(p.data, p.tensor_type).copy()) for p in parts
        ]
        shape = (*original.shape[:-2], original.shape[-2] // len(parts), original.shape[-1])
        together = torch.cat([value.reshape(shape) for value in values], dim=-2)
        made[name] = Stored(together, sum(int(part.n_bytes) for part in parts))
    return made, "; ".join(f"{kind}: {', '.join(sorted(of))}" for kind, of in sorted(kinds.items()))


def main() -> None:
    chosen = given(__doc__, NAMES)
    model = opened(chosen.model)
    ids = text(chosen)
    matrix = importance(model, ids)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "f32.gguf"
        write_gguf(model, source)
        for name in chosen.only:
            target = Path(folder) / f"{name}.gguf"
            quantize(source, target, NAMES[name], matrix)
            made, kinds = dequantized(target, layer_weights(model))
            save(chosen.out / name, chosen.model, made, kinds, "llama-cpp-python", "gguf")


if __name__ == "__main__":
    main()
