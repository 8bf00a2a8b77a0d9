"""Seconds that each operation takes on this machine, measured in about a second.

Every operation is timed with the code that compression runs, on matrices of the model's own shapes,
or on parts of them where they are large.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.draws import drawn_tokens, gumbel_noise
from moepress.format.codec import Codec, codec_for
from moepress.kernels.trellis import TILE_COLUMNS
from moepress.original.batches import LOGIT_TOKENS
from moepress.original.quantized.config import BLOCK
from moepress.original.quantized.forms import products
from moepress.original.quantized.numbers import Numbers
from moepress.original.values import all_finite
from moepress.rounding.factor import DenseFactor, block_feedback
from moepress.rounding.methods import quantize_matrix
from moepress.rounding.methods.trellis import path_values
from moepress.rounding.methods.viterbi import search
from moepress.rounding.rotation import rotate
from moepress.text.samples import BATCH
from moepress.workload import operations as op
from moepress.workload.operations import Work
from moepress.workload.shapes import ModelShape

ENOUGH = 0.03  # seconds to time one operation
SLOW = 0.5  # seconds of a first run that is not repeated; other first runs are not counted
RUNS = 3  # the fastest counts
TOKENS, ROWS, COLUMNS = 512, 2048, 1024  # at most, of the matrices that are timed
FACTORED = 2048  # columns at most
HEADS = 8  # at most
MULTIPLIED = 1 << 25  # weights at most that few tokens are multiplied by: more than caches hold
STATES = 1 << 13  # rows of COLUMNS elements: more than caches hold
ELEMENTS = 1 << 20  # at most, of arrays that are passed over
LOGITS = 1 << 21  # at most, whose gradient is timed
PLACES, PLACE_BYTES = 32, 1 << 20  # of the model's files that are read
REREAD = "reread"  # rate of bytes that the system still holds in memory


@dataclass(frozen=True)
class Machine:
    """Where the work will run, and on what."""

    device: torch.device
    stored: torch.dtype  # of the weights, dequantized if they are not so on disk
    codes: Numbers | None  # of routed experts that are quantized on disk
    dtype: torch.dtype  # of the walk
    shape: ModelShape
    length: int  # tokens of a sequence
    group_size: int
    files: tuple[Path, ...]  # of the model's weights

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(self.device, dtype)

    def seconds(self, run: Callable[[], Any]) -> float:
        """The least time of a few runs, after a first one that prepares what later ones share."""
        best = self._once(run)
        if best > SLOW:
            return best
        spent, best = 0.0, float("inf")
        for _ in range(RUNS):
            best = min(best, self._once(run))
            spent += best
            if spent > ENOUGH:
                break
        return best

    def _once(self, run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started


def measured(names: Iterable[str], machine: Machine) -> dict[str, float]:
    """Seconds for one of each named operation, and for REREAD."""
    found: dict[str, float] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name in sorted({*names, "read"}):
            kind, _, bits = name.partition(" ")
            if kind == "read":
                found[name], found[REREAD] = _reading(machine.files)
            else:
                found[name] = PROBES[kind](machine, float(bits or 0))
    return found


def seconds(work: Work, rates: Mapping[str, float]) -> float:
    """The time that a work takes."""
    return sum(count * rates[name] for name, count in work.items())


def _product(machine: Machine, _: float) -> float:
    rows, cols = machine.shape.gate_up
    x = machine.random(TOKENS, min(cols, COLUMNS), dtype=machine.dtype)
    w = machine.random(min(rows, ROWS), x.shape[1], dtype=machine.dtype)
    flops = op.product(len(x), x.shape[1], len(w))["product"]
    return machine.seconds(lambda: F.linear(x, w)) / flops


def _attend(machine: Machine, _: float) -> float:
    heads, length = min(machine.shape.heads, HEADS), min(machine.length, TOKENS)
    q, k = machine.random(2, 1, heads, length, machine.shape.head, dtype=machine.dtype)
    v = k[..., : machine.shape.value_head].contiguous()
    run = machine.seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return run / (heads * length**2)


def _multiply(machine: Machine, tokens: float) -> float:
    rows, cols = machine.shape.gate_up
    rows = max(1, min(rows, MULTIPLIED // cols))
    experts = machine.shape.moe_layers * machine.shape.experts
    count = max(1, min(experts, MULTIPLIED // (rows * cols)))
    weights = torch.ones(count, rows, cols, dtype=machine.dtype, device=machine.device)
    x = machine.random(int(tokens), cols, dtype=machine.dtype)
    run = machine.seconds(lambda: [F.linear(x, weight) for weight in weights])
    return run / weights.numel()


def _recall(machine: Machine, _: float) -> float:
    shape = machine.shape
    heads, length = min(shape.heads, HEADS), min(machine.length, TOKENS)
    sharing = min(heads, max(1, shape.heads // (shape.key_heads or shape.heads)))
    heads = heads // sharing * sharing
    q = machine.random(BATCH, heads, 1, shape.head, dtype=machine.dtype)
    k = machine.random(1, heads // sharing, length, shape.head, dtype=machine.dtype)
    k = k.repeat(BATCH, 1, 1, 1)
    v = k[..., : shape.value_head].contiguous()
    run = machine.seconds(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=sharing > 1))
    return run / (BATCH * heads * length)


def _state(machine: Machine, _: float) -> float:
    """A state that decays, is added to and read: memory of arrays this large is new each time."""
    state, rows = machine.random(2, STATES, COLUMNS)
    run = machine.seconds(lambda: ((state * state.exp() + state * rows) * rows).sum(-1))
    return run / (STATES * COLUMNS)


def _float32(machine: Machine, _: float) -> float:
    rows, cols = machine.shape.gate_up
    w = machine.random(min(rows, ROWS), min(cols, COLUMNS))
    square = machine.random(w.shape[1], w.shape[1])
    flops = op.product(len(w), w.shape[1], w.shape[1])["product"]
    return machine.seconds(lambda: w @ square) / flops


def _cholesky(machine: Machine, _: float) -> float:
    cols = min(max(machine.shape.hidden, machine.shape.intermediate), FACTORED)
    matrix = torch.eye(cols, device=machine.device) + 0.5 / cols
    run = machine.seconds(lambda: torch.linalg.cholesky_ex(matrix.mT, upper=True))
    return max(0.0, run - op.factor(cols)["float32"] * _float32(machine, 0)) / cols**2


def _copy(machine: Machine, _: float) -> float:
    rows, cols = machine.shape.gate_up
    x = machine.random(min(rows * cols, ELEMENTS))
    return machine.seconds(lambda: x * 2) / len(x)


def _rotate(machine: Machine, _: float) -> float:
    rows, cols = machine.shape.gate_up
    x = machine.random(max(1, min(rows, ELEMENTS // cols)), cols)
    return machine.seconds(lambda: rotate(x)) / op.rotation(*x.shape)["rotate"]


def _search(machine: Machine, bits: float) -> float:
    rows = max(64, min(machine.shape.gate_up[0], ROWS) // 64 * 64)
    target = machine.random(TILE_COLUMNS, rows)
    counted = op.search(rows, TILE_COLUMNS, bits)[f"search {bits}"]
    return machine.seconds(lambda: search(target, bits)) / counted


def _decode(machine: Machine, bits: float) -> float:
    rows, cols = machine.shape.gate_up
    size = max(64, min(rows, TOKENS) // 64 * 64), max(8, min(cols, COLUMNS) // 8 * 8)
    branches = torch.zeros(size, dtype=torch.uint8, device=machine.device)
    return machine.seconds(lambda: path_values(branches, bits)) / branches.numel()


def _int(machine: Machine, bits: float) -> float:
    codec = _codec(machine, bits)
    cols = codec.group_size
    weight = machine.random(min(machine.shape.gate_up[0], ROWS), cols)
    eye = torch.eye(cols, device=machine.device)
    factor = DenseFactor(eye, torch.ones(cols, device=machine.device), 0.01)
    run = machine.seconds(lambda: quantize_matrix("gptq", weight, codec, factor))
    return run / weight.numel()


def _nearest(machine: Machine, bits: float) -> float:
    codec = _codec(machine, bits)
    cols = min(machine.shape.gate_up[1], COLUMNS) // codec.group_size * codec.group_size
    weight = machine.random(min(machine.shape.gate_up[0], ROWS), cols)
    return machine.seconds(lambda: quantize_matrix("rtn", weight, codec)) / weight.numel()


def _codec(machine: Machine, bits: float) -> Codec:
    return codec_for(bits, machine.shape.gate_up[1], machine.group_size)


def _draw(machine: Machine, _: float) -> float:
    generator = torch.Generator().manual_seed(0)
    return machine.seconds(lambda: torch.randn(ELEMENTS, generator=generator)) / ELEMENTS


def _solve(machine: Machine, _: float) -> float:
    cols = min(max(machine.shape.hidden, machine.shape.intermediate), COLUMNS) // 8 * 8
    matrix = torch.eye(cols, device=machine.device)
    return machine.seconds(lambda: block_feedback(matrix)) / cols**2


def _logits(machine: Machine, _: float) -> float:
    vocabulary = machine.shape.vocabulary
    tokens = max(1, min(LOGIT_TOKENS, LOGITS // vocabulary))
    logits = machine.random(tokens, vocabulary, dtype=machine.dtype).requires_grad_()
    noise = gumbel_noise((tokens,), vocabulary, 0, machine.device)

    def run() -> None:
        with torch.enable_grad():
            likely = logits.float().log_softmax(-1)
            with torch.no_grad():
                drawn = drawn_tokens(likely, noise.at(noise.starts))
            torch.autograd.grad(likely.gather(-1, drawn[:, None]).sum(), logits)

    return machine.seconds(run) / logits.numel()


def _load(machine: Machine, _: float) -> float:
    if machine.codes is not None:
        return _dequantize(machine, machine.codes)
    stored = machine.random(ELEMENTS, dtype=machine.stored).cpu()

    def run() -> None:
        value = stored.clone()
        assert all_finite(value)
        value.to(machine.device, machine.dtype)

    return machine.seconds(run) / ELEMENTS


def _dequantize(machine: Machine, numbers: Numbers) -> float:
    rows, cols = ELEMENTS // COLUMNS, COLUMNS
    codes = torch.zeros(rows, cols // numbers.per_byte, dtype=torch.uint8)
    codes = codes if numbers.values else codes.view(torch.float8_e4m3fn)
    scale = torch.ones(1, cols // BLOCK, device=machine.device)
    block_of = torch.zeros(rows, dtype=torch.long, device=machine.device)

    def run() -> None:
        out = torch.empty(rows, cols, dtype=machine.stored, device=machine.device)
        moved = codes.to(machine.device)
        value = products(moved, numbers, scale, None, block_of, BLOCK, None, out)
        assert all_finite(value) and all_finite(value)  # of the tensor, then of the parameter
        value.to(machine.dtype)

    return machine.seconds(run) / (rows * cols)


def _call(machine: Machine, _: float) -> float:
    x = machine.random(256)

    def run() -> None:
        for _ in range(100):
            x.sub(x)

    return machine.seconds(run) / 100


PROBES: Mapping[str, Callable[[Machine, float], float]] = {
    "product": _product,
    "attend": _attend,
    "multiply": _multiply,
    "recall": _recall,
    "state": _state,
    "float32": _float32,
    "cholesky": _cholesky,
    "copy": _copy,
    "rotate": _rotate,
    "search": _search,
    "decode": _decode,
    "int": _int,
    "nearest": _nearest,
    "draw": _draw,
    "solve": _solve,
    "logits": _logits,
    "load": _load,
    "call": _call,
}


def _reading(files: Iterable[Path]) -> tuple[float, float]:
    """Seconds for a byte of the model's files: read at places all over them, and read again.

    0 without files: of a model that is known by its config alone.
    """
    sizes = [(path, path.stat().st_size) for path in files]
    whole = sum(size for _, size in sizes)
    if not whole:
        return 0.0, 0.0
    places = []
    for place in range(PLACES):
        at = whole * place // PLACES
        for path, size in sizes:
            if at < size:
                places.append((path, at))
                break
            at -= size
    found = []
    for _ in range(2):
        started, done = time.perf_counter(), 0
        for path, at in places:
            with path.open("rb", buffering=0) as file:
                file.seek(at)
                done += len(file.read(PLACE_BYTES) or b"")
        found.append((time.perf_counter() - started) / max(done, 1))
    return found[0], found[1]
