"""An operation that torch knows as an op, and that runs without torch's dispatcher where it can.

For one token the dispatcher takes longer than the work of a small op (docs/log.md#decode-overhead).
Only what records or replaces operations needs it: compilers, autograd, tracing, function
transforms such as vmap, dispatch modes, subclasses of tensors, and tensors without data (meta).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)
PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
P = ParamSpec("P")
R = TypeVar("R")


OPS: dict[str, Op[Any, Any]] = {}  # all of them, by name


class Op(Generic[P, R]):
    """A function of tensors, and the op of torch.library that runs it.

    Args:
        name: "namespace::name" of the op.
        body: the function; torch reads the schema from its annotations.
        mutates: names of the arguments that it changes.
    """

    def __init__(self, name: str, body: Callable[P, R], mutates: Sequence[str] = ()) -> None:
        self.body = body
        self.op = torch.library.custom_op(name, body, mutates_args=tuple(mutates))
        OPS[name] = self
        update_wrapper(self, body)

    def __call__(self, *args: P.args, **named: P.kwargs) -> R:
        """Run the body, as an op of torch where something has to see it."""
        if _recorded() or _needs_dispatcher((*args, *named.values())):
            result: R = self.op(*args, **named)
            return result
        return self.body(*args, **named)


def op(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Decorator: make an `Op` of a function."""
    return lambda body: Op(name, body, mutates)


def _recorded() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or _in_mode()
    )


def _in_mode() -> bool:
    """Whether this thread is in a dispatch mode.

    torch's `is_in_torch_dispatch_mode` has one flag for all threads, which two threads whose modes
    overlap leave wrong: off in the mode of the second, or on for ever.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)
    )


def _needs_dispatcher(args: Iterable[object]) -> bool:
    grad = torch.is_grad_enabled()
    return any(
        type(x) not in PLAIN or x.is_meta or (grad and x.requires_grad)
        for x in args
        if isinstance(x, Tensor)
    )
