"""How fast a folder will run in some memory, before it is opened."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moepress.byte_units import size_text
from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import SCORES
from moepress.format.quantization import packed_specs
from moepress.kernels import cpu
from moepress.kernels.cpu.expert_store import HUGE_FROM, ExpertStore, Place, check_largest, pages
from moepress.kernels.gate import packed_names
from moepress.memory import free_host_memory, free_memory
from moepress.original.folder import weight_files
from moepress.store.hottest import hottest, share_of
from moepress.store.memory import WITHOUT_EXPERTS, Memory, card_room, plan
from moepress.store.places import places_of, total_bytes
from moepress.store.uses import HALF_LIFE, Floats, frequencies

LOCALITY = 1.8
MOST_READ = 256 << 20  # bytes read to measure the speed of a drive
MEMORY_READ = 256 << 20
EXPERT_NAMES = {name for gated in (True, False) for name in packed_names(gated)}


def expected_misses(frequency: Sequence[Floats], sizes: Sequence[Floats], budget: int) -> float:
    """Share of the choices whose expert will not be in memory.

    The most frequent experts alone would leave a share m out. The store also follows what a text
    uses again: on traces of the reference models m^1.8 was left (docs/log.md#experts-on-disk).

    Args:
        frequency: [L] [E] share of the calibration tokens that chose each expert; of zeros alone:
            all are taken to be equally frequent.
        sizes: [L] [E] bytes.
        budget: bytes.
    """
    missed = 1 - share_of(frequency, hottest(frequency, sizes, budget))
    return float(max(missed, 0.0) ** LOCALITY)


def read_speed(path: Path, matrix: int = HUGE_FROM) -> float:
    """Bytes per second at which a store reads matrices of a size from a file.

    A store is opened for it, because more than the drive decides: large matrices come in huge
    pages, into which direct reads are two to three times as fast (docs/log.md#huge-pages).

    Args:
        matrix: bytes.

    Raises:
        CheckpointError: the file cannot be read.
        InputError: there is no store here.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from error
    nbytes = max(min(matrix, size), 1)
    starts = range(0, max(min(size, MOST_READ) - nbytes, 0) + 1, nbytes)
    pairs = [(Place(path, at, nbytes), Place(path, 0, 0)) for at in starts]
    store = ExpertStore([pairs], [np.zeros(len(pairs))], HALF_LIFE, sum(pages(a) for a, _ in pairs))
    try:
        started = time.perf_counter()
        with store.hold(0, range(len(pairs))):
            return store.counts().bytes_read / max(time.perf_counter() - started, 1e-9)
    finally:
        store.close()


def memory_speed() -> float:
    """Bytes per second that torch's threads read from memory: the best of three sums."""
    values = torch.ones(MEMORY_READ // 4)  # sums of integers take 15 times as long
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - started)
    return MEMORY_READ / max(min(seconds), 1e-9)


@dataclass(frozen=True)
class Forecast:
    """How fast a folder decodes, at batch 1: bytes over measured speeds. All sizes in bytes."""

    expert_bytes: int
    other_bytes: int  # of weights that always stay in memory
    memory: int | None  # for experts; None: all are in memory
    hit_rate: float  # of the choices, the share whose expert is in memory
    active_bytes_per_token: float  # weights that a token passes
    read_bytes_per_token: float  # from the drive
    memory_bytes_per_s: float
    drive_bytes_per_s: float

    @property
    def tokens_per_s(self) -> float:
        """An upper bound: kernels rarely read memory as fast as a plain sum does."""
        seconds = self.active_bytes_per_token / self.memory_bytes_per_s
        return 1 / (seconds + self.read_bytes_per_token / self.drive_bytes_per_s)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}

    def __str__(self) -> str:
        most = f"at most {float(f'{self.tokens_per_s:.3g}'):,.10g} tokens/s"
        experts = f"{size_text(self.expert_bytes)} of experts"
        if not self.read_bytes_per_token:
            return f"{experts}, all in memory: nothing is read per token; {most}"
        where = "" if self.memory is None else f", {size_text(self.memory)} in memory"
        return (
            f"{experts}{where}: {self.hit_rate:.0%} of the chosen ones, "
            f"{size_text(self.read_bytes_per_token)} read per token at "
            f"{size_text(self.drive_bytes_per_s)}/s; {most}"
        )


def forecast(folder: Path, memory: Memory = "fit") -> Forecast:
    """Forecast the speed of a compressed folder on this machine's CPU.

    Args:
        memory: as of `memory.plan`.

    Raises:
        InputError: the folder is none of moepress, has no counts of its calibration, the memory
            does not hold the weights outside the experts, or there are no compiled kernels.
        CheckpointError: a file is damaged.
    """
    held = _Held.of(folder)
    if not held.sizes:
        raise InputError(f"{folder} {WITHOUT_EXPERTS}: there is nothing to forecast.")
    if not all(row.any() for row in held.frequency):
        raise InputError(
            f"{folder} has no {SCORES} with the counts of its calibration. Expected them, for a "
            "forecast: copy that file from the folder it came from."
        )
    if (reason := cpu.missing()) is not None:
        raise InputError(f"There is no forecast without the compiled kernels: {reason}")
    room = plan(memory, held.experts, held.rest)
    budget = None if room is None or room.locked else room.experts
    if budget is not None:
        check_largest(budget, held.largest)
    elif held.experts + held.rest > (free := free_host_memory()):  # mapped: the system evicts
        budget = max(free - held.rest, 0)
    chosen = sum(float(f @ s) for f, s in zip(held.frequency, held.sizes, strict=True))
    misses = 0.0
    if budget is not None:
        misses = expected_misses(held.frequency, held.sizes, budget)
    return Forecast(
        expert_bytes=held.experts,
        other_bytes=held.rest,
        memory=budget,
        hit_rate=1 - misses,
        active_bytes_per_token=held.rest + chosen,
        read_bytes_per_token=misses * chosen,
        memory_bytes_per_s=memory_speed(),
        drive_bytes_per_s=read_speed(
            max(held.files, key=lambda path: path.stat().st_size), held.mean_matrix
        ),
    )


@dataclass(frozen=True)
class CardFit:
    """What a card takes of a folder. The experts that it does not take run on the CPU."""

    gpu_memory: int  # bytes of the card's memory for weights
    expert_bytes: int
    other_bytes: int  # of the other weights, which have to be on the card
    experts: float  # share of the experts that are on the card; 0 if the others do not fit
    choices: float | None  # share of the choices that the card serves; None: no counts

    @property
    def runs(self) -> bool:
        """Whether the card can run the model at all."""
        return self.other_bytes <= self.gpu_memory

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "runs": self.runs}

    def __str__(self) -> str:
        size = f"{size_text(self.expert_bytes + self.other_bytes)} of weights"
        room = f"{size_text(self.gpu_memory)} of the card"
        if not self.runs:
            return (
                f"{size} do not fit into {room}: those outside the experts take "
                f"{size_text(self.other_bytes)}"
            )
        if self.experts == 1:
            return f"{size} fit into {room}"
        served = "" if self.choices is None else f", which serve {self.choices:.0%} of the choices"
        return f"{size}, {room}: {self.experts:.0%} of the experts on the card{served}"


