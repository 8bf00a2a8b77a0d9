"""Record what a step computes on a CPU, and repeat it: a list of calls in place of Python code.

Between two products of a decoded token Python runs a module, a hook, a few small functions of
torch. For small experts that takes as long as the products (docs/log.md#decode-overhead). A
recording has what is left of a step when all of that is decided: calls of the compiled library, and
operations of torch, each with the tensors it had. A replay makes these calls and nothing else.

As with a CUDA graph, what Python decided stays decided, and everything that changes has to be read
from memory by the calls. So work that reads a number out of a tensor is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moepress.hf.cuda_graph import Graph
from moepress.hf.fixed_cache import UnfitError
from moepress.kernels import cpu
from moepress.kernels.cpu.interface import Repeat, recorded
from moepress.kernels.op import OPS

MOST_BYTES = 512 << 20  # of what a step computes: more would be unpacked weights, say
READS_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
TAKERS = {"tolist", "numpy", "__array__", "__dlpack__"}  # of a tensor, past the recorder
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.clone.default}
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# One thread records at a time. torch has flags for all threads that say whether one is in a mode:
# modes that overlap in two threads leave them on for good.
_recording = threading.RLock()


def cpu_graph(work: Callable[[], Tensor], device: torch.device) -> Graph:
    """Record `work`, which runs once.

    Raises:
        UnfitError: it reads numbers out of tensors, or computes too many.
    """
    recorder = _Recorder()
    with _recording, _uncompiled(), recorded(recorder.calls.append), _numbers_stay(), recorder:
        result = work()
    calls, kept = tuple(recorder.calls), recorder.kept

    def replay(_kept: object = kept) -> None:
        with torch.inference_mode():  # what was made in it may be written to
            for call in calls:
                call()

    return Graph(result, replay)


def _uncompiled() -> AbstractContextManager[None]:
    """Inside the `with` statement, functions that torch has compiled run as they were written.

    Under a recorder torch cannot compile, and remembers that: a compiled function that is first
    called there, such as transformers' flex attention, would fail for the rest of the process.
    """
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


class _numbers_stay(TorchFunctionMode):  # noqa: N801  # a context manager
    """Inside the `with` statement, what takes numbers out of tensors unseen is refused."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in TAKERS:
            raise UnfitError(f"it reads numbers out of tensors ({func.__name__})")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Sees every operation of torch.

    Attributes:
        calls: what a replay does.
        kept: tensors whose addresses are in calls of the library: results, and arguments but for
            packed bytes, which the model keeps and which may be the most of a machine's memory.
    """

    supports_higher_order_operators = True  # they come here, and are refused

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Repeat] = []
        self.kept: list[Any] = []
        self._storages: set[int] = set()
        self._bytes = 0

    def __torch_dispatch__(
        self,
        func: OpOverload | HigherOrderOperator,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Any = None,
    ) -> Any:
        if isinstance(func, HigherOrderOperator):
            raise UnfitError(f"it calls {func}, an operation of functions")
        named = kwargs or {}
        if func._schema.name in OPS:
            self._keep_given((args, named))
            with self:  # its body: the library's calls, and what is around them
                return OPS[func._schema.name].body(*args, **named)
        with self:  # of inference mode, operations that consist of others
            parts = func.decompose(*args, **named)
        if parts is not NotImplemented:
            return parts
        if _reads_numbers(func, args):
            raise UnfitError(f"it reads numbers out of tensors ({func})")
        out = func(*args, **named)
        outs = _tensors(out)
        self._keep(outs)
        if torch.Tag.inplace_view in func.tags or func.overloadpacket.__name__ in EMPTY:
            return out
        # Aliases keep the shapes of now: a view may be made in place later.
        args, named, outs = tree_map_only(Tensor, _alias, (args, named, outs))
        if func._schema.is_mutable:
            self.calls.append(_again(func, args, named))
        elif not _are_views(outs, _tensors((args, named))):
            if _added(func, args, named, outs):
                self.kept.append(args)
            else:
                self.calls.append(_into(func, args, named, outs))
        return out

    def _keep_given(self, arguments: Any) -> None:
        given = _tensors(arguments)
        self.kept.append([_alias(x) for x in given if x.dtype != torch.uint8])

    def _keep(self, outs: Sequence[Tensor]) -> None:
        self.kept.append(outs)
        for out in outs:
            storage = out.untyped_storage()
            if storage.data_ptr() not in self._storages:
                self._storages.add(storage.data_ptr())
                self._bytes += storage.nbytes()
        if self._bytes > MOST_BYTES:
            raise UnfitError(f"a step computes more than {MOST_BYTES >> 20} MB")


def _alias(x: Tensor) -> Tensor:
    alias: Tensor = torch.ops.aten.alias.default(x)
    return alias


def _reads_numbers(func: OpOverload, args: Sequence[Any]) -> bool:
    """Whether the result of an operation is more than tensors of known shapes."""
    if func is torch.ops.aten.index.Tensor:  # marked, though only masks have that effect
        return any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))
    return func is torch.ops.aten.equal.default or not READS_NUMBERS.isdisjoint(func.tags)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _are_views(outs: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    """Whether results have the memory of arguments, so that nothing was computed."""
    storages = {x.untyped_storage().data_ptr() for x in given}
    return all(out.untyped_storage().data_ptr() in storages for out in outs)


def _again(func: OpOverload, args: Sequence[Any], named: Mapping[str, Any]) -> Repeat:
    """An operation that changes its arguments, with the same ones."""

    def repeat() -> None:
        func(*args, **named)

    return repeat


def _added(
    func: OpOverload, args: Sequence[Any], named: Mapping[str, Any], outs: Sequence[Tensor]
) -> bool:
    """Whether an operation is a sum that the library can compute, which is done and so recorded."""
    if func is not torch.ops.aten.add.Tensor or named or len(args) != 2:
        return False
    a, b = args
    return isinstance(b, Tensor) and cpu.add_into(a, b, outs[0])


def _into(
    func: OpOverload, args: Sequence[Any], named: Mapping[str, Any], outs: Sequence[Tensor]
) -> Repeat:
    """An operation whose results go to where they were."""
    if func in COPIES:
        return _again(torch.ops.aten.copy_.default, (outs[0], args[0]), {})
    variant = _out_variant(func)
    if variant is not None and len(variant[1]) == len(outs):
        return _again(variant[0], args, {**named, **dict(zip(variant[1], outs, strict=True))})

    def repeat() -> None:
        for out, new in zip(outs, _tensors(func(*args, **named)), strict=True):
            out.copy_(new)

    return repeat


@lru_cache(maxsize=1024)
def _out_variant(func: OpOverload) -> tuple[OpOverload, Sequence[str]] | None:
    """The overload that writes its results where it is told, and the names of these arguments."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    for name in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, name)
        arguments = other._schema.arguments
        outs = [a.name for a in arguments if a.is_out]
        if outs and [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted:
            return other, outs
    return None
