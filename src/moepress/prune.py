"""Online dynamic pruning: drop experts that a token does not need (arXiv:2410.06270, section 3.3).

    with mp.prune(model, 0.15) as pruned:      # 15 % of the chosen experts, where it costs least
        model.generate(...)

A token's chosen experts are ranked by routing weight. Rank r is dropped where w_r / w_1 is below
the layer's threshold for that rank. The first rank is never dropped, and the most important tokens
of a prefill keep all ranks (pruning/importance.py). A dropped choice gets the index that
transformers gives to "no expert". Our kernels, and transformers' `eager` and `grouped_mm` experts,
compute nothing for it; nothing is multiplied by zero.

Pruning works on packed models and on originals of every family that has transformers' experts
interface, by hooks in front of the experts (pruning/layer.py). Thresholds come from `DropCosts`,
which every compressed folder carries (costs/drop_costs.py, pruning/thresholds.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from moepress.errors import InputError
from moepress.format.checkpoint import load_json, save_json
from moepress.format.quantization import quantization_of
from moepress.original.composite import decoder
from moepress.pruning.layer import pruned_layers
from moepress.pruning.rule import PROTECT
from moepress.pruning.rule import Pruning as Pruning
from moepress.pruning.rule import Strength as Strength
from moepress.pruning.stored import check_fits
from moepress.pruning.stored import stored_costs as stored_costs
from moepress.reading.config import CONFIG, config_fields
from moepress.store.statistics import store_of

if TYPE_CHECKING:
    from moepress.costs.drop_costs import DropCosts

DISK = "disk:"  # before the share, of a strength
# Time of a choice whose expert is read over one whose expert is in memory: a drive of 1 to 3 GB/s
# beside memory of 20 to 60. Twice or half as much changes few thresholds.
READ_OVER_COMPUTE = 20.0
ENOUGH_USES = 1000  # of experts, after which the measured share of misses counts
ACTIVE = "_moepress_pruned"  # attribute of a model's decoder: the pruning in force


@dataclass(frozen=True)
class PruningStatistics:
    """What was dropped since pruning began. L layers with experts, k experts per token."""

    layers: tuple[int, ...]  # [L]
    tokens: tuple[int, ...]  # [L] that passed the layer, padding included; each made k choices
    dropped: tuple[tuple[int, ...], ...]  # [L][k] choices, by rank; 0 where the rule has no layer
    protected: tuple[int, ...]  # [L] tokens that kept all experts whatever their ratios
    absent: tuple[tuple[int, ...], ...] = ()  # [L][k] of the dropped, because of a read

    @property
    def share(self) -> float:
        """Share of all choices that was dropped."""
        choices = sum(n * len(row) for n, row in zip(self.tokens, self.dropped, strict=True))
        return sum(map(sum, self.dropped)) / choices if choices else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "share": self.share}


class Pruned:
    """Pruning in force on a model, until `remove` or the end of its `with` block.

    A later one on the same model replaces it until the later one is removed.
    """

    def __init__(self, model: Any, pruning: Pruning, *, count: bool = False) -> None:
        if not hasattr(model, "get_decoder"):
            raise InputError(
                f"Cannot prune a {type(model).__name__}. Expected a transformers model."
            )
        self.pruning = pruning
        self._model = decoder(model)  # the same with the head and without it
        self._count = count
        self._layers = pruned_layers(model, pruning, count)
        self._undo: list[Callable[[], None]] = []
        self._before: Pruned | None = getattr(self._model, ACTIVE, None)
        if self._before is not None:
            self._before._detach()
        self._attach()
        setattr(self._model, ACTIVE, self)

    @property
    def counts(self) -> bool:
        """Whether statistics are kept, for which every layer waits for the card."""
        return self._count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop pruning and restore the pruning that was in force before. Safe to repeat."""
        active: Pruned | None = getattr(self._model, ACTIVE, None)
        if active is self:
            self._detach()
            setattr(self._model, ACTIVE, self._before)
            if self._before is not None:
                self._before._attach()
            return
        while active is not None and active._before is not self:
            active = active._before
        if active is not None:  # a later one is in force: it must not restore this one
            active._before = self._before

    def statistics(self) -> PruningStatistics:
        """Counts so far.

        Raises:
            InputError: pruning was started without `count=True`.
        """
        if not self._count:
            raise InputError("Nothing was counted. Expected mp.prune(model, ..., count=True).")
        return PruningStatistics(
            layers=tuple(layer.number for layer in self._layers),
            tokens=tuple(layer.tokens for layer in self._layers),
            dropped=tuple(tuple(layer.dropped.tolist()) for layer in self._layers),
            protected=tuple(int(layer.protected) for layer in self._layers),
            absent=tuple(tuple(layer.absent.tolist()) for layer in self._layers),
        )

    def _attach(self) -> None:
        for layer in self._layers:
            self._undo += layer.attach()

    def _detach(self) -> None:
        while self._undo:
            self._undo.pop()()


