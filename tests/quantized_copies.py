"""Quantized copies of tiny model folders, as publishers store them, and what they dequantize to.

A writer takes the weight that the hub's layout names, and returns the tensors that take its place
and its dequantized value. The values are computed here the long way, weight by weight.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEAR = r"(proj|experts\.\d+\.w[123]|self_attn\.w\w+)\.weight$"
EXPERT = r"experts\.\d+\.\w+\.weight$"
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

Writer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def spread(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """The scale of each element [N, K] float32."""
    rows = scale.float().repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def largest(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """[blocks of rows, blocks of columns]: largest magnitude of each block."""
    rows = [
        torch.stack([part.abs().max() for part in row.split(block[1], 1)])
        for row in weight.float().split(block[0])
    ]
    return torch.stack(rows)


def power_of_two(scale: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(scale)))


def fp8(block: tuple[int, int], scale: str = "float32", ending: str = "_scale_inv") -> Writer:
    """E4M3 in blocks. Scales are float32, or powers of two as E8M0 or as bytes."""

    def write(key: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scales = largest(weight, block) / 448
        if scale != "float32":
            scales = power_of_two(scales)
        each = spread(scales, tuple(weight.shape), block)  # type: ignore[arg-type]
        codes = (weight.float() / each).to(torch.float8_e4m3fn)
        stored = scales
        if scale != "float32":
            stored = scales.to(torch.float8_e8m0fnu)
        if scale == "bytes":
            stored = stored.view(torch.uint8)
        name = key.removesuffix(".weight") if ending.startswith(".") else key
        return {key: codes, name + ending: stored}, (codes.float() * each).to(weight.dtype)

    return write


def fp8_rows(key: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """E4M3 with a scale for each row, in the weight's dtype: compressed-tensors, fbgemm."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(weight.dtype)
    codes = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
    value = (codes.float() * scale.float()).to(weight.dtype)
    return {key: codes, f"{key}_scale": scale}, value


