"""The files that belong to a model beside its weights, and that a copy of it needs.

They are known by name: whatever else lies in a folder may be of another model, of an adapter that
was merged, or of another format, and a copy with it would open as something else, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from stat import S_ISREG

from moepress.original.remote_code import TOKENIZER_CONFIG, code_files
from moepress.reading.files import regular_file
from moepress.reading.json import read_object

TOKENIZERS = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "merges*.txt",
    "bpe.codes",
    "entity_vocab.json",
    "word_shape.json",
    "word_pronunciation.json",
    "normalizer.json",
    "*.tiktoken",
    "tekken.json",
    "*.model",  # SentencePiece; Mistral has tokenizer.model.v3
    "tokenizer.model.*",
    "source.spm",
    "target.spm",
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "*.jinja")
PROCESSORS = ("*processor_config.json", "*extractor_config.json", "audio_tokenizer_config.json")
SETTINGS = ("generation_config.json",)
TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
CONFIGS = (*PROCESSORS, *SETTINGS, TOKENIZER_CONFIG)  # small files of one JSON object
COMPANIONS = (*TOKENIZERS, *TEMPLATES, *PROCESSORS, *SETTINGS, *TERMS)
# Folders in a model's folder that hold such files: of a second tokenizer, more chat templates.
FOLDERS = ("*tokenizer*", "*processor*", "additional_chat_templates", "chat_templates")
# What a snapshot of a model on the hub fetches. Which of it is copied is decided here.
FETCHED = (
    *("*.json", "*.txt", "*.model*", "*.jinja", "*.tiktoken", "*.spm", "*.codes", "*.py"),
    *TERMS,
)

# What a copy has anew (the config, the index), and what describes a model to people.
MADE_ANEW = ("config.json", "model.safetensors", "*.safetensors.index.json")
NOT_TOLD = (*MADE_ANEW, "*.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf")


def companions(folder: Path) -> dict[str, Path]:
    """The files of tokenizer, processors, code and the like that a copy of the model needs.

    By their names in the folder; a second tokenizer, for example, is in a folder inside.

    Raises:
        FileError: one is no regular file, cannot be read, or is a damaged config.
    """
    found = {*code_files(folder), *_named_by_tokenizer(folder), *_known(folder)}
    for inner in _visible(folder):
        if inner.is_dir() and _matches(inner.name, FOLDERS):
            found |= _known(inner)
        elif inner.is_dir() and _matches(inner.name, TERMS):  # LICENSES
            found |= set(_files(inner))
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(found)
        if path.name not in MADE_ANEW
    }


def left_behind(folder: Path, weights: set[Path]) -> list[str]:
    """Names of the files of a folder that a copy of the model does not get, sorted.

    Args:
        weights: the files that hold the model's tensors.
    """
    copied = {*companions(folder).values(), *weights}
    names = [path.name for path in _files(folder) if path not in copied]
    return sorted(name for name in names if not _matches(name, NOT_TOLD))


def _known(folder: Path) -> set[Path]:
    """The companions in a folder."""
    named = (path for path in _visible(folder) if _matches(path.name, COMPANIONS))
    found = {path for path in named if not (path.is_dir() and _matches(path.name, TERMS))}
    for path in found:
        regular_file(path, "The companion file")
        if _matches(path.name, CONFIGS):
            read_object(path, "The companion file", infinities=True)
    return found


def _named_by_tokenizer(folder: Path) -> set[Path]:
    """Files of the folder that tokenizer_config.json names, such as a "vocab_file"."""
    path = folder / TOKENIZER_CONFIG
    if not path.exists():
        return set()
    fields = read_object(path, "The tokenizer's config", infinities=True)
    named = {value for value in fields.values() if isinstance(value, str)}
    return {path for path in _files(folder) if path.name in named}


def _files(folder: Path) -> Iterator[Path]:
    """The regular files of a folder that are not hidden, links to such files among them."""
    for path in _visible(folder):
        try:
            regular = S_ISREG(path.stat().st_mode)
        except OSError:  # a link that leads nowhere
            continue
        if regular:
            yield path


def _visible(folder: Path) -> Iterator[Path]:
    """What is in a folder without hidden names; macOS makes "._NAME" beside NAME on some drives."""
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
