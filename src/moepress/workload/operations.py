"""Operations of the steps of a compression, counted from the shapes of matrices.

Work is a `Counter` from the name of an operation to how many times it is done. The names and what
one of each is:

    product     floating-point operation of a matrix product in the dtype of the walk
    attend      pair of a token and one that attention may see, in one head
    multiply n  weight multiplied by n tokens at a time, where text is written
    recall      pair of a token that is written and one before it, in one head
    float32     like `product`, in float32: Hessians, feedback, refits, triangular solves
    cholesky    element of a matrix that is factored, beyond the products of the factorization
    copy        element that a step on whole matrices reads and writes
    rotate      element in one of the steps of a Hadamard transform
    search k    weight that a search for paths of k bits passes
    decode k    weight whose value is computed from its path of k bits
    int k       weight rounded to a scalar grid of k bits inside its group, with feedback
    nearest k   weight rounded to the nearest code on a scalar grid of k bits
    draw        Gaussian number drawn
    solve       element of a factor that `block_feedback` changes
    logits      logit whose gradient is computed
    load        weight read into a tensor, checked and converted
    read        byte read from the model, or written
    call        call of a PyTorch operation: its fixed cost, which small matrices feel

Where the inputs of a matrix are those of one expert, `tokens` is their number: few tokens are kept
in place of sums (rounding/kept_tokens.py), and fewer still make a factor of tokens
(rounding/token_factor.py). `in_16_bits` says whether products of drawn errors, corrections, gains
and scales are in the dtype of the walk.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from moepress.format.codec import ROWS_PER_SLAB
from moepress.kernels.trellis import STEPS, TILE_COLUMNS, run_length
from moepress.rounding.correction import solves_first, sums_moved
from moepress.rounding.factor import column_slices
from moepress.rounding.kept_tokens import keeps
from moepress.rounding.methods.viterbi import SEAM
from moepress.rounding.noisy_products import SHARED, rows_of_sample
from moepress.rounding.sweep import COLUMNS_IN_16_BITS, RUN, middle_of, runs
from moepress.rounding.token_factor import few

Work = Counter[str]

# Calls of PyTorch operations, counted in the source: views and slices count, as they cost the same.
CALLS_OF_SWEEP = 5  # for each product that passes feedback on
CALLS_OF_VISIT = 12  # to round eight columns
CALLS_OF_DRAWN_VISIT = 16
CALLS_OF_BLOCK_SOLVE = 5
# Passes over a whole matrix besides products: every temporary is written once and read once.
PASSES_OF_ROUNDING = 9  # scaling, padding, transposing; the fit
PASSES_OF_DRAWING = 6
PASSES_OF_FACTOR = 6  # two flips, two divisions, the diagonal's checks


def total(works: Iterable[Work]) -> Work:
    """The sum of several works."""
    return sum(works, Work())


def times(count: float, work: Work) -> Work:
    """A work done `count` times."""
    return Work({name: count * number for name, number in work.items()})


def product(rows: int, inner: int, cols: int, dtype: str = "product") -> Work:
    """A matrix product [rows, inner] @ [inner, cols]."""
    return Work({dtype: 2 * rows * inner * cols})


def _dtype(in_16_bits: bool) -> str:
    """The name of operations of a matrix product."""
    return "product" if in_16_bits else "float32"


def hessian(tokens: int, cols: int) -> Work:
    """Add tokens to a Hessian."""
    return products_of_columns(tokens, cols) + Work({"copy": 2 * tokens * cols})


def products_of_columns(rows: int, cols: int) -> Work:
    """Products of all columns of a matrix with each other, in slices from the diagonal on."""
    slices = column_slices(cols)
    flops = sum(2 * rows * (own.stop - own.start) * (cols - own.start) for own in slices)
    return Work({"float32": flops})


def factor(cols: int, tokens: int | None = None) -> Work:
    """The LDL factorization of a Hessian; with kept tokens, the Hessian too."""
    if tokens is not None and few(tokens, cols):
        return _factor_of_tokens(tokens, cols)
    work = hessian(tokens, cols) if tokens is not None and keeps(tokens, cols) else Work()
    work += Work({"float32": cols**3 / 3})  # nearly all of it in products, if the matrix is large
    return work + Work({"cholesky": cols**2, "copy": PASSES_OF_FACTOR * cols**2})


def _factor_of_tokens(tokens: int, cols: int) -> Work:
    """Run by run: G x, x^T G x, its factorization, Z, Z Z^T."""
    work = Work({"copy": 4 * tokens * cols})
    for run in runs(cols):
        size = run.stop - run.start
        work += times(2, product(tokens, tokens, size, "float32"))
        work += Work({"float32": 3 * tokens * size**2 + size**3 / 3, "cholesky": size**2})
    return work


def own_variance(tokens: int, cols: int) -> Work:
    """What inputs do not tell of each other: their correlations, and the inverse of these."""
    work = product(cols, tokens, cols, "float32") + Work({"float32": cols**3, "cholesky": cols**2})
    return work + Work({"copy": 5 * tokens * cols + 3 * cols**2})


def rotation(rows: int, cols: int) -> Work:
    """The rotation of `rows` rows: a product with signs, then the steps of the transform."""
    return Work({"rotate": rows * cols * (1 + int(math.log2(run_length(cols))))})


def inputs(
    tokens: int,
    cols: int,
    rotates: bool,
    corrects: bool,
    rows: int | None = None,
    in_16_bits: bool = False,
) -> Work:
    """Gather the Hessian of a matrix's inputs, and with `corrects` its correction.

    Args:
        rotates: whether inputs are rotated, for trellis codes.
        rows: of the only matrix with these inputs; None: there are several.
    """
    if rows is not None and keeps(tokens, cols):
        work = Work({"copy": 3 * (1 + corrects) * tokens * cols})
        return work + times(rotates * (1 + corrects), rotation(tokens, cols))
    work = hessian(tokens, cols)
    if corrects:
        dtype = _dtype(in_16_bits)
        if rows is not None and sums_moved(rows, cols):
            work += times(2, product(rows, tokens, cols, dtype))
            work += times(rotates, rotation(rows, cols))
        else:
            work += product(cols, tokens, cols, dtype)
        work += Work({"copy": 3 * tokens * cols})
    if rotates:
        work += times(1 + corrects, rotation(tokens, cols))
    return work


def corrected(
    rows: int,
    cols: int,
    rotates: bool,
    alone: bool,
    tokens: int | None = None,
    in_16_bits: bool = False,
) -> Work:
    """Move weights [rows, cols] to make up for earlier errors; the factor for that, too.

    Args:
        alone: whether no other matrix has these inputs.
    """
    rotations = times(2 * rotates, rotation(rows, cols))
    dtype = _dtype(in_16_bits)
    if tokens is not None and keeps(tokens, cols):
        between = products_of_columns(cols, tokens)  # x x^T
        between += product(tokens, tokens, min(rows, cols), "float32")  # what is solved
        between += Work({"float32": tokens**3 / 3, "cholesky": tokens**2})
        moved = times(2, product(rows, cols, tokens, dtype))
        return between + moved + rotations + Work({"copy": 5 * rows * cols})
    inside = _inside(column_slices(cols))
    solved = cols if solves_first(rows, cols) else rows
    solves = Work({"float32": 2 * solved * inside}) + Work({dtype: 2 * solved * (cols**2 - inside)})
    work = factor(cols) + _moved(rows, cols, alone, dtype) + solves
    return work + rotations + Work({"copy": 4 * rows * cols})


def _moved(rows: int, cols: int, alone: bool, dtype: str) -> Work:
    """The product of a matrix and M, unless it was summed (correction.py)."""
    return Work() if alone and sums_moved(rows, cols) else product(rows, cols, cols, dtype)


def gain(
    rows: int, cols: int, rotates: bool, tokens: int | None = None, in_16_bits: bool = False
) -> Work:
    """The gain of a rounded matrix, which has inputs of its own."""
    rotations = times(2 * rotates, rotation(rows, cols))
    dtype = _dtype(in_16_bits)
    if tokens is not None and keeps(tokens, cols):
        outputs = times(2, product(rows, cols, tokens, dtype))
        return outputs + rotations + Work({"copy": 4 * rows * (cols + tokens)})
    products = Work({dtype: 2 * upper_product(rows, cols)["float32"]})
    work = _moved(rows, cols, True, dtype) + products
    work += product(2, cols, rows, "float32")
    return work + rotations + Work({"copy": 8 * rows * cols + 2 * cols**2})


def upper_product(rows: int, cols: int, tokens: int | None = None) -> Work:
    """The product of a matrix [rows, cols] with an upper triangular factor."""
    if tokens is not None and few(tokens, cols):
        inside = _inside(runs(cols))
        return Work({"float32": 2 * rows * (2 * tokens * cols + inside)})
    flops = 0
    for own in column_slices(cols):
        flops += 2 * rows * own.stop * (own.stop - own.start)
    return Work({"float32": flops})


def _inside(slices: list[slice]) -> int:
    """Elements of the diagonal blocks of a square matrix."""
    return sum((own.stop - own.start) ** 2 for own in slices)


@lru_cache(maxsize=256)
def _sweep(cols: int, leaf: int) -> tuple[int, int, int, int, int]:
    """Of a sweep over `cols` columns: sum of left times right, sum of their lengths, products.

    Then the first two sums again, of products that may be in 16 bits.
    """
    left = middle_of(0, cols, leaf)
    if left == cols:
        return 0, 0, 0, 0, 0
    right = cols - left
    below = [_sweep(left, leaf), _sweep(right, leaf)]
    wide = min(left, right) >= COLUMNS_IN_16_BITS
    own = left * right, cols, 1, wide * left * right, wide * cols
    return tuple(sum(numbers) for numbers in zip(own, *below, strict=True))


def sweep(
    rows: int, cols: int, leaf: int, in_16_bits: bool = False, tokens: int | None = None
) -> Work:
    """The products that pass feedback on while columns are visited `leaf` at a time (sweep.py)."""
    if tokens is not None and few(tokens, cols):
        return _sweep_by_tokens(rows, cols, leaf, in_16_bits, tokens)
    areas, lengths, products, wide, converted = _sweep(cols, leaf)
    work = Work({"copy": rows * lengths, "call": CALLS_OF_SWEEP * products})
    if in_16_bits and wide:
        work += Work({"product": 2 * rows * wide, "copy": rows * converted})
        areas -= wide
    return work + Work({"float32": 2 * rows * areas})


def _sweep_by_tokens(rows: int, cols: int, leaf: int, in_16_bits: bool, tokens: int) -> Work:
    """Inside of runs as ever; from one run to the next by way of the tokens."""
    work = total(sweep(rows, run.stop - run.start, leaf) for run in runs(cols))
    steps = len(runs(cols)) - 1
    dtype = _dtype(in_16_bits and tokens >= COLUMNS_IN_16_BITS)
    # The first run gets no feedback, the last one passes none on.
    last = cols - steps * RUN if steps else 0
    passed = product(tokens, (steps - 1) * 2 * RUN + RUN + last, rows, dtype) if steps else Work()
    copies = Work({"copy": 3 * steps * rows * (tokens + RUN), "call": 2 * CALLS_OF_SWEEP * steps})
    return work + passed + copies


def block_feedback(cols: int, tokens: int | None = None) -> Work:
    """V from R, eight columns at a time (factor.py)."""
    calls = CALLS_OF_BLOCK_SOLVE * (cols // TILE_COLUMNS)
    if tokens is not None and few(tokens, cols):
        solved = Work({"float32": 2 * tokens * cols * TILE_COLUMNS, "copy": 4 * tokens * cols})
        return solved + Work({"solve": cols * min(RUN, cols), "call": calls})
    return Work({"solve": cols**2, "call": calls})


def search(rows: int, cols: int, bits: float) -> Work:
    """The search for trellis paths. Each path is also searched through its seam (viterbi.py)."""
    steps = -(-rows // ROWS_PER_SLAB) * STEPS
    paths = ROWS_PER_SLAB * TILE_COLUMNS // STEPS
    with_seam = steps + 2 * min(SEAM, steps)
    return Work({f"search {bits}": cols // TILE_COLUMNS * paths * with_seam})


def decode(rows: int, cols: int, bits: float) -> Work:
    """The values of trellis paths."""
    padded = -(-rows // ROWS_PER_SLAB) * ROWS_PER_SLAB
    return Work({f"decode {bits}": padded * cols})


def dequantize(rows: int, cols: int, bits: float, family: str) -> Work:
    """A rounded matrix as weights."""
    if family == "trellis":
        return decode(rows, cols, bits) + rotation(rows, cols) + Work({"copy": 2 * rows * cols})
    return Work({"copy": 4 * rows * cols})


def round_trellis(
    rows: int,
    cols: int,
    bits: float,
    feedback: bool,
    tokens: int | None = None,
    in_16_bits: bool = False,
) -> Work:
    """Round a matrix to trellis codes; with feedback its factor is at hand."""
    visits = cols // TILE_COLUMNS
    work = rotation(rows, cols) + search(rows, cols, bits)
    work += Work({"copy": PASSES_OF_ROUNDING * rows * cols, "call": visits * CALLS_OF_VISIT})
    if feedback:
        work += block_feedback(cols, tokens) + sweep(rows, cols, TILE_COLUMNS, tokens=tokens)
        work += refit(rows, cols, tokens, in_16_bits and cols > COLUMNS_IN_16_BITS)
    return work


def refit(rows: int, cols: int, tokens: int | None = None, in_16_bits: bool = False) -> Work:
    """The best scale of each row, with a factor (`fit.best_scale`)."""
    blocks = product(rows, TILE_COLUMNS, cols, "float32")
    weighted = Work({_dtype(in_16_bits): upper_product(rows, cols, tokens)["float32"]})
    return weighted + blocks + product(2, cols, rows, "float32")


def draw_errors(
    rows: int, cols: int, widths: int, in_16_bits: bool = False, tokens: int | None = None
) -> Work:
    """Give a matrix the errors of trellis codes of several widths, drawn (noise.py)."""
    in_16_bits = in_16_bits and cols > COLUMNS_IN_16_BITS
    of_one = sweep(rows, cols, TILE_COLUMNS, in_16_bits, tokens) + rotation(rows, cols)
    of_one += product(rows, TILE_COLUMNS, cols, "float32") + product(2, cols, rows, "float32")
    calls = CALLS_OF_DRAWN_VISIT * (cols // TILE_COLUMNS)
    of_one += Work({"copy": PASSES_OF_DRAWING * rows * cols, "call": calls})
    shared = rotation(rows, cols) + block_feedback(cols, tokens)
    weighted = upper_product(rows, cols, tokens)["float32"]
    shared += Work({_dtype(in_16_bits): weighted})
    shared += Work({"draw": rows * cols, "copy": 3 * rows * cols})
    return shared + times(widths, of_one)


def draw_products(
    rows: int,
    cols: int,
    products: int,
    widths: int,
    in_16_bits: bool = False,
    tokens: int | None = None,
) -> Work:
    """Draw the errors of several widths at the products of a matrix (noisy_products.py).

    Args:
        products: with how many tokens. The product of their inputs and the matrix is not counted.
        tokens: of the Hessian.
    """
    work = draw_errors(rows_of_sample(rows), cols, widths, in_16_bits, tokens)
    work += block_feedback(cols) + Work({"draw": SHARED * rows, "copy": 4 * rows * cols})
    if tokens is not None and few(tokens, cols):
        work += Work({"float32": tokens * cols**2})  # R in full
    of_one = times(2, rotation(products, cols)) + product(products, cols, 1, "float32")
    of_one += Work({"float32": products * cols**2})  # a triangular system for each token
    of_one += Work({"copy": cols**2 + products * (6 * cols + 3 * rows)})
    return work + times(widths, of_one)


def round_scalar(
    rows: int, cols: int, bits: float, group: int, feedback: bool, tokens: int | None = None
) -> Work:
    """Round a matrix to scalar codes."""
    if not feedback:
        return Work({f"nearest {bits}": rows * cols})
    return Work({f"int {bits}": rows * cols}) + sweep(rows, cols, group, tokens=tokens)


def load(weights: int, itemsize: float) -> Work:
    """Read weights from the model and convert them."""
    return Work({"load": weights, "read": weights * itemsize})
