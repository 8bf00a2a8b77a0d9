"""Packed folders in transformers: loading, running, saving, and refusing damaged ones."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MixtralForCausalLM
from transformers.utils import logging

from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import quantization_config
from moepress.format.codec import GRID_BITS, PackedSpec
from moepress.hf import (
    MoePressConfig,
    MoePressQuantizer,
    files,
    load_model,
    no_progress_bars,
    register,
    set_threads,
)
from moepress.hf.packing import pack_modules
from moepress.kernels.modules import PackedEmbedding, PackedExperts, PackedLinear
from moepress.kernels.reference import dequantize
from tests.conftest import COMMON, FAMILIES, make_model
from tests.kernels.test_kernels import random_packed

ALL = [*FAMILIES, "qwen3_moe"]
IDS = torch.tensor([[5, 9, 300, 17, 2, 44]])


@dataclass(frozen=True)
class Packed:
    """A packed folder, and the same model unpacked."""

    folder: Path
    oracle: nn.Module  # float32, weights dequantized
    specs: dict[str, PackedSpec]


def tiny(family: str) -> nn.Module:
    if family != "qwen3_moe":
        return make_model(family)
    torch.manual_seed(0)
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "head_dim": 16}
    config = AutoConfig.for_model(family, **COMMON, **sizes, num_experts_per_tok=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def choose_specs(model: nn.Module) -> dict[str, PackedSpec]:
    """Specs with every width: mixed experts, linears of the layers, and tied embeddings."""
    specs = {}
    for path, module in model.named_modules():
        if hasattr(module, "has_gate"):
            count = len(module.gate_up_proj)
            for shift, name in enumerate(("gate_up_proj", "down_proj")):
                widths = tuple(GRID_BITS[(e + shift) % 5] for e in range(count))
                specs[f"{path}.{name}"] = PackedSpec(widths, 32)
        elif type(module) is nn.Linear and ".layers." in path:
            specs[f"{path}.weight"] = PackedSpec((4,), 32)
    if model.config.tie_word_embeddings:
        specs["model.embed_tokens.weight"] = PackedSpec((8,), 64)
    return specs


def pack_model(model: nn.Module, folder: Path, specs: dict[str, PackedSpec]) -> None:
    """Replace the weights in `specs` by random codes, packed in `folder` and plain in `model`."""
    state: dict[str, Tensor] = {}
    tied = model.all_tied_weights_keys
    for seed, (name, weight) in enumerate(model.state_dict().items()):
        if name in tied:
            continue
        state[name] = weight.clone()
        if name in specs:
            matrices = weight if weight.dim() == 3 else weight[None]
            packed = []
            for matrix, codec in zip(matrices, specs[name].codecs, strict=True):
                packed.append(random_packed(*matrix.shape, codec, seed + len(packed)))
                matrix.copy_(dequantize(packed[-1], *matrix.shape, codec))
            state[name] = torch.cat(packed)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["quantization_config"] = quantization_config(specs, {"made by": "a test"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Packed]:
    """Makes the packed folder of a family, once."""
    made: dict[str, Packed] = {}

    def make(family: str = "mixtral") -> Packed:
        if family not in made:
            model, folder = tiny(family), tmp_path_factory.mktemp(family)
            specs = choose_specs(model)
            pack_model(model, folder, specs)
            made[family] = Packed(folder, model, specs)
        return made[family]

    return make


@pytest.fixture
def broken(packed: Callable[..., Packed], tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the Mixtral folder with its config or tensors changed."""

    def change(
        config: Callable[[dict[str, Any]], object] = lambda quantization: None,
        tensors: Callable[[dict[str, Tensor]], object] = lambda state: None,
    ) -> Path:
        intact = packed().folder
        fields = json.loads((intact / "config.json").read_text())
        config(fields["quantization_config"])
        (tmp_path / "config.json").write_text(json.dumps(fields))
        state = load_file(intact / "model.safetensors")
        tensors(state)
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path

    return change


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


