"""Which files and tensors are the model: those that transformers takes, or a refusal."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moepress.compress import compress
from moepress.errors import CheckpointError, InputError, MoepressError, NumericalError
from moepress.original.source import Source
from moepress.original.usable import check_usable
from tests.conftest import small_recipe

Folder = Callable[..., Path]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def whole(model_folder: Folder, tmp_path: Path) -> Path:
    """A copy of a model in one file."""
    return Path(shutil.copytree(model_folder(), tmp_path / "copy"))


@pytest.fixture
def sharded(model_folder: Folder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder(max_shard_size="100KB"), tmp_path / "copy"))


def change(folder: Path, changed: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    state = load_file(folder / SINGLE)
    copies = {name: value.clone() for name, value in changed(state).items()}
    save_file(copies, folder / SINGLE, {"format": "pt"})
    return folder


def configure(folder: Path, text: str = "", **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(text or json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def assigned(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def assign(folder: Path, weight_map: Any) -> Path:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# Files, index and shards


def test_a_single_file_beside_an_index_is_refused(sharded: Path, model_folder: Folder) -> None:
    shutil.copy(model_folder() / SINGLE, sharded)
    with pytest.raises(CheckpointError, match=r"beside model\.safetensors\.index"):
        Source(sharded)


def test_an_index_of_the_single_file_is_no_contradiction(whole: Path) -> None:
    names = load_file(whole / SINGLE)
    assert Source(assign(whole, dict.fromkeys(names, SINGLE))).files == [whole / SINGLE]


def test_an_index_that_assigns_otherwise_is_refused(sharded: Path) -> None:
    names = assigned(sharded)
    (other,) = set(names.values()) - {names[NORM]} if len(set(names.values())) == 2 else (
        next(file for file in names.values() if file != names[NORM]),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=f"says that {NORM} is in {other}"):
        Source(assign(sharded, {**names, NORM: other}))


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    names = assigned(sharded)
    other = next(file for file in names.values() if file != names[NORM])
    state = load_file(sharded / other)
    stale = load_file(sharded / names[NORM])[NORM] + 1
    save_file({**state, NORM: stale}, sharded / other, {"format": "pt"})
    for given in (names, {k: v for k, v in names.items() if k != NORM}):
        with pytest.raises(CheckpointError, match=NORM):
            Source(assign(sharded, given))


def test_a_shard_that_the_index_lacks_is_refused(sharded: Path) -> None:
    names = assigned(sharded)
    left = {k: v for k, v in names.items() if v != names[NORM]}
    with pytest.raises(CheckpointError, match=r"has no tensor for|experts'"):
        Source(assign(sharded, left))


@pytest.mark.parametrize(
    "weight_map",
    [None, 3, [], {}, {"a": 3}, {"a": "../a.safetensors"}, {"a": "/a.safetensors"}, {"a": "a.bin"}],
)
def test_a_damaged_index_is_refused(sharded: Path, weight_map: Any) -> None:
    with pytest.raises(CheckpointError, match="The index"):
        Source(assign(sharded, weight_map))


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_weights_that_are_a_link_to_nothing_are_named(whole: Path, name: str) -> None:
    (whole / SINGLE).unlink()
    (whole / name).symlink_to("../../blobs/0")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to \.\./\.\./blobs/0"):
        Source(whole)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_weights_in_pickles_are_refused(whole: Path, other: str) -> None:
    (whole / SINGLE).rename(whole / other)
    with pytest.raises(InputError, match=r"pytorch_model\*\.bin, .* save_pretrained"):
        Source(whole)


def test_weights_under_a_name_of_the_config_are_refused(whole: Path) -> None:
    (whole / SINGLE).rename(whole / "other.safetensors")
    with pytest.raises(InputError, match="transformers_weights"):
        Source(configure(whole, transformers_weights="other.safetensors"))


# Tensors


def without_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    more = {k.replace("layers.1.", "layers.2."): v for k, v in state.items() if "layers.1." in k}
    return {**state, **more}


UNNEEDED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "layers": (without_layers, "1 decoder layers more than the 2"),
    "a bias": (
        lambda s: {**s, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
        "q_proj.bias, but MixtralForCausalLM",
    ),
    "a scale": (
        lambda s: (
            {**s, "model.layers.0.self_attn.k_scale": torch.ones(1)}
            | {"model.layers.0.self_attn.q_proj.input_scale": torch.ones(1)}
        ),
        "input_scale, a scale of a tensor",
    ),
    "GPTQ": (
        lambda s: {k.replace("w1.weight", "w1.qweight"): v for k, v in s.items()},
        "w1.qweight: GPTQ or AWQ has rounded",
    ),
    "two names": (
        lambda s: {**s, "norm.weight": s["model.norm.weight"] + 1},
        "2 tensors for model.norm.weight",
    ),
    "more experts": (
        lambda s: {**s, **{k.replace("experts.3", "experts.4"): v for k, v in s.items()}},
        r"has shape \[5, 192, 64\]",
    ),
}


@pytest.mark.parametrize("kind", UNNEEDED)
def test_what_the_model_would_lack_is_refused(whole: Path, kind: str) -> None:
    changed, message = UNNEEDED[kind]
    with pytest.raises(CheckpointError, match=message):
        Source(change(whole, changed))


def test_layers_that_predict_ahead_are_surplus(
    whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def with_mtp(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**without_layers(state), "model.layers.2.eh_proj.weight": torch.ones(64, 128)}

    source = Source(change(whole, with_mtp))
    check_usable(source)
    assert f"{len(source.unused)} tensors that MixtralForCausalLM" in caplog.text


def test_fewer_layers_than_the_files_hold_are_refused(whole: Path) -> None:
    with pytest.raises(CheckpointError, match="decoder layers more than the 1"):
        Source(configure(whole, num_hidden_layers=1))


SHAPES: dict[str, tuple[str, Callable[[Tensor], Tensor], type[MoepressError], str]] = {
    "the head": ("lm_head.weight", lambda v: v[:-1].clone(), CheckpointError, r"says \[384, 64\]"),
    "a router": ("gate.weight", lambda v: v.mT.contiguous(), CheckpointError, "has shape"),
    "an expert": ("experts.3.w2.weight", lambda v: v[:, :-1].clone(), CheckpointError, "experts"),
    "integers": ("model.norm.weight", lambda v: v.int(), CheckpointError, "integers without"),
    "NaN": ("model.norm.weight", lambda v: v * float("nan"), NumericalError, "NaN or infinite"),
    "a router's NaN": ("gate.weight", lambda v: v / 0, NumericalError, "NaN or infinite"),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_tensors_that_do_not_fit_are_refused_before_work(whole: Path, kind: str) -> None:
    ending, changed, error, message = SHAPES[kind]

    def one(state: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(name for name in sorted(state) if name.endswith(ending))
        return {**state, name: changed(state[name])}

    with pytest.raises(error, match=message):
        check_usable(Source(change(whole, one)))


def test_an_overflow_in_the_models_dtype_is_refused(
    whole: Path, text_file: Path, tmp_path: Path
) -> None:
    change(whole, lambda s: {**s, "model.norm.weight": s["model.norm.weight"] + 7e4})
    configure(whole, dtype="float16")
    with pytest.raises(NumericalError, match=r"holds 7e\+04, which float16 cannot hold"):
        compress(whole, tmp_path / "out", small_recipe(text_file, bits=2.0))
    assert not (tmp_path / "out").exists()
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    large = {"model.norm.weight": torch.ones(64), q_proj: torch.full((64, 64), 7e4)}
    change(whole, lambda state: state | large)
    source = Source(whole)
    with pytest.raises(NumericalError, match="q_proj"):
        source.load(source.layer_paths[0])


def test_zeros_are_told(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "model.layers.0.self_attn.v_proj.weight"
    source = Source(change(whole, lambda s: {**s, name: torch.zeros_like(s[name])}))
    for _ in range(2):
        assert not source.tensor(name).any()
    assert caplog.text.count("nothing but zeros") == 1 and name in caplog.text


@pytest.mark.parametrize("chosen", [0, 5])
def test_choices_that_no_router_can_make_are_refused(whole: Path, chosen: int) -> None:
    with pytest.raises(InputError, match=f"choose {chosen} of 4 experts"):
        check_usable(Source(configure(whole, num_experts_per_tok=chosen)))


# Configs


CONFIGS: dict[str, tuple[Any, str]] = {
    "layers": ({"num_hidden_layers": 1 << 40}, "num_hidden_layers = 1099511627776"),
    "more layers than tensors": ({"num_hidden_layers": 5000}, "5,000, but the files hold"),
    "labels": ({"num_labels": 10**9}, "num_labels = 1000000000"),
    "rows": ({"vocab_size": 10**12}, r"says \[1000000000000, 64\]"),
    "no integer": ({"hidden_size": 1 << 70}, "hidden_size = 1180591620717411303424"),
    "negative": ({"hidden_size": -64}, "config.json"),
    "letters": ({"hidden_size": "many"}, "hidden_size"),
    "nothing": ({"hidden_size": None}, "config.json"),
    "heads": ({"num_attention_heads": 0}, "config.json"),
    "dtype": ({"dtype": "float99"}, "float99"),
    "classes": ({"architectures": 3}, "architectures"),
    "a family": ({"model_type": "no_such"}, "no_such"),
    "quantization": ({"quantization_config": "fp8"}, "quantization_config = a string"),
    "NaN": ('{"rms_norm_eps": NaN}', "NaN is no JSON"),
    "digits": ('{"hidden_size": ' + "9" * 5000 + "}", "5,000 digits"),
    "nesting": ("[" * 10_000, "nested too deep"),
    "an array": ("[]", "holds an array"),
    "nothing at all": (" ", "cannot be read as JSON"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_hostile_configs_are_refused_in_one_line(whole: Path, kind: str) -> None:
    changed, message = CONFIGS[kind]
    given = {"text": changed} if isinstance(changed, str) else changed
    with pytest.raises((InputError, CheckpointError), match=message) as refusal:
        check_usable(Source(configure(whole, **given)))
    assert "\n" not in str(refusal.value)


def test_a_config_of_latin_letters_is_refused(whole: Path) -> None:
    path = whole / "config.json"
    path.write_bytes(path.read_bytes().replace(b"{", b'{"note": "caf\xe9", ', 1))
    with pytest.raises(InputError, match="is not UTF-8"):
        Source(whole)


def test_infinity_is_kept_as_transformers_writes_it(whole: Path) -> None:
    path = whole / "config.json"
    path.write_text(path.read_text().replace("{", '{"time_step_limit": [0.0, Infinity], ', 1))
    limit = Source(whole).config_json()["time_step_limit"]
    assert limit == [0.0, {"__float__": "Infinity"}]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_cut_tokenizer_is_one_line(
    whole: Path, text_file: Path, tmp_path: Path, name: str
) -> None:
    path = whole / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="tokenizer") as refusal:
        compress(whole, tmp_path / "out", small_recipe(text_file, bits=2.0))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


# Companions

LEFT = ("adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin.index.json",
        "trainer_state.json", "quantize_config.json", "requirements.txt")  # fmt: skip
COPIED = (
    *("tokenizer.json", "tokenizer.model", "qwen.tiktoken", "chat_template.jinja", "LICENSE.txt"),
    *("additional_chat_templates/tool.jinja", "preprocessor_config.json", "own.vocabulary"),
    *("second_tokenizer/tokenizer.json", "generation_config.json", "LICENSES/MIT.txt"),
)


def test_companions_are_known_and_the_rest_is_told(
    whole: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (*LEFT, *COPIED):
        path = whole / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_text("{}")
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")  # macOS, on a drive of exFAT
    (whole / "README.md").write_text("# About")
    tokenizer = json.loads((whole / "tokenizer_config.json").read_text())
    (whole / "tokenizer_config.json").write_text(
        json.dumps({**tokenizer, "vocab_file": "own.vocabulary"})
    )
    with caplog.at_level(logging.WARNING):
        out = compress(whole, tmp_path / "out", small_recipe(text_file, bits=2.0))
    assert not [name for name in (*LEFT, "README.md") if (out / name).exists()]
    assert not [name for name in COPIED if not (out / name).is_file()]
    assert not list(out.rglob("._*"))
    (told,) = [r.getMessage() for r in caplog.records if "no part of the model" in r.getMessage()]
    assert "adapter_config.json" in told and "3 more" in told and "README" not in told


@pytest.mark.parametrize("how", ["a pipe", "a folder", "NUL", "JSON", "an array"])
def test_companions_that_cannot_be_copied_are_refused(whole: Path, how: str) -> None:
    path = whole / "generation_config.json"
    path.unlink()
    if how == "a pipe":
        os.mkfifo(path)
    elif how == "a folder":
        path.mkdir()
    else:
        path.write_bytes({"NUL": bytes(20), "JSON": b'{"eos_token_id": ', "an array": b"[]"}[how])
    with pytest.raises(InputError, match=f"generation_config.json.*{how}"):
        check_usable(Source(whole))


def test_code_that_is_not_there_is_named_and_left_out(
    whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = {"AutoConfig": "configuration_own.OwnConfig"}
    hub = {"AutoModel": "owner/name--modeling.Own"}
    gone = {"AutoModelForCausalLM": "modeling_own.Own"}
    configure(whole, auto_map=there | gone | hub)
    (whole / "configuration_own.py").write_text("raise SystemExit\n")
    source = Source(whole)
    with caplog.at_level(logging.WARNING):
        check_usable(source)
    assert "code that is not there: modeling_own.py" in caplog.text
    assert source.config_json()["auto_map"] == there | hub


def test_what_is_written_opens_with_trust(whole: Path, text_file: Path, tmp_path: Path) -> None:
    configure(whole, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    out = compress(whole, tmp_path / "out", small_recipe(text_file, bits=2.0))
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    AutoTokenizer.from_pretrained(out)


def test_a_file_and_a_link_to_it_are_one(whole: Path, model_folder: Folder) -> None:
    """As where a tool names its files otherwise, and somebody made links in place of copies."""
    names = sorted(load_file(whole / SINGLE))
    (whole / "model-00001-of-00001.safetensors").symlink_to(SINGLE)
    os.link(whole / SINGLE, whole / "weights.safetensors")
    other = "model-00001-of-00001.safetensors", "weights.safetensors"
    expected = Source(model_folder()).tensor(NORM)
    for index in (
        dict.fromkeys(names, other[0]),
        {name: (SINGLE, *other)[i % 3] for i, name in enumerate(names)},
    ):
        source = Source(assign(whole, index))
        assert [path.name for path in source.files] == [SINGLE]
        assert torch.equal(source.tensor(NORM), expected)
    (whole / SINGLE).unlink()  # the link leads nowhere then
    with pytest.raises(CheckpointError, match=r"names 2 files that .* lacks: model-00001"):
        Source(whole)
    source = Source(assign(whole, dict.fromkeys(names, other[1])))
    assert [path.name for path in source.files] == [other[1]]
