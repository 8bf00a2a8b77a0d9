"""The forward of a model, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from types import MethodType
from typing import Any

Plain = Callable[..., Any]


class ReplacedForward:
    """What is a model's attribute `forward` meanwhile. A copy of the model gets its own, as before.

    Who has fetched it may call it later: it does what it did.

    Args:
        model: whose forward is replaced.
        forward: takes the plain forward, positional arguments and named ones.
    """

    def __init__(
        self, model: Any, forward: Callable[[Plain, tuple[Any, ...], dict[str, Any]], Any]
    ) -> None:
        self.plain: Plain = model.forward
        self._model, self._forward = model, forward
        update_wrapper(self, self.plain)  # `generate` looks at its arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self.plain, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plain:
        copied = memo.get(id(self._model))
        return self.plain if copied is None else MethodType(type(copied).forward, copied)
