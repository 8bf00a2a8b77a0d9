"""Makes transformers know our folders, whichever of the two packages is imported first.

transformers finds a quantization method in a table of `transformers.quantizers.auto` and discovers
no plugins. Importing that module takes seconds, so `import moepress` does not; it leaves a finder
that waits for someone else to import it, registers then, and takes itself off the import path.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AWAITED = "transformers.quantizers.auto"
OURS = "moepress.hf"


def install() -> None:
    """Register with transformers now if it is loaded, else as soon as it is. Safe to repeat."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    hf = sys.modules.get(OURS)
    if hf is not None and not hasattr(hf, "register"):
        return  # moepress.hf is what imports transformers: it registers itself when it is done
    from moepress.hf import register

    register()


class _Finder(MetaPathFinder):
    """Finds `AWAITED` through the other finders, and has its loader register afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)  # done once; and the next line must not come back here
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The loader it is given, and then `_register`."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader  # for tracebacks, resources
        self._loader.exec_module(module)
        _register()
