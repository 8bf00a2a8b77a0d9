"""Ranks: the processes that torchrun starts, which divide the work of one compression.

    torchrun --nproc-per-node 4 -m moepress compress MODEL OUT --bits 2.5

All ranks run the same program and meet in the methods of `Ranks`, which all of them call in the
same order. One process alone is a job of one rank: then the methods exchange nothing.

Who does what: the calibration sequences are divided batch by batch (original/division.py), the
experts of a layer and the linears of a layer by their loads (`owners`). Rank 0 decides what there
is to do, and it alone writes (`agreed`). Results do not depend on the number of ranks: nothing is
summed in an order that does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from moepress.errors import MoepressError

T = TypeVar("T")
CPU = torch.device("cpu")

# The longest that ranks wait for each other to begin: imports from a slow disk take minutes.
TO_BEGIN = timedelta(minutes=30)
# The longest that a rank waits for another one that is alive. That one may be slow and well: rank 0
# may let the model write its calibration text, a layer may take hours. Of a rank that ended, the
# others hear at once.
PATIENCE = timedelta(days=14)
BYTES_AT_ONCE = 1 << 26  # of a sum over ranks; bounds the copy that is exchanged


class RankError(MoepressError):
    """Another rank of the job ended."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU  # through whose memory tensors are exchanged

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which decides and writes."""
        return self.rank == 0

    def agreed(self, decide: Callable[[], T]) -> T:
        """What `decide` returns on rank 0, the only one that calls it. Large tensors: see `give`.

        Raises:
            MoepressError: what `decide` raised, on all ranks.
        """
        if self.count == 1:
            return decide()
        told: list[Any] = [_outcome(decide) if self.first else None]
        with _with_peers():
            dist.broadcast_object_list(told, 0)
        value, error = told[0]
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def everyones(self, value: T) -> list[T]:
        """The values of all ranks, by rank: small ones."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with _with_peers():
            dist.all_gather_object(found, value)
        return found

    def owners(self, loads: Sequence[float]) -> list[int]:
        """The rank of each of some tasks: the longest first, each to the rank with least to do.

        Args:
            loads: time of each task, in any unit. The same on all ranks.
        """
        given = [0.0] * self.count
        found = [0] * len(loads)
        for task in sorted(range(len(loads)), key=lambda task: -loads[task]):
            rank = min(range(self.count), key=given.__getitem__)
            found[task] = rank
            given[rank] += loads[task]
        return found

    def give(self, tensor: Tensor, owner: int) -> None:
        """Fill `tensor`, of equal shape and dtype on all ranks, with the one of rank `owner`."""
        if self.count == 1 or not tensor.numel():
            return
        staged = _as_bytes(tensor, self.device)
        with _with_peers():
            self._meet()
            dist.broadcast(staged, owner)
        if self.rank != owner:
            _fill(tensor, staged)

    def give_first(self, tensor: Tensor, owner: int) -> None:
        """`give` for rank 0 only: on other ranks the tensor stays as it is."""
        if owner == 0 or self.rank not in (0, owner) or not tensor.numel():
            return
        staged = _as_bytes(tensor, CPU)
        with _with_peers():
            if self.rank == owner:
                dist.send(staged, 0)
            else:
                dist.recv(staged, owner)
        if self.rank != owner:
            _fill(tensor, staged)

    def swap(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send one tensor to each rank.

        Args:
            parts: by receiver.

        Returns:
            The bytes [n] uint8 of what each rank sent to this one, by sender.
        """
        staged = [_as_bytes(part, self.device) for part in parts]
        sizes = self.everyones([len(part) for part in staged])
        incoming = [of_one[self.rank] for of_one in sizes]
        received = torch.empty(sum(incoming), dtype=torch.uint8, device=self.device)
        with _with_peers():
            self._meet()
            dist.all_to_all_single(received, torch.cat(staged), incoming, [*map(len, staged)])
        return list(torch.split(received, incoming))

    def sum_up(self, tensor: Tensor) -> None:
        """Sum `tensor` over the ranks, in place. At each place all ranks but one have zero.

        So the sum does not depend on an order.
        """
        if self.count == 1:
            return
        flat = tensor.view(-1)
        for part in torch.split(flat, BYTES_AT_ONCE // tensor.element_size()):
            staged = part.to(self.device)
            with _with_peers():
                self._meet()
                dist.all_reduce(staged)
            if staged is not part:
                part.copy_(staged)

    def _meet(self) -> None:
        """Before cards exchange something: wait on the CPU until all ranks have come.

        There a rank that ended is an error at once. NCCL would wait, busily, for its own timeout.
        """
        if self.device.type == "cuda":
            dist.all_reduce(torch.zeros(1))


ALONE = Ranks()
_joined = ALONE
_store: Any = None  # of the job: it outlives the ranks


def here(device: torch.device | None = None) -> Ranks:
    """This process among those of its job; `ALONE` outside of `joined`.

    Args:
        device: of the computation. Cards exchange tensors directly if each rank has its own.
    """
    if device is None or device.type != "cuda" or own_card() is None:
        return _joined
    return replace(_joined, device=device)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Be one of the ranks that torchrun started, inside the `with` statement.

    On a machine with cards each rank gets the card of its number on the machine.

    Raises:
        RankError: the ranks do not find each other.
    """
    global _joined, _store
    card = own_card()
    if card is not None:
        torch.cuda.set_device(card)
    cards = torch.cuda.is_available() and dist.is_nccl_available()
    with _with_peers():
        _store, rank, count = next(rendezvous("env://", timeout=TO_BEGIN))
        _store.set(_key(f"began/{rank}"), "")
        _store.wait([_key(f"began/{other}") for other in range(count)], TO_BEGIN)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cards else "gloo",
            store=_store, rank=rank, world_size=count, timeout=PATIENCE,
        )  # fmt: skip
    _joined = Ranks(rank, count)
    try:
        yield _joined
        with _with_peers():
            dist.barrier()  # a rank that leaves early would look like one that failed
        dist.destroy_process_group()  # after an error it could wait for ranks that are gone
    finally:
        _joined = ALONE


