"""Online dynamic pruning: skip experts that a token does not need (arXiv:2410.06270, section 3.3).

    with mp.prune(model, 0.15) as pruned:      # 15 % of the chosen experts, where it costs least
        model.generate(...)

A token's chosen experts are ranked by routing weight. Rank r is dropped where w_r / w_1 is below
the layer's threshold for that rank; the first is never dropped, and the most important tokens of a
prefill keep all (importance.py). A dropped choice gets the index that transformers gives to "no
expert": our kernels, and transformers' `eager` and `grouped_mm` experts, skip it; nothing is
multiplied by zero.

It works on packed models and on originals of every family that has transformers' experts interface,
by hooks in front of the experts. Thresholds come from `DropCosts`, which every compressed folder
carries (drop_costs.py, thresholds.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from moepress import kernels
from moepress.errors import InputError
from moepress.format.checkpoint import DROP_COSTS, is_compressed, load_json, save_json
from moepress.kernels.modules import PackedExperts
from moepress.original.architectures import decoder_layers, is_experts
from moepress.pruning.importance import Sink, listen, protected_tokens

if TYPE_CHECKING:
    from moepress.costs.drop_costs import DropCosts

PROTECT = 0.02  # share of a prefill's tokens that keep all experts, as in the paper
ACTIVE = "_moepress_pruned"  # attribute of a model's decoder: the pruning in force
# An attribute of transformers' own experts: whether choices of "no expert" occur and are skipped.
SKIPS = "_is_expert_parallel"

Strength = float | Literal["paper"]


@dataclass(frozen=True)
class Pruning:
    """What is dropped: ratios to a token's largest routing weight, by layer and rank."""

    thresholds: Mapping[int, tuple[float, ...]]  # decoder layer: [k], rising rank; the first is 0
    renormalise: bool  # the weights that stay are scaled up to the sum of all
    protect: float = PROTECT  # share of each sequence's tokens that keep all experts in a prefill

    def __post_init__(self) -> None:
        if not isinstance(self.thresholds, Mapping) or not isinstance(self.renormalise, bool):
            raise InputError(
                f"Pruning has thresholds {self.thresholds!r} and renormalise {self.renormalise!r}. "
                "Expected ratios by decoder layer, and true or false."
            )
        for layer, ratios in self.thresholds.items():
            right = isinstance(layer, int) and layer >= 0 and isinstance(ratios, tuple) and ratios
            if not right or not all(_is_share(r) for r in ratios) or ratios[0] != 0:
                raise InputError(
                    f"Thresholds of layer {layer!r} are {ratios!r}. Expected one ratio for each "
                    "chosen expert, from 0 to 1, the first 0: a token's first expert is never "
                    "dropped."
                )
        if not _is_share(self.protect):
            raise InputError(f"protect is {self.protect!r}. Expected a share of tokens, 0 to 1.")

    @property
    def drops(self) -> bool:
        return any(any(ratios) for ratios in self.thresholds.values())

    @classmethod
    def of(cls, costs: DropCosts, strength: Strength, protect: float = PROTECT) -> Pruning:
        """Thresholds for a strength, from what was measured.

        Args:
            costs: of the model.
            strength: "paper": each layer's median ratio of every rank, weights renormalised. A
                number: this share of all chosen experts, dropped where it costs least.
            protect: share of a prefill's tokens that keep all experts; their share is not counted.

        Raises:
            InputError: a share that cannot be dropped.
        """
        from moepress.pruning.thresholds import cheapest, medians

        if strength == "paper":
            ratios, renormalise = medians(costs), True
        elif isinstance(strength, str):
            raise InputError(f"Pruning {strength!r} is not known. Expected 'paper' or a share.")
        else:
            (ratios, plain), (scaled, other) = (
                cheapest(costs, strength, renormalise) for renormalise in (False, True)
            )
            renormalise = other < plain
            ratios = scaled if renormalise else ratios
        rows = np.minimum(ratios, 1).tolist()
        return cls(dict(zip(costs.layers, map(tuple, rows), strict=True)), renormalise, protect)

    def to_json(self) -> dict[str, Any]:
        thresholds = {str(layer): list(ratios) for layer, ratios in self.thresholds.items()}
        return {**vars(self), "thresholds": thresholds}

    @classmethod
    def from_json(cls, fields: Any) -> Pruning:
        """Read what `to_json` gave.

        Raises:
            InputError: it is something else.
        """
        try:
            thresholds = {int(n): tuple(ratios) for n, ratios in fields["thresholds"].items()}
            return cls(**{**fields, "thresholds": thresholds})
        except InputError:
            raise
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(
                'Pruning is not understood. Expected {"thresholds": {layer: [0, ratio, ...]}, '
                '"renormalise": true or false, "protect": share}, got '
                f"{type(error).__name__}: {error}."
            ) from error


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


