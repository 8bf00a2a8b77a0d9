"""Tensors of the pretended card: they say `cuda:0`, and their numbers are those of a CPU tensor.

A `CardTensor` wraps a CPU tensor. For torch's C++ code it is a tensor on the meta device, as a
FakeTensor of torch is: autograd then needs no CUDA. Every op on one arrives in `run`, which
computes on the CPU tensors inside and wraps the results. Views share memory because the tensors
inside do.

`run` raises `CardError` where CUDA would fail, and counts what makes the host wait for the card.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.card.lacking import lacks

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")


class CardError(RuntimeError):
    """Python code did what a card would refuse, or what it would let pass with wrong numbers."""


@dataclass
class Copy:
    """A copy between the host and the card that goes on while Python does."""

    source: Tensor  # on the CPU
    target: Tensor  # on the CPU
    seen: Tensor  # what the source was when the copy was queued

    def finish(self) -> None:
        if not torch.equal(_bytes(self.source), _bytes(self.seen)):
            raise CardError("pinned memory was written before the copy from it was done")
        if self.target is not self.source:
            self.target.copy_(self.seen)


@dataclass
class Card:
    """What the pretended card has seen."""

    total: int = 1 << 36  # bytes of memory
    waits: Counter[str] = field(default_factory=Counter)  # for the card, by what waits
    uploads: Counter[str] = field(default_factory=Counter)  # of memory that is not pinned
    copies: list[Copy] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)  # tensors by storage
    allocated: int = 0
    peak: int = 0
    pinned: dict[int, StorageWeakRef] = field(default_factory=dict)  # by address
    lock: Any = field(default_factory=threading.RLock)

    def wait(self, why: str) -> None:
        """The host waits until everything that was queued is done."""
        self.waits[f"{why} {_caller()}"] += 1
        self.settle()

    def settle(self) -> None:
        while self.copies:
            self.copies.pop(0).finish()

    @contextmanager
    def without_waits(self) -> Iterator[None]:
        """Raise CardError if the host waits for the card inside the `with` statement.

        Copies of memory that is not pinned count too: a CUDA graph can contain neither.
        """
        waits, uploads = Counter(self.waits), Counter(self.uploads)
        yield
        found = [*(self.waits - waits).items(), *(self.uploads - uploads).items()]
        if found:
            raise CardError(f"the host waits for the card: {found}")


card = Card()


class _Share:
    """A tensor's share of a storage, for the count of allocated bytes."""

    def __init__(self, inner: Tensor) -> None:
        storage = inner.untyped_storage()
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        self.card = card
        with card.lock:
            count = card.held.get(self.key, 0)
            card.held[self.key] = count + 1
            if not count:
                card.allocated += self.size
                card.peak = max(card.peak, card.allocated)

    def __del__(self) -> None:
        with self.card.lock:
            self.card.held[self.key] -= 1
            if not self.card.held[self.key]:
                del self.card.held[self.key]
                self.card.allocated -= self.size


class CardTensor(Tensor):
    """A tensor of the pretended card. `inner` is the CPU tensor with its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> CardTensor:
        assert type(inner) is Tensor and inner.device == CPU, (type(inner), inner.device)
        keys = {"dispatch_device": True, "device_for_backend_keys": DEVICE}
        made = Tensor._make_subclass(cls, meta_like(inner, inner.dtype), False, **keys)
        made.inner = inner
        made.share = _Share(inner)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def record_stream(self, stream: Any) -> None: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = put(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CardTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def _plainly() -> Iterator[None]:
    """Inside the `with` statement, new tensors are neither inference tensors nor of a graph."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def meta_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A meta tensor of torch's own."""
    with torch._C._DisableTorchDispatch():
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")


def put(inner: Tensor) -> CardTensor:
    """A tensor on the card with the memory of a CPU tensor."""
    with _plainly():
        return CardTensor(inner.detach())


def _unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, CardTensor) else value


def _caller() -> str:
    """The innermost line of moepress, of a model, or of a test that is being run.

    Not those that pass on what a model calls.
    """
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not any(part in name for part in ("/tests/card/", "/torch/", "/hf/cuda_graph.py")):
            return f"{name.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


# Ops whose result has a size that depends on numbers, so the host waits for the card.
WAITING = {
    "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount",
    "_local_scalar_dense", "equal", "allclose", "is_nonzero", "repeat_interleave",
}  # fmt: skip
# Their index tensors may be on the CPU. CUDA uploads them.
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
MIXED = {"copy_": "_copy", "_to_copy": "_to_copy"}  # take tensors of two devices
MODES: Any = None  # functions.Functions, which imports this file


def run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An op of which an argument is on the card."""
    name = func._schema.name.partition("::")[2]
    if func is torch.ops.prim.device.default:  # asked by C++ code; the CPU's threads run autograd
        return torch.device("meta")
    if func.namespace == "moepress":
        with MODES():  # this function is called without them
            return _own(func)(*args, **kwargs)
    if name in MIXED:
        return globals()[MIXED[name]](*args, **kwargs)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    _check(name, tensors)
    if name in WAITING and not _size_is_known(func, kwargs):
        card.wait(name)
    if func is aten.isin.Tensor_Tensor and args[1].numel() >= 10 * args[0].numel() ** 0.145:
        card.wait(name)  # torch looks for so many by sorting, after `unique`
    if name in INDEXED:
        _check("indexing", [args[0], *(a for a in args[2:] if isinstance(a, Tensor))])
        _check_indices(name, args[1])
    device = kwargs.get("device")
    given = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    if "device" in kwargs:
        given["device"] = CPU
    inside = tree_map(_unwrapped, args), tree_map(_unwrapped, given)
    with _plainly():
        if name == "histc":  # CUDA's takes integers
            result = func(inside[0][0].double(), *inside[0][1:], **inside[1]).to(args[0].dtype)
        else:
            result = func(*inside[0], **inside[1])
    if device is not None and torch.device(device).type == "cpu":
        return result
    return _results(func, args, kwargs, inside, result)


def _size_is_known(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an op of WAITING is called so that its result's size is known without numbers."""
    return func is aten.repeat_interleave.self_int or bool(kwargs.get("output_size"))