def tells() -> bool:
    """Whether this rank is the first on its machine with an error to tell; later ones are silent.

    An error of one rank makes others fail too, and only the first one says why. Each machine has a
    terminal of its own.
    """
    if _store is None:  # before the ranks have found each other
        return os.environ.get("RANK", "0") == "0"
    try:
        return int(_store.add(_key(f"errors/{os.environ.get('GROUP_RANK')}"), 1)) == 1
    except (RuntimeError, OSError):  # torchrun's own process has ended
        return True


def ranks_here() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _joined.count > 1 else 1


def own_card() -> int | None:
    """The card of this rank, of its number on the machine; None: not each rank here has its own."""
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() >= together else None


def _key(name: str) -> str:
    """A key of the store. torchrun may start the ranks again, with the same store."""
    return f"moepress/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{name}"


def _outcome(decide: Callable[[], T]) -> tuple[T | None, MoepressError | None]:
    try:
        return decide(), None
    except MoepressError as error:
        return None, error


@contextmanager
def _with_peers() -> Iterator[None]:
    """Inside the `with` statement, turn errors of communication into one that says what to do."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise RankError(
            "Another rank of this job has ended, was killed, or cannot be reached; torchrun says "
            "which (exit code -9: often for want of memory). Everything finished is kept: run the "
            "same command again to go on, with any number of ranks."
        ) from error


def _as_bytes(tensor: Tensor, device: torch.device) -> Tensor:
    """The bytes [n] uint8 of a tensor on a device: its own memory, or a copy."""
    return tensor.detach().to(device).contiguous().view(-1).view(torch.uint8)


def _fill(tensor: Tensor, staged: Tensor) -> None:
    if tensor.data_ptr() != staged.data_ptr():
        tensor.copy_(staged.view(tensor.dtype).view(tensor.shape))
