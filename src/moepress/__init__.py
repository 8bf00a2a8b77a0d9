"""Compress Mixture-of-Experts language models to 1.5-3 bits per expert weight, without training.

    import moepress as mp
    from transformers import AutoModelForCausalLM

    mp.compress("mistralai/Mixtral-8x7B-v0.1", "mixtral-2.5bit", bits=2.5)
    model = AutoModelForCausalLM.from_pretrained("mixtral-2.5bit")

Each verb is a function, and also the module that holds it: `mp.compress` is always the function,
`from moepress.compress import ...` reaches the rest of its module. Importing this package imports
nothing heavy: it only prepares transformers to open compressed folders (see _plugin.py), and OpenMP
for machines that are busy, if it comes before torch (see _threads.py). The rest is imported on
first use.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from moepress import _plugin, _threads

if TYPE_CHECKING:
    from moepress.allocate import allocate as allocate
    from moepress.calibrate import calibrate as calibrate
    from moepress.chat import chat as chat
    from moepress.compress import compress as compress
    from moepress.demo import demo as demo
    from moepress.dequantize import dequantize as dequantize
    from moepress.doctor import doctor as doctor
    from moepress.errors import InputError as InputError
    from moepress.errors import MoepressError as MoepressError
    from moepress.estimate import estimate as estimate
    from moepress.evaluate import evaluate as evaluate
    from moepress.generate import generate as generate
    from moepress.inspect import inspect as inspect
    from moepress.kernels.modules import set_activation_bits as set_activation_bits
    from moepress.propose import propose as propose
    from moepress.prune import Pruning as Pruning
    from moepress.prune import prune as prune
    from moepress.quantize import quantize as quantize
    from moepress.recipe import Recipe as Recipe
    from moepress.report import plot as plot
    from moepress.report import report as report
    from moepress.score import score as score
    from moepress.serve import serve as serve

__version__ = "0.1.0"

_VERBS = (
    "allocate", "calibrate", "chat", "compress", "demo", "dequantize", "doctor", "estimate",
    "evaluate", "generate", "inspect", "propose", "prune", "quantize", "report", "score", "serve",
)  # fmt: skip
_HOMES = {verb: f"moepress.{verb}" for verb in _VERBS} | {
    "InputError": "moepress.errors",
    "MoepressError": "moepress.errors",
    "Pruning": "moepress.prune",
    "Recipe": "moepress.recipe",
    "plot": "moepress.report",
    "set_activation_bits": "moepress.kernels.modules",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'moepress' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keep the import system from binding a verb's module in place of the verb's function.

    After `import moepress.chat`, the import system sets the attribute `chat` of this package to the
    submodule. Ignoring that assignment leaves the name to `__getattr__`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
_plugin.install()
_threads.shorten_spin()