def _results(func: Any, args: Any, kwargs: Any, inside: Any, result: Any) -> Any:
    """Results on the card: the arguments themselves where an op writes to them."""
    owner = {
        id(b): a
        for a, b in zip(_tensors((args, kwargs)), _tensors(inside), strict=True)
        if isinstance(a, CardTensor)
    }
    if func._schema.is_mutable and any(
        isinstance(a, CardTensor) and a.shape != a.inner.shape for a in _tensors((args, kwargs))
    ):  # squeeze_ and the like, which torch's C++ code uses
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return owner[id(value)] if id(value) in owner else put(value)

    return tree_map(one, result)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _check(name: str, tensors: list[Tensor]) -> None:
    """Raise CardError if an op has tensors on the CPU that have a dimension."""
    for tensor in tensors:
        if isinstance(tensor, CardTensor):
            continue
        if tensor.device.type == "meta":
            raise CardError(f"{name}: a meta tensor with tensors of the card")
        if tensor.dim() and name not in INDEXED:
            shapes = [(str(t.device), tuple(t.shape)) for t in tensors]
            raise CardError(f"{name}: tensors of two devices: {shapes}")
    if tensors and lacks(name, tensors[0].dtype):
        raise CardError(f"{name}: CUDA has no kernel for {tensors[0].dtype}")


def _check_indices(name: str, indices: Sequence[Tensor | None]) -> None:
    for index in indices:
        if index is None:
            continue
        if index.dtype in (torch.bool, torch.uint8):
            card.wait(f"{name} with a mask")
        elif not isinstance(index, CardTensor):
            card.uploads[f"{name} with indices of the CPU {_caller()}"] += 1


def _own(func: Any) -> Callable[..., Any]:
    """The Python function of an op of moepress: it launches kernels on the tensors of the card."""
    from moepress import kernels

    return getattr(kernels, func._opname).body  # type: ignore[no-any-return]


def _set(tensor: Any, source: Any, *rest: Any) -> Any:
    raise CardError("set_ of a tensor of the card is not pretended")


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """copy_ between the card and the host, or on the card."""
    with _plainly():
        if isinstance(target, CardTensor) and isinstance(source, CardTensor):
            target.inner.copy_(source.inner)
        elif isinstance(target, CardTensor):
            upload(source.detach(), target.inner, non_blocking)
        else:
            assert isinstance(source, CardTensor)
            download(source.inner, target.detach(), non_blocking)
    return target


def upload(source: Tensor, inner: Tensor, non_blocking: bool) -> None:
    inner.copy_(source)
    if is_pinned(source) and non_blocking:
        card.copies.append(Copy(source, source, source.clone()))
    elif source.dim() or not non_blocking:
        card.uploads[f"copy to the card {_caller()}"] += 1


def download(inner: Tensor, target: Tensor, non_blocking: bool) -> None:
    if not (non_blocking and is_pinned(target)):
        target.copy_(inner)
        card.wait("copy to the host")
        return
    # Nobody may read the target before the copy is done.
    _bytes(target).fill_(0x7F) if target.is_contiguous() else target.zero_()
    seen = inner.detach().clone()
    card.copies.append(Copy(seen, target, seen))


def _to_copy(
    tensor: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Tensor:
    """`Tensor.to`, of which an end is on the card."""
    to_card = isinstance(tensor, CardTensor) if device is None else is_card(device)
    inner = tensor.inner if isinstance(tensor, CardTensor) else tensor
    with _plainly():
        made = aten._to_copy.default(
            inner.detach(), dtype=dtype, layout=layout, memory_format=memory_format
        )
        if to_card:
            if not isinstance(tensor, CardTensor):
                upload(inner, made, non_blocking)
            return put(made)
        if non_blocking:
            pin(made)
        download(inner.to(made.dtype), made, non_blocking)
    return made


def is_card(device: Any) -> bool:
    """Whether a device, as torch takes it, is the pretended card, or what C++ code calls it."""
    if isinstance(device, int):
        return True
    return torch.device(device).type in ("cuda", "meta")


def pin(tensor: Tensor) -> Tensor:
    """Say of a CPU tensor that its memory is pinned."""
    storage = tensor.untyped_storage()
    card.pinned[storage.data_ptr()] = StorageWeakRef(storage)
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    known = card.pinned.get(tensor.untyped_storage().data_ptr())
    return known is not None and not known.expired()


class Constructors(TorchDispatchMode):
    """C++ code that makes a tensor beside one of the card asks for the meta device: see `put`."""

    def __init__(self, meta_is_card: Callable[[], bool]) -> None:
        super().__init__()
        self.meta_is_card = meta_is_card

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, CardTensor) for t in types):
            return run(func, args, kwargs)
        device = kwargs.get("device")
        if device is None or torch.device(device).type not in ("cuda", "meta"):
            return func(*args, **kwargs)
        if torch.device(device).type == "meta" and not self.meta_is_card():
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            return _to_copy(*args, **kwargs)
        if _tensors((args, kwargs)) and torch.device(device).type == "meta":
            return func(*args, **kwargs)
        return put(func(*args, **{**kwargs, "device": CPU}))
