"""Every op of a device's backend against the reference: `moepress doctor --kernels`.

So is what compression computes by kernels (self_test_rounding.py).

Kernels are compiled for the machine that runs them, and nobody has tried all machines. The inputs
are random and small, and reach every kind of kernel: both families of codes, all widths, few and
many tokens, activations of 8 and of 16 bits.

The reference runs on the CPU, in float32, and rounds activations as the kernels do. A number that
lies between two codes may be rounded up here and down there, since sums are in another order, hence
the tolerances. A kernel may also take simpler values of trellis codes (`trellis.Values`), or round
nothing: one of these results has to be met.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, fields, replace
from functools import cache, partial
from typing import Any, get_args

import torch
from torch import Tensor

from moepress import self_test_rounding
from moepress.errors import MoepressError
from moepress.format.codec import CODE_BITS, GRID_BITS, TRELLIS_BITS, PackedSpec
from moepress.kernels import ops, reference, router, small_ops, small_reference, trellis
from moepress.kernels.backends import backend_for
from moepress.kernels.cuda import compiler, launch
from moepress.kernels.experts_call import ExpertsCall
from moepress.kernels.random_codes import random_packed
from moepress.kernels.router import Formula

TOLERANCE = {8: 4e-3, 16: 3e-4}  # of a token's result, by activation bits
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TOKENS = (1, 4, 24, 400)  # kernels of one token, of few and of many differ
MOST = max(TOKENS)
HIDDEN, INNER, GROUP = 128, 256, 128
ROWS = 70  # of a linear; no multiple of a slab
BOTH = (8, 16)  # activation bits
SUMS = 1e-6  # what sums of float32 in another order change


@dataclass(frozen=True)
class Compared:
    """What the comparisons of one op found.

    Attributes:
        name: of the op and what it was given.
        compared: how many results.
        error: the largest relative error of a token's result, |out - oracle| / |oracle|.
        wrong: one line for each result that is further off than its tolerance.
    """

    name: str
    compared: int
    error: float
    wrong: tuple[str, ...]


def self_test(device: torch.device) -> Iterator[Compared]:
    """Run every op on a device with the backend that runs there; one result for each kind of op.

    A kernel that cannot be compiled or started is a wrong result: nothing is raised.
    """
    if backend_for(device).name == "cuda":
        with suppress(MoepressError):  # the op that needs the kernel raises it again
            compiler.compile_all(programs(), torch.cuda.get_device_capability(device))
    for name, cases in _cases(torch.Generator().manual_seed(0)).items():
        yield _tested(name, cases, device)


def programs() -> list[compiler.Program]:
    """Every CUDA program that the end of a file lists; what takes longest to compile first."""
    found: list[compiler.Program] = []
    for source in sorted(launch.SOURCES, key=lambda name: not name.startswith("trellis")):
        text = (compiler.HERE / f"{source}.cu").read_text()
        variants = re.findall(r"^MOEPRESS_\w+\((\d+), (\d)\)$", text, re.MULTILINE)
        names = [f"moepress_{source}_g{g}_p{p}" for g, p in variants] or [f"moepress_{source}"]
        found += [(source, launch.defines_of(name)) for name in names]
    return found


@dataclass(frozen=True)
class _Case:
    """One call of an op.

    Attributes:
        label: what is special about it.
        op: gives a tensor or several.
        given: its arguments on the CPU.
        oracles: give what the reference finds; any of them is right.
        tolerance: of a row of the results. 0: the results are equal.
    """

    label: str
    op: Callable[..., Any]
    given: Sequence[Any]
    oracles: Sequence[Callable[[], Any]]
    tolerance: float = 0.0


def _tested(name: str, cases: Iterator[_Case], device: torch.device) -> Compared:
    compared, largest, wrong = 0, 0.0, []
    for case in cases:
        compared += 1
        try:
            found = case.op(*(_moved(value, device) for value in case.given))
            found = _moved(found, "cpu")  # a card tells here what went wrong in a kernel
        except (MoepressError, RuntimeError) as failure:
            wrong.append(f"{case.label}: {str(failure).splitlines()[0]}")
            continue
        error = _least_error(found, case)
        largest = max(largest, error)
        if not error <= case.tolerance:
            wrong.append(f"{case.label}: error {error:.2g}, at most {case.tolerance:.2g} expected")
    return Compared(name, compared, largest, tuple(wrong))


def _moved(value: Any, device: torch.device | str) -> Any:
    """A copy on a device of a tensor, or of several."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    return [_moved(v, device) for v in value] if isinstance(value, list | tuple) else value


