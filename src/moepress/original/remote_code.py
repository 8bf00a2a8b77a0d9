"""Models whose code is not in transformers but in their folder (`auto_map` in config.json).

Such code runs with all rights of the user. It is never run unless the caller says
`trust_remote_code`, and never asked about; and where transformers has a class of its own for the
model, that class is used and the folder's code is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moepress.errors import InputError, MoepressError
from moepress.reading.config import CONFIG, MODEL_TYPE, config_fields, known_type
from moepress.reading.json import read_object

TOKENIZER_CONFIG = "tokenizer_config.json"
# Files that may name code, in the field "auto_map".
NAMING = (
    *(CONFIG, TOKENIZER_CONFIG, "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)
AUTO_MAP = "auto_map"
MOST_SHOWN = 300  # characters of the message of an exception
MODULES = "transformers_modules"  # package in which transformers imports such code


def config_of(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder.

    Args:
        trust_remote_code: run the folder's code if transformers has no class for its model type.

    Raises:
        InputError: there is none, it is damaged or transformers cannot read it, or it is of a class
            in the folder's code, which is not trusted.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    fields = config_fields(folder)  # transformers reads it less strictly
    known = known_type(fields)

    def load(trust: bool) -> Any:
        if known != fields:
            return CONFIG_MAPPING[known[MODEL_TYPE]].from_dict(known)
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust)

    return _trusted(folder, load, trust_remote_code, f"{folder / CONFIG}")


def tokenizer_of(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder.

    Args:
        trust_remote_code: run the folder's code if transformers has no class for the tokenizer.

    Raises:
        InputError: there is none, it is damaged, or it is of a class in the folder's code, which is
            not trusted.
    """
    from transformers import AutoTokenizer

    config = None  # read by transformers, which may choose the tokenizer's class by it
    if (folder / CONFIG).exists():
        fields = config_fields(folder)
        config = config_of(folder) if known_type(fields) != fields else None

    def load(trust: bool) -> Any:
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trust)

    tokenizer = _trusted(folder, load, trust_remote_code, f"the tokenizer of {folder}")
    longest = getattr(tokenizer, "model_max_length", 0)  # which transformers compares, unchecked
    if isinstance(longest, bool) or not isinstance(longest, int | float):
        raise InputError(
            f"{folder / TOKENIZER_CONFIG} has the model_max_length {str(longest)[:80]!r}. Expected "
            "a number of tokens: fetch the file again."
        )
    return tokenizer


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


def _trusted(folder: Path, load: Callable[[bool], Any], trust: bool, what: str) -> Any:
    """What `load` returns; it may run the folder's code only if it must, and if that is trusted."""
    try:
        return load(False)
    except Exception as error:  # transformers and the libraries below it raise many types
        if not (isinstance(error, ValueError) and "trust_remote_code" in str(error)):
            raise _unreadable(what, error) from error
        if not trust:
            files = ", ".join(path.name for path in code_files(folder)) or "files on the hub"
            raise InputError(
                f"{folder} is a model whose code is not in transformers: it brings its own "
                f"({files}). Read it; if you trust it, run the same command with "
                "--trust-remote-code (in Python: trust_remote_code=True)."
            ) from error
    try:
        return load(True)
    except Exception as error:
        raise _unreadable(what, error) from error


def _unreadable(what: str, error: Exception) -> MoepressError:
    if isinstance(error, MoepressError):
        return error
    if isinstance(error, PermissionError):
        return InputError(f"{error.filename} may not be read by this user: change its permissions.")
    return InputError(
        f"transformers cannot read {what}: {one_line(error)}. The file is damaged, or of another "
        "version of transformers: fetch it again."
    )


def one_line(error: Exception) -> str:
    """The type and the beginning of the message of a library's exception."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:MOST_SHOWN]}" if text else type(error).__name__


def code_files(folder: Path) -> list[Path]:
    """Files of code that a folder's configs name, and those that they import from beside them.

    None is run or imported. Code that a config names in another repository is left out.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    found: set[Path] = set()
    for path in _named_files(folder):
        if path.is_file():
            try:
                found |= {path, *map(Path, get_relative_import_files(path))}
            except Exception as error:  # an import of a file that is not there, no UTF-8
                raise InputError(
                    f"The code {path}, which a config of the folder names, cannot be followed to "
                    f"the files that it imports: {one_line(error)}. Fetch the model again."
                ) from error
    return sorted(path for path in found if path.is_file() and path.is_relative_to(folder))


def missing_code(folder: Path) -> list[str]:
    """Names of the files of code that a folder's configs name and that are not in it."""
    return sorted({path.name for path in _named_files(folder) if not path.is_file()})


def without_missing_code(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, without the classes whose code is not in the folder."""
    named = fields.get(AUTO_MAP)
    if not isinstance(named, Mapping):
        return dict(fields)
    kept = {
        auto: found
        for auto, found in named.items()
        if all(
            (folder / f"{module}.py").is_file() for module in _modules({AUTO_MAP: {auto: found}})
        )
    }
    rest = {name: value for name, value in fields.items() if name != AUTO_MAP}
    return rest | ({AUTO_MAP: kept} if kept else {})


def _named_files(folder: Path) -> Iterator[Path]:
    """The files of code that a folder's configs name."""
    for name in NAMING:
        if (folder / name).exists():
            fields = read_object(folder / name, "The file", infinities=True)
            yield from (folder / f"{module}.py" for module in _modules(fields))


def _modules(config: Any) -> Iterator[str]:
    """Names of the modules in the field "auto_map", also of a config inside a config."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key == AUTO_MAP and isinstance(value, dict):
            classes = (c for one in value.values() for c in _alternatives(one))
            # "module.Class"; "owner/name--module.Class" lies in another repository
            named = (c.rpartition(".")[0] for c in classes if isinstance(c, str) and "--" not in c)
            yield from (module for module in named if module.isidentifier())
        else:
            yield from _modules(value)


def _alternatives(named: Any) -> list[Any]:
    """The classes that an auto class may be: one, or those of slow and fast, or of backends."""
    if isinstance(named, dict):
        return list(named.values())
    return named if isinstance(named, list) else [named]
