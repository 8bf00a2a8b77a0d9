"""Sums over the experts of a layer, for each token: of outputs forward, of gradients backward.

The experts are divided over ranks, and so are the tokens. A float sum depends on its order: each
token's terms are added in the order of the experts' numbers, whichever rank computed them. For that
the ranks exchange terms, not partial sums: k rows [H] for each token in place of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from moepress.original.batches import chunks, empty
from moepress.original.division import Division
from moepress.original.experts import Routed, RoutedExpert
from moepress.sending import sent


class TokenSums:
    """Sums for this rank's tokens, from rows that each expert gives for the tokens that chose it.

    Args:
        division: of the tokens.
        routed: of all tokens.
        numbers: of the experts, rising.
        device: of the computation.
        dtype: of the rows.
        weighted: multiply the rows of an expert by its routing weights.
    """

    def __init__(
        self,
        division: Division,
        routed: Routed,
        numbers: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        weighted: bool = True,
    ) -> None:
        self._division = division
        self._routed = routed
        self._weighted = weighted and not routed.scales_input
        ranks = division.ranks
        choices = torch.bincount(routed.index.flatten(), minlength=max(numbers, default=0) + 1)
        counts = choices[list(numbers)].tolist()
        # Half of an expert's time depends on its tokens, half is the same for all experts.
        mean = sum(counts) / max(1, len(counts))
        owners = ranks.owners([count + mean for count in counts])
        self.owners = dict(zip(numbers, owners, strict=True))  # the rank of each expert
        self.own = [n for n in numbers if self.owners[n] == ranks.rank]  # experts of this rank
        width = routed.hidden.shape[1]
        self._device = device
        self._starts: dict[int, int] = {}
        rows = 0
        if ranks.count > 1:
            for number, count in zip(numbers, counts, strict=True):
                if self.owners[number] == ranks.rank:
                    self._starts[number] = rows
                    rows += count
        self._rows = empty((rows, width), dtype, device)  # of one rank: none are kept

    @cached_property
    def _sums(self) -> Tensor:
        shape = self._division.ids.numel(), self._routed.hidden.shape[1]
        return empty(shape, torch.float32, self._device).zero_()

    def add(self, expert: RoutedExpert, chunk: slice, rows: Tensor) -> None:
        """Add rows [t, H] of an expert of this rank, for a chunk of its tokens."""
        if self._division.ranks.count == 1:
            self._add(rows, expert.tokens[chunk], expert.places[chunk], 0)
            return
        start = self._starts[expert.number]
        self._rows[start + chunk.start : start + chunk.stop] = rows

    def add_output(self, expert: RoutedExpert) -> None:
        """Add the output of an expert on its tokens."""
        for chunk in chunks(expert.tokens):
            self.add(expert, chunk, expert.output(chunk))

    def result(self) -> Tensor:
        """The sums [T', H] float32 of this rank's tokens."""
        ranks = self._division.ranks
        if ranks.count == 1:
            return self._sums
        done = 0
        for together in self._division.rounds:
            none = [self._rows[:0]] * (ranks.count - len(together))
            received = ranks.swap([*map(self._rows_of, together), *none])
            if ranks.rank < len(together):
                batch = self._division.tokens(together[ranks.rank])
                self._add_batch(received, batch, done)
                done += batch.stop - batch.start
        return self._sums

    def _rows_of(self, batch: slice) -> Tensor:
        """The rows of this rank's experts for the tokens of a batch, expert by expert."""
        tokens = self._division.tokens(batch)
        ends = torch.tensor([tokens.start, tokens.stop])
        parts = [self._rows[:0]]
        for number, start in self._starts.items():
            low, high = torch.searchsorted(self._routed.of(number)[0], ends).tolist()
            parts.append(self._rows[start + low : start + high])
        return torch.cat(parts)

    def _add_batch(self, received: Sequence[Tensor], batch: slice, start: int) -> None:
        """Add the rows of all ranks for a batch of this rank.

        Args:
            received: their bytes, by rank.
            batch: its tokens.
            start: place of the first of them among this rank's tokens.
        """
        width = self._rows.shape[1]
        rows = [part.view(self._rows.dtype).view(-1, width) for part in received]
        used = [0] * len(rows)
        for number, owner in self.owners.items():
            token, place = (self._routed.index[batch] == number).nonzero(as_tuple=True)
            first = used[owner]
            used[owner] += len(token)
            part = rows[owner][first : used[owner]]
            self._add(part, token + batch.start, place, start - batch.start)

    def _add(self, rows: Tensor, tokens: Tensor, places: Tensor, shift: int) -> None:
        """Add rows [t, H] to the sums of `tokens` [t], which are at `shift` + token."""
        rows = rows.float().to(self._sums.device)
        if self._weighted:
            rows = rows * sent(self._routed.weight[tokens, places, None], rows.device)
        self._sums.index_add_(0, sent(tokens + shift, rows.device), rows)