def fp8_tensor(key: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """E4M3 with one float32 scale, and a scale of activations beside it."""
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    other = {f"{key.removesuffix('weight')}input_scale": torch.tensor(2.0)}
    return {key: codes, f"{key}_scale": scale, **other}, (codes.float() * scale).to(weight.dtype)


def fp8_mistral(key: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """E4M3 with one scale in the weight's dtype, and one of activations: Mistral's own names."""
    scale = (weight.float().abs().max() / 448).to(weight.dtype)
    codes = (weight.float() / scale.float()).to(torch.float8_e4m3fn)
    module = key.removesuffix("weight")
    beside = {f"{module}qscale_weight": scale, f"{module}qscale_act": torch.ones_like(scale)}
    return {key: codes, **beside}, (codes.float() * scale.float()).to(weight.dtype)


def fp8_experts(key: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """E4M3 of all experts in one tensor [E, N, K], a float32 scale [E, 1, 1] for each."""
    scale = weight.float().abs().amax((1, 2), keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {key: codes, f"{key}_scale_inv": scale}, (codes.float() * scale).to(weight.dtype)


def fp8_columns(key: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """E4M3 of all experts in one tensor [E, K, N], as FBGEMM has them: a scale for each column.

    Scales of gate_up are [E, 1, N], those of down [E, N, 1].
    """
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    stored = scale.mT if "down_proj" in key else scale
    return {key: codes, f"{key}_scale": stored}, (codes.float() * scale).to(weight.dtype)


def nibbles(codes: Tensor) -> Tensor:
    """Codes [..., K] of four bits, two to a byte, the first in the low bits."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def fp4_codes(weight: Tensor) -> Tensor:
    """The nearest FP4 code of each number, int64."""
    nearest = (weight.float().abs()[..., None] - FP4).abs().argmin(-1)
    return nearest + 8 * (weight < 0)


def fp4_values(codes: Tensor) -> Tensor:
    return torch.where(codes >= 8, -FP4[codes & 7], FP4[codes & 7])


def fp4(key: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Two E2M1 codes in an int8, scales E8M0 of 32 columns: experts of DeepSeek-V4."""
    scale = power_of_two(largest(weight, (1, 32)) / 6)
    each = spread(scale, tuple(weight.shape), (1, 32))  # type: ignore[arg-type]
    codes = fp4_codes(weight.float() / each)
    stored = {
        key: nibbles(codes).view(torch.int8),
        f"{key.removesuffix('weight')}scale": scale.to(torch.float8_e8m0fnu),
    }
    return stored, (fp4_values(codes) * each).to(weight.dtype)


def mxfp4_blocks(key: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """gpt-oss: weights [E, K, N] as blocks [E, N, K / 32, 16] and exponents [E, N, K / 32]."""
    grouped = weight.float().mT.unflatten(-1, (-1, 32))
    scale = power_of_two(grouped.abs().amax(-1) / 6)
    codes = fp4_codes(grouped / scale[..., None])
    stored = {
        f"{key}_blocks": nibbles(codes),
        f"{key}_scales": (scale.log2() + 127).to(torch.uint8),
    }
    value = (fp4_values(codes) * scale[..., None]).flatten(-2).mT.contiguous()
    return stored, value.to(weight.dtype)


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [R, C] as int32 words [R, C * bits / 32], the first in the low bits."""
    per_word = 32 // bits
    grouped = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    grouped = grouped.long().unflatten(1, (-1, per_word))
    words = sum(grouped[..., i] << (bits * i) for i in range(per_word))
    assert isinstance(words, Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def packed_int(bits: int, group: int | None, symmetric: bool = True) -> Writer:
    """pack-quantized of compressed-tensors; scales in the weight's dtype."""

    def write(key: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        size = group or weight.shape[1]
        half = 1 << (bits - 1)
        grouped = weight.float().unflatten(1, (-1, size))
        if symmetric:
            scale = (grouped.abs().amax(-1) / half).to(weight.dtype)
            zero = torch.zeros_like(scale, dtype=torch.long)
        else:
            low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
            scale = ((high - low) / (2 * half - 1)).to(weight.dtype)
            zero = (-half - low / scale.float()).round().clamp(-half, half - 1).long()
        steps = (grouped / scale.float()[..., None]).round().long() + zero[..., None]
        codes = steps.clamp(-half, half - 1)
        stored = {
            f"{key}_packed": packed_words(codes.flatten(1) + half, bits),
            f"{key}_scale": scale,
            f"{key}_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            packed = packed_words((zero + half).mT.contiguous(), bits)
            stored[f"{key}_zero_point"] = packed.mT.contiguous()
        value = (codes - zero[..., None]).float() * scale.float()[..., None]
        return stored, value.flatten(1).to(weight.dtype)

    return write


def int8_rows(key: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """int-quantized of compressed-tensors."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(weight.dtype)
    codes = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    value = (codes.float() * scale.float()).to(weight.dtype)
    return {key: codes, f"{key}_scale": scale}, value


def quantized_copy(
    folder: Path,
    out: Path,
    writers: dict[str, Writer],
    declared: dict[str, Any],
    shard: int | None = None,
) -> tuple[Path, Path]:
    """A quantized copy of a model folder, and its dequantized copy.

    Args:
        writers: by pattern of the names that they are for; the first that fits.
        declared: the quantization_config.
        shard: tensors of a file; None: all in one file.
    """
    quantized, plain = out / "quantized", out / "plain"
    state: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for key, weight in state.items():
        writer = next((w for pattern, w in writers.items() if re.search(pattern, key)), None)
        if writer is None:
            stored[key] = values[key] = weight
            continue
        tensors, values[key] = writer(key, weight)
        stored |= tensors
    for to, tensors in ((quantized, stored), (plain, values)):
        ignore = shutil.ignore_patterns("*.safetensors", "*.index.json")
        shutil.copytree(folder, to, ignore=ignore)
        _save(to, {k: v.contiguous() for k, v in tensors.items()}, shard)
    declare(quantized, declared)
    return quantized, plain


def _save(folder: Path, tensors: dict[str, Tensor], shard: int | None) -> None:
    if shard is None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    index = {}
    for start in range(0, len(names), shard):
        file = f"model-{start:05d}.safetensors"
        part = names[start : start + shard]
        save_file({k: tensors[k] for k in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def declare(folder: Path, declared: dict[str, Any], **changes: Any) -> None:
    """Write a quantization_config, and other fields, into config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": declared, **changes}))


def fp8_config(block: tuple[int, int], **changes: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": list(block), "fmt": "e4m3", **changes}


def compressed_tensors_config(kind: str, groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": ["Linear"], "weights": weights}
            for number, weights in enumerate(groups)
        },
        "ignore": ["lm_head"],
    }
