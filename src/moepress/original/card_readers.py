"""Read experts for a card ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from moepress.original.experts import ExpertWeights

READERS = 4  # threads; one alone would keep the card waiting


class CardReaders:
    """Threads that read experts to a card, each on a stream of its own.

    Args:
        device: the card.
    """

    def __init__(self, device: torch.device) -> None:
        # Streams are kept, because freed memory is only used again on its stream.
        self._streams = [
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(READERS)
        ]

    def in_turn(
        self, expert: Callable[[int], ExpertWeights], numbers: Iterable[int]
    ) -> Iterator[ExpertWeights]:
        """`expert` of each of `numbers`; the next ones are read while one is in use.

        They are made on other streams than they are used on: see `in_use`.
        """

        def read(number: int, stream: torch.cuda.Stream) -> ExpertWeights:
            with torch.cuda.stream(stream):
                weights = expert(number)
            stream.synchronize()
            return weights

        with ThreadPoolExecutor(READERS) as pool:
            ahead: deque[Future[ExpertWeights]] = deque()
            for place, number in enumerate(numbers):
                ahead.append(pool.submit(read, number, self._streams[place % READERS]))
                if len(ahead) > READERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


def in_use(weights: ExpertWeights, device: torch.device) -> ExpertWeights:
    """Weights of `CardReaders`, whose memory is kept until the current stream is done with them.

    To be called in the thread that uses them: each thread has a current stream of its own.
    """
    stream = torch.cuda.current_stream(device)
    for value in weights:
        if value is not None:
            value.record_stream(stream)
    return weights
