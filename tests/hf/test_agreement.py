"""A folder whose files do not hold exactly the model's tensors is refused before weights are read.

transformers alone would fill what is missing, or has another shape, with random numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from moepress.errors import CheckpointError, FileError, InputError
from moepress.format.checkpoint import CHECKSUMS, save_json
from moepress.format.checksums import verify, write_checksums
from moepress.hf import load_model
from moepress.hf.files import VERIFY
from moepress.inspect import inspect
from moepress.reading.config import config_fields
from tests.test_hf import IDS, choose_specs, pack_model, tiny

NORM = "model.layers.0.input_layernorm.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
HEAD = "lm_head.weight"
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A packed folder of a family, without checksums."""
    made: dict[str, Path] = {}

    def make(family: str = "mixtral") -> Path:
        if family not in made:
            model, made[family] = tiny(family), tmp_path_factory.mktemp(family)
            pack_model(model, made[family], choose_specs(model))
        return made[family]

    return make


def changed_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / FILE)
    change(state)
    save_file(state, folder / FILE, {"format": "pt"})


def changed_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    save_json(folder / "config.json", config | fields)


def renamed(state: dict[str, Tensor], name: str) -> None:
    state[name + "s"] = state.pop(name)


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "norm is missing": (lambda s: s.pop(NORM), f"{NORM} is in none"),
    "router is missing": (lambda s: s.pop(ROUTER), f"{ROUTER} is in none"),
    "head is missing": (lambda s: s.pop(HEAD), f"{HEAD} is in none"),
    "norm is renamed": (lambda s: renamed(s, NORM), f"{NORM} is in none"),
    "shape of a norm": (lambda s: s.update({NORM: s[NORM][1:].clone()}), r"is \[63\] F32.*\[64\]"),
    "shape of a head": (lambda s: s.update({HEAD: s[HEAD].T.contiguous()}), "belong together"),
    "dtype of a norm": (lambda s: s.update({NORM: s[NORM].char()}), r"I8; .* floats"),
    "8-bit floats": (lambda s: s.update({NORM: s[NORM].to(torch.float8_e4m3fn)}), "F8_E4M3"),
    "one more": (lambda s: s.update({"model.more.weight": torch.ones(2)}), "no place for"),
    "a bias more": (lambda s: s.update({"lm_head.bias": torch.ones(384)}), "no place for"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_unpacked_tensors_are_compared(
    intact: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(intact(), tmp_path / "x")
    change, message = TENSORS[name]
    changed_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 3}, r"layers\.2\..* is in none"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* has no place for"),
        ({"hidden_size": 32}, "does not divide|belong together|Cannot load"),
        ({"vocab_size": 385}, "belong together"),
        ({"num_local_experts": 5}, "5 experts"),
        ({"num_key_value_heads": 4}, "belong together"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
    ],
)
def test_a_config_of_another_model_is_refused(
    intact: Callable[..., Path], tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(intact(), tmp_path / "x")
    changed_config(folder, **fields)
    with pytest.raises((InputError, CheckpointError), match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_head_that_is_said_to_be_its_own_must_be_there(
    intact: Callable[..., Path], tmp_path: Path
) -> None:
    """Tied in the files, untied in the config: transformers alone makes a random head."""
    folder = shutil.copytree(intact("qwen2_moe"), tmp_path / "x")
    changed_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=f"{HEAD} is in none"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_files_decide_what_is_tied(intact: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(intact(), tmp_path / "x")
    changed_config(folder, tie_word_embeddings=True)
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        assert torch.equal(got, AutoModelForCausalLM.from_pretrained(intact())(IDS).logits)


def test_two_files_with_the_same_tensor(intact: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(intact(), tmp_path / "x")
    state = load_file(folder / FILE)
    (folder / FILE).unlink()
    first, second = "model-a.safetensors", "model-b.safetensors"
    half = {name: state.pop(name) for name in list(state)[::2]}
    save_file(half, folder / first)
    save_file(state, folder / second)
    index = dict.fromkeys(half, first) | dict.fromkeys(state, second)
    save_json(folder / f"{FILE}.index.json", {"metadata": {}, "weight_map": index})
    AutoModelForCausalLM.from_pretrained(folder)
    save_file({**state, NORM: half.get(NORM, state.get(NORM)) + 1}, folder / second)
    save_file({**half, NORM: half.get(NORM, state.get(NORM))}, folder / first)
    with pytest.raises(FileError, match=f"{NORM} is in .* and in another"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize(
    "kind", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
def test_other_heads_open_the_folder(intact: Callable[..., Path], family: str, kind: Any) -> None:
    """Its head is left aside, the new one is made; the decoder is the folder's."""
    options = {} if kind is AutoModel else {"num_labels": 3}
    model = kind.from_pretrained(intact(family), **options)
    whole = AutoModelForCausalLM.from_pretrained(intact(family))
    with torch.no_grad():
        decoder = model if kind is AutoModel else model.model
        assert torch.equal(decoder(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
        assert torch.isfinite(model(IDS)[0]).all()


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_other_heads_miss_no_part_of_the_decoder(
    intact: Callable[..., Path], tmp_path: Path, kind: Any
) -> None:
    for layers, message in ((3, r"layers\.2\..* is in none"), (1, r"layers\.1\..* has no place")):
        folder = shutil.copytree(intact(), tmp_path / str(layers))
        changed_config(folder, num_hidden_layers=layers)
        with pytest.raises(CheckpointError, match=message):
            kind.from_pretrained(folder)


def test_a_config_that_transformers_cannot_read_is_one_line(
    intact: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(intact(), tmp_path / "x")
    for fields in ({"hidden_size": "x"}, {"model_type": "mixtra"}, {"num_attention_heads": 0}):
        changed_config(folder, **{**json.loads((intact() / "config.json").read_text()), **fields})
        with pytest.raises(InputError) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)


# Checksums


@pytest.fixture
def summed(intact: Callable[..., Path], tmp_path: Path) -> Path:
    """A packed folder with checksums."""
    folder = shutil.copytree(intact(), tmp_path / "summed")
    write_checksums(folder, [folder / FILE], config_fields(folder))
    return folder


def test_every_flipped_bit_is_found(summed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = summed / FILE
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    assert verify(summed, [path]) == len(load_file(path))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        place = int(torch.randint(start, len(raw), (1,), generator=generator))
        damaged = bytearray(raw)
        damaged[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        path.write_bytes(damaged)
        with pytest.raises(FileError, match="not as it was written"):
            verify(summed, [path])
    with pytest.raises(FileError, match="not as it was written"):
        inspect(summed, verify=True)
    AutoModelForCausalLM.from_pretrained(summed)  # unless it is asked for, no byte is compared
    monkeypatch.setenv(VERIFY, "1")
    with pytest.raises(FileError, match="not as it was written"):
        AutoModelForCausalLM.from_pretrained(summed)
    path.write_bytes(raw)
    AutoModelForCausalLM.from_pretrained(summed)
    assert inspect(summed, verify=True)["verified_tensors"] == len(load_file(path))


def test_a_changed_config_is_told(summed: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every number of it is valid; only the checksum knows that it was another one."""
    AutoModelForCausalLM.from_pretrained(summed)
    assert "not as it was written" not in caplog.text
    changed_config(summed, rms_norm_eps=0.1)
    AutoModelForCausalLM.from_pretrained(summed)
    assert "config.json" in caplog.text and "not as it was written" in caplog.text
    with pytest.raises(FileError, match=r"config\.json of .* is not as it was written"):
        inspect(summed, verify=True)


def test_widths_of_other_experts_are_refused(summed: Path) -> None:
    """The tensors are as long as before: nothing else would tell."""
    config = config_fields(summed)
    packed = config["quantization_config"]["modules"]
    name, bits = next((n, p["bits"]) for n, p in packed.items() if len(set(p["bits"])) > 1)
    before = AutoModelForCausalLM.from_pretrained(summed)(IDS).logits
    packed[name]["bits"] = bits[1:] + bits[0]
    changed_config(summed, **config)
    with pytest.raises(FileError, match="packed in another way than they were written"):
        AutoModelForCausalLM.from_pretrained(summed)
    (summed / CHECKSUMS).unlink()  # as of older folders
    after = AutoModelForCausalLM.from_pretrained(summed)(IDS).logits
    assert not torch.allclose(after, before, rtol=0.1, atol=0.1)  # NaN, as it happens


def test_opening_compares_names_dtypes_and_shapes(summed: Path) -> None:
    changed_tensors(summed, lambda s: s.update({NORM: s[NORM].half()}))
    with pytest.raises(FileError, match=rf"{NORM} is \[64\] F16; .* \[64\] F32 was written"):
        AutoModelForCausalLM.from_pretrained(summed)
    (summed / CHECKSUMS).unlink()  # without them it is a cast like any other
    AutoModelForCausalLM.from_pretrained(summed)
    with pytest.raises(InputError, match="made by an older version"):
        inspect(summed, verify=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("kind"),
        lambda c: c.update(more=1),
        lambda c: c["tensors"].pop(NORM),
        lambda c: c["tensors"][NORM].update(sha256="0"),
        lambda c: c["tensors"][NORM].update(shape=[-64]),
        lambda c: c["tensors"].update(more=c["tensors"][NORM]),
    ],
)
def test_damaged_checksums_are_refused(
    summed: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    fields = json.loads((summed / CHECKSUMS).read_text())
    change(fields)
    save_json(summed / CHECKSUMS, fields)
    with pytest.raises(FileError, match="copy it again"):
        AutoModelForCausalLM.from_pretrained(summed)
    with pytest.raises(InputError):
        inspect(summed / FILE, verify=True)
