"""Peak memory of each stage, from the shapes of the arrays that it holds at the same time.

The sums name the arrays of the code, in bytes. They are upper bounds: arrays that follow each other
closely are added. Not counted is what the process holds before the work starts.

An allocator keeps some of the memory that is freed: arrays of less than 32 MB lie in heaps that do
not shrink. `with_kept` adds half of the arrays for that, KEPT bytes at most, and what libraries
take when they first run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moepress.costs.drop_costs import SAMPLE
from moepress.costs.embedding_and_head import ROWS_AT_ONCE
from moepress.costs.sketch import rows_in_sketch
from moepress.draws import STARTS
from moepress.format.codec import stored_family
from moepress.hf.growing_cache import room_beyond
from moepress.original.batches import BATCH_TOKENS, LOGIT_TOKENS
from moepress.recipe import UNQUANTIZED
from moepress.rounding.correction import sums_moved
from moepress.rounding.hessian import TOKENS_PER_CHUNK
from moepress.rounding.kept_tokens import keeps
from moepress.rounding.noisy_products import SHARED, rows_of_sample
from moepress.rounding.options import Rounding
from moepress.rounding.sweep import RUN
from moepress.rounding.token_factor import few
from moepress.text.samples import BATCH
from moepress.workload.shapes import Layer
from moepress.workload.task import Task, Widths

FLOAT = 4  # bytes of a float32
# Bytes of a weight while a matrix is rounded to trellis codes: the weights to round, and they
# rotated, in units of their scales, and with feedback, in float32; branches twice; 16-bit numbers.
ROUNDING_TRELLIS = 4 * FLOAT + 2 + 2
# The same for scalar codes: codes, a float32 copy. Only some thousand rows are held in float32.
ROUNDING_SCALAR = 1 + FLOAT
# A rounded matrix as weights: values of its paths, times the scales, rotated.
DECODING = 3 * FLOAT
# Its gain: it and the original weights, both rotated, and what the second one is made of.
GAIN = 6 * FLOAT
# Target, its product with the factor, and noise in float32; then errors, what is left after
# feedback, slices in the fit of the scale and in the rotation back.
DRAWING, DRAWN = 3 * FLOAT, 3 * FLOAT
# Correction: the weights rotated, the solutions of two triangular systems (or, with kept tokens,
# W d^T of fewer columns and the change) with products in 16 bits.
CORRECTING = 4 * FLOAT
# Activations of a layer for a token: of states and attention, in the dtype of the walk and float32.
ACTIVATIONS = 5
# Inputs of a matrix on a chunk: rotated and weighted in float32, with the steps of the transform.
GATHERING = 6 * FLOAT
# Predictions of a step: logits in float32, copies, noise, what is left of them.
PREDICTIONS = 8
STEPS_OF_STATE = 10  # results of a step with the state of a layer
KEPT, LIBRARIES = 500_000_000, 500_000_000


def with_kept(arrays: int) -> int:
    """Resident memory for `arrays` bytes of arrays."""
    return arrays + min(arrays // 2, KEPT) + LIBRARIES


def sampling(task: Task) -> int:
    """The whole model, its KV cache or states, and the predictions of a step with their noise."""
    shape, rows = task.shape, min(BATCH, task.sequences)
    room = rows * (task.length + room_beyond(task.length))
    states = [layer.state for layer in shape.layers]
    cache = room * shape.cached * states.count(0)
    cache += room * 2 * shape.attention  # keys and values for all queries of one layer
    kept = FLOAT * rows * (sum(states) + STEPS_OF_STATE * max(states))
    predicted = FLOAT * (PREDICTIONS * rows * shape.vocabulary + 2 * (STARTS + shape.vocabulary))
    weights = shape.weights * shape.compute_itemsize + shape.outside * shape.itemsize
    return weights + cache * shape.compute_itemsize + kept + predicted


def sensitivity(task: Task) -> int:
    """The forward and the backward walk.

    Without the states that wait for the backward walk in the machine's memory where a card computes
    (costs/kept_states.py): up to those of all layers, but only from memory that is free then, of
    which seven times the states of a layer stay free.
    """
    task = task.at_most
    walk = _states(task, copies=2) + _routed(task, copies=1)
    gradient = _states(task, copies=1)
    back = walk + gradient + _routed(task, copies=2)
    layers = [
        back
        + layer.weights * task.shape.compute_itemsize
        + max(
            _batch(task, graph=True),
            layer.has_experts * (_expert(task) + _expert_run(task, graph=True)),
        )
        for layer in task.shape.layers
    ]
    noise = 2 * (STARTS + task.shape.vocabulary) * FLOAT  # to draw tokens
    head = walk + gradient + _outside(task) + _logits(task) + noise
    return max(*layers, head)


def score(task: Task) -> int:
    """Measuring every expert and every open tensor."""
    task = task.at_most
    recipe, shape = task.recipe, task.shape
    walk = _states(task, copies=2) + _routed(task, copies=1) + task.tokens * FLOAT * 12
    linears = Rounding.of_linears(recipe, recipe.measure)
    experts = Rounding.of_experts(recipe, recipe.measure)
    most = [_states(task, copies=1) + _outside(task) + _tables(task)]
    for layer in shape.layers:
        held = walk + layer.weights * shape.compute_itemsize
        names = {linear.name for linear in layer.linears if linear.name in task.open}
        widths = [bits for name in names for bits in task.open[name]]
        most.append(held + _batch(task) + _linears(layer, names, widths, linears, corrects=False))
        if layer.has_experts:
            rounded = _rounded_expert(task, experts)
            most.append(held + _expert(task) + max(rounded, _expert_run(task)))
    return max(most)


def quantize(task: Task, widths: Widths, folder: int) -> int:
    """Rounding every weight.

    Args:
        folder: bytes of the compressed model.
    """
    task = task.at_most
    recipe, shape = task.recipe, task.shape
    linears = Rounding.of_linears(recipe, recipe.quantizer)
    experts = Rounding.of_experts(recipe, recipe.quantizer)
    walks = 2 if experts.corrects else 1
    states = _states(task, copies=walks + 1)
    inputs = task.tokens * shape.hidden * shape.compute_itemsize  # of the experts, of one walk
    packed = folder // shape.moe_layers  # of a layer
    routed = states + _routed(task, copies=1)
    most = [_states(task, copies=1) + _outside(task) + _tables(task)]
    for layer in shape.layers:
        held = layer.weights * shape.compute_itemsize
        names = {linear.name for linear in layer.linears if linear.name in widths.tensors}
        of_linears = [widths.tensors[name] for name in names]
        statistics = _linears_statistics(layer, names, linears, corrects=walks == 2)
        rounded = _linears(layer, names, of_linears, linears, corrects=walks == 2)
        most.append(states + held + walks * _batch(task) + statistics)
        most.append(states + held + (walks - 1) * inputs + rounded)
        if layer.has_experts:
            # The original layer runs before its linears are rounded.
            most.append(routed + held + statistics + _expert(task) + _expert_run(task))
            sample = min(SAMPLE, task.tokens)
            meter = sample * shape.hidden * (2 * FLOAT + shape.experts_per_token * FLOAT)
            rounded = max(
                _rounded_matrix(task, *size, experts, widths.experts)
                for size in (shape.gate_up, shape.down)
            )
            run = max(_expert_run(task), rounded)
            hidden = shape.expert_tokens(task.tokens) * shape.inner * shape.compute_itemsize
            both = routed + walks * inputs + packed + 2 * _expert(task)
            most.append(both + held + meter + run + hidden)
    return max(most)


def _states(task: Task, copies: int) -> int:
    """Hidden states of all tokens, and carried values."""
    return copies * task.states


def _routed(task: Task, copies: int) -> int:
    """Inputs of the experts and their output in float32, and `copies` more in float32."""
    shape = task.shape
    size = task.tokens * shape.hidden
    return size * shape.compute_itemsize + copies * size * FLOAT


def _outside(task: Task) -> int:
    """The tensors outside the layers, and one of them while it is read."""
    shape = task.shape
    largest = max((rows * cols for rows, cols in task.tables.values()), default=0)
    reading = largest * (shape.other_disk + shape.itemsize)  # mapped, and copied or dequantized
    return shape.outside * shape.compute_itemsize + round(reading)


def _batch(task: Task, graph: bool = False) -> int:
    """Activations of a batch in a layer; with `graph` all of them are kept for the way back."""
    shape = task.shape
    tokens = min(task.tokens, max(BATCH_TOKENS, task.length))
    one = ACTIVATIONS * (shape.hidden + shape.attention) * (shape.compute_itemsize + FLOAT)
    return (1 + graph) * tokens * one


def _logits(task: Task) -> int:
    """Logits of a few positions with their graph: in the dtype of the walk, and six in float32."""
    shape = task.shape
    positions = min(LOGIT_TOKENS, task.length)
    return positions * shape.vocabulary * (2 * shape.compute_itemsize + 6 * FLOAT)


def _expert(task: Task) -> int:
    """An expert's weights, and its largest matrix while it is read.

    That is mapped, and copied or dequantized.
    """
    shape = task.shape
    largest = max(rows * cols for rows, cols in (shape.gate_up, shape.down))
    reading = largest * (shape.expert_disk + shape.itemsize)
    return shape.expert_weights * shape.compute_itemsize + round(reading)


def _expert_run(task: Task, graph: bool = False) -> int:
    """Activations of an expert on a chunk of its tokens."""
    shape = task.shape
    tokens = min(BATCH_TOKENS, shape.expert_tokens(task.tokens) * 2)
    inner = 5 * shape.inner * shape.compute_itemsize
    outer = shape.hidden * (3 * shape.compute_itemsize + 4 * FLOAT)
    return (1 + graph) * tokens * (inner + outer)


def _chunk(task: Task, cols: int) -> int:
    """Inputs of an expert's matrix [N, cols] on a chunk of tokens, while they are gathered."""
    tokens = min(TOKENS_PER_CHUNK, 2 * task.hessian_tokens)
    return tokens * cols * (4 * task.shape.compute_itemsize + GATHERING)