def prune(
    model: Any,
    strength: Strength | Pruning = "paper",
    *,
    protect: float | None = None,
    costs: DropCosts | None = None,
    count: bool = False,
) -> Pruned:
    """Drop experts that tokens do not need, from now on or inside a `with` block.

    Args:
        model: a transformers causal LM, packed or not.
        strength: a share of all choices of experts, dropped where it costs least; "paper": the
            median ratios of every layer, weights renormalised; or a `Pruning` with thresholds of
            your own. 0 drops nothing, even if the model's folder says otherwise. "disk:0.15", for
            a model whose experts are on disk: at most this share, those that save most time per
            loss, which are mostly choices whose expert would have to be read.
        protect: share of each sequence's tokens that keep all experts during a prefill; None: that
            of the `Pruning`, else 0.02.
        costs: measured on this model; None: those in its folder.
        count: keep statistics.

    Raises:
        InputError: the share cannot be dropped, there are no costs, or the thresholds are for
            another model.
    """

    def found() -> DropCosts:
        return costs or stored_costs(model.name_or_path)

    if isinstance(strength, str) and strength.startswith(DISK):
        pruning = _of_reads(model, strength, PROTECT if protect is None else protect, found())
    else:
        pruning = _resolved(strength, protect, found)
    return Pruned(model, pruning, count=count)


def _of_reads(model: Any, strength: str, protect: float, costs: DropCosts) -> Pruning:
    """The pruning of strength "disk:SHARE"."""
    share = disk_share(strength)
    store = store_of(model)
    if store is None:
        raise InputError(
            f"Pruning {strength!r} is for a model whose experts are on disk, and this one's are in "
            "memory. Open it with less memory, or prune by a share such as 0.15."
        )
    counts = store.counts()
    missing = store.expected_misses
    if counts.uses >= ENOUGH_USES:
        missing = 1 - counts.hits / counts.uses
    return Pruning.of_reads(costs, share, missing, READ_OVER_COMPUTE, protect)


def _resolved(
    strength: Strength | Pruning, protect: float | None, costs: Callable[[], DropCosts]
) -> Pruning:
    if isinstance(strength, Pruning):
        return strength if protect is None else replace(strength, protect=protect)
    if isinstance(strength, bool) or not isinstance(strength, int | float | str):
        raise InputError(
            f"Pruning strength is {strength!r}. Expected a share of the chosen experts, 'paper' "
            "or a Pruning."
        )
    protect = PROTECT if protect is None else protect
    if strength == 0:  # needs no costs
        return Pruning({}, False, protect)
    return Pruning.of(costs(), strength, protect)


def active_pruning(model: Any) -> Pruning | None:
    """The pruning in force on a model; None: none."""
    active: Pruned | None = getattr(decoder(model), ACTIVE, None)
    return None if active is None else active.pruning


def count_dropped(model: Any) -> Pruned | None:
    """Count what the pruning in force drops from now on. Returns None if nothing is dropped."""
    active: Pruned | None = getattr(decoder(model), ACTIVE, None)
    if active is None or not active.pruning.drops:
        return None
    return Pruned(model, active.pruning, count=True)


def set_pruning(
    folder: str | Path, strength: Strength | Pruning, protect: float | None = None
) -> None:
    """Make a compressed folder prune whenever it is opened, also by servers; 0 undoes it.

    Args:
        folder: its config.json is changed.
        strength, protect: as of `prune`, but no "disk:SHARE".

    Raises:
        InputError: the folder was not made by moepress, or as of `prune`.
    """
    folder = Path(folder)
    quantization_of(folder)  # raises if it is another folder, or damaged
    if isinstance(strength, str) and strength.startswith(DISK):
        share = disk_share(strength)
        raise InputError(
            f"Pruning {strength!r} cannot be stored in a folder: what it drops depends on the "
            "memory of the machine that runs the model. Give it where the model runs (--prune "
            f"{strength} of generate, chat, serve and evaluate, or mp.prune), or store a share "
            f"such as {share:g}."
        )
    pruning = _resolved(strength, protect, lambda: stored_costs(folder))
    if isinstance(strength, Pruning):
        check_fits(pruning, folder)
    config = config_fields(folder)
    config["quantization_config"].pop("pruning", None)
    if pruning.drops:
        config["quantization_config"]["pruning"] = pruning.to_json()
    save_json(folder / CONFIG, config)


def disk_share(strength: str) -> float:
    """The share that "disk:SHARE" names.

    Raises:
        InputError: it names none.
    """
    try:
        share = float(strength.removeprefix(DISK))
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise InputError(
            f"Pruning {strength!r} names no share. Expected one from 0 to below 1 of the chosen "
            "experts, such as 'disk:0.15'."
        )
    return share


def parse_strength(text: str) -> Strength | Pruning:
    """The strength that a command line asks for.

    Args:
        text: "paper", a share such as 0.15, "disk:0.15" (see `prune`), or the path of a JSON file
            of a `Pruning`.

    Raises:
        InputError: it is none of them.
    """
    if text == "paper":
        return "paper"
    if text.startswith(DISK):
        disk_share(text)
        return text
    if text.endswith(".json"):
        return Pruning.from_json(load_json(Path(text)))
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"Pruning {text!r} is not understood. Expected 'paper', a share of the chosen experts "
            "such as 0.15, or a .json file with thresholds."
        ) from error