def card_fits(folder: Path, gpu_memory: int | None = None) -> dict[str, CardFit]:
    """What the cards of this machine take of a compressed folder, by card; none: it has none.

    Args:
        gpu_memory: bytes for weights of a card that may be elsewhere, which is taken instead.

    Raises:
        InputError: the folder is none of moepress.
        CheckpointError: a file is damaged.
    """
    held = _Held.of(folder)
    if gpu_memory is not None:
        return {"a card": _card_fit(held, gpu_memory)}
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    free = {name: free_memory(torch.device(name)) for name in names}
    return {n: _card_fit(held, card_room(f, held.experts + held.rest)) for n, f in free.items()}


def _card_fit(held: _Held, gpu_memory: int) -> CardFit:
    room = gpu_memory - held.rest
    counted = any(row.any() for row in held.frequency)
    on_card = hottest(held.frequency, held.sizes, room) if held.sizes and room >= 0 else []
    whole = room >= held.experts
    experts = float(np.concatenate(on_card).mean()) if on_card else 0.0
    choices = share_of(held.frequency, on_card) if on_card and counted else None
    return CardFit(
        gpu_memory,
        held.experts,
        held.rest,
        1.0 if whole else experts,
        1.0 if whole else choices,
    )


@dataclass(frozen=True)
class _Held:
    """Weights of a compressed folder, in bytes.

    Those of an expert are taken from its widths, which leaves out scales.
    """

    files: tuple[Path, ...]
    sizes: tuple[Floats, ...]  # [L] [E]
    frequency: tuple[Floats, ...]  # [L] [E], 0 where it is unknown
    experts: int
    rest: int

    @property
    def mean_matrix(self) -> int:
        """Bytes of a matrix of an expert, of which it has two."""
        count = sum(int((row > 0).sum()) for row in self.sizes)
        return max(self.experts // max(2 * count, 1), 1)

    @property
    def largest(self) -> int:
        """Bytes of the largest expert; the pages of a store may take a little more."""
        return int(max(row.max() for row in self.sizes))

    @classmethod
    def of(cls, folder: Path) -> _Held:
        files = weight_files(folder)
        specs = {
            n: s for n, s in packed_specs(folder).items() if n.rpartition(".")[2] in EXPERT_NAMES
        }
        places = places_of(files, specs)
        layers: dict[str, Floats] = {}
        for name, spec in specs.items():
            bits = np.array(spec.bits, dtype=np.float64)
            sizes = places[name].nbytes * bits / max(bits.sum(), 1)
            path = name.rpartition(".")[0]
            layers[path] = layers.get(path, np.zeros(len(bits))) + sizes
        frequency = frequencies(folder, list(layers), [len(row) for row in layers.values()])
        experts = sum(place.nbytes for place in places.values())
        rest = total_bytes(files) - experts
        return cls(tuple(files), tuple(layers.values()), tuple(frequency), experts, rest)
