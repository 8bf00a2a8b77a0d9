"""The program of a multiple-choice knapsack, with scaled costs and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from moepress.allocation.arrays import Floats, Ints, Mask, at


@dataclass(frozen=True)
class Program:
    """A multiple-choice knapsack of I items with C options each, in G groups of M items.

    Costs are scaled so that the largest difference between options of an item is 1. Sizes are in
    units of the greatest common divisor of all differences between options of an item. A choice [I]
    is the index of one option for each item.
    """

    excess: Floats  # [I, C] cost above that of the item's cheapest option, within [0, 1]
    sizes: Ints  # [I, C] size above that of the item's smallest option
    capacity: int
    members: Ints  # [G, M] items of each group
    required: tuple[int, ...]  # options that each group uses at least once

    @classmethod
    def of(
        cls, costs: Floats, sizes: Ints, capacity: int, members: Ints, required: Sequence[int]
    ) -> Program:
        """The program with costs and sizes in its own units. Arguments as for `knapsack.solve`."""
        excess = costs - costs.min(axis=1, keepdims=True)
        smallest = sizes.min(axis=1, keepdims=True)
        unit = int(np.gcd.reduce(sizes - smallest, axis=None)) or 1
        return cls(
            excess / (excess.max() or 1.0),
            (sizes - smallest) // unit,
            (capacity - int(smallest.sum())) // unit,
            members,
            tuple(required),
        )

    def room(self, choice: Ints) -> int:
        """What a choice leaves of the budget; negative if it does not fit."""
        return self.capacity - int(at(self.sizes, choice).sum())

    def group_of(self) -> Ints:
        """[I] group of each item; all 0 if no options are required."""
        groups = np.zeros(len(self.sizes), dtype=np.int64)
        if self.required:
            groups[self.members] = np.arange(len(self.members))[:, None]
        return groups

    def at_price(self, price: float) -> tuple[Ints, Floats]:
        """The cheapest choice [I] if a unit of budget costs `price`, and the reduced costs [I, C].

        The reduced cost of an option is its cost plus price * size, less the least such sum of its
        item. The choice uses the required options in every group.
        """
        total = self.excess + price * self.sizes
        choice = total.argmin(axis=1)
        # min(axis=1) is slow on such short rows; reuse the argmin.
        reduced = total - at(total, choice)[:, None]
        for items in self.members if self.required else ():
            offers = reduced[items][:, list(self.required)]
            rows, places = linear_sum_assignment(offers)
            choice[items[rows]] = np.array(self.required)[places]
        return choice, reduced

    def choice_at(self, price: float) -> Ints:
        """The choice of `at_price` alone, in less time."""
        if self.required:
            return self.at_price(price)[0]
        return np.asarray((self.excess + price * self.sizes).argmin(axis=1))

    def representatives(self, choice: Ints) -> Mask:
        """[I] one item for each group and required option; these items must keep their option."""
        held = np.zeros(len(choice), dtype=np.bool_)
        for option in self.required:
            found = choice[self.members] == option
            held[self.members[np.arange(len(found)), found.argmax(axis=1)]] = True
        return held

    def cover_cost(self, reduced: Floats, without: int | None = None) -> Floats:
        """[G] how much the bound rises because a group must use its required options.

        Args:
            reduced: [I, C] reduced costs.
            without: an option that is not required here.
        """
        options = [option for option in self.required if option != without]
        rises = np.zeros(len(self.members))
        for group, items in enumerate(self.members if options else ()):
            offers = reduced[items][:, options]
            rises[group] = offers[linear_sum_assignment(offers)].sum()
        return rises
