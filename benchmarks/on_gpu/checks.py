"""Every op on the card against the reference backend, which runs on the CPU.

The oracle rounds activations as the kernels do (`reference.linear(rounded=True)`), in float32.
Outputs are compared by |out - oracle| / |oracle|, over all tokens and for the worst token. A number
that lies between two activation codes may be rounded up here and down there, since sums are in
another order; hence the tolerances.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moepress import kernels
from moepress.errors import MoepressError
from moepress.format.codec import CODE_BITS, GRID_BITS, Codec, PackedSpec
from moepress.kernels import ExpertsCall, Gate, reference
from moepress.kernels.modules import PackedExperts, PackedLinear
from on_gpu.card import Card
from on_gpu.case import Case, CheckError, Row
from on_gpu.random_codes import random_packed

TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200, 300)
SHAPES = (  # rows, columns, group size of a linear
    (64, 32, 32), (1, 64, 32), (70, 384, 128), (200, 64, 64), (130, 160, 32), (257, 1024, 128),
    (48, 192, 64), (512, 2816, 128),
)  # fmt: skip
EXPERTS = (  # hidden, intermediate, gate_up's and down's group size, chosen, tokens
    (64, 32, 32, 32, 2, (1, 3, 8, 9, 40, 300)),
    (96, 160, 32, 32, 1, (1, 5, 64, 130)),
    (256, 384, 128, 64, 4, (1, 2, 16, 17, 129)),
    (384, 128, 64, 128, 8, (1, 4, 33, 300)),
    (1024, 704, 128, 64, 2, (1, 16, 100)),
)
GATES = {
    "gpt_oss": Gate("silu", limit=7.0, alpha=1.702, up_offset=1.0),
    "step3p7": Gate("silu", limit=2.0, limits_output=True),
    "inkling2": Gate("silu", gate_softcap=4.0, up_softcap=2.5),
    "nemotron_h": Gate("relu2", gated=False),
}
TOLERANCE = {8: 4e-3, 16: 3e-4}  # by activation bits, of a token; see above
HALF = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def cases(card: Card) -> Iterator[Case]:
    from on_gpu import grouped

    for case in integer_cases(card):
        yield grouped.by_integers(case)
    yield from grouped.check_cases(card)


def integer_cases(card: Card) -> Iterator[Case]:
    yield Case("the cuda backend runs here", partial(check_backend, card), 60)
    yield Case("first call", partial(first_call, card), 150)
    families = [(family, bits) for family, widths in CODE_BITS.items() for bits in widths]
    for family, bits in families:
        yield Case(f"linear {family} {bits}", partial(check_linear, card, family, bits), 90)
    for family in CODE_BITS:
        for number in range(len(EXPERTS)):
            run = partial(check_experts, card, family, number)
            yield Case(f"experts {family}, shape {number}", run, 90)
        yield Case(f"activations {family}", partial(check_activations, card, family), 90)
        yield Case(f"gates {family}", partial(check_gates, card, family), 90)
        yield Case(f"odd inputs {family}", partial(check_odd_inputs, card, family), 60)
    yield Case("embedding", partial(check_embedding, card), 60)
    yield Case("drop", partial(check_drop, card), 60)
    yield Case("attention", partial(check_attention, card), 60)
    yield Case("CUDA graph", partial(check_graph, card), 60)
    for family in CODE_BITS:
        yield Case(f"large {family}", partial(check_large, card, family), 120)


def compile_cases(card: Card) -> Iterator[Case]:
    for family in CODE_BITS:
        yield Case(f"{family}", partial(check_compile, card, family), 120)


def check_backend(card: Card) -> list[Row]:
    status = [dataclasses.asdict(s) for s in kernels.status()]
    found = kernels.backend_for(card.device).name
    if found != card.device.type:
        raise CheckError(f"{card.device} runs '{found}': {status}")
    return [{"backend": found, "status": status}]


def first_call(card: Card) -> list[Row]:
    started = time.perf_counter()
    spec = PackedSpec((2,), 32, "trellis")
    packed = random_packed(spec, 64, 64, card.generator())
    x = torch.randn(1, 64, device=card.device)
    kernels.linear(x, packed, None, 64, 2, 32, 8, "trellis").sum().item()
    return [{"seconds": time.perf_counter() - started}]


# Comparison


class Worst:
    """The worst float32 errors over many comparisons, and what was wrong."""

    def __init__(self) -> None:
        self.error = self.token_error = 0.0
        self.count = 0
        self.wrong: list[str] = []

    def __call__(
        self, label: str, found: Tensor, oracle: Tensor, tolerance: float, dtype: torch.dtype
    ) -> None:
        """Compare `found` in `dtype` with an oracle in float32 on the CPU."""
        self.count += 1
        if found.dtype != dtype or found.shape != oracle.shape:
            self.wrong.append(f"{label}: {list(found.shape)} {found.dtype}")
            return
        ours, exact = found.detach().cpu().double(), oracle.double()
        if ours.numel() == 0:
            return
        allowed = tolerance + HALF[dtype]
        rows = ours.reshape(-1, ours.shape[-1]), exact.reshape(-1, ours.shape[-1])
        norms = rows[1].norm(dim=1)
        # The few outputs of a short row may cancel out: then the error is one of a typical token.
        norms = norms.clamp(min=float(norms.square().mean().sqrt()) * 0.3 + 1e-30)
        errors = (rows[0] - rows[1]).norm(dim=1) / norms
        error = float((ours - exact).norm() / exact.norm().clamp(min=1e-30))
        worst = float(errors.nan_to_num(nan=9e9, posinf=9e9).max())
        if dtype == torch.float32:
            self.error = max(self.error, error if error == error else 9e9)
            self.token_error = max(self.token_error, worst)
        if not worst <= allowed:
            bad = (~(errors <= allowed)).nonzero().flatten().tolist()
            self.wrong.append(
                f"{label}: error {worst:.3g}, allowed {allowed:.3g}; {len(bad)} of {len(errors)} "
                f"rows, first {bad[:6]}"
            )

    def same(self, label: str, found: Tensor, other: Tensor) -> None:
        """Check that two results are equal bit for bit."""
        self.count += 1
        if not torch.equal(_bytes(found), _bytes(other)):
            differ = int((found != other).sum())
            self.wrong.append(f"{label}: {differ} of {found.numel()} numbers differ")

    def expect(self, label: str, holds: bool) -> None:
        self.count += 1
        if not holds:
            self.wrong.append(label)

    def rows(self) -> list[Row]:
        row = {"compared": self.count, "error": self.error, "token_error": self.token_error}
        if self.wrong:
            more = f" (and {len(self.wrong) - 8} more)" if len(self.wrong) > 8 else ""
            raise CheckError(f"{row} WRONG {len(self.wrong)}: " + " | ".join(self.wrong[:8]) + more)
        return [row]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _tokens(card: Card) -> tuple[int, ...]:
    return (1, 2, 3, 17) if card.tiny else TOKENS


# Linear


def check_linear(card: Card, family: str, bits: int) -> list[Row]:
    worst, generator = Worst(), torch.Generator().manual_seed(bits)
    for (rows, cols, group), activation_bits in (
        (shape, a) for shape in (SHAPES[:4] if card.tiny else SHAPES) for a in (8, 16)
    ):
        spec = PackedSpec((bits,), group, family)
        packed = random_packed(spec, rows, cols, torch.Generator().manual_seed(rows))
        x = torch.randn(max(_tokens(card)), cols, generator=generator)
        bias = torch.randn(rows, generator=generator)
        (codec,) = spec.codecs
        oracle = reference.linear(x, packed, None, rows, codec, activation_bits, rounded=True)
        here = [t.to(card.device) for t in (x, packed, bias)]

        def call(
            x: Tensor,
            bias: Tensor | None = None,
            packed: Tensor = here[1],
            given: tuple[Any, ...] = (rows, bits, group, activation_bits, family),
        ) -> Tensor:
            y: Tensor = kernels.linear(x, packed, bias, *given)
            return y

        for tokens in _tokens(card):
            card.poison()
            label = f"{rows}x{cols} g{group} a{activation_bits} T{tokens}"
            allowed = TOLERANCE[activation_bits]
            try:
                y = call(here[0][:tokens])
            except MoepressError as error:  # other numbers of tokens take other kernels
                worst.wrong.append(f"{label}: {str(error)[:300]}")
                break
            worst(label, y, oracle[:tokens], allowed, torch.float32)
            worst.same(label + " twice", call(here[0][:tokens]), y)
            if tokens in (1, 17):
                with_bias = call(here[0][:tokens], here[2])
                worst(label + " bias", with_bias, oracle[:tokens] + bias, allowed, torch.float32)
        for dtype in (torch.bfloat16, torch.float16):
            some = x[:17].to(dtype)
            exact = reference.linear(
                some.float(), packed, bias.to(dtype).float(), rows, codec, activation_bits,
                rounded=True,
            )  # fmt: skip
            y = call(some.to(card.device), here[2].to(dtype))
            worst(f"{rows}x{cols} {dtype}", y, exact, 2 * TOLERANCE[activation_bits], dtype)
        moved = torch.cat([here[1].new_zeros(64), here[1]])[64:]  # another alignment
        worst.same("moved by 64 bytes", call(here[0][:3], None, moved), call(here[0][:3]))
        nothing = call(here[0][:0])
        worst.expect("no token", nothing.shape == (0, rows))
        deep = call(here[0][:6].view(2, 3, cols))
        worst.same("[2, 3, K]", deep.view(6, rows), call(here[0][:6]))
    return worst.rows()


# Experts


def experts_call(
    family: str,
    hidden: int,
    inner: int,
    groups: tuple[int, int],
    chosen: int,
    tokens: int,
    activation: str = "silu",
    activation_bits: int = 8,
    gate: Gate | None = None,
) -> ExpertsCall:
    """A call on the CPU: every width, an expert that is left out, choices that are no expert.

    With a gate there are biases, and inputs large enough for its limits.
    """
    widths = CODE_BITS[family]
    gate_up = (*widths, 0, *widths[::-1], 2)
    down = (*widths[1:], widths[0], 0, *widths, 2)
    specs = PackedSpec(gate_up, groups[0], family), PackedSpec(down, groups[1], family)
    shapes = ((gate.parts if gate else 2) * inner, hidden), (hidden, inner)
    generator = torch.Generator().manual_seed(tokens + hidden)
    packed = [random_packed(s, *shape, generator) for s, shape in zip(specs, shapes, strict=True)]
    tables = [torch.tensor(s.table(*shape)) for s, shape in zip(specs, shapes, strict=True)]
    count = len(gate_up)
    order = torch.rand(tokens, count + 2, generator=generator).argsort(1)[:, :chosen]
    index = order - 1  # -1 and `count` are no expert
    weights = torch.rand(tokens, chosen, generator=generator)
    x = torch.randn(tokens, hidden, generator=generator)
    call = ExpertsCall(
        x, index, weights, *packed, *tables, inner, *groups, activation, activation_bits, family
    )
    if gate is None:
        return call
    biases = [torch.randn(count, rows, generator=generator) for rows, _ in shapes]
    (rows, cols), codec = shapes[0], Codec(gate_up[0], groups[0], family)
    y = reference.linear(x, packed[0][: codec.nbytes(rows, cols)], None, rows, codec)
    return dataclasses.replace(
        call,
        hidden=x * (6 / float(y.std())),
        gate_up_bias=biases[0],
        down_bias=biases[1],
        **dataclasses.asdict(gate),
    )


def on(device: torch.device, call: ExpertsCall) -> ExpertsCall:
    moved = {
        f.name: getattr(call, f.name).to(device)
        for f in dataclasses.fields(call)
        if isinstance(getattr(call, f.name), Tensor)
    }
    return dataclasses.replace(call, **moved)


def run_experts(call: ExpertsCall) -> Tensor:
    y: Tensor = kernels.experts(*(getattr(call, f.name) for f in dataclasses.fields(call)))
    return y


def first_tokens(call: ExpertsCall, tokens: int) -> ExpertsCall:
    names = "hidden", "top_k_index", "top_k_weights"
    return dataclasses.replace(call, **{n: getattr(call, n)[:tokens] for n in names})


def check_experts(card: Card, family: str, number: int) -> list[Row]:
    hidden, inner, first, second, chosen, counts = EXPERTS[number]
    worst = Worst()
    for activation_bits in (8, 16):
        most = experts_call(
            family, hidden, inner, (first, second), chosen, max(counts), "silu", activation_bits
        )
        here = on(card.device, most)
        # The CPU takes long for large ones. In PyTorch's own operations, the card is as good.
        oracle = reference.experts(here if number > 2 else most, rounded=True).cpu()
        for tokens in counts[:2] if card.tiny else counts:
            card.poison()
            label = f"H{hidden} I{inner} k{chosen} a{activation_bits} T{tokens}"
            call = first_tokens(here, tokens)
            y = run_experts(call)
            worst(label, y, oracle[:tokens], TOLERANCE[activation_bits], torch.float32)
            worst.same(label + " twice", run_experts(call), y)
        for dtype in (torch.bfloat16, torch.float16) if number < 3 else ():
            some = first_tokens(most, 5)
            half = some.hidden.to(dtype)
            exact = reference.experts(dataclasses.replace(some, hidden=half.float()), rounded=True)
            given = dataclasses.replace(first_tokens(here, 5), hidden=half.to(card.device))
            allowed = 2 * TOLERANCE[activation_bits]
            worst(f"{dtype} a{activation_bits}", run_experts(given), exact, allowed, dtype)
    return worst.rows()


def check_activations(card: Card, family: str) -> list[Row]:
    worst = Worst()
    for name in reference.ACTIVATIONS:
        call = experts_call(family, 128, 96, (32, 32), 2, 20, name, 16)
        oracle = reference.experts(call, rounded=True)
        worst(name, run_experts(on(card.device, call)), oracle, TOLERANCE[16], torch.float32)
    return worst.rows()


def check_gates(card: Card, family: str) -> list[Row]:
    worst = Worst()
    for name, gate in GATES.items():
        for tokens, activation_bits in ((1, 16), (20, 16), (70, 8)):
            call = experts_call(family, 128, 96, (32, 32), 2, tokens, "silu", activation_bits, gate)
            oracle = reference.experts(call, rounded=True)
            label = f"{name} a{activation_bits} T{tokens}"
            allowed = TOLERANCE[activation_bits]
            worst(label, run_experts(on(card.device, call)), oracle, allowed, torch.float32)
    return worst.rows()


def check_odd_inputs(card: Card, family: str) -> list[Row]:
    """Memory layouts, values that are not finite, no choices at all."""
    worst = Worst()
    call = on(card.device, experts_call(family, 128, 96, (32, 32), 2, 20, "silu", 16))
    y = run_experts(call)
    strided = dataclasses.replace(
        call,
        hidden=torch.stack([call.hidden] * 2, dim=1)[:, 1],
        top_k_index=call.top_k_index.T.contiguous().T,
        top_k_weights=call.top_k_weights.T.contiguous().T,
    )
    worst.same("strided inputs", run_experts(strided), y)
    worst.same("int32 index", run_experts(
        dataclasses.replace(call, top_k_index=call.top_k_index.int())), y)  # fmt: skip
    none = dataclasses.replace(call, top_k_index=torch.full_like(call.top_k_index, -1))
    worst.expect("no choices give 0", bool(run_experts(none).eq(0).all()))
    empty = run_experts(first_tokens(call, 0))
    worst.expect("no tokens", empty.shape == (0, 128))
    last = len(call.gate_up_table)
    half = call.top_k_index.clone()
    half[:, 1] = last
    alone = run_experts(dataclasses.replace(call, top_k_index=half))
    oracle = reference.experts(
        on(torch.device("cpu"), dataclasses.replace(call, top_k_index=half)), rounded=True
    )
    worst("one choice dropped", alone, oracle, TOLERANCE[16], torch.float32)
    spoiled = call.hidden.clone()
    spoiled[3, 5], spoiled[7, 0], spoiled[11] = torch.nan, torch.inf, 0
    z = run_experts(dataclasses.replace(call, hidden=spoiled))
    others = [t for t in range(20) if t not in (3, 7, 11)]
    worst.same("a NaN spoils no other token", z[others], y[others])
    inside = (call.top_k_index >= 0) & (call.top_k_index < last)
    widths = call.gate_up_table[call.top_k_index.clamp(0, last - 1), 1]
    chooses = ((widths > 0) & inside).any(1)
    for t in (3, 7):
        worst.expect(f"token {t} is NaN", bool(z[t].isnan().all()) or not bool(chooses[t]))
    worst.expect("a zero token gives 0", bool(z[11].eq(0).all()))
    return worst.rows()


# Embedding, drop


def check_embedding(card: Card) -> list[Row]:
    worst = Worst()
    for bits, (rows, cols, group) in (
        (b, s) for b in GRID_BITS for s in ((50, 64, 32), (300, 384, 128), (33, 192, 64))
    ):
        spec = PackedSpec((bits,), group)
        packed = random_packed(spec, rows, cols, torch.Generator().manual_seed(rows))
        for shape, dtype in (
            (s, d)
            for s in ((1,), (2, 3), (0,), (1, 257))
            for d in (torch.float32, torch.bfloat16, torch.float16)
        ):
            ids = torch.randint(rows, shape, generator=torch.Generator().manual_seed(1))
            ids.flatten()[-1:] = rows - 1
            card.poison()
            exact = reference.embedding(ids, packed, rows, cols, spec.codecs[0], dtype)
            y = kernels.embedding(
                ids.to(card.device), packed.to(card.device), rows, cols, bits, group, dtype
            )
            worst.same(f"{bits} bits {rows}x{cols} {dtype} {shape}", y.cpu(), exact)
    return worst.rows()


def check_drop(card: Card) -> list[Row]:
    worst, generator = Worst(), torch.Generator().manual_seed(0)
    for tokens, k, count in ((1, 2, 8), (7, 8, 128), (300, 4, 16), (1000, 8, 256), (0, 2, 8)):
        weights = torch.rand(tokens, k, generator=generator)
        index = torch.rand(tokens, count + 2, generator=generator).argsort(1)[:, :k] - 1
        thresholds = torch.cat([torch.zeros(1), torch.rand(k - 1, generator=generator)])
        keep = torch.rand(tokens, generator=generator) < 0.2
        for renormalise, kept in ((r, p) for r in (False, True) for p in (None, keep)):
            given = index, weights, thresholds, renormalise, kept, count
            exact = reference.drop(*given)
            found = kernels.drop(
                *(g.to(card.device) if isinstance(g, Tensor) else g for g in given)
            )
            label = f"{tokens} tokens of {k}, renormalise {renormalise}, keep {kept is not None}"
            worst.same(label + ": index", found[0].cpu(), exact[0])
            worst.same(label + ": dropped", found[2].cpu(), exact[2])
            gap = (found[1].cpu() - exact[1]).abs().max() if tokens else torch.zeros(())
            worst.expect(label + f": weights differ by {float(gap):.3g}", float(gap) < 1e-6)
    return worst.rows()


ATTENTION = (  # batches, query heads, key heads, tokens, positions, size of a head
    (1, 32, 8, 1, 512, 128), (2, 8, 1, 1, 100, 64), (1, 24, 2, 1, 333, 128), (2, 4, 2, 3, 65, 256),
    (1, 4, 4, 1, 1, 40),
)  # fmt: skip


def check_attention(card: Card) -> list[Row]:
    """Rows with and without a mask, and one that sees nothing. Errors: of a head."""
    worst, generator = Worst(), torch.Generator().manual_seed(0)
    for batches, heads, shared, tokens, positions, size in ATTENTION:
        q = torch.randn(batches, heads, tokens, size, generator=generator)
        k, v = torch.randn(2, batches, positions, shared, size, generator=generator).transpose(2, 3)
        mask = torch.rand(batches, 1, tokens, positions, generator=generator) < 0.6
        mask[..., 0] = True
        mask[0, 0, 0] = False
        for dtype, given in ((d, m) for d in HALF for m in (None, mask)):
            here = [x.to(dtype) for x in (q, k, v)]
            exact = reference.attention(*(x.double() for x in here), given, size**-0.5)
            there = [x.to(card.device) for x in here]
            found = kernels.attention(
                *there, None if given is None else given.to(card.device), size**-0.5
            )
            label = f"{batches} x {heads} ({shared}) heads of {size}, {positions} keys, {dtype}"
            worst(label, found, exact, 1e-5, dtype)
            if given is not None:
                worst.expect(label + ": zeros", not found[0, 0].any())
    return worst.rows()


# Graphs, compilers, large shapes


class Block(nn.Module):
    """A packed projection, a router, packed experts and the residual: half a decoder layer."""

    def __init__(self, card: Card, family: str) -> None:
        super().__init__()
        hidden, inner, count = 256, 128, 6
        specs = (
            PackedSpec((2, 3, 2, 1, 0, 4), 64, family),
            PackedSpec((2, 2, 3, 1, 0, 4), 64, family),
        )
        four = Codec(4, 64, family)
        self.project = PackedLinear(hidden, hidden, four)
        self.router = nn.Linear(hidden, count, bias=False)
        self.experts = PackedExperts(count, hidden, inner, *specs, Gate("silu"))
        generator = torch.Generator().manual_seed(0)
        filled = (
            (self.project.weight, PackedSpec((4,), 64, family), hidden, hidden),
            (self.experts.gate_up_proj, specs[0], 2 * inner, hidden),
            (self.experts.down_proj, specs[1], hidden, inner),
        )
        for parameter, spec, rows, cols in filled:
            parameter.data = random_packed(spec, rows, cols, generator)
        self.router.weight.data.normal_(generator=generator)
        self.to(card.device)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        weights, index = self.router(y).softmax(-1).topk(2)
        return x + self.experts(y, index, weights)


def check_graph(card: Card) -> list[Row]:
    """A captured graph gives what plain calls give, for inputs that came after capture."""
    worst = Worst()
    for family in CODE_BITS:
        block = Block(card, family)
        thresholds = torch.tensor([0.0, 0.5], device=card.device)
        table = random_packed(PackedSpec((4,), 64), 40, 256, card.generator())
        for tokens in (1, 4, 40):
            ids = torch.zeros(tokens, dtype=torch.int64, device=card.device)
            x = torch.zeros(tokens, 256, device=card.device)
            weights = torch.rand(tokens, 2, device=card.device)
            index = torch.randint(6, (tokens, 2), device=card.device)

            def work(
                x: Tensor = x,
                ids: Tensor = ids,
                index: Tensor = index,
                weights: Tensor = weights,
                block: Block = block,
                table: Tensor = table,
                thresholds: Tensor = thresholds,
            ) -> tuple[Tensor, ...]:
                y = block(x) + kernels.embedding(ids, table, 40, 256, 4, 64, torch.float32)
                return y, *kernels.drop(index, weights, thresholds, True, None, 6)

            with torch.inference_mode():
                replay, results = card.captured(work)
                for seed in range(3):
                    generator = card.generator(seed)
                    x.normal_(generator=generator)
                    ids.random_(0, 40, generator=generator)
                    weights.uniform_(generator=generator)
                    replay()
                    card.synchronize()
                    if card.is_cuda:
                        for found, plain in zip(results, work(), strict=True):
                            worst.same(f"{family} {tokens} tokens", found, plain)
    return worst.rows()


def check_compile(card: Card, family: str) -> list[Row]:
    """torch.compile(fullgraph=True) of a block: the same but for the order of torch's own sums."""
    worst, rows = Worst(), []
    ways: tuple[dict[str, Any], ...] = ({}, {"mode": "reduce-overhead"})
    for options in ways if card.is_cuda else ({"backend": "aot_eager"},):
        block = Block(card, family)
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, dynamic=False, **options)
        with torch.inference_mode():
            for seed in range(4):
                x = torch.randn(4, 256, device=card.device, generator=card.generator(seed))
                y = compiled(x).clone()
                worst(f"{options} {family}", y, block(x).cpu(), TOLERANCE[8], torch.float32)
        rows.append({"compiled": str(options or "inductor")})
    return [*worst.rows(), *rows]


