"""A quantized original reads as its dequantized copy, and what cannot be read is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import quant_scheme as schemes
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, core_model_loading

from moepress.errors import CheckpointError, InputError, NumericalError
from moepress.inspect import inspect
from moepress.original.checkpoint import Checkpoint
from moepress.original.folder import read_config
from moepress.original.on_disk import expert_codes
from moepress.original.quantized.config import PRESETS, Quantization, parse_quantization
from moepress.original.quantized.grids import Blocks, Sizes
from moepress.original.sizes import bytes_by_part
from moepress.original.source import Source
from tests import quantized_copies as copies
from tests.conftest import KNOWN
from tests.families.models import make_model, save_model
from tests.families.versions import installed

Folder = Callable[..., Path]
KNOWN.setdefault(
    "minimax_m2",
    {
        "intermediate_size": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "rotary_dim": 8,
    },
)
KNOWN.setdefault(
    "gpt_oss",
    {
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
)
BLOCK = (16, 16)
INT4 = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}
FP8_ROWS = {"type": "float", "num_bits": 8, "strategy": "channel"}
FP8 = copies.fp8_config(BLOCK)
KINDS: dict[str, tuple[str, dict[str, copies.Writer], dict[str, Any]]] = {
    "fp8": ("deepseek_v3", {copies.LINEAR: copies.fp8(BLOCK)}, FP8),
    "fp8 of MiniMax": ("minimax_m2", {copies.LINEAR: copies.fp8(BLOCK)}, FP8),
    "fp8, ragged blocks": (
        "deepseek_v3",
        {copies.LINEAR: copies.fp8((20, 24))},
        copies.fp8_config((20, 24)),
    ),
    "ue8m0 and fp4": (
        "deepseek_v3",
        {
            copies.EXPERT: copies.fp4,
            copies.LINEAR: copies.fp8(BLOCK, scale="E8M0", ending=".scale"),
        },
        copies.fp8_config(BLOCK, scale_fmt="ue8m0"),
    ),
    "mxfp8": (
        "minimax_m2",
        {copies.LINEAR: copies.fp8((1, 32), scale="bytes")},
        {"quant_method": "mxfp8"},
    ),
    "mxfp4": (
        "gpt_oss",
        {r"experts\.(gate_up|down)_proj$": copies.mxfp4_blocks},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    ),
    "one scale": (
        "minimax_m2",
        {copies.LINEAR: copies.fp8_tensor},
        {"quant_method": "fp8", "weight_block_size": None},
    ),
    "fbgemm": ("minimax_m2", {copies.LINEAR: copies.fp8_rows}, {"quant_method": "fbgemm_fp8"}),
    "float-quantized": (
        "deepseek_v3",
        {copies.LINEAR: copies.fp8_rows},
        copies.compressed_tensors_config("float-quantized", [FP8_ROWS]),
    ),
    "int4": (
        "minimax_m2",
        {copies.EXPERT: copies.packed_int(4, 32)},
        copies.compressed_tensors_config("pack-quantized", [INT4]),
    ),
    "int4 with zeros": (
        "deepseek_v3",
        {copies.EXPERT: copies.packed_int(4, 32, symmetric=False)},
        copies.compressed_tensors_config("pack-quantized", [INT4 | {"symmetric": False}]),
    ),
    "int4 experts, fp8 attention": (
        "deepseek_v3",
        {copies.EXPERT: copies.packed_int(4, 16), copies.LINEAR: copies.fp8_rows},
        copies.compressed_tensors_config("mixed", [INT4 | {"group_size": 16}, FP8_ROWS])
        | {"format": "mixed-precision"},
    ),
    "int8, packed rows": (
        "minimax_m2",
        {copies.EXPERT: copies.packed_int(8, None)},
        copies.compressed_tensors_config(
            "pack-quantized", [{"type": "int", "num_bits": 8, "strategy": "channel"}]
        ),
    ),
    "int8": (
        "minimax_m2",
        {copies.LINEAR: copies.int8_rows},
        copies.compressed_tensors_config(
            "int-quantized", [{"type": "int", "num_bits": 8, "strategy": "channel"}]
        ),
    ),
}
# transformers dequantizes these when it loads on a CPU. It raises on blocks that do not divide a
# matrix, such as those of kv_a_proj_with_mqa of DeepSeek-V3; the rest needs compressed-tensors.
BY_TRANSFORMERS = ["fp8", "fp8 of MiniMax", "ue8m0 and fp4", "mxfp8", "mxfp4"]
BY_COMPRESSED_TENSORS = [
    "float-quantized",
    "int4",
    "int4 with zeros",
    "int8, packed rows",
    "int8",
]


def copy_of(kind: str, model_folder: Folder, out: Path, **changes: Any) -> tuple[Path, Path]:
    family, writers, declared = KINDS[kind]
    return copies.quantized_copy(
        model_folder(family, "bfloat16"), out, writers, declared, **changes
    )


def tensors(source: Source) -> dict[str, Tensor]:
    """Every tensor, those of routed experts whole, and the weights of every expert alone."""
    found = {name: source.tensor(name) for name in source.all_names}
    for experts in source.experts.values():
        found |= {name: source.fused(name) for name in experts.matrix_names}
        for number in range(experts.experts):
            weights = source.expert(experts.layer, number)
            found[f"{experts.path} gate_up {number}"] = weights.gate_up
            found[f"{experts.path} down {number}"] = weights.down
    return found


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_original_reads_as_its_dequantized_copy(
    model_folder: Folder, tmp_path: Path, kind: str
) -> None:
    quantized, plain = copy_of(kind, model_folder, tmp_path)
    first, second = Source(quantized), Source(plain)
    same(tensors(first), tensors(second))
    assert first.dtype == torch.bfloat16
    assert not hasattr(first.config, "quantization_config")
    assert first.fingerprint != second.fingerprint


def opened_by_transformers(folder: Path) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(folder)
    except AttributeError:
        if installed() >= Version("5.17"):
            raise
        pytest.skip("transformers 5.16 itself fails on FP8")


@pytest.mark.parametrize("kind", BY_TRANSFORMERS)
def test_transformers_dequantizes_to_the_same(
    model_folder: Folder, tmp_path: Path, kind: str
) -> None:
    quantized, _ = copy_of(kind, model_folder, tmp_path)
    state = opened_by_transformers(quantized).state_dict()
    found = {name: value for name, value in tensors(Source(quantized)).items() if name in state}
    assert len(found) > 20
    same({name: state[name].to(value.dtype) for name, value in found.items()}, found)


@pytest.mark.parametrize("kind", BY_COMPRESSED_TENSORS)
def test_compressed_tensors_dequantizes_to_the_same(
    model_folder: Folder, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    quantized, _ = copy_of(kind, model_folder, tmp_path)
    declared = KINDS[kind][2]
    scheme = QuantizationScheme(**declared["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(declared["format"])
    state = load_file(quantized / "model.safetensors")
    source = Source(quantized)
    parts = "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
    scales = [key for key in state if key.endswith(".weight_scale")]
    assert len(scales) > 10
    for key in scales:
        module = key.removesuffix("weight_scale")
        stored = {part: state[module + part] for part in parts if module + part in state}
        theirs = compressor.decompress(stored, scheme)["weight"]
        ours = source.checkpoint.read(f"{module}weight", None, source.dtype, source.device)
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("kind", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_fp4_of_compressed_tensors(tmp_path: Path, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (24, 32), generator=generator, dtype=torch.uint8)
    stored = {"weight_packed": codes}
    if kind == "nvfp4-pack-quantized":
        scale = 1 + 7 * torch.rand(24, 4, generator=generator)
        stored["weight_scale"] = scale.to(torch.float8_e4m3fn)
        stored["weight_global_scale"] = torch.tensor([37.0])
        each = stored["weight_scale"].float() / 37
    else:
        exponents = torch.randint(110, 130, (24, 2), generator=generator)
        stored["weight_scale"] = exponents.to(torch.uint8)
        each = torch.exp2(exponents - 127.0)
    save_file({f"a.{key}": value for key, value in stored.items()}, tmp_path / "a.safetensors")
    declared = copies.compressed_tensors_config(kind, [])
    checkpoint = Checkpoint.of([tmp_path / "a.safetensors"], parse_quantization(declared, tmp_path))
    found = checkpoint.read("a.weight", None, torch.bfloat16, torch.device("cpu"))
    numbers = copies.fp4_values(torch.stack([codes & 15, codes >> 4], -1).flatten(1).long())
    spread = each.repeat_interleave(64 // each.shape[1], 1)
    assert torch.equal(found, (numbers * spread).bfloat16())
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError:
        return
    size, strategy = (16, "tensor_group") if kind.startswith("nvfp4") else (32, "group")
    weights = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": size}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(kind)
    assert torch.equal(found, compressor.decompress(stored, scheme)["weight"])


@pytest.mark.parametrize("rows", [1, 8, 9])  # zero points of eight rows share a word
def test_zero_points_of_few_rows(tmp_path: Path, rows: int) -> None:
    weight = torch.randn(rows, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored, expected = copies.packed_int(4, 32, symmetric=False)("a.weight", weight)
    save_file(stored, tmp_path / "a.safetensors")
    groups = [INT4 | {"symmetric": False}]
    declared = copies.compressed_tensors_config("pack-quantized", groups)
    checkpoint = Checkpoint.of([tmp_path / "a.safetensors"], parse_quantization(declared, tmp_path))
    found = checkpoint.read("a.weight", None, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "columns"),
    [
        (4, None, True, 100),
        (4, 20, True, 100),
        (4, 12, False, 36),
        (2, 14, True, 70),
        (8, None, True, 33),
        (8, None, False, 33),
        (1, None, True, 40),
    ],
)
def test_the_last_word_of_a_row_may_be_filled_up(
    tmp_path: Path, bits: int, group: int | None, symmetric: bool, columns: int
) -> None:
    weight = torch.randn(9, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored, expected = copies.packed_int(bits, group, symmetric)("a.weight", weight)
    save_file(stored, tmp_path / "a.safetensors")
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights |= {"strategy": "group" if group else "channel", "group_size": group}
    declared = copies.compressed_tensors_config("pack-quantized", [weights])
    checkpoint = Checkpoint.of([tmp_path / "a.safetensors"], parse_quantization(declared, tmp_path))
    checkpoint.read_shapes(["a.weight"])
    assert checkpoint.forms["a.weight"].shape == weight.shape
    found = checkpoint.read("a.weight", None, torch.bfloat16, torch.device("cpu"))
    assert torch.equal(found, expected)
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError:
        return
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    theirs = {key.removeprefix("a."): value for key, value in stored.items()}
    assert torch.equal(found, compressor.decompress(theirs, scheme)["weight"])


@pytest.mark.parametrize("group", [12, None])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_of_any_inner_size_in_int4(tmp_path: Path, family: str, group: int | None) -> None:
    inner = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    model: Any = make_model(family, **{inner: 36}).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path / "original")
    declared = copies.compressed_tensors_config("pack-quantized", [INT4 | {"group_size": group}])
    writers = {r"(w2|experts\.\d+\.down_proj)\.weight$": copies.packed_int(4, group)}
    quantized, plain = copies.quantized_copy(tmp_path / "original", tmp_path, writers, declared)
    first, second = Source(quantized), Source(plain)
    assert first.checkpoint.quantized
    same(tensors(first), tensors(second))


@pytest.mark.parametrize(
    ("family", "writers", "changes"),
    [
        (
            "deepseek_v4",
            {
                r"ffn\.experts\.\d+\.w\d\.weight$": copies.fp4,
                r"(attn|shared_experts)\.w\w+\.weight$": copies.fp8(BLOCK, "E8M0", ".scale"),
            },
            {"scale_fmt": "ue8m0", "expert_dtype": "fp4"},
        ),
        ("deepseek_v32", {copies.LINEAR: copies.fp8(BLOCK, "bytes")}, {"scale_fmt": "ue8m0"}),
        ("mimo_v2_flash", {copies.LINEAR: copies.fp8(BLOCK)}, {}),
    ],
)
def test_families_as_the_hub_has_them(
    tmp_path: Path, family: str, writers: dict[str, copies.Writer], changes: dict[str, str]
) -> None:
    model = make_model(family).to(torch.bfloat16)
    folder = save_model(model, tmp_path / "original")
    declared = copies.fp8_config(BLOCK, **changes)
    quantized, plain = copies.quantized_copy(folder, tmp_path, writers, declared, shard=20)
    source = Source(quantized)
    found = tensors(source)
    same(found, tensors(Source(plain)))
    assert expert_codes(source) is not None
    state = opened_by_transformers(quantized).state_dict()
    theirs = {n: state[n].to(value.dtype) for n, value in found.items() if n in state}
    same({name: found[name] for name in theirs}, theirs)


@pytest.mark.parametrize("inner", [64, 96])  # H is 64: one shape of scales is that of rows too
def test_fused_experts_of_fbgemm(tmp_path: Path, inner: int) -> None:
    """As transformers quantizes Llama 4 (FbgemmFp8Quantize); its own class runs on cards only."""
    model = make_model("llama4_text", intermediate_size=inner).to(torch.bfloat16)
    folder = save_model(model, tmp_path / "original")
    writers = {
        r"experts\.(gate_up|down)_proj$": copies.fp8_columns,
        r"self_attn\.\w_proj\.weight$": copies.fp8_rows,
    }
    declared = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    quantized, plain = copies.quantized_copy(folder, tmp_path, writers, declared)
    same(tensors(Source(quantized)), tensors(Source(plain)))


@pytest.mark.parametrize("stored", ["bfloat16", "FP8", "int4"])
def test_llama_4_with_experts_apart(tmp_path: Path, stored: str) -> None:
    """As llm-compressor stores it: each matrix of an expert is a linear."""
    fused = save_model(make_model("llama4_text").to(torch.bfloat16), tmp_path / "fused")
    state = {k: v for file in fused.glob("*.safetensors") for k, v in load_file(file).items()}
    apart: dict[str, Tensor] = {}
    for key, value in state.items():
        path, _, name = key.rpartition(".")
        for expert, matrix in enumerate(value.mT if path.endswith(".experts") else ()):
            names = ["gate_proj", "up_proj"] if name == "gate_up_proj" else [name]
            for one, part in zip(names, matrix.chunk(len(names)), strict=True):
                apart[f"{path}.{expert}.{one}.weight"] = part.contiguous()
        if not path.endswith(".experts"):
            apart[key] = value
    folder = tmp_path / "apart"
    shutil.copytree(fused, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file(apart, folder / "model.safetensors", metadata={"format": "pt"})
    if stored == "bfloat16":
        same(tensors(Source(folder)), tensors(Source(fused)))
        return
    kind, args = ("float-quantized", FP8_ROWS) if stored == "FP8" else ("pack-quantized", INT4)
    writer = copies.fp8_rows if stored == "FP8" else copies.packed_int(4, 32)
    declared = copies.compressed_tensors_config(kind, [args])
    quantized, plain = copies.quantized_copy(folder, tmp_path, {copies.EXPERT: writer}, declared)
    found = tensors(Source(quantized))
    same(found, tensors(Source(plain)))
    whole = tensors(Source(fused))
    assert found.keys() == whole.keys()
    for name, value in found.items():
        assert (value - whole[name]).norm() < 0.2 * whole[name].norm(), name


def test_shards_may_part_codes_and_scales(model_folder: Folder, tmp_path: Path) -> None:
    quantized, plain = copy_of("fp8", model_folder, tmp_path, shard=7)
    assert len(list(quantized.glob("*.safetensors"))) > 5
    same(tensors(Source(quantized)), tensors(Source(plain)))


def test_mxfp4_blocks_of_gpt_oss_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 64, 48, generator=generator).to(torch.bfloat16)
    stored, value = copies.mxfp4_blocks("experts.gate_up_proj", weight)
    stored["experts.gate_up_proj_scales"][0, 0, 0] = 3  # a subnormal number
    save_file(stored, tmp_path / "a.safetensors")
    checkpoint = Checkpoint.of([tmp_path / "a.safetensors"], Quantization("mxfp4"))
    assert list(checkpoint.names) == ["experts.gate_up_proj"]
    theirs = convert_moe_packed_tensors(*stored.values())
    cpu = torch.device("cpu")
    whole = checkpoint.read("experts.gate_up_proj", None, torch.bfloat16, cpu)
    assert torch.equal(whole, theirs) and torch.equal(whole[1:], value[1:])
    for row in range(3):
        one = checkpoint.read("experts.gate_up_proj", row, torch.bfloat16, cpu)
        assert torch.equal(one, whole[row : row + 1])
    assert checkpoint.nbytes("experts.gate_up_proj") == 3 * 64 * 48 // 2 + 3 * 48 * 2


@pytest.mark.parametrize("stored", ["NVFP4", "MXFP8"])
def test_experts_of_inkling_are_what_transformers_makes_of_them(
    tmp_path: Path, stored: str
) -> None:
    if not hasattr(core_model_loading, "Inkling2LoopDequantizeExperts"):
        pytest.skip("this transformers cannot read them")
    generator = torch.Generator().manual_seed(0)
    parts = {"w": torch.randint(0, 256, (3, 8, 32), generator=generator, dtype=torch.uint8)}
    if stored == "NVFP4":
        parts["w_scale"] = (1 + torch.rand(3, 8, 4, generator=generator)).to(torch.float8_e4m3fn)
        parts["w_amax"] = 1 + torch.rand(3, generator=generator)
        parts["w_outer_scale_denominator"] = torch.tensor(2688.0)
    else:
        parts["w"] = torch.randn(3, 8, 64, generator=generator).to(torch.float8_e4m3fn)
        exponents = torch.randint(120, 130, (3, 8, 2), generator=generator)
        parts["w_scale"] = exponents.to(torch.uint8)
    save_file(parts, tmp_path / "a.safetensors")
    names = [f"w{end}" for end in ("", "_scale", "_amax", "_outer_scale_denominator")]
    theirs = core_model_loading.Inkling2LoopDequantizeExperts().convert(parts, names, ["w"])["w"]
    checkpoint = Checkpoint.of([tmp_path / "a.safetensors"], Quantization("fp8"))
    cpu = torch.device("cpu")
    assert torch.equal(checkpoint.read("w", None, torch.bfloat16, cpu), theirs)
    assert torch.equal(checkpoint.read("w", 2, torch.bfloat16, cpu), theirs[2:])


def test_the_grid_of_a_matrix() -> None:
    declared = Sizes((128, 128), (32, 16), declared=True)
    free = Sizes((128, 128), (32, 16), declared=False)
    blocks = Blocks(128), Blocks(128)
    assert declared.fitting(576, 7168, (5, 56), fused=False) == blocks  # kv_a_proj of DeepSeek-V3
    assert declared.fitting(576, 7168, (1, 56), fused=False) is None
    assert declared.fitting(576, 7168, (1, 1), fused=False) is None
    assert free.fitting(576, 7168, (1, 1), fused=False) == (Blocks(576), Blocks(7168))
    assert declared.fitting(576, 7168, (576, 1), fused=False) == (Blocks(1), Blocks(7168))
    assert declared.fitting(576, 7168, (576, 224), fused=False) == (Blocks(1), Blocks(32))
    assert declared.fitting(64, 96, (2, 1), fused=True) == (Blocks(32, True), Blocks(128))
    halves = declared.fitting(384, 128, (4, 1), fused=True)  # gate and up of 192 rows each
    assert halves is not None
    assert halves[0].index(384).bincount().tolist() == [128, 64, 128, 64]
    assert declared.fitting(384, 128, (4, 1), fused=False) is None


def test_sizes_are_those_on_disk(model_folder: Folder, tmp_path: Path) -> None:
    quantized, plain = copy_of("fp8", model_folder, tmp_path)
    small, large = inspect(quantized), inspect(plain)
    assert small["quantization"] == "FP8, blocks of 16 x 16"
    assert "quantization" not in large
    assert small["bytes"] == (quantized / "model.safetensors").stat().st_size < large["bytes"]
    parts, of_plain = bytes_by_part(quantized), bytes_by_part(plain)
    stored = sum(tensor.nbytes for tensor in load_file(quantized / "model.safetensors").values())
    assert sum(part.stored for part in parts.values()) == stored
    for name, part in parts.items():
        assert part.original == of_plain[name].original
    routed = parts["routed experts"]
    assert routed.stored == routed.original // 2 * (1 + 4 / 256)  # a float32 for 256 weights


# What cannot be read


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})
    return folder


KEY = "model.layers.1.mlp.experts.2.up_proj.weight"
SCALE = f"{KEY}_scale_inv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(SCALE), rf"{KEY} .* has no scales"),
        (lambda s: s.pop(KEY), rf"{SCALE} .* no codes"),
        (lambda s: s.update({SCALE: s[SCALE][:1]}), rf"{SCALE} .* does not fit {KEY}"),
        (lambda s: s.update({SCALE: s[SCALE][:1, :1]}), rf"{SCALE} .* does not fit {KEY}"),
        (lambda s: s.update({KEY: s[KEY].bfloat16()}), rf"{SCALE} .* no codes"),
        (lambda s: s.update({KEY: s[KEY].view(torch.uint8)}), rf"{SCALE} .* no codes"),
    ],
)
def test_damaged_scales_are_named_before_any_work(
    model_folder: Folder, tmp_path: Path, change: Any, message: str
) -> None:
    quantized, _ = copy_of("fp8", model_folder, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Source(changed(quantized, change))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_codes_without_scales_are_named_before_any_work(
    model_folder: Folder, tmp_path: Path, dtype: torch.dtype
) -> None:
    plain = shutil.copytree(model_folder("deepseek_v3", "bfloat16"), tmp_path / "plain")
    with pytest.raises(CheckpointError, match=f"{KEY} .*scales"):
        Source(changed(plain, lambda state: state.update({KEY: state[KEY].to(dtype)})))


def test_codes_that_the_model_does_not_need_do_not_matter(
    model_folder: Folder, tmp_path: Path
) -> None:
    quantized, plain = copy_of("fp8", model_folder, tmp_path)
    extra = torch.zeros(4, dtype=torch.uint8)
    changed(quantized, lambda state: state.update({"model.layers.1._extra_state": extra}))
    same(tensors(Source(quantized)), tensors(Source(plain)))


def not_a_number(state: dict[str, Tensor]) -> None:
    state[KEY].view(torch.uint8)[3, 5] = 0x7F


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (not_a_number, KEY),
        (lambda state: state[SCALE].fill_(torch.nan), SCALE),
        (lambda state: state[SCALE].fill_(torch.inf), SCALE),
        (lambda state: state[SCALE].fill_(3e38), KEY),
    ],
)
def test_numbers_that_are_not_finite_are_named(
    model_folder: Folder, tmp_path: Path, change: Any, name: str
) -> None:
    quantized, _ = copy_of("fp8", model_folder, tmp_path)
    source = Source(changed(quantized, change))
    source.expert(1, 1)
    with pytest.raises(NumericalError, match=rf"{name} .*infinite"):
        source.expert(1, 2)


def test_a_shape_that_is_not_that_of_the_codes_is_named(
    model_folder: Folder, tmp_path: Path
) -> None:
    quantized, _ = copy_of("int4", model_folder, tmp_path)
    key = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
    wrong = torch.tensor([96, 62])
    changed(quantized, lambda state: state.update({f"{key}_shape": wrong}))
    with pytest.raises(CheckpointError, match=rf"{key}_shape says \[96, 62\]"):
        Source(quantized).expert(1, 0)


def test_int4_of_other_groups_than_declared_is_named(model_folder: Folder, tmp_path: Path) -> None:
    quantized, _ = copy_of("int4", model_folder, tmp_path)
    groups = [INT4 | {"group_size": 16}]
    copies.declare(quantized, copies.compressed_tensors_config("pack-quantized", groups))
    with pytest.raises(CheckpointError, match=r"weight_scale .* does not fit .*groups of 16"):
        Source(quantized)


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ({"quant_method": "awq"}, "awq.* rounded"),
        ({"quant_method": "gptq"}, "gptq.* rounded"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gguf"}, "not in safetensors"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "moepress"}, "made by moepress"),
        ({"quant_method": "brand-new"}, "brand-new.* not known"),
        ({"bits": 4}, "no quant_method"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
            "sparsity",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"a": 1}}},
            "rotated",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "damaged"),
        ({"config_groups": {"W3A16": ["Linear"]}}, "compressed-tensors W3A16.*not read"),
        ({"config_groups": {"group_0": ["Linear"]}}, "compressed-tensors group_0.*not read"),
        ({"config_groups": {"group_0": 3}}, "damaged"),
    ],
)
def test_other_methods_are_refused_with_a_reason(
    tmp_path: Path, declared: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        parse_quantization(declared, tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_schemes_by_name_are_those_of_compressed_tensors(tmp_path: Path, name: str) -> None:
    if not schemes.is_preset_scheme(name):
        pytest.skip("a name that this version has not")
    whole = {"group_0": schemes.preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json")}
    by_name, written_out = (
        parse_quantization({"config_groups": groups}, tmp_path)
        for groups in ({name.lower(): ["Linear"]}, whole)
    )
    assert by_name.ints == written_out.ints
    assert by_name.sizes == written_out.sizes
    assert by_name.asymmetric == written_out.asymmetric


def test_a_scheme_may_be_given_by_name(tmp_path: Path) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name, symmetric in (("W4A16", True), ("W4A16_ASYM", False)):
        stored, expected = copies.packed_int(4, 128, symmetric=symmetric)("a.weight", weight)
        declared = copies.compressed_tensors_config("pack-quantized", [])
        declared["config_groups"] = {name: ["Linear"]}
        assert torch.equal(one_matrix(tmp_path, stored, declared), expected)


def test_the_text_part_of_a_composite_may_declare_it(tmp_path: Path) -> None:
    config = {
        "model_type": "mixtral",
        "text_config": {"quantization_config": {"quant_method": "awq"}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="awq"):
        read_config(tmp_path)


@pytest.mark.parametrize("dtype", [None, "float8_e4m3fn"])
def test_without_a_dtype_in_the_config_it_is_that_of_the_other_tensors(
    model_folder: Folder, tmp_path: Path, dtype: str | None
) -> None:
    quantized, _ = copy_of("fp8", model_folder, tmp_path)
    copies.declare(quantized, FP8, dtype=dtype)
    assert Source(quantized).dtype == torch.bfloat16


def one_matrix(folder: Path, stored: dict[str, Tensor], declared: dict[str, Any]) -> Tensor:
    """The matrix "a.weight" of a file of its own, dequantized."""
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "a.safetensors")
    checkpoint = Checkpoint.of([folder / "a.safetensors"], parse_quantization(declared, folder))
    return checkpoint.read("a.weight", None, torch.bfloat16, torch.device("cpu"))


ASYMMETRIC = copies.compressed_tensors_config("pack-quantized", [INT4 | {"symmetric": False}])
ZERO = "a.weight_zero_point"


@pytest.mark.parametrize(
    "change",
    [
        lambda zero: zero.flatten(),
        lambda zero: zero.mT,
        lambda zero: zero[:-1],
        lambda zero: zero[:, :-1],
        lambda zero: zero.long(),
        lambda zero: torch.zeros(40, 3, dtype=torch.bool),
        lambda zero: torch.zeros(3, 40, dtype=torch.int8),
        lambda zero: zero[0, :1],
    ],
)
def test_zero_points_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored, _ = copies.packed_int(4, 32, symmetric=False)("a.weight", weight)
    with pytest.raises(CheckpointError, match=rf"{ZERO} .* does not fit .*\[(5|40), 3\]"):
        one_matrix(tmp_path, {**stored, ZERO: change(stored[ZERO])}, ASYMMETRIC)


def test_zero_points_that_were_not_packed(tmp_path: Path) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored, expected = copies.packed_int(4, 32, symmetric=False)("a.weight", weight)
    words = stored[ZERO].mT.contiguous().view(torch.uint8)
    codes = torch.stack([words & 15, words >> 4], -1).flatten(1).mT
    zeros = (codes.to(torch.int8) - 8)[:24]
    assert torch.equal(one_matrix(tmp_path, {**stored, ZERO: zeros}, ASYMMETRIC), expected)


@pytest.mark.parametrize("kind", ["packed", "bytes"])
def test_missing_zero_points_are_refused(tmp_path: Path, kind: str) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    write = copies.packed_int(4, 32, symmetric=False) if kind == "packed" else copies.int8_rows
    stored, _ = write("a.weight", weight)
    stored.pop(ZERO, None)
    bits = 4 if kind == "packed" else 8
    floats = {"type": "float", "strategy": "channel", "symmetric": True}
    groups = [INT4 | {"num_bits": bits, "symmetric": False}, floats]
    declared = copies.compressed_tensors_config("pack-quantized", groups)
    with pytest.raises(CheckpointError, match="has no zero points beside it"):
        one_matrix(tmp_path, stored, declared)
    symmetric = INT4 | {"num_bits": bits, "group_size": 96}  # other modules may have none
    declared = copies.compressed_tensors_config("pack-quantized", [*groups, symmetric])
    one_matrix(tmp_path, stored, declared)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.bool])
def test_scales_that_are_integers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored, _ = copies.fp8(BLOCK)("a.weight", weight)
    stored["a.weight_scale_inv"] = (100 * stored["a.weight_scale_inv"]).to(dtype)
    with pytest.raises(CheckpointError, match="Expected scales that are floats"):
        one_matrix(tmp_path, stored, FP8)


@pytest.mark.parametrize("given", [None, torch.ones(2), torch.ones(1, dtype=torch.int32)])
def test_nvfp4_has_one_number_for_a_matrix(tmp_path: Path, given: Tensor | None) -> None:
    stored = {
        "a.weight_packed": torch.zeros(24, 32, dtype=torch.uint8),
        "a.weight_scale": torch.ones(24, 4).to(torch.float8_e4m3fn),
    }
    if given is not None:
        stored["a.weight_global_scale"] = given
    declared = copies.compressed_tensors_config("nvfp4-pack-quantized", [])
    with pytest.raises(CheckpointError, match=r"a\.weight_global_scale"):
        one_matrix(tmp_path, stored, declared)


@pytest.mark.parametrize("rows", [0, 32])
def test_codes_without_elements_are_refused(tmp_path: Path, rows: int) -> None:
    stored = {
        "a.weight": torch.zeros(rows, 32 - rows).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(2, 2),
    }
    with pytest.raises(CheckpointError, match=r"no codes that it fits .*a.weight \(F8_E4M3"):
        one_matrix(tmp_path, stored, FP8)


@pytest.mark.parametrize("bits", [4, 8])
def test_widths_of_whole_rows_are_told_apart(tmp_path: Path, bits: int) -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored, expected = copies.packed_int(bits, None)("a.weight", weight)
    rows = {"type": "int", "strategy": "channel", "group_size": None}
    groups = [rows | {"num_bits": each, "symmetric": True} for each in (4, 8)]
    groups.append(groups[0] | {"symmetric": False})
    declared = copies.compressed_tensors_config("pack-quantized", groups)
    assert torch.equal(one_matrix(tmp_path, stored, declared), expected)
