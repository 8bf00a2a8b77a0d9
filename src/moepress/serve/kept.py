"""What the model keeps of texts whose answers are done, for prompts that begin like them."""

from __future__ import annotations

from collections.abc import Callable

from moepress.hf.prefix import common
from moepress.serve.stepping import State


class Kept:
    """Sequences that nobody goes on with, the one used last at the end.

    Args:
        reach: how many first tokens of a text can be taken from a sequence (`Stepper.reach`).
        nbytes: memory of a sequence.
    """

    def __init__(
        self, reach: Callable[[State, list[int]], int], nbytes: Callable[[State], int]
    ) -> None:
        self._reach = reach
        self._nbytes = nbytes
        self._states: list[State] = []

    @property
    def held(self) -> int:
        """Bytes of all of them."""
        return sum(map(self._nbytes, self._states))

    def add(self, state: State, most: int) -> None:
        """Keep a sequence in place of those that are a part of it.

        Args:
            most: bytes that all of them may take.
        """
        if not state.length or state.images or self._nbytes(state) > most:
            return
        self._states = [one for one in self._states if common(one.ids, state.ids) < one.length]
        self._states.append(state)
        self.make_room(most)

    def best(self, ids: list[int]) -> tuple[State, int] | None:
        """The sequence that most first tokens of a text can be taken from, and how many."""
        found = [(self._reach(state, ids), state) for state in self._states]
        first, state = max(found, key=lambda one: one[0], default=(0, None))
        return (state, first) if first and state is not None else None

    def take(self, state: State) -> None:
        """Remove a sequence: somebody goes on with it."""
        self._states.remove(state)

    def make_room(self, most: int, last: State | None = None) -> None:
        """Drop those used longest ago, until they take so many bytes at most.

        Args:
            last: one that is used now.
        """
        if last is not None:
            self._states.remove(last)
            self._states.append(last)
        over = self.held - most
        while over > 0 and self._states:
            over -= self._nbytes(self._states.pop(0))