def _least_error(found: Any, case: _Case) -> float:
    """That beside the first oracle which is near enough, else beside the nearest one."""
    errors = []
    for oracle in case.oracles:
        errors.append(_error(found, oracle()))
        if errors[-1] <= case.tolerance:
            return errors[-1]
    return min(errors)


def _error(found: Any, oracle: Any) -> float:
    """The largest `row_error` of one result or of several."""
    if isinstance(oracle, Tensor):
        return row_error(found, oracle)
    return max(row_error(a, b) for a, b in zip(found, oracle, strict=True))


def row_error(found: Tensor, oracle: Tensor) -> float:
    """The largest of `row_errors`; infinite where a shape differs, or a number is NaN."""
    if found.shape != oracle.shape:
        return torch.inf
    if not found.numel() or torch.equal(found, oracle):
        return 0.0
    return float(row_errors(found, oracle).nan_to_num(nan=torch.inf).max())


def row_errors(found: Tensor, oracle: Tensor) -> Tensor:
    """|found - oracle| / |oracle| of each row (the last dimension), float64 [rows].

    The few numbers of a short row may cancel out: then the error is one of a typical row.
    """
    ours, exact = (x.double().reshape(-1, x.shape[-1]) for x in (found, oracle))
    norms = exact.norm(dim=1)
    norms = norms.clamp(min=float(norms.square().mean().sqrt()) * 0.3 + 1e-30)
    errors: Tensor = (ours - exact).norm(dim=1) / norms
    return errors


def _cases(generator: torch.Generator) -> dict[str, Iterator[_Case]]:
    products: dict[str, Iterator[_Case]] = {}
    for family in CODE_BITS:
        products[f"experts, {family} codes"] = _experts(family, generator)
        products[f"linear, {family} codes"] = _linear(family, generator)
    return (
        products
        | {
            "linears": _linears(generator),
            "embedding": _embedding(generator),
            "drop": _drop(generator),
            "route": _route(generator),
            "attention": _attention(generator),
            "rms_norm": _rms_norm(generator),
            "rotary": _rotary(generator),
            "cache_write": _cache_write(generator),
        }
        | {name: _of_rounding(calls(generator)) for name, calls in self_test_rounding.CALLS.items()}
    )


# Products of packed matrices


def _roundings(family: str, activation_bits: int) -> list[dict[str, Any]]:
    """What kernels may do: arguments of the reference. The last one, nothing, needs none."""
    simpler = family == "trellis" and activation_bits == 8
    values = get_args(trellis.Values) if simpler else ("exact",)
    return [*({"rounded": True, "values": v} for v in values), {}]


def _experts(family: str, generator: torch.Generator) -> Iterator[_Case]:
    """Every token chooses every expert: one of each width, and one that is left out."""
    widths = CODE_BITS[family]
    shapes = (2 * INNER, HIDDEN), (HIDDEN, INNER)
    specs = [PackedSpec((*bits, 0), GROUP, family) for bits in (widths, widths[::-1])]
    gate_up, down = (random_packed(s, *n, generator) for s, n in zip(specs, shapes, strict=True))
    tables = [torch.tensor(s.table(*n)) for s, n in zip(specs, shapes, strict=True)]
    choices = len(widths) + 2  # the last one is no expert
    for dtype, bits in ((d, b) for d in ROUNDING for b in BOTH):
        call = ExpertsCall(
            torch.randn(MOST, HIDDEN, generator=generator).to(dtype),
            torch.rand(MOST, choices, generator=generator).argsort(1),
            torch.rand(MOST, choices, generator=generator),
            gate_up, down, tables[0], tables[1], INNER, GROUP, GROUP, "silu", bits, family,
        )  # fmt: skip
        exact = replace(call, hidden=call.hidden.float())
        oracles = [
            partial(_experts_oracle, exact, **rounding) for rounding in _roundings(family, bits)
        ]
        yield from _by_tokens(
            f"{dtype}, activations of {bits} bits",
            partial(_experts_of, call),
            [call.hidden, call.top_k_index, call.top_k_weights],
            oracles,
            TOLERANCE[bits] + 2 * ROUNDING[dtype],
        )


