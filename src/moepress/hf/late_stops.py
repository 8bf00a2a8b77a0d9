"""`generate` learns one step late that a text has ended: the card then never waits for Python.

After every token transformers reads from the card whether the text goes on. Only then Python
prepares the next step, while the card does nothing. For Apple's devices transformers (from 5.17 on)
reads what the step before has copied to the host, while the next step runs, and throws away the
token too many (`DeferredStopCheck`). Inside of `late_stops` it does so for other devices too.

A cache that the caller keeps would have a token too many: for those nothing changes.

The function of transformers that decides this is replaced at the first use, for good. Where nobody
asks for late stops, ours passes its arguments and its answer through.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers.generation import utils

MARK = "_moepress_asks"
ASKED = {"device", "cache_is_returned", "is_assistant"}  # parameters that decide

_local = threading.local()


@dataclass(frozen=True, eq=False)
class _Asked:
    """A request for late stops."""

    device_type: str
    wanted: Callable[[], bool]


def _requests() -> list[_Asked]:
    """Those of this thread; the last one counts."""
    if not hasattr(_local, "requests"):
        _local.requests = []
    found: list[_Asked] = _local.requests
    return found


@contextmanager
def late_stops(device_type: str, wanted: Callable[[], bool]) -> Iterator[None]:
    """Inside the `with` statement, texts end a step late, for calls of this thread.

    Requests may end in any order, and in another thread: each takes back its own.

    Args:
        device_type: of the tokens, such as "cuda".
        wanted: whether they shall, asked after each prompt.
    """
    _wrap()
    requests, asked = _requests(), _Asked(device_type, wanted)
    requests.append(asked)
    try:
        yield
    finally:
        requests.remove(asked)


def _wrap() -> None:
    """Put our function in the place of the one that transformers asks, if this release has it."""
    check = getattr(utils, "DeferredStopCheck", None)
    if check is None or getattr(check.is_supported, MARK, False):
        return
    plain = check.is_supported
    signature = inspect.signature(plain)

    def is_supported(*args: Any, **kwargs: Any) -> bool:
        supported = bool(plain(*args, **kwargs))
        given = signature.bind(*args, **kwargs).arguments
        requests = _requests()
        if supported or not requests or not given.keys() >= ASKED:
            return supported
        asked = requests[-1]
        kept = given["cache_is_returned"] or given["is_assistant"]
        # A CPU has no events, and nothing waits for it.
        here = given["device"].type == asked.device_type != "cpu"
        return here and not kept and asked.wanted()

    setattr(is_supported, MARK, True)
    check.is_supported = staticmethod(is_supported)
