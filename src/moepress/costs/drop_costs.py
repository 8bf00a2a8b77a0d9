"""Drop costs: what dropping (token, expert) choices adds to the error of a MoE block's output.

They are measured once and serve all strengths of pruning. A token's chosen experts are ranked by
routing weight, w_1 >= ... >= w_k. Online dynamic pruning (arXiv:2410.06270, section 3.3) drops the
expert of rank r if the ratio w_r / w_1 is small. For a sample of tokens of each layer, `DropCosts`
has the distribution of that ratio by rank, and what dropping a rank adds to the squared error:

    y   = sum over all ranks of w_r f_r                       f_r: output of the expert of rank r
    y_m = a_m * sum over ranks 1 .. m of w_r f_r              a_m = 1, or (sum of all w) / (sum of
    D_m = || y - y_m ||^2                                     the m largest w): renormalised
    cost of rank r = D_(r-1) - D_r                            all later ranks already dropped

Costs are divided by the energy of the residual stream, so that layers can be compared: the median
over tokens, because a few tokens may have states a hundred times as large as all others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from moepress.errors import CheckpointError, FileError
from moepress.format.arrays import read_arrays, read_document
from moepress.format.checkpoint import save_tensors
from moepress.original.batches import chunks, empty
from moepress.original.experts import Routed, RoutedExpert
from moepress.ranks import ALONE, Ranks
from moepress.reading.documents import Array, Document
from moepress.sending import sent

SAMPLE = 4096  # tokens of a layer; the standard error of a median is 0.8 % of the tokens
BINS = 32  # bins of equally many tokens, by rising ratio
KIND = "moepress drop costs"
ARRAYS = ("ratio", "cost", "renormalised_cost")
AGAIN = "Copy it again, or measure them again."
NO_EXPERT = 2.0  # ratio of a choice of no expert: above all others, so it is never dropped
# If the sums of the tokens' routing weights differ by at most this share, they count as constant.
EVEN_SUM = 0.01  # bfloat16 alone makes them differ by 0.004


class DropFields(Document):
    """The document in the file, without its kind."""

    layers: Array[Annotated[int, Field(ge=0, lt=1 << 16)]]
    normalised: bool
    provenance: dict[str, str]


@dataclass(frozen=True)
class DropCosts:
    """Distribution of w_r / w_1, and costs, by rank. L MoE layers, k experts per token, Q bins."""

    layers: tuple[int, ...]  # [L] index of each MoE layer in the model
    ratio: npt.NDArray[np.float32]  # [L, k - 1, Q + 1] quantiles of w_r / w_1 for r = 2 .. k
    cost: npt.NDArray[np.float32]  # [L, k - 1, Q] mean over the tokens of a bin
    renormalised_cost: npt.NDArray[np.float32]  # [L, k - 1, Q]
    normalised: bool  # whether a token's routing weights sum to a constant
    provenance: dict[str, str]

    def __post_init__(self) -> None:
        if wrong := self._contradiction():
            raise CheckpointError(f"Drop costs do not fit together: {wrong}. Measure them again.")

    def _contradiction(self) -> str | None:
        """What is wrong with the fields, and what was expected; None if nothing is."""
        arrays = (self.ratio, self.cost, self.renormalised_cost)
        if self.ratio.ndim != 3 or self.ratio.shape[2] < 2:
            return f"ratios of shape {self.ratio.shape}, expected [L, k - 1, Q + 1]"
        count, ranks, edges = self.ratio.shape
        if {self.cost.shape, self.renormalised_cost.shape} != {(count, ranks, edges - 1)}:
            return f"ratios {self.ratio.shape}, costs {[a.shape for a in arrays[1:]]}"
        if any(a.dtype != np.float32 or not np.isfinite(a).all() for a in arrays):
            return "an array is not of finite float32 numbers"
        if (np.diff(self.ratio, axis=-1) < 0).any() or (self.ratio < 0).any():
            return "ratios are negative or not in rising order"
        layers = self.layers
        if len(layers) != count or any(type(layer) is not int for layer in layers):
            return f"layers {layers}, expected {count} numbers"
        if list(layers) != sorted(set(layers)):
            return f"layers {layers}, expected distinct ones in rising order"
        return None

    @property
    def top_k(self) -> int:
        """k, the experts that each token chooses."""
        return int(self.ratio.shape[1]) + 1

    @property
    def largest_share(self) -> float:
        """Largest share of all choices that may be dropped: all but the first of each token."""
        return 1 - 1 / self.top_k

    def costs(self, renormalise: bool) -> npt.NDArray[np.float64]:
        """Costs [L, k - 1, Q], with the kept weights scaled up or left as they are."""
        return (self.renormalised_cost if renormalise else self.cost).astype(np.float64)

    def arrays(self) -> dict[str, Tensor]:
        """The fields that are stored as tensors; `rest` has the others, for the metadata."""
        return {name: torch.from_numpy(getattr(self, name)) for name in ARRAYS}

    def rest(self) -> dict[str, Any]:
        """The fields that are stored as metadata."""
        return {k: v for k, v in vars(self).items() if k not in ARRAYS}

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor], rest: Mapping[str, Any]) -> DropCosts:
        """The inverse of `arrays` and `rest`."""
        fields: dict[str, Any] = {**rest, **{name: arrays[name].numpy() for name in ARRAYS}}
        return cls(**fields | {"layers": tuple(fields["layers"])})

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        about = json.dumps({"kind": KIND, **self.rest()}, sort_keys=True)
        save_tensors(path, self.arrays(), about)

    @classmethod
    def load(cls, path: Path) -> DropCosts:
        """Read what `save` wrote.

        Raises:
            FileError: the file is missing or damaged, or holds something else.
        """
        rest = read_document(path, KIND, "drop costs", AGAIN)
        arrays = read_arrays(path, rest, DropFields, dict.fromkeys(ARRAYS, "float32"), AGAIN)
        try:
            return cls(**{**rest, "layers": tuple(rest["layers"]), **arrays})
        except CheckpointError as error:
            raise FileError(f"{path} does not hold drop costs: {error} {AGAIN}") from error

    @classmethod
    def of_layers(
        cls, results: Mapping[int, Mapping[str, Tensor]], provenance: Mapping[str, str]
    ) -> DropCosts:
        """Combine the results of a `DropMeter` for each decoder layer."""
        rows = list(results.values())
        return cls.of(
            {name: torch.stack([row[name] for row in rows]) for name in ARRAYS},
            {
                "layers": results.keys(),
                "normalised": all(bool(row["normalised"]) for row in rows),
                "provenance": dict(provenance),
            },
        )


class DropMeter:
    """Measures the drop costs of a layer, expert by expert, on a sample of its tokens.

    Args:
        routed: the tokens that reach the layer's experts, and their choices.
        experts: E, the number of experts.
        seed: of the sample.
        left_out: experts that are left out. Choices of them count as choices of no expert, as they
            do while the model runs.
        ranks: that the experts are divided over.
    """

    def __init__(
        self,
        routed: Routed,
        experts: int,
        seed: int,
        left_out: Sequence[int] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        generator = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(routed.hidden), generator=generator)[:SAMPLE].sort().values
        real = (routed.index[some] >= 0) & (routed.index[some] < experts)
        # [S] sum of each token's routing weights before experts are left out
        self._total = routed.weight[some].masked_fill(~real, 0).sum(1)
        real &= ~torch.isin(routed.index[some], torch.tensor(left_out, dtype=torch.int64))
        weight = routed.weight[some].masked_fill(~real, 0)
        self.sample = replace(routed.of_tokens(some), weight=weight)
        self._real = real
        shape = (*weight.shape, routed.hidden.shape[1])
        # [S, k, H], weighted
        self._outputs = empty(shape, torch.float32, routed.hidden.device).zero_()

    @torch.inference_mode()
    def add(self, expert: RoutedExpert) -> None:
        """Run one expert on its tokens of the sample."""
        expert = replace(expert, routed=self.sample, hidden=None)  # kept for other tokens
        token, place = expert.tokens, expert.places
        for chunk in chunks(token):
            y = expert.output(chunk).float().to(self._outputs.device)
            device = y.device
            gate = sent(expert.gate[chunk, None], device)
            self._outputs[sent(token[chunk], device), sent(place[chunk], device)] = y * gate

    @torch.inference_mode()
    def result(self, energy: float) -> dict[str, Tensor]:
        """The layer's rows of the arrays of `DropCosts`, and its `normalised`.

        Args:
            energy: median over tokens of the sum of squares of the layer's output states.
        """
        self._ranks.sum_up(self._outputs)
        weight, order = self.sample.weight.sort(dim=1, descending=True, stable=True)
        real = self._real.gather(1, order)
        # A token whose weights are all 0 (sigmoids that underflow) has ratios 0 / 0. It drops none.
        ratio = (weight / weight[:, :1]).nan_to_num(nan=1).masked_fill(~real, NO_EXPERT)[:, 1:]
        plain, renormalised = (
            torch.cat([c.double() for c in costs]) / energy
            for costs in zip(
                *(self._costs(chunk, order[chunk]) for chunk in chunks(weight)), strict=True
            )
        )
        bins = min(BINS, len(ratio))
        edges = torch.linspace(0, len(ratio), bins + 1).round().long()  # of bins, in tokens
        ratio, by_ratio = ratio.sort(dim=0)
        sizes = edges.diff().tolist()
        total = self._total
        return {
            "ratio": ratio[edges.clamp(max=len(ratio) - 1)].T.contiguous(),
            "cost": _bin_means(plain.gather(0, by_ratio), sizes).float(),
            "renormalised_cost": _bin_means(renormalised.gather(0, by_ratio), sizes).float(),
            "normalised": total.max() - total.min() <= EVEN_SUM * total.max(),
        }

    def _costs(self, chunk: slice, order: Tensor) -> tuple[Tensor, Tensor]:
        """Cost [s, k - 1] of each rank but the first, plain and renormalised.

        Args:
            chunk: tokens of the sample.
            order: [s, k], their choices by falling weight.
        """
        outputs = self._outputs[chunk]
        order = order.to(outputs.device)
        # [s, k] sum of the m largest
        weight = self.sample.weight[chunk].to(outputs.device).gather(1, order).cumsum(1)
        outputs = outputs.gather(1, order[..., None].expand_as(outputs))
        kept = outputs.cumsum(1)  # [s, k, H], y_m for m = 1 .. k
        scale = weight[:, -1:] / weight.clamp(min=torch.finfo(weight.dtype).tiny)
        plain = (kept[:, -1:] - kept).square().sum(-1)
        renormalised = (kept[:, -1:] - scale[..., None] * kept).square().sum(-1)
        return -plain.diff(dim=1).cpu(), -renormalised.diff(dim=1).cpu()


def _bin_means(values: Tensor, sizes: list[int]) -> Tensor:
    """Means [k - 1, Q] of consecutive rows of [S, k - 1], `sizes` rows a bin."""
    return torch.stack([rows.mean(0) for rows in values.split_with_sizes(sizes)], dim=1)


def drop_seed(seed: int, layer: int) -> int:
    """Seed of the sample of a layer's tokens on which dropping experts is measured."""
    return seed * 1_000_003 + layer


def drop_bytes(top_k: int) -> int:
    """Bytes of a layer's arrays in a file."""
    return (top_k - 1) * (BINS + 1 + 2 * BINS) * 4
