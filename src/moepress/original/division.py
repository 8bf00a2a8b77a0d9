"""The calibration sequences of a walk, divided over ranks: batch by batch, in turn.

A batch is the same slice of sequences for any number of ranks. So a layer computes the same numbers
of it, on whichever rank. What needs all batches gets them in their order. Inside a loop the batches
of all passes stand behind each other, and each rank has the same sequences in every pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moepress.original.batches import batches, empty
from moepress.ranks import Ranks


class Division:
    """Which sequences this rank has.

    T tokens of S sequences in all, T' of S' on this rank; S' may be 0 except on rank 0.

    Args:
        ids: [S, L] int64 token ids of all sequences.
        ranks: that the sequences are divided over.
        tokens: of a batch; None: BATCH_TOKENS.
    """

    def __init__(self, ids: Tensor, ranks: Ranks, tokens: int | None = None) -> None:
        self.ranks = ranks
        self.all_ids = ids
        self.length = ids.shape[1]
        found, count = batches(ids, tokens), ranks.count
        # The batches, as many at a time as there are ranks: batch i of a round is of rank i.
        self.rounds = [found[i : i + count] for i in range(0, len(found), count)]
        self.ids = self.own(ids)  # [S', L]

    def repeated(self, times: int) -> Division:
        """The same sequences several times over, as in the passes of a loop."""
        other, count = copy.copy(self), len(self.all_ids)
        other.ids, other.all_ids = self.ids.repeat(times, 1), self.all_ids.repeat(times, 1)
        starts = range(0, times * count, count)
        other.rounds = [
            [slice(i + b.start, i + b.stop) for b in together]
            for i in starts
            for together in self.rounds
        ]
        return other

    @property
    def batches(self) -> list[tuple[int, slice]]:
        """(rank, slice of all sequences) of each batch, in order."""
        return [owned for together in self.rounds for owned in enumerate(together)]

    @property
    def own_batches(self) -> list[slice]:
        """The batches of this rank, as slices of all sequences."""
        return [batch for rank, batch in self.batches if rank == self.ranks.rank]

    @property
    def sequences(self) -> list[int]:
        """Number of each sequence of this rank."""
        return [number for batch in self.own_batches for number in range(batch.start, batch.stop)]

    def tokens(self, batch: slice) -> slice:
        """The tokens of a batch."""
        return slice(batch.start * self.length, batch.stop * self.length)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part [S', ...] of [S, ...], or [T', ...] of [T, ...]; of one rank no copy."""
        if self.ranks.count == 1:
            return whole
        rows = len(whole) // len(self.all_ids)
        parts = (whole[b.start * rows : b.stop * rows] for b in self.own_batches)
        return torch.cat([whole[:0], *parts])

    def spread(self, whole: Tensor) -> None:
        """Fill [T, ...], of which each rank has its own part, on all ranks."""
        for rank, batch in self.batches:
            self.ranks.give(whole[self.tokens(batch)], rank)

    def everywhere(self, own: Tensor | None) -> Tensor:
        """[T, ...] on all ranks, from each rank's part [T', ...]. None: this rank has no tokens."""
        if self.ranks.count == 1:
            assert own is not None
            return own
        shape, dtype, device = self.ranks.agreed(lambda: _about(own))
        whole = empty((self.all_ids.numel(), *shape), dtype, device)
        for batch, local in self._places():
            assert own is not None
            whole[self.tokens(batch)] = own[self.tokens(local)]
        self.spread(whole)
        return whole

    def on_first(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Arrays [S, ...] or [T, ...] on rank 0, by name, from each rank's parts; {} on others.

        A name that a rank does not have is zero there.
        """
        ranks = self.ranks
        if ranks.count == 1:
            return dict(own)
        about: dict[str, Any] = {}
        for found in ranks.everyones({name: _about(value) for name, value in own.items()}):
            about = found | about  # rank 0 has sequences: its values tell the number of rows
        whole = {}
        for name in sorted(about):
            shape, dtype, _ = about[name]
            rows = self._rows(own.get(name))
            rows = ranks.agreed(lambda rows=rows: rows)  # type: ignore[misc]
            target = empty((len(self.all_ids) * rows, *shape), dtype) if ranks.first else None
            places = self._places()
            for owner, batch in self.batches:
                if ranks.rank not in (0, owner):
                    continue
                value = torch.zeros(((batch.stop - batch.start) * rows, *shape), dtype=dtype)
                if ranks.rank == owner and name in own:
                    _, local = next(places)
                    value.copy_(own[name][local.start * rows : local.stop * rows])
                ranks.give_first(value, owner)
                if target is not None:
                    target[batch.start * rows : batch.stop * rows] = value
            if target is not None:
                whole[name] = target
        return whole

    def total(self, values: Sequence[float]) -> float:
        """The sum of one number of each batch, in the order of the batches.

        Args:
            values: of this rank's batches.
        """
        by_rank = [iter(of_one) for of_one in self.ranks.everyones(list(values))]
        return sum(next(by_rank[rank]) for rank, _ in self.batches)

    def _rows(self, own: Tensor | None) -> int:
        """Rows of an array for each sequence: 1, or L."""
        return 1 if own is None or not len(self.ids) else len(own) // len(self.ids)

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """Each batch of this rank, as a slice of all sequences and of this rank's sequences."""
        done = 0
        for batch in self.own_batches:
            start, done = done, done + batch.stop - batch.start
            yield batch, slice(start, done)


def _about(value: Tensor | None) -> tuple[torch.Size, torch.dtype, torch.device]:
    assert value is not None  # rank 0 has sequences
    return value.shape[1:], value.dtype, value.device