@dataclass(frozen=True)
class PruningStatistics:
    """What was dropped since pruning began. L pruned layers, k experts a token."""

    layers: tuple[int, ...]  # [L]
    tokens: tuple[int, ...]  # [L] that came by, padding too; each made k choices
    dropped: tuple[tuple[int, ...], ...]  # [L][k] choices, by rank
    protected: tuple[int, ...]  # [L] tokens that kept all experts, whatever their ratios

    @property
    def share(self) -> float:
        """Share of all choices that was dropped."""
        choices = sum(n * len(row) for n, row in zip(self.tokens, self.dropped, strict=True))
        return sum(map(sum, self.dropped)) / choices if choices else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "share": self.share}


class Pruned:
    """Pruning in force on a model, until it is removed or its `with` block ends.

    Another one on the same model takes its place while it lasts.
    """

    def __init__(self, model: Any, pruning: Pruning, *, count: bool = False) -> None:
        if not hasattr(model, "get_decoder"):
            raise InputError(
                f"Cannot prune a {type(model).__name__}. Expected a transformers model."
            )
        self.pruning = pruning
        self._model = model.get_decoder()  # a model with its head and without are pruned as one
        self._count = count
        self._layers = _layers(model, pruning, count)
        self._undo: list[Callable[[], None]] = []
        self._before: Pruned | None = getattr(self._model, ACTIVE, None)
        if self._before is not None:
            self._before._detach()
        self._attach()
        setattr(self._model, ACTIVE, self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop pruning; what was in force before is in force again. Safe to repeat."""
        active: Pruned | None = getattr(self._model, ACTIVE, None)
        if active is self:
            self._detach()
            setattr(self._model, ACTIVE, self._before)
            if self._before is not None:
                self._before._attach()
            return
        while active is not None and active._before is not self:
            active = active._before
        if active is not None:  # a later one is in force: it shall not bring this one back
            active._before = self._before

    def statistics(self) -> PruningStatistics:
        """What was dropped so far.

        Raises:
            InputError: nothing was counted.
        """
        if not self._count:
            raise InputError("Nothing was counted. Expected mp.prune(model, ..., count=True).")
        return PruningStatistics(
            layers=tuple(layer.number for layer in self._layers),
            tokens=tuple(layer.tokens for layer in self._layers),
            dropped=tuple(tuple(layer.dropped.tolist()) for layer in self._layers),
            protected=tuple(int(layer.protected) for layer in self._layers),
        )

    def _attach(self) -> None:
        for layer in self._layers:
            self._undo += layer.attach()

    def _detach(self) -> None:
        while self._undo:
            self._undo.pop()()


class _Layer:
    """A pruned decoder layer: the hook before its experts, and its counts."""

    def __init__(
        self, number: int, layer: nn.Module, experts: Any, pruning: Pruning, count: bool
    ) -> None:
        self.number = number
        self._layer = layer
        self._experts = experts
        self._pruning = pruning
        self._thresholds = torch.tensor(pruning.thresholds[number], dtype=torch.float32)
        self._left_out = torch.tensor(getattr(experts, "left_out", ()), dtype=torch.int64)
        self._sink = Sink()
        self._count = count
        self.tokens = 0
        self.dropped = torch.zeros(len(self._thresholds), dtype=torch.int64)
        self.protected = torch.zeros((), dtype=torch.int64)

    def attach(self) -> list[Callable[[], None]]:
        """Prune from now on. Returns calls that undo it."""
        undo: list[Callable[[], None]] = [
            self._experts.register_forward_pre_hook(self._before_experts).remove
        ]
        if self._pruning.protect > 0:
            undo += listen(self._layer, self._sink)
        if hasattr(self._experts, SKIPS):
            undo.append(partial(setattr, self._experts, SKIPS, getattr(self._experts, SKIPS)))
            setattr(self._experts, SKIPS, True)
        return undo

    def _before_experts(
        self, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, index, weights = args
        if index.shape[1] != len(self._thresholds):
            raise InputError(
                f"Layer {self.number} chooses {index.shape[1]} experts for a token, but the "
                f"pruning has {len(self._thresholds)} thresholds. It was made for another model."
            )
        if self._thresholds.device != hidden.device:
            self._thresholds = self._thresholds.to(hidden.device)
            self._left_out = self._left_out.to(hidden.device)
        if len(self._left_out):  # no choices: they would take the place of experts that cost time
            absent = torch.isin(index, self._left_out)
            index = index.masked_fill(absent, self._experts.num_experts)
        protected = protected_tokens(hidden, self._sink, self._pruning.protect)
        index, weights, dropped = kernels.drop(
            index,
            weights,
            self._thresholds,
            self._pruning.renormalise,
            protected,
            self._experts.num_experts,
        )
        if self._count:
            self.tokens += len(hidden)
            self.dropped += dropped.sum(0).cpu()
            self.protected += 0 if protected is None else protected.sum().cpu()
        return hidden, index, weights


def _layers(model: nn.Module, pruning: Pruning, count: bool) -> list[_Layer]:
    """The layers of a model that a pruning is about."""
    found = {}
    for number, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if isinstance(module, PackedExperts) or is_experts(module):
                found[number] = layer, module
    strangers = sorted(pruning.thresholds.keys() - found.keys())
    if strangers:
        raise InputError(
            f"The pruning has thresholds for layers {strangers}, but {type(model).__name__} has "
            f"routed experts in layers {sorted(found)}. It was made for another model."
        )
    return [
        _Layer(number, *found[number], pruning, count)
        for number, ratios in sorted(pruning.thresholds.items())
        if any(ratios) or count
    ]


def prune(
    model: Any,
    strength: Strength | Pruning = "paper",
    *,
    protect: float | None = None,
    costs: DropCosts | None = None,
    count: bool = False,
) -> Pruned:
    """Skip experts that tokens do not need, from now on or inside a `with` block.

    Args:
        model: a transformers causal LM, packed or not.
        strength: a share of all chosen experts, dropped where it costs least; "paper": the median
            of every layer, weights renormalised; or a `Pruning` with thresholds of your own.
            0 drops nothing, even if the model's folder says otherwise.
        protect: share of each sequence's tokens that keep all experts during a prefill; None: of
            the `Pruning`, else 0.02.
        costs: measured on this model; None: as its folder has them.
        count: keep statistics.

    Raises:
        InputError: a share that cannot be dropped, no costs, or thresholds of another model.
    """
    pruning = _resolved(strength, protect, lambda: costs or stored_costs(model.name_or_path))
    return Pruned(model, pruning, count=count)


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


def count_dropped(model: Any) -> Pruned | None:
    """Keep statistics of the pruning in force from now on; None: nothing is dropped."""
    active: Pruned | None = getattr(model.get_decoder(), ACTIVE, None)
    if active is None or not active.pruning.drops:
        return None
    return Pruned(model, active.pruning, count=True)


def stored_costs(folder: str | Path) -> DropCosts:
    """The drop costs that a compressed folder, or a hub id of one, carries.

    Raises:
        InputError: it carries none.
    """
    from huggingface_hub import hf_hub_download

    from moepress.costs.drop_costs import DropCosts

    path = Path(folder) / DROP_COSTS
    if folder and not path.is_file() and not Path(folder).exists() and str(folder).count("/") == 1:
        try:
            path = Path(hf_hub_download(str(folder), DROP_COSTS))
        except Exception as error:  # the hub client raises many kinds: all mean it is not to be had
            raise InputError(
                f"{folder} is neither a local folder nor a model on the hub with {DROP_COSTS} "
                f"({type(error).__name__}). Give costs of `moepress calibrate`."
            ) from error
    if not folder or not path.is_file():
        raise InputError(
            f"{folder or 'The model'} has no {DROP_COSTS}, which says what dropping experts costs. "
            "Compress the model with this version, copy that file from the folder it came from, or "
            "give costs of `moepress calibrate`."
        )
    return DropCosts.load(path)


def set_pruning(
    folder: str | Path, strength: Strength | Pruning, protect: float | None = None
) -> None:
    """Have a compressed folder prune whenever it is opened, servers included; 0: no more.

    Args:
        folder: its config.json is changed.
        strength, protect: as of `prune`.

    Raises:
        InputError: not a folder of ours, or as of `prune`.
    """
    folder = Path(folder)
    if not is_compressed(folder):
        raise InputError(f"{folder} is not a folder made by moepress. Expected one to prune.")
    pruning = _resolved(strength, protect, lambda: stored_costs(folder))
    if isinstance(strength, Pruning) and (folder / DROP_COSTS).is_file():
        check_fits(pruning, stored_costs(folder))
    config = load_json(folder / "config.json")
    config["quantization_config"].pop("pruning", None)
    if pruning.drops:
        config["quantization_config"]["pruning"] = pruning.to_json()
    save_json(folder / "config.json", config)


def check_fits(pruning: Pruning, costs: DropCosts) -> None:
    """Raise InputError if thresholds are for other layers, or another number of chosen experts."""
    strangers = sorted(pruning.thresholds.keys() - set(costs.layers))
    sizes = {len(ratios) for ratios in pruning.thresholds.values()} - {costs.top_k}
    if strangers or sizes:
        raise InputError(
            f"The pruning has thresholds for layers {sorted(pruning.thresholds)}, "
            f"{sorted(sizes) or costs.top_k} of each. This model has routed experts in layers "
            f"{list(costs.layers)}, and a token chooses {costs.top_k}."
        )


def parse_strength(text: str) -> Strength | Pruning:
    """What a command line says: "paper", a share such as 0.15, or a JSON file of a `Pruning`.

    Raises:
        InputError: it is none of them.
    """
    if text == "paper":
        return "paper"
    if text.endswith(".json"):
        return Pruning.from_json(load_json(Path(text)))
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"Pruning {text!r} is not understood. Expected 'paper', a share of the chosen experts "
            "such as 0.15, or a .json file with thresholds."
        ) from error
