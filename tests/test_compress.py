"""The main job: what is written is what was planned, and a stop at any moment changes nothing."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moepress
from moepress.allocate import allocate
from moepress.allocation.plan import BitAllocation
from moepress.calibrate import calibrate
from moepress.compress import compress
from moepress.costs.scores import ExpertScores
from moepress.errors import BudgetError, CheckpointError, InputError, NumericalError
from moepress.estimate import estimate
from moepress.format.checkpoint import PLAN, SCORES, folder_bytes, tensor_bytes
from moepress.format.quantization import packed_specs
from moepress.kernels.reference import dequantize
from moepress.original.source import Source
from moepress.quantize import quantize
from moepress.recipe import Recipe
from moepress.score import score
from tests.conftest import FAMILIES, with_context
from tests.conftest import small_recipe as named_recipe

Folder = Callable[..., Path]


def small_recipe(text: Path, name: str = "default", **changes: object) -> Recipe:
    return named_recipe(text, name, **changes)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def compressed(
    model_folder: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "model"
    return compress(model_folder(), out, small_recipe(text_file, bits=2.5))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_opens_packed_and_close_to_the_original(
    model_folder: Folder, text_file: Path, tmp_path: Path, family: str
) -> None:
    folder = model_folder(family)
    recipe = small_recipe(
        text_file, "fast", bits=8, expert_bits=(8,), attention_bits=8, shared_expert_bits=8,
        dense_mlp_bits=8,
    )  # fmt: skip
    out = compress(folder, tmp_path / "out", recipe)
    model = AutoModelForCausalLM.from_pretrained(out)
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    assert packed
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        close = model(ids).logits
    assert (close - exact).norm() < 0.1 * exact.norm()


def test_stored_bytes_are_the_rounded_weights(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    """Rounded to nearest, each packed matrix is near its original; the rest is untouched."""
    recipe = small_recipe(text_file, "fast", bits=2.5, quantizer="rtn", measure="rtn")
    compressed = compress(model_folder(), tmp_path / "out", recipe)
    source = Source(model_folder())
    specs = packed_specs(compressed)
    stored = {k: v for p in compressed.glob("model-*.safetensors") for k, v in load_file(p).items()}
    for experts in source.experts.values():
        for name, shape in (
            ("gate_up_proj", experts.gate_up_shape), ("down_proj", experts.down_shape)
        ):  # fmt: skip
            spec = specs[f"{experts.path}.{name}"]
            blob = stored.pop(f"{experts.path}.{name}")
            starts = spec.offsets(*shape)
            assert len(blob) == starts[-1]
            for index, codec in enumerate(spec.codecs):
                part = blob[starts[index] : starts[index + 1]]
                weights = source.expert(experts.layer, index)
                original = weights.gate_up if name == "gate_up_proj" else weights.down
                error = (dequantize(part, *shape, codec) - original).norm() / original.norm()
                assert error < {1: 0.75, 2: 0.5, 3: 0.3}[codec.bits]
    for name, value in stored.items():
        original = source.tensor(name)
        if name in specs:
            value = dequantize(value, *original.shape, specs[name].codecs[0])
            assert (value - original).norm() < 0.15 * original.norm()
        else:
            assert torch.equal(value, original), name


def test_size_is_what_was_predicted(compressed: Path) -> None:
    plan = BitAllocation.load(compressed / PLAN)
    shards = sum(tensor_bytes(p) for p in compressed.glob("model-*.safetensors"))
    assert shards == plan.total_bytes
    assert folder_bytes(compressed) == pytest.approx(plan.folder_bytes, rel=0.01)
    assert plan.average_bits <= 2.5
    assert (compressed / SCORES).is_file()


def test_stages_give_the_same_bytes_as_the_whole(
    compressed: Path, model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    scores = score(model_folder(), small_recipe(text_file))
    scores.save(tmp_path / "scores.safetensors")
    loaded = ExpertScores.load(tmp_path / "scores.safetensors")
    plan = allocate(loaded, loaded.recipe_for(Recipe(bits=2.5)))
    plan.save(tmp_path / "plan.json")
    out = quantize(model_folder(), BitAllocation.load(tmp_path / "plan.json"), tmp_path / "out")
    assert {k: v for k, v in content(compressed).items() if k != SCORES} == content(out)


def test_running_again_changes_nothing(
    compressed: Path, model_folder: Folder, text_file: Path
) -> None:
    before = content(compressed)
    assert compress(model_folder(), compressed, small_recipe(text_file, bits=2.5)) == compressed
    assert content(compressed) == before


@pytest.mark.parametrize("stage", ["score", "quantize"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_run_that_dies_resumes_with_the_same_bytes(
    compressed: Path,
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    layer: int,
) -> None:
    """The progress of the second run counts the layers of the first."""
    module = importlib.import_module(f"moepress.{stage}")
    real = getattr(module, f"{stage}_layer")

    def dies(walk: object, at: int, *args: object) -> object:
        if at == layer:
            raise KeyboardInterrupt
        return real(walk, at, *args)

    recipe = small_recipe(text_file, bits=2.5)
    monkeypatch.setattr(module, f"{stage}_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(model_folder(), tmp_path / "out", recipe)
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(module, f"{stage}_layer", real)
    capsys.readouterr()
    compress(model_folder(), tmp_path / "out", recipe)
    assert f"{stage}: 2/2" in capsys.readouterr().err
    assert content(tmp_path / "out") == content(compressed)
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == []


def test_kill_9_in_a_process_of_its_own(
    compressed: Path, model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    """Killed as soon as the first layer of each stage is on disk, then once more at random."""
    out = tmp_path / "out"
    fields = json.dumps(small_recipe(text_file, bits=2.5).to_dict())
    code = (
        "import json, sys; from moepress.compress import compress; from moepress.recipe import "
        "Recipe; compress(sys.argv[1], sys.argv[2], Recipe.from_dict(json.loads(sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, str(model_folder()), str(out), fields]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for wait_for in ("layer-0000.safetensors", "model-layer-0000.safetensors"):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and not any(out.rglob(wait_for)):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert content(out) == content(compressed)


def test_other_work_in_the_folder_is_refused(
    compressed: Path, model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    before = content(compressed)
    with pytest.raises(InputError, match="finished model of other work"):
        compress(model_folder(), compressed, small_recipe(text_file, bits=2.0))
    assert content(compressed) == before
    (tmp_path / "holiday.jpg").write_bytes(b"beach")
    with pytest.raises(InputError, match="not empty"):
        compress(model_folder(), tmp_path, small_recipe(text_file, bits=2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_unfinished_work_of_another_recipe_is_refused(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("moepress.quantize")
    monkeypatch.setattr(module, "quantize_layer", lambda *_: 1 / 0)
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        compress(model_folder(), out, small_recipe(text_file, bits=2.5))
    with pytest.raises(InputError, match=r"differs in: full_recipe \(the budget"):
        compress(model_folder(), out, small_recipe(text_file, bits=2.0))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, InputError, "No budget"),
        ({"bits": 2.5, "bpw": 3.0}, InputError, "More than one budget"),
        ({"bits": 0.5}, BudgetError, "smallest"),
        ({"size": 1000}, BudgetError, "smallest"),
        ({"bits": 2.5, "expert_bits": (2, 5)}, InputError, "expert_bits is 5"),
        ({"bits": 2.5, "group_size": 48}, InputError, "group_size is 48"),
        ({"bits": 2.5, "sequences": 100_000}, InputError, "tokens"),
    ],
)
def test_bad_recipes_write_nothing(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    out = tmp_path / "out"
    with pytest.raises(error, match=message):
        compress(model_folder(), out, small_recipe(text_file, **changes))
    assert not out.exists()


def test_rows_that_no_group_divides_are_padded(
    text_file: Path, tmp_path: Path, model_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.conftest import make_model

    folder = tmp_path / "odd"
    shutil.copytree(model_folder(), folder)
    make_model("mixtral", intermediate_size=72).save_pretrained(folder)
    compress(folder, tmp_path / "out", small_recipe(text_file, bits=2.5))
    assert "the 72 inputs of down_proj are padded to 96" in caplog.text
    assert (tmp_path / "out" / "config.json").exists()


def test_nan_weights_stop_the_work(model_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = shutil.copytree(model_folder(), tmp_path / "nan")
    state = load_file(folder / "model.safetensors")
    (key,) = [k for k in state if "layers.1." in k and "experts.2." in k and "w1" in k]
    state[key][3, 5] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.experts"):
        compress(folder, out, small_recipe(text_file, bits=2.5))
    assert not (out / "config.json").exists()


def test_a_full_disk_is_one_error_and_keeps_finished_layers(
    compressed: Path,
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk fills while the second layer is written. With space again the run resumes."""
    module = importlib.import_module("moepress.format.checkpoint")
    real = module.write_tensors

    def full(path: Path, tensors: object, metadata: object) -> None:
        if "model-layer-0001" in path.name:
            raise OSError(28, "No space left on device")
        real(path, tensors, metadata)

    monkeypatch.setattr(module, "write_tensors", full)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="No space left"):
        compress(model_folder(), out, small_recipe(text_file, bits=2.5))
    assert (out / "model-layer-0000.safetensors").is_file()
    assert not list(out.glob("*model-layer-0001*"))
    monkeypatch.setattr(module, "write_tensors", real)
    compress(model_folder(), out, small_recipe(text_file, bits=2.5))
    assert content(out) == content(compressed)


