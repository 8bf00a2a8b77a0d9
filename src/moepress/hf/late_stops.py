"""`generate` learns one step late that a text has ended: the card then never waits for Python.

After every token transformers reads from the card whether the text goes on. Only then Python
prepares the next step, while the card does nothing. For Apple's devices transformers (from 5.17 on)
reads what the step before has copied to the host, while the next step runs, and throws away the
token too many (`DeferredStopCheck`). Inside of `late_stops` it does so for other devices too.

A cache that the caller keeps would have a token too many: for those nothing changes.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.generation import utils

MARK = "_moepress_asks"
ASKED = {"device", "cache_is_returned", "is_assistant"}  # parameters that decide

_local = threading.local()


@contextmanager
def late_stops(device_type: str, wanted: Callable[[], bool]) -> Iterator[None]:
    """Inside the `with` statement, texts end a step late, for calls of this thread.

    Args:
        device_type: of the tokens, such as "cuda".
        wanted: whether they shall, asked after each prompt.
    """
    _wrap()
    before = getattr(_local, "asked", None)
    _local.asked = device_type, wanted
    try:
        yield
    finally:
        _local.asked = before


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
        asked = getattr(_local, "asked", None)
        if supported or asked is None or not given.keys() >= ASKED:
            return supported
        device_type, wanted = asked
        kept = given["cache_is_returned"] or given["is_assistant"]
        # A CPU has no events, and nothing waits for it.
        here = given["device"].type == device_type != "cpu"
        return here and not kept and wanted()

    setattr(is_supported, MARK, True)
    check.is_supported = staticmethod(is_supported)