def check_large(card: Card, family: str) -> list[Row]:
    """Mixtral-8x7B's shape, with the reference backend on the card itself as the oracle."""
    worst, wanted = Worst(), (2, 3, 4, 1)
    hidden, inner = (128, 256) if card.tiny else (4096, 14336)
    generator = card.generator(3)
    shapes = (2 * inner, hidden), (hidden, inner)
    spec = PackedSpec(wanted, 128, family)
    packed = [random_packed(spec, *shape, generator) for shape in shapes]
    tables = [torch.tensor(spec.table(*shape), device=card.device) for shape in shapes]
    for tokens, activation_bits in ((1, 8), (3, 16), (16, 8), (200, 8), (600, 16)):
        x = torch.randn(tokens, hidden, generator=generator, device=card.device)
        index = torch.rand(tokens, 4, generator=generator, device=card.device).argsort(1)[:, :2]
        weights = torch.rand(tokens, 2, generator=generator, device=card.device)
        call = ExpertsCall(
            x, index, weights, *packed, *tables, inner, 128, 128, "silu", activation_bits, family
        )
        card.poison()
        y = run_experts(call)
        oracle = reference.experts(call, rounded=True).cpu()
        label = f"{tokens} tokens a{activation_bits}"
        worst(label, y, oracle, TOLERANCE[activation_bits], torch.float32)
    rows, cols = (500, 256) if card.tiny else (32000, 4096)
    spec = PackedSpec((4,), 128, family)
    matrix = random_packed(spec, rows, cols, generator)
    for tokens in (1, 70):
        x = torch.randn(tokens, cols, generator=generator, device=card.device)
        y = kernels.linear(x, matrix, None, rows, 4, 128, 8, family)
        oracle = reference.linear(x, matrix, None, rows, spec.codecs[0], 8, rounded=True).cpu()
        worst(f"head, {tokens} tokens", y, oracle, TOLERANCE[8], torch.float32)
    return worst.rows()


def sanitized(card: Card) -> Callable[[], None]:
    """A small run of every kernel, for compute-sanitizer."""
    from on_gpu import grouped

    def run() -> None:
        for family in CODE_BITS:
            for tokens in (1, 40):
                call = on(card.device, experts_call(family, 128, 96, (32, 32), 2, tokens))
                run_experts(call).sum().item()
                with grouped.way(True):
                    run_experts(call).sum().item()
            for bits in CODE_BITS[family]:
                spec = PackedSpec((bits,), 32, family)
                packed = random_packed(spec, 70, 96, torch.Generator()).to(card.device)
                for tokens in (1, 20, 70):
                    x = torch.randn(tokens, 96, device=card.device)
                    for activation_bits in (8, 16):
                        kernels.linear(x, packed, None, 70, bits, 32, activation_bits, family)
                if family == "int":
                    ids = torch.arange(70, device=card.device)
                    kernels.embedding(ids, packed, 70, 96, bits, 32, torch.float32)
        index = torch.randint(8, (5, 2), device=card.device)
        weights = torch.rand(5, 2, device=card.device)
        thresholds = torch.tensor([0.0, 0.5], device=card.device)
        kernels.drop(index, weights, thresholds, True, None, 8)
        card.synchronize()

    return run
