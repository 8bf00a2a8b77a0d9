"""Compress Mixture-of-Experts language models to 1.5-3 bits per expert weight, without training.

    import moepress as mp
    from transformers import AutoModelForCausalLM

    mp.compress("mistralai/Mixtral-8x7B-v0.1", "mixtral-2.5bit", bits=2.5)
    model = AutoModelForCausalLM.from_pretrained("mixtral-2.5bit")

Each verb is a module, and in it a function of the same name: `mp.compress` is the function,
`from moepress.compress import ...` reaches the rest of its module. Nothing heavy is imported before
it is used; importing this package only lets transformers find our folders (see _plugin.py).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from moepress import _plugin

if TYPE_CHECKING:
    from moepress.allocate import allocate as allocate
    from moepress.calibrate import calibrate as calibrate
    from moepress.compress import compress as compress
    from moepress.errors import InputError as InputError
    from moepress.errors import MoepressError as MoepressError
    from moepress.evaluate import evaluate as evaluate
    from moepress.kernels.modules import set_activation_bits as set_activation_bits
    from moepress.prune import Pruning as Pruning
    from moepress.prune import prune as prune
    from moepress.quantize import quantize as quantize
    from moepress.recipe import Recipe as Recipe
    from moepress.report import report as report
    from moepress.score import score as score

__version__ = "0.1.0"

_VERBS = ("allocate", "calibrate", "compress", "evaluate", "prune", "quantize", "report", "score")
_HOMES = {verb: f"moepress.{verb}" for verb in _VERBS} | {
    "InputError": "moepress.errors",
    "MoepressError": "moepress.errors",
    "Pruning": "moepress.prune",
    "Recipe": "moepress.recipe",
    "set_activation_bits": "moepress.kernels.modules",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'moepress' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


class _Package(ModuleType):
    """Keeps the import system from binding a verb's module over the verb's function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
_plugin.install()
