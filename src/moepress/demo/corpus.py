"""Text that every Python installation carries, split the same way on all of them.

Two domains: ``python`` is the source of the standard library's modules, ``docs`` is the language
reference as ``help()`` shows it (``pydoc_data.topics``). A document goes to its split by the CRC-32
of its name alone, so `asyncio/tasks.py` is held out, or not, on every installation alike; the text
itself is that of the Python that runs this.

>>> valid = corpus("valid")
>>> sorted({document.domain for document in valid})
['docs', 'python']
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zlib import crc32

Split = Literal["train", "calib", "valid"]
Domain = Literal["python", "docs"]

DOMAINS: tuple[Domain, ...] = ("python", "docs")

# One document in this many is held out for `valid`, and as many for `calib`. There are few topics,
# so they give a larger share.
_HELD_OUT: dict[Domain, int] = {"python": 20, "docs": 8}
# Installed packages, number tables, the topics themselves, and files this build generated.
_SKIPPED = ("site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__")
_GENERATED = ("_sysconfigdata", "_sysconfig_vars", "config-")
# Some distributions leave the tests out, so they only ever train, and only some of them do.
_TESTS = ("test", "tests", "idle_test")
_TESTS_KEPT_ONE_IN = 3
_TESTS_LARGEST_BYTES = 100_000


@dataclass(frozen=True)
class Document:
    """One named text: a module's source, or a topic of the language reference."""

    domain: Domain
    name: str
    text: str


def split_of(domain: Domain, name: str) -> Split:
    """The split a document belongs to, by its name: `("python", "json/decoder.py")`."""
    slot = crc32(name.encode()) % _HELD_OUT[domain]
    return "valid" if slot == 0 else "calib" if slot == 1 else "train"


def corpus(split: Split) -> list[Document]:
    """The documents of a split, those of `python` first, each domain in order of name."""
    return [*_modules(split), *_topics(split)]


def _modules(split: Split) -> list[Document]:
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        name = relative.as_posix()
        if any(p in _SKIPPED or p.startswith(_GENERATED) for p in relative.parts):
            continue
        if any(part in _TESTS for part in relative.parts):
            kept = split == "train" and crc32(name.encode()) % _TESTS_KEPT_ONE_IN == 0
            if not kept or path.stat().st_size > _TESTS_LARGEST_BYTES:
                continue
        elif split_of("python", name) != split:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a handful of modules declare another encoding
            continue
        if text.strip():
            documents.append(Document("python", name, text))
    return documents


def _topics(split: Split) -> list[Document]:
    """The reference prints some sections under several topics: what train has is not held out."""
    from pydoc_data.topics import topics

    where = {name: split_of("docs", name) for name in sorted(topics)}
    trained = {
        paragraph
        for name, its_split in where.items()
        if its_split == "train"
        for paragraph in _paragraphs(topics[name])
    }
    documents = []
    for name in (name for name, its_split in where.items() if its_split == split):
        text = topics[name]
        if split != "train":
            text = "\n\n".join(p for p in _paragraphs(text) if p not in trained)
        if text:
            documents.append(Document("docs", name, text))
    return documents


def _paragraphs(text: str) -> list[str]:
    return [stripped for part in text.split("\n\n") if (stripped := part.strip("\n"))]