def _linears(
    layer: Layer,
    names: Collection[str],
    widths: Sequence[float],
    rounding: Rounding,
    corrects: bool,
) -> int:
    """Rounding the linears of a layer, whose statistics were gathered together."""
    groups = layer.sharing_inputs(names)
    rounded = _rounding_bytes(widths, rounding)
    most = 0
    for group in groups:
        square = FLOAT * group[0].cols ** 2
        largest = max(linear.weights for linear in group)
        targets = corrects * FLOAT * sum(linear.weights for linear in group)
        # A copy of the Hessian while that is factored; then block feedback.
        correcting = corrects * (2 * square + CORRECTING * largest)
        rounding_one = rounding.needs_hessian * square + rounded * largest
        most = max(most, targets + max(correcting, rounding_one))
    return _linears_statistics(layer, names, rounding, corrects) + most


def _linears_statistics(
    layer: Layer, names: Collection[str], rounding: Rounding, corrects: bool
) -> int:
    """Hessians of all linears of a layer and, with `corrects`, the sums of corrections."""
    squares = sum(group[0].cols ** 2 for group in layer.sharing_inputs(names))
    return (1 + corrects) * FLOAT * squares if rounding.needs_hessian else 0


def _rounding_bytes(widths: Sequence[float], rounding: Rounding) -> int:
    """Bytes of a weight while its matrix is rounded to one of the widths."""
    trellis = any(stored_family(bits, rounding.family) == "trellis" for bits in widths)
    rounded = ROUNDING_TRELLIS if trellis else ROUNDING_SCALAR
    if rounding.draws:
        rounded = max(rounded, DRAWING + DRAWN)
    return max(rounded, DECODING)


