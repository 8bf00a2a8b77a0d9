"""Register moepress with transformers, whichever of the two packages is imported first.

transformers looks quantization methods up in a table of `transformers.quantizers.auto` and has no
plugin discovery. Importing that module takes seconds, so `import moepress` does not import it.
Instead it installs an import hook that registers moepress when that module is first imported, and
then removes itself.
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
    """Register with transformers now if it is loaded, else when it is. Safe to repeat."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    hf = sys.modules.get(OURS)
    if hf is not None and not hasattr(hf, "register"):
        return  # moepress.hf is importing transformers: it registers itself at its end
    from moepress.hf import register

    register()


class _Finder(MetaPathFinder):
    """Find `AWAITED` through the other finders, and wrap its loader to register afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)  # its work is done, and the next line must not recurse
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Load with another loader, then `_register`."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            # Tracebacks and resource readers need the real loader.
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
