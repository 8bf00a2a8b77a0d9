"""Tensors of a checkpoint that the model's class has no place for.

transformers leaves them out, and so does moepress, which says so. Some are no mere surplus: without
them the model computes something else than the one that was trained. Those are refused:

    qweight         of GPTQ and AWQ, in place of a weight
    scales, zeros   beside a tensor that is taken: the tensor alone means nothing
    biases          beside a tensor that is taken: config.json lacks the field that turns them on
    whole layers    config.json has fewer layers than the files. Layers that only predict further
                    tokens (MTP) are surplus: they have projections and norms that no other has
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from moepress.errors import FileError

SCALE = re.compile(
    r"(^|_)(scales?|scale_inv|scale_\d+|zero_points?|zeros|qzeros|qweight|g_idx|absmax|amax)$"
)
BIAS = re.compile(r"(^|_)bias$")
MASKS = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$")  # old files have them as buffers
PREDICTS_AHEAD = re.compile(
    r"\.(eh_proj|enorm|hnorm|shared_head|embed_tokens|mtp\w*|nextn\w*)(\.|$)"
)
NUMBERED = re.compile(r"(.*?\.)(\d+)\.")  # "model.layers.", "3"
NAMED = 3  # unneeded tensors that a message names


def ignored_by_class(model: Any, keys: Iterable[str]) -> set[str]:
    """The keys of a checkpoint that the model's class declares as surplus."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    known = [re.compile(pattern) for pattern in patterns]
    return {key for key in keys if any(pattern.search(key) for pattern in known)}


def check_unneeded(
    folder: Path,
    model: Any,
    unused: Collection[str],
    taken: Collection[str],
    of_layers: Collection[str],
) -> None:
    """Refuse a checkpoint that holds more of the model than its class takes.

    Args:
        folder: of the checkpoint, for messages.
        model: the skeleton.
        unused: keys of the tensors that it has no place for.
        taken: keys of the tensors that it takes.
        of_layers: those of them that belong to decoder layers.

    Raises:
        FileError: an unused tensor is a scale or bias of one that is taken, packed by GPTQ or AWQ,
            or belongs to a decoder layer that the config does not count.
    """
    left = sorted(set(unused) - ignored_by_class(model, unused))
    _check_layers(folder, model, left, of_layers)
    if rounded := next((key for key in left if key.endswith(".qweight")), None):
        raise FileError(
            f"{folder} holds {rounded}: GPTQ or AWQ has rounded its weights to few bits, and "
            "config.json does not say so. Give the original model's folder."
        )
    modules = {_module(key) for key in taken} | set(taken)
    for key in left:
        leaf = key.rpartition(".")[2]
        if _module(key) not in modules and key.removesuffix(f"_{leaf}") not in modules:
            continue
        if SCALE.search(leaf):
            raise FileError(
                f"{folder} holds {key}, a scale of a tensor that the model takes, but config.json "
                "does not say how its weights are quantized. Without the scale they are other "
                "numbers: give the original model, or the config.json that belongs to these files."
            )
        if BIAS.search(leaf) and not MASKS.search(key):
            raise FileError(
                f"{folder} holds {key}, but {type(model).__name__} with this config.json has no "
                "such bias, and would compute without it. The config is another model's or lacks a "
                "field such as attention_bias: fetch it again."
            )


def _check_layers(folder: Path, model: Any, unused: Iterable[str], taken: Iterable[str]) -> None:
    """Raise FileError if the files hold decoder layers beyond those of the config."""
    known: dict[str, set[int]] = defaultdict(set)  # numbers by what stands in front of them
    for key in taken:
        if found := NUMBERED.match(key):
            known[found[1]].add(int(found[2]))
    more: dict[tuple[str, int], list[str]] = defaultdict(list)
    for key in unused:
        found = NUMBERED.match(key)
        if found and found[1] in known and int(found[2]) not in known[found[1]]:
            more[found[1], int(found[2])].append(key)
    extra = {k: v for k, v in more.items() if not any(PREDICTS_AHEAD.search(key) for key in v)}
    if extra:
        (stem, number), keys = min(extra.items())
        raise FileError(
            f"{folder} holds {len(extra)} decoder layers more than the {len(known[stem])} of its "
            f"config.json, the first {stem}{number} ({keys[0]}). {type(model).__name__} would "
            "leave them out: the config is another model's; fetch it again."
        )


def _module(key: str) -> str:
    """Path of the module that owns a tensor."""
    return key.rpartition(".")[0]


def some_of(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(sorted(names)[:NAMED])
    more = len(names) - NAMED
    return shown if more <= 0 else f"{shown} and {more:,} more"
