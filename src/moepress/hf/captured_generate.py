"""transformers' `generate` of a packed model on a CPU replays captured steps (captured.py).

`moepress.generate`, `chat` and `serve` capture steps themselves, on cards too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from moepress.hf.captured import CapturedSteps

DEVICES = ("cpu",)


def with_captured_steps(generate: Callable[..., Any]) -> Callable[..., Any]:
    """`generate`, a method of models, inside of the captured steps of its model.

    They are kept for the next time, as long as the model lives. While one thread generates, others
    that do so with the same model compute as ever.
    """

    @wraps(generate)
    def captured(self: Any, *args: Any, **options: Any) -> Any:
        one = _of(self)
        if not one.free.acquire(blocking=False):
            return generate(self, *args, **options)
        try:
            with one.steps:
                return generate(self, *args, **options)
        finally:
            one.free.release()

    return captured


class _Model:
    """The captured steps of one model, and a lock that who uses them holds."""

    def __init__(self, model: Any) -> None:
        self.steps = CapturedSteps(model, devices=DEVICES)
        self.free = threading.Lock()


_models: WeakKeyDictionary[Any, _Model] = WeakKeyDictionary()  # steps do not keep one alive
_making = threading.Lock()


def _of(model: Any) -> _Model:
    with _making:
        if model not in _models:
            _models[model] = _Model(model)
        return _models[model]