# Loading


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("family", ALL)
def test_a_loaded_model_computes_what_its_weights_say(
    packed: Callable[..., Packed], family: str
) -> None:
    this = packed(family)
    model, info = load(this.folder, output_loading_info=True)
    assert not any(info.values()), info
    assert {p for p, v in model.named_parameters() if v.dtype == torch.uint8} == set(this.specs)
    torch.testing.assert_close(logits(model), logits(this.oracle), rtol=1e-3, atol=1e-4)
    kinds = {type(m) for m in model.modules()}
    assert {PackedLinear, PackedExperts} <= kinds
    assert (PackedEmbedding in kinds) == this.oracle.config.tie_word_embeddings


def test_tied_embeddings_share_their_packed_bytes(packed: Callable[..., Packed]) -> None:
    model = load(packed("qwen2_moe").folder, dtype=torch.bfloat16)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, PackedLinear)
    assert head.weight is table.weight
    assert table(IDS).dtype == torch.bfloat16


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16])
def test_dtypes(packed: Callable[..., Packed], dtype: Any) -> None:
    this = packed()
    model = load(this.folder, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else dtype
    assert model.dtype == wanted
    exact, got = logits(this.oracle), logits(model)
    plain = logits(copy.deepcopy(this.oracle).to(wanted))
    assert got.dtype == wanted
    assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-4 * exact.norm()


@pytest.mark.usefixtures("reference_backend")
def test_a_model_class_of_its_own_and_a_bare_decoder(packed: Callable[..., Packed]) -> None:
    this = packed()
    assert torch.equal(
        logits(MixtralForCausalLM.from_pretrained(this.folder)), logits(load(this.folder))
    )
    bare, info = AutoModel.from_pretrained(this.folder, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        states = bare(IDS).last_hidden_state
        torch.testing.assert_close(
            states, this.oracle.model(IDS).last_hidden_state, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(packed: Callable[..., Packed], cache: str | None) -> None:
    this = packed("qwen3_moe")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    got = load(this.folder).generate(IDS, **options)
    assert torch.equal(got, this.oracle.generate(IDS, **options))


def test_decoding_compiles_to_one_graph(packed: Callable[..., Packed]) -> None:
    model = load(packed().folder)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(IDS[:, :1]).logits, model(IDS[:, :1]).logits)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_saved_again_it_is_the_same_model(
    packed: Callable[..., Packed], family: str, tmp_path: Path
) -> None:
    this = packed(family)
    model = load(this.folder)
    model.save_pretrained(tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (this.folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.to_dict() == quantization_config(
        this.specs, {"made by": "a test"}
    )
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("where", ["auto", "disk"])
def test_device_maps(
    packed: Callable[..., Packed], tmp_path: Path, where: str, offload_buffers: bool
) -> None:
    this = packed("qwen2_moe")
    names = ("embed_tokens", "norm", "rotary_emb", "layers.0")
    split = {f"model.{name}": "cpu" for name in names} | {
        "lm_head": "cpu",
        "model.layers.1": "disk",
    }
    model = load(
        this.folder,
        device_map="auto" if where == "auto" else split,
        offload_folder=tmp_path,
        offload_buffers=offload_buffers,
    )
    assert torch.equal(logits(model), logits(load(this.folder)))


# Refusing


def test_without_moepress_loading_fails(packed: Callable[..., Packed]) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, packed().folder], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "MISMATCH" in done.stderr
    assert "RuntimeError" in done.stderr


GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def entry(path: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda quantization: quantization["modules"].setdefault(path, {}).update(fields)


def trellis_gate_up(quantization: dict[str, Any]) -> None:
    quantization["format_version"] = 4
    quantization["modules"][GATE_UP].update(family="trellis", bits="1234")


@pytest.mark.parametrize(
    "config, message",
    [
        (lambda q: q.update(format_version=8), "version 8; this moepress reads up to 7. Upgrade"),
        (lambda q: q.update(extra=1), "unknown field 'extra'"),
        (entry(QUERY, family="lattice"), f"{QUERY}.*No codec family 'lattice'"),
        (entry(QUERY, family="trellis"), "trellis codes of format version 1.*Compress the orig"),
        (trellis_gate_up, "of families 'trellis' and 'int'"),
        (entry(QUERY, bits="5"), f"{QUERY}.* 5-bit codes do not exist"),
        (entry(QUERY, bits="x"), f"{QUERY}.bits = 'x'"),
        (entry(QUERY, bits="44"), "of one width"),
        (entry(QUERY, group_size=48), "group size 48 is not offered"),
        (entry(QUERY, group_size=128), "q_proj packed. group size 128 does not divide"),
        (lambda q: q["modules"][QUERY].pop("bits"), f"no field 'modules.{QUERY}.bits'"),
        (entry(QUERY, bits=4), f"modules.{QUERY}.bits = 4. Expected: a valid string"),
        (entry(QUERY, group_size="32"), f"modules.{QUERY}.group_size = '32'"),
        (lambda q: q.update(modules=[]), r"modules = an array. Expected"),
        (lambda q: q.update(format_version="1"), "format_version = '1'"),
        (lambda q: q.update(provenance=3), "provenance = 3"),
        (lambda q: q.update(pruning={"thresholds": 3, "renormalise": True}), "thresholds = 3"),
        (entry(GATE_UP, bits="222"), "has 4 experts, but 3 widths"),
        (lambda q: q["modules"].pop(GATE_UP), r"Expected both of \['gate_up_proj', 'down_proj'\]"),
        (entry("model.x.weight", bits="4", group_size=32), "has no module model.x. The"),
        (entry("model.norm.weight", bits="4", group_size=32), "It is a MixtralRMSNorm"),
        (entry("lm_head.bias", bits="4", group_size=32), "Linear with packed .'bias'."),
    ],
)  # fmt: skip
def test_a_damaged_config_is_refused(
    broken: Callable[..., Path], config: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(broken(config=config))


@pytest.mark.parametrize(
    "tensors, message",
    [
        (lambda s: s.pop(GATE_UP), f"{GATE_UP} is in none of the model's files"),
        (lambda s: s.update({QUERY: s[QUERY][:-64].clone()}), f"{QUERY} is .*belong together"),
        (lambda s: s.update({QUERY: s[QUERY].char()}), f"{QUERY} is .* I8;"),
    ],
)
def test_damaged_tensors_are_refused_before_they_are_read(
    broken: Callable[..., Path], tensors: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(broken(tensors=tensors))


def test_a_wrong_width_does_not_fit_the_bytes(broken: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="do not belong together"):
        load(broken(config=entry(GATE_UP, bits="2222")))


def test_a_truncated_file_is_refused(broken: Callable[..., Path]) -> None:
    folder = broken()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read as safetensors"):
        load(folder)


def test_tied_tensors_may_be_named_twice_but_not_packed_differently(
    packed: Callable[..., Packed], tmp_path: Path
) -> None:
    this = packed("qwen2_moe")
    (tmp_path / "model.safetensors").symlink_to(this.folder / "model.safetensors")
    fields = json.loads((this.folder / "config.json").read_text())
    entry("lm_head.weight", bits="8", group_size=64)(fields["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert torch.equal(logits(load(tmp_path)), logits(load(this.folder)))
    entry("lm_head.weight", bits="4", group_size=64)(fields["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"one tensor \(tied\)"):
        load(tmp_path)


class ScaledEmbedding(nn.Embedding):
    """Like Gemma's: returns something other than a row of the table."""


@pytest.mark.parametrize("module", [ScaledEmbedding(8, 32), nn.Conv1d(32, 8, 1)])
def test_modules_that_compute_something_else_are_refused(module: nn.Module) -> None:
    with pytest.raises(InputError, match=f"It is a {type(module).__name__}"):
        pack_modules(nn.ModuleDict({"x": module}), {"x.weight": PackedSpec((4,), 32)})


def test_an_embedding_of_trellis_codes_is_refused() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(4, 32)})
    with pytest.raises(InputError, match="cannot be read row by row"):
        pack_modules(model, {"table.weight": PackedSpec((2,), 32, "trellis")})


def test_what_transformers_asks_of_a_quantizer() -> None:
    register()
    register()
    config = MoePressConfig({QUERY: {"bits": "4", "group_size": 32}}, provenance={"note": [1]})
    assert MoePressConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    quantizer = MoePressQuantizer(config)
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    assert quantizer.is_compileable
    with pytest.raises(InputError, match="`moepress dequantize FOLDER OUT`"):
        quantizer.dequantize(nn.Linear(2, 2), torch.float32)
    with pytest.raises(ValueError, match="pre-quantized"):
        MoePressQuantizer(config, pre_quantized=False)
    with pytest.raises(InputError, match="'gptq', expected 'moepress'"):
        MoePressConfig({}, quant_method="gptq")


def test_files_are_read_ahead_if_they_fit_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("a", "b", "gone", "after")]
    for path in paths:
        path.write_bytes(bytes(9_000_000))
    read = dict.fromkeys(paths, 0)
    opened = Path.open

    def watched(path: Path, *args: object, **options: object) -> object:
        file = opened(path, *args, **options)
        paths[2].unlink(missing_ok=True)  # a file that vanishes meanwhile is no error
        return SimpleNamespace(readinto=lambda buffer: count(path, file.readinto(buffer)))

    def count(path: Path, size: int) -> int:
        read[path] += size
        return size

    monkeypatch.setattr(Path, "open", lambda *a, **k: nullcontext(watched(*a, **k)))
    monkeypatch.setattr(files, "free_host_memory", lambda: 39_000_000)
    assert files.read_ahead(map(str, paths)) is None  # 36 MB of 39
    monkeypatch.setattr(files, "free_host_memory", lambda: 41_000_000)
    thread = files.read_ahead(map(str, paths))
    assert thread is not None
    thread.join()
    assert list(read.values()) == [9_000_000, 9_000_000, 0, 0]


def test_our_loading_is_silent_and_others_keep_their_progress_bars(
    packed: Callable[..., Packed], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = packed().folder
    made: list[str] = []

    def theirs(factory: Any, arguments: Any, options: Any) -> Any:
        made.append(options["desc"])
        return factory(*arguments, **options)

    shown, hub = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    load_model(folder)
    assert "Loading weights" not in capfd.readouterr().err
    load(folder)
    assert ("Loading weights" in capfd.readouterr().err) == shown
    previous = logging.set_tqdm_hook(theirs)
    try:
        load_model(folder)
        with pytest.raises(KeyError), no_progress_bars():
            raise KeyError
        assert made == []
        load(folder)
        assert made == ["Loading weights"]
    finally:
        assert logging.set_tqdm_hook(previous) is theirs
    assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == (shown, hub)


def test_threads_are_set() -> None:
    before = torch.get_num_threads()
    set_threads(1)
    try:
        assert torch.get_num_threads() == 1
        set_threads(None)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_overlapping_blocks_without_bars_restore_the_hook() -> None:
    """As two threads that load models at once: A enters, B enters, A leaves, B leaves."""
    from transformers.utils import logging as transformers_logging

    from moepress import hf

    def mine(factory: object, args: object, options: object) -> None:
        return None

    before = transformers_logging.set_tqdm_hook(mine)
    try:
        first, second = hf.no_progress_bars(), hf.no_progress_bars()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert transformers_logging.set_tqdm_hook(hf._no_bar) is hf._no_bar
        second.__exit__(None, None, None)
        assert transformers_logging.set_tqdm_hook(mine) is mine
    finally:
        transformers_logging.set_tqdm_hook(before)
