"""Texts that have a name instead of a path: data sets, `stdlib` and `self`.

Data sets are read with the configurations usual for GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import PurePath
from typing import Any, Literal

from moepress.errors import InputError, install_extra

Split = Literal["calib", "valid"]

SELF, STDLIB = "self", "stdlib"
C4_DOCUMENTS = 10_000  # about 5 million tokens, the first 20 MB of its first file
MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra",
    "number_theory", "prealgebra", "precalculus",
)  # fmt: skip


def load_data_set(name: str, split: Split) -> list[str]:
    """The documents of a data set in `DATA_SETS`.

    Raises:
        InputError: the `datasets` library is missing, or the data set cannot be loaded.
    """
    otherwise = f"Give a text file instead, or '{STDLIB}', or '{SELF}' (the model's own samples)."
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"Data set '{name}' needs the datasets library, which is not installed: "
            f"{install_extra('datasets')}. {otherwise}"
        ) from error
    try:
        return DATA_SETS[name](load_dataset, split)
    except Exception as error:  # the library, the network and file systems each raise their own
        raise InputError(
            f"Data set '{name}' cannot be loaded, {type(error).__name__}: {error}. It needs the "
            f"network. {otherwise}"
        ) from error


def _c4(load: Callable[..., Any], split: Split) -> list[str]:
    file, name = {
        "calib": ("en/c4-train.00000-of-01024.json.gz", "train"),
        "valid": ("en/c4-validation.00000-of-00008.json.gz", "validation"),
    }[split]
    rows = load("allenai/c4", data_files={name: file}, split=name, streaming=True)
    return [row["text"] for row in islice(rows, C4_DOCUMENTS)]


def _wikitext2(load: Callable[..., Any], split: Split) -> list[str]:
    """One document: the rows are lines, joined with blank lines between them as in GPTQ's code."""
    name = {"calib": "train", "valid": "test"}[split]
    rows = load("Salesforce/wikitext", "wikitext-2-raw-v1", split=name)
    return ["\n\n".join(row["text"] for row in rows)]


def _math(load: Callable[..., Any], split: Split) -> list[str]:
    """MATH (arXiv:2103.03874): one document per problem, followed by its solution."""
    name = {"calib": "train", "valid": "test"}[split]
    return [
        f"{row['problem']}\n\n{row['solution']}"
        for subject in MATH_SUBJECTS
        for row in load("EleutherAI/hendrycks_math", subject, split=name)
    ]


DATA_SETS: dict[str, Callable[[Callable[..., Any], Split], list[str]]] = {
    "c4": _c4,
    "wikitext2": _wikitext2,
    "math": _math,
}


def normalised(text: str) -> str:
    """The name of a text without what does not change it: "a//b/" becomes "a/b".

    A path that would then be the name of a data set begins with "./".
    """
    plain = str(PurePath(text))
    return f"./{plain}" if plain in (*DATA_SETS, STDLIB, SELF) and plain != text else plain
