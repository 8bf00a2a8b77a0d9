"""The hook in front of a decoder layer's experts that drops choices, and its counts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moepress import kernels
from moepress.blocks import adapt
from moepress.errors import InputError
from moepress.kernels.divided import packed_experts
from moepress.kernels.reference import with_sum_of
from moepress.original.architectures import decoder_layers, text_experts
from moepress.pruning.capture import capture_attention, current_record
from moepress.pruning.importance import protected_tokens
from moepress.pruning.left_out import left_out_table, without_left_out
from moepress.pruning.rule import Pruning

# An attribute of transformers' own experts: true makes them ignore choices of "no expert". Older
# versions have none: there the loop over experts fails on such choices, the others ignore them.
IGNORES_NO_EXPERT = "_is_expert_parallel"
LOOP = "eager"  # the implementation that is a loop
FAILING_LOOPS = ("GptOssExperts",)  # classes whose loop fails although they have the attribute

_COUNTING = threading.Lock()  # several threads may run one model


def pruned_layers(model: nn.Module, pruning: Pruning, count: bool) -> list[PrunedLayer]:
    """The layers of a model in which choices are dropped; with `count` all that have experts.

    Raises:
        InputError: the pruning has thresholds for a layer without routed experts.
    """
    adapt(model)
    found = {}
    for number, layer in enumerate(decoder_layers(model)):
        for module in (*packed_experts(layer).values(), *text_experts(layer)):
            found[number] = layer, module
    pruning.check_layers(found.keys(), type(model).__name__)
    return [
        PrunedLayer(number, *found[number], pruning, count)
        for number in sorted(found)
        if count or any((*pruning.thresholds.get(number, ()), *pruning.absent.get(number, ())))
    ]


class PrunedLayer:
    """A decoder layer whose choices of experts are dropped by thresholds, and counted.

    Args:
        number: of the decoder layer, for messages and thresholds.
        layer: the decoder layer.
        experts: the module of its routed experts.
        pruning: where it has no thresholds for the layer, choices are only counted.
        count: whether to count.
    """

    def __init__(
        self, number: int, layer: nn.Module, experts: Any, pruning: Pruning, count: bool
    ) -> None:
        self.number = number
        self._layer = layer
        self._experts = experts
        self._pruning = pruning
        self._thresholds = torch.tensor(pruning.thresholds.get(number, ()), dtype=torch.float32)
        self._absent = torch.tensor(pruning.absent.get(number, ()), dtype=torch.float32)
        self._left_out = left_out_table(getattr(experts, "left_out", ()), experts.num_experts)
        self._count = count
        self.tokens = 0
        self.dropped = torch.zeros(len(self._thresholds), dtype=torch.int64)  # [k] by rank
        self.absent = torch.zeros_like(self.dropped)  # of them, because of a read
        self.protected = torch.zeros((), dtype=torch.int64)
        self._choices = self._saved = 0  # all, and those dropped, for the share

    def attach(self) -> list[Callable[[], None]]:
        """Prune from now on. Returns calls that undo it."""
        undo: list[Callable[[], None]] = [
            self._experts.register_forward_pre_hook(self._before_experts).remove
        ]
        if not len(self._thresholds):
            return undo
        if self._pruning.protect > 0:
            undo += capture_attention(self._layer, self._pruning.protect)
        if hasattr(self._experts, IGNORES_NO_EXPERT):
            before = getattr(self._experts, IGNORES_NO_EXPERT)
            undo.append(partial(setattr, self._experts, IGNORES_NO_EXPERT, before))
            setattr(self._experts, IGNORES_NO_EXPERT, True)
        return undo

    def _before_experts(
        self, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, index, weights = args
        if not len(self._thresholds):
            with _COUNTING:
                self.tokens += len(hidden)
                self.dropped = self.absent = torch.zeros(index.shape[1], dtype=torch.int64)
            return args
        if index.shape[1] != len(self._thresholds):
            raise InputError(
                f"Layer {self.number} chooses {index.shape[1]} experts for a token, but the "
                f"pruning has {len(self._thresholds)} thresholds. It was made for another model."
            )
        if self._left_out.device != index.device:
            self._thresholds = self._thresholds.to(index.device)
            self._absent = self._absent.to(index.device)
            self._left_out = self._left_out.to(index.device)  # last: other threads look at it
        # Choices of experts that are left out cost no time: they must not use up the ranks, and
        # the dropped share, of experts that do.
        index = without_left_out(index, self._left_out, self._experts.num_experts)
        protected = None
        if self._pruning.protect > 0:
            protected = protected_tokens(hidden, current_record(), self._pruning.protect)
        index, weights, dropped = kernels.drop(
            index,
            weights,
            self._thresholds,
            self._pruning.renormalise,
            protected,
            self._experts.num_experts,
        )
        unread = None
        if len(self._absent):
            index, weights, unread = self._drop_reads(index, weights, dropped, protected)
            dropped = dropped | unread
        if self._count:
            if unread is not None:
                with _COUNTING:
                    self.absent += unread.sum(0).cpu()
            by_rank = dropped.sum(0).cpu()
            kept = 0 if protected is None else protected.sum().cpu()
            with _COUNTING:
                self.tokens += len(hidden)
                self.dropped += by_rank
                self.protected += kept
        if _fails_without_expert(experts):  # the first choice again, with weight 0
            index = torch.where(index < self._experts.num_experts, index, index[:, :1])
        return hidden, index, weights

    def _drop_reads(
        self, index: Tensor, weights: Tensor, dropped: Tensor, protected: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Also drop choices of small weight whose expert would have to be read, up to a share.

        Only where that saves the read: not where another choice of the call needs the expert.

        Args:
            index, weights, dropped: [T, k], by falling weight, as `kernels.drop` returns them.
            protected: [T] bool, or None.

        Returns:
            index and weights [T, k], and what was dropped here, [T, k] bool.
        """
        stored, none = getattr(self._experts, "stored", None), self._experts.num_experts
        unread = torch.zeros_like(dropped)
        if stored is not None:
            here = index.new_ones(none + 1, dtype=torch.bool)  # the last: no expert
            here[:none] = stored.store.at_hand(stored.layer)
            chosen = index.clamp(0, none)
            unread = ~here[chosen] & (weights.float() < self._absent * weights[:, :1].float())
            if protected is not None:
                unread &= ~protected[:, None]
            needed = torch.zeros_like(here)
            needed[chosen[~unread]] = True
            unread &= ~needed[chosen]
        with _COUNTING:
            self._choices += index.numel()
            saved = self._saved + int((dropped | unread).sum())
            if saved > self._pruning.most * self._choices:
                unread, saved = torch.zeros_like(dropped), self._saved + int(dropped.sum())
            self._saved = saved
        if not unread.any():
            return index, weights, unread
        kept = weights.masked_fill(unread, 0)
        if self._pruning.renormalise:
            kept = with_sum_of(weights, kept)
        return index.masked_fill(unread, none), kept, unread


def _fails_without_expert(experts: nn.Module) -> bool:
    config = getattr(experts, "config", None)
    loop = getattr(config, "_experts_implementation", None) == LOOP
    ignores = hasattr(experts, IGNORES_NO_EXPERT) and type(experts).__name__ not in FAILING_LOOPS
    return loop and not ignores
