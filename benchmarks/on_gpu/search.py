"""The trellis search on the card, and compression of two layers of Mixtral-8x7B's shape."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mixtral_shape
from moepress.format.codec import HALF_WIDTHS, TRELLIS_BITS
from moepress.kernels import trellis
from moepress.kernels.cuda import drawn, rotation, values
from moepress.kernels.trellis import TILE_COLUMNS, branch_bits, code_matrix, deviation
from moepress.rounding import noise
from moepress.rounding.methods import viterbi
from on_gpu.card import Card
from on_gpu.case import Case, CheckError, Row

MIXES = {
    "1": (1,), "1.5": (1.5,), "2": (2,), "2.5": (2.5,), "3": (3,), "3.5": (3.5,), "4": (4,),
    "2 and 3": (2, 3),
}  # fmt: skip
SEQUENCES, LENGTH = 128, 2048  # of a whole compression
LIMIT = 24e9  # bytes of the card's memory that torch may take


def cases(card: Card) -> Iterator[Case]:
    for bits in sorted(TRELLIS_BITS, key=lambda b: b not in HALF_WIDTHS):
        yield Case(f"{bits} bits against the oracle", partial(check_search, card, bits), 60)
    yield Case("several matrices", partial(check_together, card), 60)
    yield Case("drawn errors", partial(check_drawn, card), 60)
    yield Case("values of codes", partial(check_values, card), 60)
    yield Case("rotation", partial(check_rotation, card), 60)
    yield Case("rates", partial(rates, card), 60)


def targets(card: Card, bits: float, *shape: int) -> torch.Tensor:
    generator = card.generator(round(2 * bits))
    return torch.randn(*shape, generator=generator, device=card.device) * deviation(bits)


def check_search(card: Card, bits: float) -> list[Row]:
    """The same branches as `search_plainly`, bit for bit."""
    lengths = (64, 128) if card.tiny else (64, 128, 640, 4096 + 64, 2 * 4096 + 640)
    wrong = []
    for rows in lengths:
        target = targets(card, bits, TILE_COLUMNS, rows)
        found, exact = viterbi.search(target, bits), viterbi.search_plainly(target, bits)
        differ = int((found != exact).sum())
        if differ:
            wrong.append(f"{rows} rows: {differ} of {found.numel()} branches differ")
    if wrong:
        raise CheckError("; ".join(wrong))
    return [{"lengths": len(lengths)}]


def check_together(card: Card) -> list[Row]:
    bits, rows, columns, first = (1, 2, 1.5, 3, 4, 2.5, 3.5, 2), 192, 24, 8
    target = torch.stack([targets(card, b, columns, rows) for b in bits])
    feedback = torch.randn(target.shape, device=card.device)
    before, original = feedback.clone(), target.clone()
    branches = torch.full(target.shape, 7, dtype=torch.uint8, device=card.device)
    viterbi.round_together(target, feedback, branches, bits, first)
    here = slice(first, first + TILE_COLUMNS)
    wrong = 0
    for number, width in enumerate(bits):
        wanted = original[number, here]
        exact = viterbi.search_plainly(wanted + before[number, here], width)
        errors = wanted - code_matrix(exact.T.contiguous(), width).T
        wrong += int((branches[number, here] != exact).sum())
        wrong += int((feedback[number, here] != errors).sum())
    branches[:, here] = 7
    feedback[:, here] = before[:, here]
    if wrong or not (bool(branches.eq(7).all()) and torch.equal(feedback, before)):
        raise CheckError(f"{wrong} numbers differ, or other columns were written")
    return [{"matrices": len(bits)}]


def check_drawn(card: Card) -> list[Row]:
    """A visit of drawn errors by kernels and by plain operations."""
    worst = 0.0
    for columns, widths in ((96, 1), (1024, 3), (28672, 3)):
        target, z = torch.randn(2, 24, columns, generator=card.generator(), device=card.device)
        received = torch.randn(24, widths, columns, generator=card.generator(1), device=card.device)
        given = target, received, torch.zeros_like(received)
        more = torch.linspace(0.02, 0.3, widths, device=card.device), z
        expected = [x.clone() for x in given]
        for start, stop in ((8, 16), (16, 20)):
            drawn.drawing(*given, *more)(start, stop)
            noise.plain_drawing(*expected, *more)(start, stop)
        pairs = zip(given, expected, strict=True)
        worst = max(worst, *(float((a - b).abs().max()) for a, b in pairs))
    if not worst < 1e-5:
        raise CheckError(f"numbers differ by {worst:.3g}")
    return [{"differ_by": worst}]


def check_values(card: Card) -> list[Row]:
    """Values of branches at all widths, bit for bit."""
    for bits in sorted(TRELLIS_BITS):
        for rows, columns in ((64, 8), (192, 40), (1024, 4096)):
            low, high = branch_bits(bits)
            shape = rows, columns // 4, 2
            steps = [
                torch.randint(1 << width, shape, device=card.device, dtype=torch.uint8)
                for width in (low, high)
            ]
            branches = torch.stack(steps, 2).view(rows, columns)
            if not torch.equal(values.code_matrix(branches, bits), code_matrix(branches, bits)):
                raise CheckError(f"{bits} bits, {rows} x {columns}: values differ")
    return [{"widths": len(TRELLIS_BITS)}]


def check_rotation(card: Card) -> list[Row]:
    """Rows rotated forth, and in float32 back, by the kernel and by plain operations, bit for bit.

    Plain operations on the CPU: a card may round a product and a sum together.
    """
    compared = 0
    for columns in (96, 256, 2816) if card.tiny else (96, 256, 2816, 4096, 14336):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(30, columns, generator=card.generator(columns), device=card.device)
            x, plain = x.to(dtype), x.to(dtype).cpu()
            pairs = [(rotation.rotate(x), trellis.rotate(plain))]
            if dtype == torch.float32:
                pairs.append((rotation.rotate(x, back=True), trellis.rotate_back(plain)))
            for found, exact in pairs:
                compared += 1
                if not torch.equal(found.cpu(), exact):
                    raise CheckError(f"{columns} columns, {dtype}: rotated rows differ")
    return [{"compared": compared}]


def rates(card: Card) -> list[Row]:
    """Weights per second, by widths and number of matrices of 28672 rows (Mixtral's gate_up)."""
    rows = []
    length = 128 if card.tiny else 28672
    for name, bits in MIXES.items():
        for matrices in (1, 8):
            widths = tuple(bits[i % len(bits)] for i in range(matrices))
            columns = 2 * TILE_COLUMNS
            target = torch.stack([targets(card, b, columns, length) for b in widths])
            feedback = torch.zeros_like(target)
            branches = torch.empty(target.shape, dtype=torch.uint8, device=card.device)
            given = target, feedback, branches, widths
            seconds = card.seconds(
                lambda given=given: [viterbi.round_together(*given, c) for c in (0, TILE_COLUMNS)],
                rounds=3,
            )
            weights = target.numel()
            rows.append({"bits": name, "matrices": matrices, "us_per_8_columns": 5e5 * seconds,
                         "gweights_per_s": weights / seconds / 1e9})  # fmt: skip
    return rows


# Compression


def compress_cases(card: Card) -> Iterator[Case]:
    """First with little text, which also compiles the kernels."""
    for recipe, sequences in (("default", 4), ("default", 2 if card.tiny else SEQUENCES)):
        run = partial(compress_layers, card, recipe, sequences)
        yield Case(f"{recipe}, {sequences} sequences, {LIMIT / 1e9:.0f} GB", run, 420)


def compress_layers(card: Card, recipe_name: str, sequences: int) -> list[Row]:
    """Seconds of each stage for two layers, in LIMIT bytes of a card's memory."""
    from moepress.allocate import allocate
    from moepress.original.source import Source
    from moepress.quantize import quantize
    from moepress.recipe import Recipe
    from moepress.score import score

    length = 64 if card.tiny else LENGTH
    folder = Path(tempfile.gettempdir()) / "moepress-two-layers"
    if not folder.exists():
        if card.tiny:
            mixtral_shape.HIDDEN, mixtral_shape.INTERMEDIATE = 128, 256
        mixtral_shape.make(folder, 2, card.device)
    out = folder.with_name(f"{folder.name}-out")
    shutil.rmtree(out, ignore_errors=True)
    recipe = Recipe.load(recipe_name, bits=2.5, sequences=sequences, sequence_length=length)
    vocabulary = mixtral_shape.VOCAB
    ids = torch.randint(vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0))
    if card.is_cuda:
        share = min(1.0, LIMIT / card.properties.total_memory)
        torch.cuda.set_per_process_memory_fraction(share, card.device)
    source = Source(folder, card.device)
    rows: list[Row] = []

    def stage(name: str, work: Callable[[], Any]) -> Any:
        if card.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        result = work()
        card.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e9 if card.is_cuda else 0.0
        rows.append({"stage": name, "sequences": sequences,
                     "seconds": time.perf_counter() - started, "peak_gb": peak})  # fmt: skip
        return result

    scores = stage("score", lambda: score(source, recipe, ids=ids))
    plan = stage("allocate", lambda: allocate(scores, recipe))
    stage("quantize", lambda: quantize(source, plan, out, ids=ids))
    shutil.rmtree(out)
    return rows
