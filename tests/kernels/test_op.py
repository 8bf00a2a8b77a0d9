"""Ops run without torch's dispatcher, except where something has to see them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from moepress.kernels.op import Op


class Seen(TorchDispatchMode):
    """The names of the ops that reach torch inside the `with` statement."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def twice(x: Tensor, more: float = 0.0) -> Tensor:
    return 2 * x + more


OP = Op("moepress_tests::twice", twice)
OP.op.register_fake(lambda x, more=0.0: torch.empty_like(x))
OP.op.register_autograd(lambda ctx, y: (2 * y, None))


def put(x: Tensor, y: Tensor) -> None:
    x.copy_(y)


PUT = Op("moepress_tests::put", put, mutates=("x",))
PUT.op.register_fake(lambda x, y: None)


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Call OP with a correct result: whether the call went through torch's dispatcher."""
    calls: list[Any] = []
    through_torch = OP.op
    monkeypatch.setattr(OP, "op", lambda *args: calls.append(args) or through_torch(*args))

    def called(*args: Any) -> bool:
        calls.clear()
        assert torch.equal(OP(*args), 2 * args[0] + sum(args[1:]))
        return bool(calls)

    return called


def test_plain_tensors_need_no_dispatcher(dispatched: Callable[..., bool]) -> None:
    x = torch.randn(3)
    assert not dispatched(x)
    assert not dispatched(x, 1.5)
    assert not dispatched(torch.nn.Parameter(x, requires_grad=False))
    with torch.no_grad():
        assert not dispatched(x.clone().requires_grad_())


def test_what_records_operations_sees_the_op(dispatched: Callable[..., bool]) -> None:
    x = torch.randn(3)
    leaf = x.clone().requires_grad_()
    assert dispatched(leaf)
    OP(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.full((3,), 2.0))
    assert dispatched(x.as_subclass(Subclass))
    with Seen() as seen:
        assert dispatched(x)
    assert "moepress_tests.twice.default" in seen.names
    assert "moepress_tests.twice" in str(make_fx(lambda x: OP(x))(x).graph)
    before_autograd = make_fx(lambda x: OP(x), pre_dispatch=True)(x)
    assert "moepress_tests.twice" in str(before_autograd.graph)
    assert "moepress_tests::twice" in str(torch.jit.trace(lambda x: OP(x), x).graph)
    assert OP(x.to("meta")).is_meta
    assert torch.equal(torch.vmap(lambda x: OP(x))(x.view(3, 1)), 2 * x.view(3, 1))


def test_modes_of_other_threads_change_nothing(dispatched: Callable[..., bool]) -> None:
    """Nor do modes that overlap: the first ends while the second goes on."""
    x = torch.randn(3)
    entered, ends, ended = [Event(), Event()], Event(), Event()

    def first() -> None:
        with Seen():
            entered[0].set()
            ends.wait()
        ended.set()

    def second() -> bool:
        with Seen():
            entered[1].set()
            ended.wait()
            return dispatched(x)

    here = []
    # torch's own flags are for all threads, and would stay on for the tests that follow
    with patch.dict(vars(_python_dispatch)), ThreadPoolExecutor(2) as pool:
        try:
            for work, event in zip((first, second), entered, strict=True):
                there = pool.submit(work)
                event.wait()
                here.append(dispatched(x))
        finally:
            ends.set()
        assert there.result()
    assert here == [False, False]
    assert not dispatched(x)


def test_what_an_op_changes_is_known() -> None:
    """Its schema says so, and compilers keep the order of what reads and writes."""
    torch.library.opcheck(PUT.op, (torch.zeros(3), torch.ones(3)))

    def work(x: Tensor, y: Tensor) -> Tensor:
        before = x + 1
        PUT(x, y)
        return before + x

    for run in (work, torch.compile(work, backend="aot_eager", fullgraph=True)):
        x = torch.zeros(3)
        assert run(x, torch.full((3,), 5.0)).tolist() == [6, 6, 6]
        assert x.tolist() == [5, 5, 5]
