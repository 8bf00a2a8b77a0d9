"""The device that a command takes where the user names none: a card with room, else the CPU."""

from __future__ import annotations

import platform
import re
from collections import defaultdict
from pathlib import Path

import torch

from moepress import kernels
from moepress.errors import InputError
from moepress.memory import free_memory
from moepress.original.folder import weight_files
from moepress.ranks import here, own_card, ranks_here
from moepress.reading.headers import read_header
from moepress.store.memory import WHOLE_SHARE
from moepress.store.places import total_bytes

WIDE = ("F64", "F32", "F16", "BF16")  # dtypes that are computed with as they are stored
FROM_CODES = 4  # bytes of compute dtype for a byte of codes: of 4 bits, two bfloat16


def cards() -> list[torch.device]:
    """The cards of this machine that the CUDA kernels run on."""
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [card for card in found if kernels.backend_for(card).name == "cuda"]


def with_room(need: int) -> str:
    """The first card that has `need` bytes free, and some more; else the CPU."""
    return next((str(card) for card in cards() if fit(need, card)), "cpu")


def fit(need: int, card: torch.device) -> bool:
    """Whether a card has `need` bytes free, and some more."""
    return need <= WHOLE_SHARE * free_memory(card)


def of_rank(name: str | None, folder: Path) -> str:
    """The device of this rank of a job: the card of its number on the machine, or the CPU.

    Args:
        name: "cpu" or "cuda"; None: cards if on each rank's own the largest layer fits, else CPUs.

    Raises:
        InputError: it is another name, or not each rank of this machine has a card for itself.
    """
    card, together = own_card(), ranks_here()
    fits = (
        name is None
        and card is not None
        and bool(cards())
        and fit(largest_layer(folder), torch.device("cuda", card))
    )
    everyones = here().everyones((name, fits))  # all ranks call this, whatever they were told
    if len({of_one for of_one, _ in everyones}) > 1:
        raise InputError(
            f"Ranks were started with different devices: {[of_one for of_one, _ in everyones]}. "
            "Expected the same --device on all, or none."
        )
    if name is None:
        name = "cuda" if all(fits for _, fits in everyones) else "cpu"
    elif name not in ("cpu", "cuda"):
        raise InputError(
            f"--device {name} would put {here().count} ranks on one device. Expected cuda, with "
            "which each rank takes its own card, or cpu."
        )
    if name == "cpu":
        return name
    if card is None:
        raise InputError(
            f"{together} ranks were started on {platform.node()}, which has "
            f"{torch.cuda.device_count()} cards. Expected a card for each rank: start no more "
            "with --nproc-per-node than there are cards, or give --device cpu."
        )
    return f"cuda:{card}"


def to_run(folder: Path) -> str:
    """The device for a model that is loaded whole."""
    return with_room(total_bytes(weight_files(folder)))


def to_compress(folder: Path) -> str:
    """The device for a model that passes layer by layer."""
    return with_room(largest_layer(folder))


def largest_layer(folder: Path) -> int:
    """At most so many bytes has the largest decoder layer of a model, in its compute dtype.

    By the numbers in the names of its tensors. Tensors outside the layers count as a layer.
    """
    sums: defaultdict[str, int] = defaultdict(int)
    for path in weight_files(folder):
        for name, entry in read_header(path).tensors.items():
            number = re.search(r"\.(\d+)\.", name)
            factor = 1 if entry.dtype in WIDE else FROM_CODES
            sums[number[1] if number else ""] += factor * entry.nbytes
    return max(sums.values(), default=0)


def describe(device: str) -> str:
    """A device in some words: its name, and that of the card."""
    if device == "cpu":
        return device
    return f"{device} ({torch.cuda.get_device_properties(device).name})"