def _rounded_expert(task: Task, rounding: Rounding) -> int:
    """An expert while it is rounded to every width, or given the errors of every width."""
    shape, count = task.shape, len(task.recipe.widths)
    sizes = [shape.gate_up, shape.down]
    hidden = shape.expert_hidden
    outer = rows_in_sketch(hidden) if rounding.draws and shape.neurons is None else hidden
    if rounding.draws and shape.neurons is None:  # rows that stand for all, and a sketch
        sizes = [(rows_of_sample(shape.gate_up[0]), shape.gate_up[1]), (outer, shape.down[1])]
    drawn = sum(rows * cols for rows, cols in sizes)
    weights = drawn * shape.compute_itemsize  # of one width
    own = shape.expert_tokens(task.tokens)  # inputs of down and outputs of the original expert
    weights += own * (shape.inner * shape.compute_itemsize + outer * FLOAT)
    largest = max(rows * cols for rows, cols in sizes)
    kept = factors = chunk = 0
    if rounding.needs_hessian:
        chunk = max(_chunk(task, cols) for _, cols in sizes)
        kept = max(_statistics(task, cols) for _, cols in sizes)
        factors = max(_factors(task, cols) for _, cols in sizes)
    if rounding.draws:  # both projections side by side
        both = sum(_factors(task, cols) for _, cols in sizes)
        if outer < hidden:  # the sketch
            weights += outer * shape.intermediate * shape.compute_itemsize
        if shape.neurons is None:  # V and that of a width; noise; products of a chunk
            rows, cols = shape.gate_up
            both += FLOAT * (2 * cols**2 + 3 * SHARED * rows)
            weights += min(own, BATCH_TOKENS) * (3 * FLOAT * cols + rows * shape.compute_itemsize)
        drawing = both + DRAWING * drawn + DRAWN * largest + weights
        return max(drawing, both + FLOAT * largest + chunk)
    codes = count * shape.expert_weights
    one = largest * _rounding_bytes(task.recipe.widths, rounding)
    return codes + max(factors + one, kept + chunk, weights + DECODING * largest)


