"""What a walk will read next from an original's files: this layer, its experts, the next layer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

from moepress.original.read_ahead import Key, Need, ReadAhead

if TYPE_CHECKING:
    from moepress.original.source import Source


class Upcoming:
    """Reads the files of a source ahead of a walk: at most one layer, and as memory allows."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._reading = ReadAhead([], "")
        self._stop = weakref.finalize(self, self._reading.stop)
        self._next: int | None = None  # the layer that is needed after the one at work

    def tensors(self, names: Iterable[str], what: str) -> None:
        """Begin to read tensors that are not routed experts, in order.

        Args:
            what: they are, for people who wait for them.
        """
        self._begin(self._needs(names), what)

    def layer(self, layer: int, following: int) -> None:
        """Begin to read a decoder layer.

        Args:
            following: the layer that is needed after it.
        """
        self._next = following
        needs = self._layer(layer)
        if layer not in self._source.experts:  # else when its experts are read
            needs += self._layer(following)
        self._begin(needs, self._text(layer))

    def experts(self, layer: int, numbers: Iterable[int]) -> None:
        """Begin to read routed experts, in order, and then the next layer."""
        following = [] if self._next is None else self._layer(self._next)
        self._begin([*self._experts(layer, numbers), *following], self._text(layer))

    @property
    def following(self) -> int | None:
        """The layer that is needed after the one at work; None: not known."""
        return self._next

    def wait_for(self, key: Key) -> None:
        """Return when a tensor of the files is read, if it is among those that were begun.

        Another thread may begin with others meanwhile: then it counts whether it is among these.

        Raises:
            CheckpointError: its file cannot be read.
        """
        reading = None
        while reading is not self._reading:  # it ends when another takes its place
            reading = self._reading
            reading.wait_for(key)

    def _begin(self, needs: list[Need], what: str) -> None:
        stop = self._stop
        self._reading = ReadAhead(needs, what)
        self._stop = weakref.finalize(self, self._reading.stop)  # or its thread would outlive us
        stop()  # now, so that whoever waits finds what took its place

    def _layer(self, layer: int) -> list[Need]:
        """A decoder layer, then its routed experts; nothing if there is no such layer."""
        source = self._source
        if not 0 <= layer < len(source.layers):
            return []
        count = source.experts[layer].experts if layer in source.experts else 0
        needs = self._needs(source.names(source.layer_paths[layer]))
        return [*needs, *self._experts(layer, range(count))]

    def _experts(self, layer: int, numbers: Iterable[int]) -> list[Need]:
        """The weights of routed experts, one expert after the other."""
        if layer not in self._source.experts:
            return []
        form = self._source.experts[layer].form
        parts = form.gate_up, form.down
        rows = {name: part.rows for part in parts for name in part.names}
        rows |= {part.bias: 1 for part in parts if part.bias is not None}
        needs = (
            self._needs([name], number, count) for number in numbers for name, count in rows.items()
        )
        return list(dict.fromkeys(chain.from_iterable(needs)))

    def _needs(self, names: Iterable[str], expert: int | None = None, rows: int = 1) -> list[Need]:
        """The bytes of parameters, or of what they have of one expert, each once.

        Args:
            rows: entries of a parameter's first dimension that belong to one expert.
        """
        source = self._source
        keys = dict.fromkeys(key for name in names for key in source.reads(name, expert))
        return [Need(key, source.checkpoint.places(*key, rows)) for key in keys]

    def _text(self, layer: int) -> str:
        return f"layer {layer + 1} of {len(self._source.layers)}"
