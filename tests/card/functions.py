"""torch's functions and methods that name a device, or that look at a tensor's memory.

A mode sees every call of them before C++ does, which would want CUDA.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

from tests.card import tensors
from tests.card.tensors import CPU, DEVICE, CardError, CardTensor, Constructors, card, put

ADDRESS = 1 << 60  # is added to addresses on the card: whoever reads there has to notice
CONSTRUCTORS = _device_constructors()


class Functions(TorchFunctionMode):
    """Inside the `with` statement, torch's functions know the card. For one thread."""

    def __init__(self) -> None:
        super().__init__()
        self.real_meta = False  # whether the call that runs is about real meta tensors
        self.constructors = Constructors(lambda: not self.real_meta)

    def __enter__(self) -> Any:
        self.constructors.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.constructors.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(func, *args, **kwargs)
        if func in CONSTRUCTORS or str(getattr(func, "__name__", "")).startswith("new_"):
            return self._construct(func, args, kwargs)
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        generator, tree = kwargs.get("generator"), tree_leaves((args, kwargs))
        if generator is not None and "device" not in kwargs:
            where = DEVICE if any(isinstance(x, CardTensor) for x in tree) else CPU
            if getattr(generator, "where", CPU) != where:
                raise CardError(f"{func.__name__}: a generator of another device than {where}")
        before = self.real_meta
        self.real_meta = _is_meta(kwargs.get("device")) or any(
            isinstance(x, Tensor) and not isinstance(x, CardTensor) and x.device.type == "meta"
            for x in tree
        )
        try:
            return func(*args, **kwargs)
        finally:
            self.real_meta = before

    def _construct(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device, pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        there = getattr(kwargs.get("generator"), "where", CPU)
        if kwargs.get("generator") is not None and there != _device(device or CPU):
            raise CardError(f"{func.__name__}: a generator of {there} for a tensor of {device}")
        like = next((a for a in args if isinstance(a, Tensor)), None)
        if isinstance(like, CardTensor) and func in (torch.tensor, torch.as_tensor, torch.asarray):
            return _to(func, like, device or DEVICE, kwargs.get("dtype"))
        if device is None or _is_meta(device) or not tensors.is_card(device):
            made = self._call(func, args, kwargs)
        elif isinstance(like, CardTensor):
            made = self._call(func, args, {**kwargs, "device": None})
        else:
            needs = kwargs.pop("requires_grad", False)
            with torch.no_grad():
                inner = self._call(func, args, {**kwargs, "device": CPU})
            made = put(inner)
            if func in (torch.tensor, torch.as_tensor, torch.asarray):
                card.uploads[f"{func.__name__} {tensors._caller()}"] += 1
            made.requires_grad_(needs)
        return tensors.pin(made) if pinned and not isinstance(made, CardTensor) else made


def _is_meta(device: Any) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == "meta"


class _Crossing(torch.autograd.Function):
    """A copy between the devices; its gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: dict[str, Any]) -> Tensor:
        ctx.back = {"device": x.device, "dtype": x.dtype}
        return tensors._to_copy(x, **options)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].to(**ctx.back), None


def _to(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to"""
    args = tuple(a for a in args if a is not None)
    if args and isinstance(args[0], Tensor):
        kwargs, args = {"device": args[0].device, "dtype": args[0].dtype, **kwargs}, args[1:]
    names = ("dtype",) if args and isinstance(args[0], torch.dtype) else ("device", "dtype")
    kwargs |= dict(zip((*names, "non_blocking", "copy"), args, strict=False))
    device = kwargs.get("device")
    there = x.device if device is None else _device(device)
    dtype = kwargs.get("dtype") or x.dtype
    if there.type == "meta":
        if x.device.type == "meta":
            return func_to(x, **kwargs)
        return tensors.meta_like(x, dtype)
    if not isinstance(x, CardTensor) and there.type != "cuda":
        return func_to(x, **kwargs)
    kwargs["device"] = there
    if isinstance(x, CardTensor) and there.type == "cuda":
        same = {k: v for k, v in kwargs.items() if k != "device"}
        return func_to(x, **same) if same else x
    if x.device.type == "meta":
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    options = {"device": there, "dtype": dtype, "non_blocking": kwargs.get("non_blocking", False)}
    if kwargs.get("memory_format") is not None:
        options["memory_format"] = kwargs["memory_format"]
    if x.requires_grad and torch.is_grad_enabled():
        return _Crossing.apply(x, options)  # type: ignore[no-any-return]
    return tensors._to_copy(x, **options)


def func_to(x: Tensor, **kwargs: Any) -> Tensor:
    return torch._C.TensorBase.to(x, **kwargs)


def _device(device: Any) -> torch.device:
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type == "cuda" and (found.index or 0) != 0:
        raise CardError(f"there is no {found}")
    return DEVICE if found.type == "cuda" else found


def _on_host(name: str) -> Callable[..., Any]:
    """A method that only a CPU tensor has."""

    def handler(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, CardTensor):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({name})")
        return func(x, *args, **kwargs)

    return handler


def _waiting(name: str) -> Callable[..., Any]:
    """A method that reads numbers."""

    def handler(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, CardTensor):
            return func(x, *args, **kwargs)
        card.wait(name)
        return getattr(x.inner, name)(*args, **kwargs)

    return handler


def _inside(name: str, change: Callable[[Any], Any] = lambda x: x) -> Callable[..., Any]:
    """What the CPU tensor inside knows."""

    def handler(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, CardTensor):
            return func(x, *args, **kwargs)
        return change(getattr(x.inner, name)(*args, **kwargs))

    return handler


def _set_data(func: Any, x: Tensor, value: Tensor) -> None:
    if isinstance(x, CardTensor) != isinstance(value, CardTensor):  # a module goes to a device
        other = value.detach()
        if isinstance(x, torch.nn.Parameter):
            other = torch.nn.Parameter(other, x.requires_grad)
        torch.utils.swap_tensors(x, other)
        return
    func(x, value)
    if isinstance(x, CardTensor):
        x.inner, x.share = value.inner, value.share  # type: ignore[attr-defined]


def _set_item(func: Any, x: Tensor, index: Any, value: Any) -> None:
    """`x[mask] = number` fills in place on CUDA, where torch keeps the number on the CPU."""
    mask = isinstance(index, CardTensor) and index.dtype is torch.bool and index.shape == x.shape
    if isinstance(x, CardTensor) and mask and isinstance(value, bool | int | float):
        x.masked_fill_(index, value)
    else:
        func(x, index, value)


def _pin(func: Any, x: Tensor, *args: Any) -> Tensor:
    if isinstance(x, CardTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors")
    return tensors.pin(x.clone())


HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cuda: lambda func, x, device=0, non_blocking=False: _to(
        func, x, device or 0, non_blocking=non_blocking
    ),
    Tensor.cpu: lambda func, x: _to(func, x, "cpu"),
    Tensor.numpy: _on_host("numpy"),
    Tensor.__array__: _on_host("__array__"),
    Tensor.tolist: _waiting("tolist"),
    Tensor.data_ptr: _inside("data_ptr", lambda address: address + ADDRESS),
    Tensor.untyped_storage: _inside("untyped_storage"),
    Tensor.storage_offset: _inside("storage_offset"),
    Tensor.data.__set__: _set_data,
    Tensor.__setitem__: _set_item,
    Tensor.pin_memory: _pin,
    Tensor.is_pinned: lambda func, x, *args: not isinstance(x, CardTensor) and tensors.is_pinned(x),
    Tensor.get_device: lambda func, x: 0 if isinstance(x, CardTensor) else -1,
}
tensors.MODES = Functions
_run_thread = threading.Thread.run


def run_thread(self: threading.Thread) -> None:
    """Run a thread with the card."""
    with Functions():
        _run_thread(self)
