"""The expert stores that are open in this process, by number.

A store holds some of a model's experts in memory and reads the others from their files when they
are needed. The op `moepress::experts` gets the number of a store, since arguments of ops are plain.
`cpu/expert_store.py` is the implementation.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol
from weakref import WeakValueDictionary

from torch import Tensor

from moepress.errors import InputError


class Store(Protocol):
    """An open store."""

    number: int  # above 0

    def hold(self, layer: int, experts: Iterable[int]) -> AbstractContextManager[None]:
        """Context in which experts of a layer are in memory."""

    def at_hand(self, layer: int) -> Tensor:
        """[E] bool: which experts of a layer are in memory or being read."""

    def failure(self) -> Exception:
        """What to raise after a read has failed."""


OPEN: WeakValueDictionary[int, Store] = WeakValueDictionary()


def held(number: int, layer: int, expert: int) -> AbstractContextManager[None]:
    """Context in which an expert is in memory, for code that reads packed bytes by itself.

    Outside the context they may be zeros.

    Args:
        number: of the store; 0: none is needed.
        layer: in the store.
    """
    return nullcontext() if number == 0 else OPEN[number].hold(layer, [expert])


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """The experts of one layer in a store."""

    store: Store
    layer: int  # number in the store
    region: Tensor  # [bytes] uint8 of the whole store; zeros where no expert is
    gate_up_table: Tensor  # [E, 2] int64: first byte in the region, code bits
    down_table: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        refuse("copied")

    def __reduce__(self) -> NoReturn:
        refuse("saved or copied")


def refuse(what: str) -> NoReturn:
    """Raise InputError: `what` cannot be done to a model with experts in a store."""
    raise InputError(
        f"The experts of this model, or some of them, stay on disk, so it cannot be {what}. Open "
        "the folder on the CPU without `memory` for that."
    )
