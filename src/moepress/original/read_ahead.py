"""Read an original's files in a thread, ahead of the work that needs them.

Weights are mapped files: the first use of a page fetches it, a small piece at a time, while the
computation waits. Here a thread reads the same bytes earlier, in large pieces, in the order of
their use, and discards them; where there are many cores, several threads share a tensor. The system
keeps them in memory as long as there is room, so a weight does not depend on this thread. Bytes
that cannot be read are an error with the name of the file; at a mapped page they would end the
process.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from moepress.byte_units import size_text
from moepress.errors import CheckpointError
from moepress.memory import free_host_memory
from moepress.progress import TELL_AFTER, TELL_AGAIN, announce
from moepress.ranks import ranks_here

PIECE = 4 << 20  # bytes that are read at a time
CORES_PER_READER = 4  # one thread reads 2 to 3 GB/s, a card takes more
MOST_READERS = 4
SHARE = 0.5  # of free memory, that bytes ahead of the work may take

Key = tuple[str, int | None]  # of a tensor of the checkpoint; row of it that is needed, None: all


class Place(NamedTuple):
    """Bytes of a file."""

    path: Path
    start: int
    stop: int


class Need(NamedTuple):
    """What the work will need at some time."""

    key: Key
    places: tuple[Place, ...]

    @property
    def nbytes(self) -> int:
        return sum(stop - start for _, start, stop in self.places)


class ReadAhead:
    """A thread that reads what will be needed, until it has read all of it or is stopped.

    It is ahead of the work by SHARE of the memory that is free at the beginning, or less; ranks on
    one machine share that. What the work waits for is read in any case.

    Args:
        needs: in the order of their use.
        what: they are, for people.
    """

    def __init__(self, needs: Sequence[Need], what: str) -> None:
        self._needs = needs
        self._what = what
        self._numbers = {need.key: number for number, need in enumerate(needs)}
        self._ends = list(accumulate(need.nbytes for need in needs))
        self._window = SHARE * free_host_memory() / ranks_here()
        self._changed = threading.Condition()
        self._read = 0  # number of needs that are read
        self._used = 0  # the last need that the work asked for
        self._bytes = 0  # read so far
        self._seconds = 0.0  # that these took
        self._since: float | None = None  # when the places were asked for that are being read
        self._at = Path()  # the file that is being read
        self._error: BaseException | None = None
        self._stopped = False
        self._waited = 0.0  # seconds that the work has waited
        self._tell_at = TELL_AFTER
        if needs:
            threading.Thread(target=self._run, name="moepress-read-ahead", daemon=True).start()

    def wait_for(self, key: Key) -> None:
        """Return when a need is read; at once if it is not among those given.

        Says on stderr what it waits for, after TELL_AFTER seconds of waiting.

        Raises:
            CheckpointError: its file cannot be read.
        """
        number = self._numbers.get(key)
        if number is None or number < self._read:
            return
        with self._changed:
            if number > self._used:
                self._used = number
                self._changed.notify_all()
            while number >= self._read and self._error is None and not self._stopped:
                self._wait()
            if number >= self._read and self._error is not None:
                raise self._error

    def stop(self) -> None:
        """End the thread, after the piece that it reads now."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _wait(self) -> None:
        """Wait for a change; tell it when the work has waited for long."""
        began = time.monotonic()
        self._changed.wait(max(0.0, self._tell_at - self._waited))
        self._waited += time.monotonic() - began
        if self._waited >= self._tell_at:
            self._tell_at = self._waited + TELL_AGAIN
            announce("waiting", self._describe)

    def _describe(self) -> str:
        """What is waited for: "for layer 3 of 32: model-00002.safetensors comes at 31 MB/s"..."""
        since, seconds = self._since, self._seconds
        seconds += 0.0 if since is None else time.monotonic() - since
        rate = self._bytes / max(seconds, 1e-3)
        return (
            f"for {self._what}: {self._at.name} comes at {size_text(rate)}/s, "
            f"{size_text(self._bytes)} of {size_text(self._ends[-1])} are read"
        )

    def _run(self) -> None:
        try:
            readers = max(1, min(MOST_READERS, (os.cpu_count() or 1) // CORES_PER_READER))
            for number, need in enumerate(self._needs):
                if not self._wait_until_allowed(number):
                    return
                for place in need.places:
                    self._at = place.path
                    self._since = time.monotonic()
                    self._read_parts(list(_parts(place, readers)))
                    self._seconds += time.monotonic() - self._since
                    self._since = None
                with self._changed:
                    self._read = number + 1
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = _told(error, self._at)
                self._changed.notify_all()

    def _wait_until_allowed(self, number: int) -> bool:
        """Wait until a need lies within the window; False if the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._may_read(number))
            return not self._stopped

    def _may_read(self, number: int) -> bool:
        ahead = self._ends[number] - self._ends[self._used]
        return number <= self._used or ahead <= self._window

    def _read_parts(self, parts: Sequence[Place]) -> None:
        """Read the first part here, and each of the others in a thread of its own."""
        errors: list[BaseException] = []

        def read(part: Place) -> None:
            try:
                self._read_place(part)
            except BaseException as error:
                errors.append(error)

        # Daemons: a process can end while a disk does not answer.
        others = [threading.Thread(target=read, args=(p,), daemon=True) for p in parts[1:]]
        for thread in others:
            thread.start()
        for part in parts[:1]:
            read(part)
        for thread in others:
            thread.join()
        if errors:
            raise errors[0]

    def _read_place(self, place: Place) -> None:
        left = place.stop - place.start
        buffer = memoryview(bytearray(min(left, PIECE)))
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.start)
            while left and not self._stopped:
                count = file.readinto(buffer[: min(left, PIECE)])
                if not count:  # it may end before this part begins
                    end = min(place.stop - left, os.fstat(file.fileno()).st_size)
                    raise CheckpointError(
                        f"{place.path} ends at byte {end:,}. Expected "
                        f"{place.stop:,} bytes at least, as at the beginning: it was cut or "
                        "replaced meanwhile; fetch it again."
                    )
                left -= count
                with self._changed:
                    self._bytes += count


def _parts(place: Place, count: int) -> Iterator[Place]:
    """A place in at most `count` parts of whole pieces."""
    pieces = -(-(place.stop - place.start) // PIECE)
    size = max(1, -(-pieces // count)) * PIECE
    for start in range(place.start, place.stop, size):
        yield Place(place.path, start, min(start + size, place.stop))


def _told(error: BaseException, path: Path) -> BaseException:
    """What the work raises for an error of the thread."""
    if not isinstance(error, OSError):
        return error
    told = CheckpointError(
        f"{path} cannot be read: {error.strerror or error}. Expected a file that stays readable "
        "while it is used: check its disk or network, and run the same command again."
    )
    told.__cause__ = error
    return told