def test_a_plan_of_another_model_is_refused(
    compressed: Path, model_folder: Folder, tmp_path: Path
) -> None:
    plan = BitAllocation.load(compressed / PLAN)
    with pytest.raises(InputError, match="The plan is for model"):
        quantize(model_folder("qwen2_moe"), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


KNOBS = {
    "fast": [
        {"quantizer": "rtn"},
        {"quantizer": "gptq-released"},
        {"expert_codec": "trellis"},
        {"linear_codec": "trellis"},
        {"damping": 0.5},
        {"hessian_weight": "none"},
        {"token_floor": 150},
        {"correction": 0.0},
        {"correction": 1.0},
        {"attention_bits": 8},
        {"attention_bits": 16},
        {"head_bits": 8},
        {"embedding_bits": 4},
        {"seed": 1},
        {"sequences": 5},
        {"group_size": 64},
        {"scope": "layer"},
        {"per_projection": False},
        {"cost": "paper"},
        {"cost": "random"},
        {"measure": "rtn"},
    ],
    "default": [
        {"quantizer": "rtn"},
        {"expert_codec": "int"},
        {"linear_codec": "int"},
        {"linear_bits": (2, 8)},
        {"attention_bits": 4},
        {"sensitivity": "none"},
        {"over": "worst"},
    ],
}


@pytest.mark.parametrize(
    ("name", "changes"), [(name, changes) for name, all_of in KNOBS.items() for changes in all_of]
)
def test_every_field_of_the_recipe_has_an_effect(
    compressed: Path,
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    name: str,
    changes: dict[str, object],
) -> None:
    """Each changes the stored weights or the plan."""
    folder = model_folder()
    prose = tmp_path / "prose.txt"  # beside the code, so that there is a worst source
    prose.write_text("It was the best of times, it was the worst of times.\n" * 200)
    calib = ((str(text_file), 1.0), (str(prose), 1.0))
    base = small_recipe(text_file, name, bits=2.25, calib=calib)
    plain = compress(folder, tmp_path / "plain", base)
    other = compress(folder, tmp_path / "other", base.with_changes(**changes))
    ignored = {PLAN, "config.json", SCORES}  # they name the recipe itself
    a, b = ({k: v for k, v in content(f).items() if k not in ignored} for f in (plain, other))
    assert a != b


def test_fast_is_nearer_to_the_original_than_random_and_rtn(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    """By the outputs of the compressed model on its own calibration text."""
    from moepress.work import calibration_ids

    folder = model_folder()
    recipe = small_recipe(text_file, bits=2.0, sequences=12)
    ids = calibration_ids(Source(folder), recipe)
    with torch.inference_mode():
        exact = AutoModelForCausalLM.from_pretrained(folder)(ids).logits

        def distance(name: str, **changes: object) -> float:
            out = compress(folder, tmp_path / name, recipe.with_changes(**changes))
            logits = AutoModelForCausalLM.from_pretrained(out)(ids).logits
            return float((logits - exact).norm())

        ours = distance("ours")
        assert ours < distance("rtn", quantizer="rtn")
        assert ours < np.mean([distance(f"r{s}", cost="random", seed=s) for s in range(3)])


def test_a_model_that_does_not_fit_in_memory_does_not_write_its_text(
    model_folder: Folder, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    monkeypatch.setattr("moepress.work.free_memory", lambda _: size // 2)
    recipe = small_recipe(text_file, "fast", bits=2.5)
    with pytest.raises(InputError, match=r"must fit in memory, and it does not\. Give a text file"):
        compress(folder, tmp_path / "self", recipe.with_changes(calib=(("self", 1.0),)))
    compress(folder, tmp_path / "text", recipe)  # walks through it one layer at a time


def test_public_names() -> None:
    assert moepress.compress is compress
    assert moepress.Recipe is Recipe


@pytest.mark.parametrize("text", ["stdlib", "self"])
def test_sequences_longer_than_the_context_are_refused(
    model_folder: Folder, tmp_path: Path, text: str
) -> None:
    folder = with_context(model_folder(), 32, tmp_path / "short")
    recipe = named_recipe(Path(text), bits=2, sequence_length=33)
    told = r"33 tokens, and the model reads 32 .* lower --sequence-length"
    for run in (estimate, compress, calibrate):
        given = (folder, recipe) if run is calibrate else (folder, tmp_path / "out", recipe)
        with pytest.raises(InputError, match=told):
            run(*given)  # type: ignore[operator]
    assert not (tmp_path / "out").exists()