def _experts_of(call: ExpertsCall, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The op with the matrices of `call`, which are moved to the tokens."""
    given = replace(call, hidden=hidden, top_k_index=index, top_k_weights=weights)
    values = [getattr(given, field.name) for field in fields(given)]
    return ops.experts(*_moved(values, hidden.device))


def _experts_oracle(
    call: ExpertsCall, rounded: bool = False, values: trellis.Values = "exact"
) -> Tensor:
    return reference.experts(call, rounded=rounded, values_of=lambda tokens: values)


def _by_tokens(
    label: str,
    op: Callable[..., Tensor],
    given: Sequence[Tensor],
    oracles: Sequence[Callable[[], Tensor]],
    tolerance: float,
) -> Iterator[_Case]:
    """The first of `given`, as many as TOKENS say; the oracles compute all of them once."""
    whole = [cache(oracle) for oracle in oracles]
    for tokens in TOKENS:
        some = [partial(_first, oracle, tokens) for oracle in whole]
        yield _Case(f"{tokens} tokens, {label}", op, [x[:tokens] for x in given], some, tolerance)


def _first(whole: Callable[[], Tensor], tokens: int) -> Tensor:
    return whole()[:tokens]


def _linear(family: str, generator: torch.Generator) -> Iterator[_Case]:
    for width, bits in ((w, b) for w in CODE_BITS[family] for b in BOTH):
        spec = PackedSpec((width,), GROUP, family)
        (codec,) = spec.codecs
        packed = random_packed(spec, ROWS, HIDDEN, generator)
        x = torch.randn(MOST, HIDDEN, generator=generator)
        oracles = [
            partial(reference.linear, x, packed, None, ROWS, codec, bits, **rounding)
            for rounding in _roundings(family, bits)
        ]

        def op(
            x: Tensor, packed: Tensor = packed, number: int = codec.number, bits: int = bits
        ) -> Tensor:
            return ops.linear(x, packed.to(x.device), None, ROWS, number, GROUP, bits, family)

        yield from _by_tokens(
            f"{width} bits, activations of {bits} bits", op, [x], oracles, TOLERANCE[bits]
        )


def _linears(generator: torch.Generator) -> Iterator[_Case]:
    rows, widths, family = [ROWS, 64, 130], TRELLIS_BITS[-3:], "trellis"
    specs = [PackedSpec((width,), GROUP, family) for width in widths]
    packed = [random_packed(s, n, HIDDEN, generator) for s, n in zip(specs, rows, strict=True)]
    codecs = [spec.codecs[0] for spec in specs]
    x = torch.randn(MOST, HIDDEN, generator=generator)

    def oracle(bits: int, rounding: dict[str, Any]) -> Tensor:
        each = zip(packed, rows, codecs, strict=True)
        return torch.cat(
            [reference.linear(x, p, None, n, codec, bits, **rounding) for p, n, codec in each],
            -1,
        )

    for bits in BOTH:

        def op(x: Tensor, bits: int = bits) -> Tensor:
            there = [p.to(x.device) for p in packed]
            numbers = [codec.number for codec in codecs]
            return ops.linears(x, there, rows, numbers, GROUP, bits, family)

        oracles = [partial(oracle, bits, rounding) for rounding in _roundings(family, bits)]
        yield from _by_tokens(f"activations of {bits} bits", op, [x], oracles, TOLERANCE[bits])


# Other ops


def _embedding(generator: torch.Generator) -> Iterator[_Case]:
    ids = torch.randint(ROWS, (3, 5), generator=generator)
    for width, dtype in ((w, d) for w in GRID_BITS for d in ROUNDING):
        spec = PackedSpec((width,), GROUP, "int")
        (codec,) = spec.codecs
        packed = random_packed(spec, ROWS, HIDDEN, generator)
        yield _Case(
            f"{width} bits, {dtype}",
            ops.embedding,
            [ids, packed, ROWS, HIDDEN, codec.number, GROUP, dtype],
            [partial(reference.embedding, ids, packed, ROWS, HIDDEN, codec, dtype)],
        )


def _drop(generator: torch.Generator) -> Iterator[_Case]:
    tokens, k, count = 50, 4, 16
    index = torch.rand(tokens, count + 2, generator=generator).argsort(1)[:, :k] - 1
    weights = torch.rand(tokens, k, generator=generator)
    thresholds = torch.tensor([0.0, 0.3, 0.5, 0.7])
    keep = torch.rand(tokens, generator=generator) < 0.2
    for renormalise, kept in ((r, p) for r in (False, True) for p in (None, keep)):
        given: list[Any] = [index, weights, thresholds, renormalise, kept, count]
        yield _Case(
            f"renormalise {renormalise}, tokens to keep {kept is not None}",
            ops.drop,
            given,
            [partial(reference.drop, *given)],
            SUMS,
        )


FORMULAS = {  # by the number of experts; logits are float32, so that hardly any two are equal
    8: Formula("softmax", normalise=True),
    64: Formula("chosen"),
    256: Formula("sigmoid", True, 1e-20, 2.5, groups=8, kept_groups=4),
}


def _route(generator: torch.Generator) -> Iterator[_Case]:
    for count, tokens in ((e, t) for e in FORMULAS for t in TOKENS):
        formula, k = FORMULAS[count], count.bit_length() // 2
        hidden = torch.randn(tokens, HIDDEN, generator=generator)
        weight = torch.randn(count, HIDDEN, generator=generator) * 2 * HIDDEN**-0.5
        correction = torch.randn(count, generator=generator) if formula.groups > 1 else None
        yield _Case(
            f"{k} of {count} experts, {tokens} tokens",
            small_ops.route,
            [hidden, weight, None, correction, k, *astuple(formula)],
            [partial(router.route, hidden, weight, None, correction, k, formula)],
            10 * SUMS,
        )


def _attention(generator: torch.Generator) -> Iterator[_Case]:
    shapes = (1, 32, 8, 1, 512, 128), (2, 8, 1, 3, 100, 64)
    for batches, heads, shared, tokens, positions, size in shapes:
        q = torch.randn(batches, heads, tokens, size, generator=generator)
        k, v = torch.randn(2, batches, shared, positions, size, generator=generator)
        mask = torch.rand(batches, 1, tokens, positions, generator=generator) < 0.6
        for dtype, hidden in ((d, m) for d in ROUNDING for m in (None, mask)):
            here = [x.to(dtype) for x in (q, k, v)]
            exact: list[Any] = [*(x.double() for x in here), hidden, size**-0.5]
            yield _Case(
                f"{heads} heads of {size}, {positions} positions, {dtype}, "
                f"mask {hidden is not None}",
                ops.attention,
                [*here, hidden, size**-0.5],
                [partial(reference.attention, *exact)],
                10 * SUMS + ROUNDING[dtype],
            )


def _rms_norm(generator: torch.Generator) -> Iterator[_Case]:
    for dtype, formula in ((d, f) for d in ROUNDING for f in small_reference.FORMULAS):
        x = torch.randn(4, 1100, generator=generator).to(dtype)
        weight = (1 + torch.randn(1100, generator=generator)).to(dtype)
        yield _Case(
            f"{formula}, {dtype}",
            small_ops.rms_norm,
            [x, weight, 1e-5, formula],
            [partial(small_reference.rms_norm, x.double(), weight.double(), 1e-5, formula)],
            SUMS + ROUNDING[dtype],
        )


def _rotary(generator: torch.Generator) -> Iterator[_Case]:
    for dtype, name in ((d, n) for d in ROUNDING for n in small_reference.STYLES):
        columns = 32 if small_reference.STYLES[name].doubled else 64
        q, k = (torch.randn(2, n, 3, 80, generator=generator).to(dtype) for n in (8, 2))
        cos, sin = torch.randn(2, 2, 3, columns, generator=generator)
        given: list[Any] = [q, k, cos, sin, name, True]
        yield _Case(
            f"{name}, {dtype}", small_ops.rotary, given, [partial(small_reference.rotary, *given)],
        )  # fmt: skip


def _cache_write(generator: torch.Generator) -> Iterator[_Case]:
    for dtype in ROUNDING:
        held = [torch.randn(2, 4, 9, size, generator=generator).to(dtype) for size in (64, 48)]
        token = [torch.randn(2, 4, 1, size, generator=generator).to(dtype) for size in (64, 48)]
        given: list[Any] = [*held, *token, torch.tensor([5])]

        def oracle(given: list[Any] = given) -> Sequence[Tensor]:
            return _written(small_reference.cache_write, *given)

        yield _Case(str(dtype), partial(_written, small_ops.cache_write), given, [oracle])


def _written(
    write: Callable[..., None], keys: Tensor, values: Tensor, *token: Tensor
) -> Sequence[Tensor]:
    """The cache after `write`."""
    held = keys.clone(), values.clone()
    write(*held, *token)
    return held


def _of_rounding(calls: Iterator[self_test_rounding.Call]) -> Iterator[_Case]:
    for label, op, given, oracle, tolerance in calls:
        yield _Case(label, op, given, [oracle], tolerance)
