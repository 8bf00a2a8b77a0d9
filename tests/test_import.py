"""`import moepress` is cheap, quiet, and enough for transformers to open our folders."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

VERBS = (
    "allocate", "calibrate", "compress", "evaluate", "prune", "quantize", "report", "score",
)  # fmt: skip
REGISTERED = "from transformers.quantizers import auto; print(auto.REGISTERED)"
STAND_IN = """
import sys, types
sys.path.insert(0, {path!r})
hf = sys.modules["moepress.hf"] = types.ModuleType("moepress.hf")
def register():
    from transformers.quantizers import auto
    auto.REGISTERED = auto.LOADED  # the table must be there, as in the real register()
hf.register = register
"""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "numpy", "scipy", "safetensors", "moepress.hf")
    code = f"import sys, moepress; print([name for name in {heavy} if name in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize(
    "first",
    [
        "import moepress",
        "import moepress, transformers",
        "import transformers, moepress",
        "import transformers.quantizers.auto, moepress",
        "import moepress, importlib; importlib.reload(moepress)",
    ],
)
def test_we_register_in_any_order_and_leave_no_hook(tmp_path: Path, first: str) -> None:
    """With a stand-in for transformers: the real one takes seconds to import."""
    folder = tmp_path / "transformers" / "quantizers"
    folder.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("")
    (folder / "auto.py").write_text("REGISTERED = False\nLOADED = True\n")
    trace = """
print([f for f in sys.meta_path if type(f).__module__.startswith("moepress")])
print(type(auto.__spec__.loader).__name__, auto.__loader__ is auto.__spec__.loader)
"""
    printed = python(STAND_IN.format(path=str(tmp_path)) + first + "\n" + REGISTERED + trace)
    assert printed.splitlines() == ["True", "[]", "SourceFileLoader True"]


def test_the_real_transformers_knows_us_once_asked() -> None:
    code = """
import moepress
from transformers.quantizers import auto
from moepress.hf import MoePressConfig, MoePressQuantizer, register
register()
assert auto.AUTO_QUANTIZER_MAPPING["moepress"] is MoePressQuantizer
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["moepress"] is MoePressConfig
print("ok")
"""
    assert python(code) == "ok"


def test_our_module_may_come_first() -> None:
    """transformers may import the awaited module while ours is still being imported."""
    code = """
import moepress.hf as ours
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["moepress"] is ours.MoePressQuantizer
print("ok")
"""
    assert python(code) == "ok"


def test_a_verb_is_its_function_even_after_its_module_was_imported() -> None:
    code = f"""
import importlib, types
import moepress as mp
for verb in {VERBS}:
    module = importlib.import_module("moepress." + verb)
    assert isinstance(module, types.ModuleType), verb
    assert getattr(mp, verb) is getattr(module, verb), verb
    assert isinstance(getattr(mp, verb), types.FunctionType), verb
from moepress.score import score_layer
from moepress import score
assert score is mp.score and score_layer.__module__ == "moepress.score"
import moepress.format.codec
assert moepress.format.codec.Codec(2, 128).bits == 2
print("ok")
"""
    assert python(code) == "ok"


def test_public_names() -> None:
    import moepress as mp

    assert issubclass(mp.InputError, mp.MoepressError)
    assert mp.Recipe().group_size == 128
    others = {
        "InputError", "MoepressError", "Pruning", "Recipe", "__version__", "set_activation_bits",
    }  # fmt: skip
    assert {*VERBS, *others} == set(mp.__all__)
    assert set(mp.__all__) <= set(dir(mp))
    with pytest.raises(AttributeError, match="no attribute 'comprss'"):
        _ = mp.comprss


def test_version_is_that_of_the_project() -> None:
    import moepress as mp

    project = Path(__file__).parents[1] / "pyproject.toml"
    assert mp.__version__ == tomllib.loads(project.read_text())["project"]["version"]
