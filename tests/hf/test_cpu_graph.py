"""A recorded step repeats what it computed, with what is in its inputs now."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from moepress import kernels
from moepress.errors import InputError
from moepress.format.codec import Codec
from moepress.hf import cpu_graph as recording
from moepress.hf.cpu_graph import cpu_graph
from moepress.hf.fixed_cache import UnfitError
from moepress.kernels import cpu

CPU = torch.device("cpu")

if cpu.missing() is not None:
    pytest.skip("the library is not compiled", allow_module_level=True)

Work = Callable[[Tensor, Tensor], Tensor]  # of x [4, 8] and a state [4, 8]


def views(x: Tensor, state: Tensor) -> Tensor:
    rows = x.view(8, 4).t()[1:3].reshape(2, 8)  # the last one copies
    return rows.unsqueeze(0) * 2


def in_place(x: Tensor, state: Tensor) -> Tensor:
    state.add_(x)
    state[:, ::2].mul_(0.5)
    return state.clone()


def made_there(x: Tensor, state: Tensor) -> Tensor:
    mask = torch.arange(8)[None] <= 3
    return torch.where(mask, x, torch.full((), -torch.inf)).softmax(-1) + torch.ones(4, 8)


def several_results(x: Tensor, state: Tensor) -> Tensor:
    values, index = x.topk(3, -1)
    parts = x.split(4, -1)
    return torch.cat([values, index.float(), *parts], -1)


def written_first(x: Tensor, state: Tensor) -> Tensor:
    """Memory that is not filled when it is made."""
    out = torch.empty(4, 8)
    out[:2] = x[:2] + 1
    out[2:] = x[2:] - 1
    return out.to(torch.bfloat16).float()


def composite(x: Tensor, state: Tensor) -> Tensor:
    """Operations that consist of others, in inference mode too."""
    q = x.view(1, 2, 4, 4)
    attended = F.scaled_dot_product_attention(q, q, q).flatten()  # [32]
    return attended @ F.linear(x, state).repeat(2, 1).view(32, 1)


def packed(x: Tensor, state: Tensor) -> Tensor:
    return PRODUCT(x.repeat(1, 4).to(torch.bfloat16)).float()


def packed_floats(x: Tensor, state: Tensor) -> Tensor:
    """The library takes inputs that its caller makes of others."""
    return PRODUCT(x.repeat(1, 8)[:, ::2].half())


CODEC = Codec(4, 32)
WEIGHT = torch.randint(
    0, 120, (CODEC.nbytes(16, 32),), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def PRODUCT(x: Tensor) -> Tensor:  # noqa: N802  # a constant
    y: Tensor = kernels.linear(x, WEIGHT, torch.ones(16), 16, CODEC.number, CODEC.group_size)
    return y


def shaped_in_place(x: Tensor, state: Tensor) -> Tensor:
    y = x * 2
    z = y + state
    return z.unsqueeze_(0) @ y.t_()


WORKS: tuple[Work, ...] = (
    views, in_place, made_there, several_results, written_first, composite, packed, packed_floats,
    shaped_in_place,
)  # fmt: skip


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_repeats_what_was_computed(work: Work, inference: bool) -> None:
    draws = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(1))
    x, state = draws[0].clone(), draws[1].clone()
    with torch.inference_mode(inference), torch.no_grad():
        graph = cpu_graph(lambda: work(x, state), CPU)
    assert torch.equal(graph.result, work(draws[0], draws[1].clone()))
    state.copy_(draws[1])
    plain = draws[1].clone()
    seen = []
    for draw in draws:
        x.copy_(draw)
        with torch.no_grad():  # what was recorded in inference mode is repeated outside of it
            graph.replay()
        assert torch.equal(graph.result, work(draw, plain)) and torch.equal(state, plain)
        seen.append(graph.result.clone())
    assert not torch.equal(seen[0], seen[1])  # else this test shows nothing


def test_calls_of_the_library_are_repeated_without_torch() -> None:
    """An op whose inputs are as the library takes them is one call."""
    x = torch.randn(1, 32, dtype=torch.bfloat16)
    bias = torch.ones(16)

    def work() -> Tensor:
        y: Tensor = kernels.linear(x, WEIGHT, bias, 16, CODEC.number, CODEC.group_size)
        return y

    recorder = recording._Recorder()
    with recording.recorded(recorder.calls.append), recorder:
        work()
    assert len(recorder.calls) == 1


def test_results_are_kept_while_the_graph_lives() -> None:
    """Memory whose address only the library has is not given to others."""
    x = torch.randn(1, 32)
    graph = cpu_graph(lambda: PRODUCT(PRODUCT(x).repeat(1, 2)), CPU)
    others = [torch.full((1, 16), float(i)) for i in range(100)]
    x.copy_(torch.randn(1, 32))
    graph.replay()
    assert torch.equal(graph.result, PRODUCT(PRODUCT(x).repeat(1, 2)))
    assert all((other == i).all() for i, other in enumerate(others))


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x * float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x if (x > 0).all() else -x,
        lambda x: x.unique(),
        lambda x: x if torch.equal(x, x) else -x,
        lambda x: x * max(x.tolist()),
        lambda x: x * float(x.numpy()[0]),
        lambda x: x * float(np.asarray(x)[0]),
    ],
)
def test_numbers_read_from_tensors_are_refused(work: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(8)
    with pytest.raises(UnfitError, match="reads numbers"):
        cpu_graph(lambda: work(x), CPU)


def test_functions_that_torch_compiles() -> None:
    """Where one is first called while a step is recorded, it works afterwards."""
    attend = torch.compile(flex_attention, backend="eager")
    x = torch.randn(1, 2, 3, 16)
    with pytest.raises(UnfitError, match="flex_attention"):
        cpu_graph(lambda: attend(x, x, x), CPU)
    torch.testing.assert_close(attend(x, x, x), F.scaled_dot_product_attention(x, x, x))


def test_arguments_are_kept_while_the_graph_lives() -> None:
    """A weight whose address only the library has left."""
    x, held = torch.randn(1, 64), [torch.randn(64)]
    expected = kernels.rms_norm(x, held[0], 1e-5, "wide")
    graph = cpu_graph(lambda: kernels.rms_norm(x, held[0], 1e-5, "wide"), CPU)
    held[0] = torch.zeros(1)
    others = [torch.full((64,), torch.nan) for _ in range(100)]
    graph.replay()
    assert torch.equal(graph.result, expected) and others[0].isnan().all()


def test_more_numbers_than_a_step_should_compute_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recording, "MOST_BYTES", 1000)
    x = torch.randn(100)
    cpu_graph(lambda: x.add(1).view(10, 10).mul_(2), CPU)  # 400 bytes, three times
    with pytest.raises(UnfitError, match="more than"):
        cpu_graph(lambda: x + 1 + 2 + 3, CPU)


def test_an_error_of_a_repeated_call() -> None:
    ids, table = torch.zeros(1, 1, dtype=torch.int64), Codec(8, 32)
    weight = torch.zeros(table.nbytes(16, 32), dtype=torch.uint8)

    def work() -> Tensor:
        y: Tensor = kernels.embedding(ids, weight, 16, 32, 8, 32, torch.float32)
        return y

    graph = cpu_graph(work, CPU)
    ids.fill_(16)
    with pytest.raises(InputError, match="outside the table"):
        graph.replay()
    ids.fill_(15)
    graph.replay()
    with pytest.raises(InputError, match="outside the table"):
        ids.fill_(99)
        cpu_graph(work, CPU)


def test_other_threads_are_not_recorded() -> None:
    from threading import Thread

    x, y = torch.randn(1, 32), torch.randn(1, 32)
    other = Thread(target=lambda: PRODUCT(y))

    def work() -> Tensor:
        other.start()
        other.join()
        return PRODUCT(x)

    recorder = recording._Recorder()
    with recording.recorded(recorder.calls.append), recorder:
        work()
    alone = recording._Recorder()
    with recording.recorded(alone.calls.append), alone:
        PRODUCT(x)
    assert len(recorder.calls) == len(alone.calls)
