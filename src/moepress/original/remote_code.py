"""Models whose code is not in transformers but in their folder (`auto_map` in config.json).

Such code runs with all rights of the user. It is never run unless the caller says
`trust_remote_code`, and never asked about; and where transformers has a class of its own for the
model, that class is used and the folder's code is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moepress.errors import InputError
from moepress.format.checkpoint import load_json

# Files that may name code, in the field "auto_map".
NAMING = ("config.json", "tokenizer_config.json", "processor_config.json")
MODULES = "transformers_modules"  # package in which transformers imports such code


def config_of(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder.

    Args:
        trust_remote_code: run the folder's code if transformers has no class for its model type.

    Raises:
        InputError: the config is of a class in the folder's code, which is not trusted.
        ValueError, KeyError, OSError: transformers cannot read it.
    """
    from transformers import AutoConfig

    def load(trust: bool) -> Any:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust)

    return _trusted(folder, load, trust_remote_code)


def tokenizer_of(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder.

    Args:
        trust_remote_code: run the folder's code if transformers has no class for the tokenizer.

    Raises:
        InputError: the tokenizer is of a class in the folder's code, which is not trusted.
    """
    from transformers import AutoTokenizer

    def load(trust: bool) -> Any:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)

    return _trusted(folder, load, trust_remote_code)


def is_remote(config: Any) -> bool:
    """Whether the class of a config comes from the code in a model's folder."""
    return type(config).__module__.split(".")[0] == MODULES


def needs_code(folder: Path, trust_remote_code: bool) -> bool:
    """Whether the folder's config or tokenizer needs code in the folder.

    Args:
        trust_remote_code: whether that code may be run.

    Raises:
        InputError: it is needed, but not trusted.
    """
    tokenizer = tokenizer_of(folder, trust_remote_code)
    remote = type(tokenizer).__module__.split(".")[0] == MODULES
    return remote or is_remote(config_of(folder, trust_remote_code))


def _trusted(folder: Path, load: Callable[[bool], Any], trust: bool) -> Any:
    """What `load` returns; it may run the folder's code only if it must, and if that is trusted."""
    try:
        return load(False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        if not trust:
            files = ", ".join(path.name for path in code_files(folder)) or "files on the hub"
            raise InputError(
                f"{folder} is a model whose code is not in transformers: it brings its own "
                f"({files}). Read it; if you trust it, run the same command with "
                "--trust-remote-code (in Python: trust_remote_code=True)."
            ) from error
    return load(True)


def code_files(folder: Path) -> list[Path]:
    """Files of code that a folder's configs name, and those that they import from beside them.

    None is run or imported. Code that a config names in another repository is left out.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    found: set[Path] = set()
    for name in NAMING:
        if (folder / name).is_file():
            for module in _modules(load_json(folder / name)):
                path = folder / f"{module}.py"
                if path.is_file():
                    found |= {path, *map(Path, get_relative_import_files(path))}
    return sorted(path for path in found if path.is_file())


def _modules(config: Any) -> Iterator[str]:
    """Names of the modules in the field "auto_map", also of a config inside a config."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key == "auto_map" and isinstance(value, dict):
            classes = (
                c for one in value.values() for c in (one if isinstance(one, list) else [one])
            )
            # "module.Class"; "owner/name--module.Class" lies in another repository
            yield from (c.rpartition(".")[0] for c in classes if c and "--" not in c)
        else:
            yield from _modules(value)
