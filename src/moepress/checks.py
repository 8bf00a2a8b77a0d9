"""What is checked before any work: that model and recipe can be used, and by all ranks alike."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from moepress.allocation.tensors import check_group_sizes, with_fitting_codec
from moepress.errors import InputError
from moepress.original.source import Source
from moepress.original.usable import check_usable
from moepress.ranks import here
from moepress.recipe import Recipe

# The longest that a file of rank 0 may take to be seen by other machines: a network file system may
# remember for a minute that a folder was not there.
SEEN_AFTER = 90.0  # seconds


def checked(source: Source, recipe: Recipe) -> Recipe:
    """The recipe with a codec that the model's experts can have, of a model that can be walked.

    Raises:
        InputError: model and recipe cannot be used, or ranks have different ones.
        NumericalError: a weight outside the layers, or a small one inside, is not finite.
    """
    check_usable(source)
    recipe = with_fitting_codec(source, recipe)
    check_group_sizes(source, recipe)
    weights = tuple(weight for _, weight in recipe.calib)  # paths may differ between machines
    check_alike(source, {"the recipe": recipe.digest("calib") + str(weights)})
    return recipe


def check_alike(source: Source, others: Mapping[str, str]) -> None:
    """Raise InputError if ranks were started with different models, devices, packages or `others`.

    Args:
        others: values by what they are, in words.
    """
    from moepress import __version__

    ranks = here()
    if ranks.count == 1:
        return
    own = {
        "the model": source.fingerprint,
        "the kind of device": f"{source.device.type}, {source.compute_dtype}",
        "moepress": __version__,
        "torch": torch.__version__,
        **others,
    }
    everyones = ranks.everyones(own)
    for rank, of_one in enumerate(everyones):
        for what, value in everyones[0].items():
            if of_one[what] != value:
                raise InputError(
                    f"{what[0].upper()}{what[1:]} of rank {rank} is not that of rank 0: "
                    f"{of_one[what]} and {value}. Expected the same on all ranks: start torchrun "
                    "with the same model and options, in the same environment, on every machine."
                )


def check_shared(folder: Path, name: str) -> None:
    """Raise InputError if a rank does not see the file that rank 0 has written.

    Args:
        folder: that all ranks were told to write to.
        name: of the file.
    """
    ranks = here()
    if ranks.count == 1:
        return
    expected = ranks.agreed(lambda: _content(folder / name))
    seen = ranks.everyones(None if _is_seen(folder / name, expected) else platform.node())
    for rank, host in enumerate(seen):
        if host is not None:
            raise InputError(
                f"Rank {rank} on {host} does not see the files that rank 0 writes to {folder}. "
                "Expected an output on a disk that all machines share, under a path that leads to "
                "it from every torchrun."
            )


def _is_seen(path: Path, expected: bytes | None) -> bool:
    """Whether a file has the expected content, or gets it within SEEN_AFTER."""
    until = time.monotonic() + SEEN_AFTER
    while _content(path) != expected:
        if time.monotonic() > until:
            return False
        time.sleep(1)
    return True


def _content(path: Path) -> bytes | None:
    """The bytes of a file; None: it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None
