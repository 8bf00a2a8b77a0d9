"""`import moepress` is cheap and quiet, registers with transformers, and offers every verb."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

VERBS = (
    "allocate", "calibrate", "chat", "compress", "demo", "dequantize", "doctor", "estimate",
    "evaluate", "generate", "inspect", "plot", "propose", "prune", "quantize", "report", "score",
    "serve",
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


ORDERS = (
    "pass",
    *(f"import moepress.{verb}" for verb in VERBS if verb != "plot"),
    "from moepress.inspect import inspect; from moepress.chat import Conversation",
    "from moepress import chat, doctor as probe; import moepress.chat, moepress.doctor",
    "import moepress.evaluation.tasks, moepress.demo, moepress.cli.using, moepress.hf",
    "import transformers.quantizers.auto; import moepress.generate",
    "import moepress as mp; mp.score; mp.report; import moepress.score, moepress.report",
    "import importlib; importlib.import_module('moepress.serve')",
    "import moepress.chat, importlib; importlib.reload(moepress); import moepress.chat",
    "import moepress.chat, importlib, sys; importlib.reload(sys.modules['moepress.chat'])",
    "import moepress.chat, sys; del sys.modules['moepress.chat']; import moepress.chat",
    "from moepress import *; assert compress.__module__ == 'moepress.compress'",
)
IN_EVERY_ORDER = f"""
import os, sys, types
import torch, transformers.core_model_loading, scipy.optimize, matplotlib.figure  # once, for speed
assert "transformers.quantizers.auto" not in sys.modules
for order in {{orders}}:
    if os.fork():
        assert os.wait()[1] == 0, order
        continue
    exec(order, {{{{}}}})
    import moepress as mp
    for verb in {VERBS}:
        function = getattr(mp, verb)
        assert isinstance(function, types.FunctionType) and function.__name__ == verb, verb
        module = sys.modules[function.__module__]
        assert isinstance(module, types.ModuleType) and getattr(module, verb) is function, verb
    os._exit(0)
print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_verb_is_its_function_whatever_is_imported_first() -> None:
    served = ("import moepress.serve.limits", "from moepress.serve.limits import Limits")
    orders = ORDERS + (served if find_spec("fastapi") else ())
    assert python(IN_EVERY_ORDER.format(orders=orders)) == "ok"


def test_public_functions_can_be_pickled() -> None:
    import moepress as mp

    for verb in VERBS:
        function = getattr(mp, verb)
        assert pickle.loads(pickle.dumps(function)) is function


def test_type_checkers_see_every_public_name() -> None:
    ours = Path(__file__).parents[1] / "src/moepress/__init__.py"
    (block,) = re.findall(r"if TYPE_CHECKING:\n((?:    .*\n)+)", ours.read_text())
    typed = re.findall(r"import (\w+) as \1$", block, re.MULTILINE)
    import moepress as mp

    assert {*typed, "__version__"} == set(mp.__all__)
    assert ours.with_name("py.typed").is_file()


def test_public_names() -> None:
    import moepress as mp

    assert issubclass(mp.InputError, mp.MoepressError)
    assert mp.Recipe().group_size == 128
    others = {
        "InputError", "MoepressError", "Pruning", "Recipe", "__version__", "set_activation_bits",
    }  # fmt: skip
    assert {*VERBS, *others} == set(mp.__all__)
    assert set(mp.__all__) <= set(dir(mp))
    assert all(getattr(mp, name) is not None for name in mp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'comprss'"):
        _ = mp.comprss


def test_every_command_is_a_function() -> None:
    import moepress as mp
    from moepress.cli import app

    commands = {command.callback.__name__ for command in app.registered_commands}
    assert commands <= set(mp.__all__)


def test_version_is_that_of_the_project() -> None:
    import moepress as mp

    project = Path(__file__).parents[1] / "pyproject.toml"
    assert mp.__version__ == tomllib.loads(project.read_text())["project"]["version"]


@pytest.mark.parametrize(
    ("first", "given", "expected"),
    [
        ("import os; ", {}, "1000"),
        ("import os, sys; sys.modules['torch'] = sys; ", {}, "None"),  # as if torch were loaded
        ("import os; ", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import os; ", {"OMP_WAIT_POLICY": "passive"}, "None"),
    ],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(
    first: str, given: dict[str, str], expected: str
) -> None:
    assert spin_after(f"{first}import moepress", given) == expected


@pytest.mark.parametrize(
    ("load", "given", "expected"),
    [
        (0.0, {}, "100000"),
        (1e6, {}, "1000"),
        (0.0, {"GOMP_SPINCOUNT": "1000"}, "1000"),
        (0.0, {"OMP_WAIT_POLICY": "passive"}, "None"),
    ],
)
def test_threads_spin_for_long_where_a_command_decodes_on_a_quiet_machine(
    load: float, given: dict[str, str], expected: str
) -> None:
    first = f"import moepress, os; os.getloadavg = lambda: ({load}, 0, 0); "
    assert spin_after(f"{first}moepress._threads.lengthen_spin()", given) == expected


def spin_after(code: str, given: dict[str, str]) -> str:
    """GOMP_SPINCOUNT of a new process after `code`."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(os.environ.get('GOMP_SPINCOUNT'))"],
        env=variables | given,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return done.stdout.strip()