def _statistics(task: Task, cols: int) -> int:
    """The inputs of an expert's matrix [N, cols], kept, or their Hessian."""
    tokens = task.hessian_tokens
    return FLOAT * cols * (tokens if keeps(tokens, cols) else cols)


def _factors(task: Task, cols: int) -> int:
    """The factor of a Hessian, and its block feedback; or two squares while it is factored."""
    tokens = task.hessian_tokens
    if few(tokens, cols):  # x, y and that of V; R_BB and V_BB
        return FLOAT * cols * (3 * tokens + 2 * RUN)
    return FLOAT * cols * (2 * cols + tokens * keeps(tokens, cols))


def _rounded_matrix(
    task: Task, rows: int, cols: int, rounding: Rounding, widths: Collection[tuple[float, float]]
) -> int:
    """A matrix of an expert while it is rounded to one width."""
    offered = [bits for both in widths for bits in both if bits]
    weights = rows * cols
    one = weights * _rounding_bytes(offered, rounding)
    if not rounding.needs_hessian:
        return one
    tokens, chunk = task.hessian_tokens, _chunk(task, cols)
    kept, factors = _statistics(task, cols), _factors(task, cols)
    if not rounding.corrects:
        return max(kept + chunk, factors + one)
    gain = weights * GAIN
    if keeps(tokens, cols):  # with differences, and the solutions of a correction
        correcting = 3 * kept + weights * CORRECTING
        return max(2 * kept + chunk, correcting, 2 * kept + factors + max(one, gain))
    # Hessian, correction and a copy of the Hessian while that is factored; then correction, factor
    # and block feedback.
    square = FLOAT * cols**2
    correction = 2 * weights * FLOAT if sums_moved(rows, cols) else square
    correcting = 3 * square + correction + weights * CORRECTING
    gathered = square + correction + chunk
    return max(gathered, correcting, 2 * square + correction + max(one, gain))


def _tables(task: Task) -> int:
    """The largest of embedding and head: its error in float32, or codes and packed bytes."""
    shape = task.shape
    sizes = [
        rows * cols
        for name, (rows, cols) in task.tables.items()
        if any(bits != UNQUANTIZED for bits in task.open.get(name, (0,)))
    ]
    rows = min(ROWS_AT_ONCE, shape.vocabulary) * shape.hidden * (1 + DECODING)
    return max(sizes, default=0) * FLOAT + rows + _logits(task)
