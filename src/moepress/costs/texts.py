"""The calibration text that each token comes from. Costs are kept text by text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.text.windows import divide


@dataclass(frozen=True)
class Texts:
    """The D texts of a calibration set, and the text of each token."""

    count: int  # D
    of_token: Tensor  # [T] int64, 0 .. D - 1

    @classmethod
    def of(cls, ids: Tensor, weights: Sequence[float]) -> Texts:
        """The texts of sequences `ids` [S, L], which were drawn in proportion to `weights` [D]."""
        sequences = torch.tensor(divide(len(ids), weights))
        of_sequence = torch.arange(len(weights)).repeat_interleave(sequences)
        return cls(len(weights), of_sequence.repeat_interleave(ids.shape[1]))

    def some(self, sequences: Tensor, length: int) -> Texts:
        """The texts of some of the sequences, given by their numbers, of `length` tokens each."""
        return Texts(self.count, self.of_token.view(-1, length)[sequences].flatten())

    def shares_of(self, whole: Texts) -> Tensor:
        """[D] float64: the share of the tokens that each text has in `whole`, over that here.

        Exactly 1 where both are the same.
        """
        here, there = self.tokens(), whole.tokens()
        return (there * len(self.of_token)).double() / (here * len(whole.of_token)).double()

    def repeated(self, times: int) -> Texts:
        """The texts of the same tokens several times over, as in the passes of a loop."""
        return self if times == 1 else Texts(self.count, self.of_token.repeat(times))

    def sums(self, values: Tensor, tokens: Tensor | None = None) -> Tensor:
        """[D] sum of values over the tokens of each text.

        Args:
            values: of all tokens [T], or of `tokens` [t].
            tokens: [t] int64; None: all.
        """
        of_token = self.of_token if tokens is None else self.of_token[tokens]
        return torch.bincount(of_token, values, minlength=self.count)

    def tokens(self) -> Tensor:
        """[D] int64 number of tokens of each text."""
        return torch.bincount(self.of_token, minlength=self.count)

    def shares(self) -> Tensor:
        """[D] float64 share of the tokens that each text has."""
        return self.tokens().double() / len(self.of_token)
