"""Models that bring their code: it runs only when trusted, travels along, else one clear error."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moepress
from moepress.cli import main
from moepress.compress import compress
from moepress.errors import InputError
from moepress.original.remote_code import code_files
from moepress.original.source import Source
from tests.conftest import small_recipe

CONFIGURATION = """
from pathlib import Path
from transformers import MixtralConfig
from .sizes_of_ours import SCALE

(Path(__file__).parent / "ran").touch()

class OursConfig(MixtralConfig):
    model_type = "ours_moe"
"""
MODELING = """
from transformers import MixtralForCausalLM
from .configuration_ours import OursConfig
from .sizes_of_ours import SCALE

class OursForCausalLM(MixtralForCausalLM):
    config_class = OursConfig

    def forward(self, *args, **named):
        out = super().forward(*args, **named)
        out.logits = out.logits * SCALE
        return out
"""
CODE = {
    "configuration_ours.py": CONFIGURATION,
    "modeling_ours.py": MODELING,
    "sizes_of_ours.py": "SCALE = 0.5\n",
}


@pytest.fixture
def ours(model_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A Mixtral whose config names a class that only the code in its folder has."""
    model = AutoModelForCausalLM.from_pretrained(model_folder())
    folder = tmp_path / "ours"
    model.save_pretrained(folder, save_original_format=False)
    for file in model_folder().glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "ours_moe",
        "architectures": ["OursForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_ours.OursConfig",
            "AutoModelForCausalLM": "modeling_ours.OursForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name, code in CODE.items():
        (folder / name).write_text(code)
    (folder / "unrelated.py").write_text("raise SystemExit\n")
    return folder


@pytest.mark.parametrize(
    "use",
    [
        lambda folder, text: compress(folder, folder.parent / "out", small_recipe(text, bits=2)),
        lambda folder, text: moepress.inspect(folder),
        lambda folder, text: moepress.generate(folder, "def"),
        lambda folder, text: moepress.chat(folder, raw=True, turns=[]),
        lambda folder, text: moepress.serve(folder, port=0),
        lambda folder, text: moepress.evaluate(folder, [str(text)]),
        lambda folder, text: moepress.score(folder, small_recipe(text)),
        lambda folder, text: moepress.calibrate(folder, small_recipe(text)),
        lambda folder, text: moepress.estimate(folder, folder.parent / "out"),
        lambda folder, text: moepress.propose(folder, folder.parent / "out"),
    ],
)
def test_without_the_word_it_is_refused_and_nothing_runs(
    ours: Path, text_file: Path, use: Callable[[Path, Path], object]
) -> None:
    with pytest.raises(InputError, match=r"configuration_ours\.py.*--trust-remote-code"):
        use(ours, text_file)
    assert not (ours.parent / "out").exists()


def test_it_is_compressed_and_its_code_travels(ours: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = small_recipe(
        text_file, bits=8, expert_bits=(8,), attention_bits=8, quantizer="rtn", measure="rtn"
    )
    out = compress(ours, tmp_path / "out", recipe, trust_remote_code=True)
    assert {path.name for path in out.glob("*.py")} == set(CODE)
    for name, code in CODE.items():
        assert (out / name).read_text() == code
    assert moepress.inspect(out, trust_remote_code=True)["kind"] == "compressed model"
    with pytest.raises(InputError, match="--trust-remote-code"):
        moepress.generate(out, "def f1(x):", tokens=2)
    assert moepress.generate(out, "def f1(x):", tokens=2, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    exact = AutoModelForCausalLM.from_pretrained(ours, trust_remote_code=True)
    assert type(model).__name__ == "OursForCausalLM"
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = exact(ids).logits
        assert (model(ids).logits - expected).norm() < 0.1 * expected.norm()
    plain = moepress.dequantize(out, tmp_path / "plain", trust_remote_code=True)
    assert {path.name for path in plain.glob("*.py")} == set(CODE)
    moepress.report(out, trust_remote_code=True)


def test_code_of_a_model_that_transformers_has_is_not_run(
    ours: Path, text_file: Path, tmp_path: Path
) -> None:
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    (ours / "configuration_ours.py").write_text("raise RuntimeError('was run')\n")
    for trust in (False, True):
        source = Source(ours, trust_remote_code=trust)
        assert type(source.model).__name__ == "MixtralForCausalLM"


def test_files_of_code_are_found_without_running_them(ours: Path) -> None:
    assert {path.name for path in code_files(ours)} == set(CODE)
    (ours / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokens_ours.Slow", None]}})
    )
    (ours / "tokens_ours.py").write_text("raise SystemExit\n")
    assert {path.name for path in code_files(ours)} == {*CODE, "tokens_ours.py"}
    (ours / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": {"torchvision": "images_ours.Fast"}}})
    )
    (ours / "images_ours.py").write_text("raise SystemExit\n")
    assert {path.name for path in code_files(ours)} >= {*CODE, "images_ours.py"}
    (ours / "preprocessor_config.json").unlink()
    config = json.loads((ours / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "somebody/else--configuration.Config"}
    (ours / "config.json").write_text(json.dumps(config))
    assert {path.name for path in code_files(ours)} == {"tokens_ours.py"}
    assert not (ours / "ran").exists()


def test_the_command_line_says_what_to_type(
    ours: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moepress", "inspect", str(ours)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    sys.argv.append("--trust-remote-code")
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def test_every_call_says_whether_code_is_trusted() -> None:
    """Without a word, transformers asks on a terminal, and one `y` runs the folder's code."""
    calls = 0
    for path in Path(moepress.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
            if name in ("from_pretrained", "from_config"):
                assert isinstance(node, ast.Call)
                calls += 1
                told = {word.arg: word.value for word in node.keywords}
                assert "trust_remote_code" in told, f"{path}:{node.lineno}"
                assert getattr(told["trust_remote_code"], "value", False) is not None
    assert calls >= 4
