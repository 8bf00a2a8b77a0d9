"""The sequences of a walk: their batches, the ranks that divide them, the passes of a loop."""

from __future__ import annotations

from torch import Tensor

from moepress.original.batches import batches
from moepress.original.division import Division
from moepress.original.loops import Loop
from moepress.ranks import Ranks


class Sequences:
    """The calibration sequences of a walk.

    S sequences with T tokens: those of this rank; one process has all. `division` has the others.
    Inside a loop the states of a walk are those of several passes of each sequence, [passes * S].

    Args:
        ids: [S of all ranks, L] int64 token ids.
        ranks: that divide the sequences.
        loop: the layers that run several times.
        tokens: of a batch; None: BATCH_TOKENS.
    """

    def __init__(self, ids: Tensor, ranks: Ranks, loop: Loop, tokens: int | None = None) -> None:
        self.loop = loop
        self.once = self.division = Division(ids, ranks, tokens)  # of one pass, and of `passes`
        self.ids = self.division.ids  # [S, L]
        self.of_ids = batches(self.ids, tokens)  # batches of one pass
        self.passes: tuple[int, ...] = (0,)  # that the states are in, one after the other

    def set_passes(self, passes: tuple[int, ...]) -> None:
        """Say which passes of the loop the states are in."""
        self.passes, count = passes, len(passes)
        self.division = self.once if count == 1 else self.once.repeated(count)

    @property
    def ranks(self) -> Ranks:
        """The ranks that walk together."""
        return self.division.ranks

    @property
    def tokens(self) -> int:
        """Number of tokens of all ranks, those of several passes counted once."""
        return self.once.all_ids.numel()

    @property
    def batches(self) -> list[slice]:
        """Slices of the states that go through a layer at a time."""
        starts = range(0, len(self.passes) * len(self.ids), max(1, len(self.ids)))
        return [slice(i + b.start, i + b.stop) for i in starts for b in self.of_ids]

    def tokens_of(self, batch: slice) -> slice:
        """The tokens of a batch, among those of this rank."""
        return self.division.tokens(batch)

    def rows_of(self, number: int) -> slice:
        """The states of pass `number`."""
        start = self.passes.index(number) * len(self.ids)
        return slice(start, start + len(self.ids))

    def call_number(self, layer: int, batch: int) -> int:
        """The place of a layer's call for a batch among all calls of the model."""
        return self.loop.call(layer, self.passes[batch // len(self.of_ids)])
