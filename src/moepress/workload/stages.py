"""Operations of each stage of a compression, from the shapes of the model.

Each function mirrors the code of its stage; the comments name what is counted. All experts are
assumed to be chosen equally often. Operations of a few tokens or rows are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from moepress.costs.drop_costs import SAMPLE
from moepress.costs.embedding_and_head import HEAD_TOKENS
from moepress.costs.interpolation import NODES
from moepress.costs.scores import ROUNDED
from moepress.costs.sketch import rows_in_sketch
from moepress.format.codec import LEFT_OUT, stored_family
from moepress.original.batches import BATCH_TOKENS, LOGIT_TOKENS
from moepress.recipe import UNQUANTIZED
from moepress.rounding.channel_scale import TOKENS
from moepress.rounding.options import Rounding
from moepress.rounding.pre_quant_scale import enough_experts, step_of_sample
from moepress.text.samples import BATCH
from moepress.workload import operations as op
from moepress.workload.operations import Work, times, total
from moepress.workload.shapes import Layer, Linear
from moepress.workload.task import Task, Widths

# Passes over the activations of a layer besides its products, per element of a hidden state and of
# the inputs of attention: norms, residuals, rotary embeddings.
PASSES_OF_LAYER = 16
CALLS_OF_LAYER = 100  # of a batch
CALLS_OF_EXPERT = 15  # of a chunk of its tokens
RUNS_OF_PROOFS = 3  # of a batch through a layer: as it is, with scaled pairs, with scaled norms
CALLS_OF_CACHED_LAYER = 400  # of a step of text that is written: transformers' own code, the cache
BACKWARD = 2  # operations of a step forward and back, over those forward: weights get no gradient


def sampling(task: Task) -> Work:
    """The model writes its text itself: one more token of up to BATCH sequences in each step."""
    shape, rows = task.shape, min(BATCH, task.sequences)
    chosen = min(shape.experts, rows * shape.experts_per_token)
    own = min(rows, shape.expert_tokens(rows))
    works = [Work({f"multiply {rows}": shape.hidden * shape.vocabulary})]  # the head
    works.append(Work({"logits": rows * shape.vocabulary, "call": CALLS_OF_LAYER}))
    for layer in shape.layers:
        step = Work({f"multiply {rows}": layer.weights, "call": CALLS_OF_CACHED_LAYER})
        step["copy"] = PASSES_OF_LAYER * rows * (shape.hidden + shape.attention)
        if layer.has_experts:
            step[f"multiply {own}"] += chosen * shape.expert_weights
            step["call"] += chosen * CALLS_OF_EXPERT
        if layer.state:
            step["state"] = rows * layer.state
        works.append(times(layer.runs, step))
    steps = -(-task.sequences // BATCH) * task.length
    pairs = task.sequences * task.length**2 // 2 * shape.heads
    attending = sum(layer.runs for layer in shape.layers if not layer.state)
    seen = Work({"recall": pairs * attending})
    loaded = op.load(shape.weights, shape.disk_bytes / shape.weights)
    return loaded + seen + times(steps, total(works))


def sensitivity(task: Task) -> Work:
    """The forward walk, the gradient at the head, the backward walk (costs/sensitivity.py)."""
    shape, tokens = task.shape, task.tokens
    works = [op.load(2 * shape.outside, shape.other_disk), head_gradient(task, tokens)]
    works.append(entering_loop(task))
    for layer, before in zip(shape.layers, task.between, strict=False):
        at = task.at(layer)
        # Forward, and the layer again before the backward walk of each pass.
        works.append(times(1 + layer.runs, op.load(layer.weights, shape.other_disk)))
        if not layer.has_experts:
            works.append(times(1 + BACKWARD, layer_forward(at, layer)))
        else:
            # Forward: route, advance. Backward: route, then forward to the experts' output, then
            # forward and back to the input.
            works.append(times(4 + BACKWARD, layer_forward(at, layer)))
            # Forward, forward again before the backward walk, forward and back.
            works.append(times(2 + BACKWARD, experts_forward(at, at.tokens)))
            loads = 1 + 2 * layer.runs
            experts = op.load(shape.experts * shape.expert_weights, shape.expert_disk)
            works.append(times(loads, experts))
            works.append(Work({"copy": 12 * at.tokens * shape.hidden}))  # sums in float32
        works.append(Work({"read": 4 * tokens * before}))  # states and gradient, written and read
    return total(works)


def head_gradient(task: Task, tokens: int) -> Work:
    """The gradient of drawn next tokens at the last states."""
    logits = tokens * task.shape.vocabulary
    chunks = -(-tokens // min(LOGIT_TOKENS, task.length))
    work = times(BACKWARD, op.product(tokens, task.shape.hidden, task.shape.vocabulary))
    return work + Work({"logits": logits, "call": chunks * (CALLS_OF_LAYER + 30)})


def score(task: Task) -> Work:
    """Measure every expert and every open tensor (score.py)."""
    shape, recipe = task.shape, task.recipe
    works = [op.load(shape.outside, shape.other_disk), entering_loop(task)]  # to embed the text
    linears = Rounding.of_linears(recipe, recipe.measure)
    experts = Rounding.of_experts(recipe, recipe.measure)
    for layer in shape.layers:
        at = task.at(layer)
        works.append(op.load(layer.weights, shape.other_disk))
        before, behind = layer.by_turn(task.open)
        runs = 1 + bool(before) + bool(behind)  # advance; linear_inputs of each
        for names in (before, behind):
            works += (_score_linears(at, group, linears) for group in layer.sharing_inputs(names))
        if layer.has_experts:
            runs += 1  # route
            works.append(times(shape.experts, _score_expert(at, experts)))
            if experts.balance and shape.neurons is None:
                works.append(_find_scale(at))
        works.append(times(runs, layer_forward(at, layer)))
        if linears.balance:
            works.append(_even_linears(at, layer))
    works.append(_score_tables(task))
    return total(works)


def _even_linears(task: Task, layer: Layer) -> Work:
    """Find which linears can be scaled evenly, and their scales."""
    batch, sampled = min(task.tokens, BATCH_TOKENS), min(task.tokens, TOKENS)
    runs = (RUNS_OF_PROOFS * batch + sampled) / task.tokens
    groups = layer.sharing_inputs([linear.name for linear in layer.linears])
    scales = (op.own_variance(sampled, group[0].cols) for group in groups if len(group) > 1)
    return total([times(runs, layer_forward(task, layer)), *scales])


def _find_scale(task: Task) -> Work:
    """Find scales of the inputs of a layer's experts, or that they gain nothing."""
    shape = task.shape
    numbers = min(shape.experts, enough_experts(shape.gate_up[0]))
    works = [op.load(numbers * shape.expert_weights, shape.expert_disk)]
    works.append(Work({"copy": 3 * numbers * math.prod(shape.gate_up)}))
    works.append(op.own_variance(-(-task.tokens // step_of_sample(task.tokens)), shape.hidden))
    return total(works)


def _score_linears(task: Task, group: Sequence[Linear], rounding: Rounding) -> Work:
    """Linears with the same inputs, at all widths offered to them."""
    cols, rotates = group[0].cols, rounding.family == "trellis"
    works = [op.inputs(task.tokens, cols, rotates, corrects=False), op.factor(cols)]
    for linear in group:
        size = linear.rows, cols
        widths = task.open[linear.name]
        works.append(_offered(task, size, widths, rounding))
        cost = op.product(linear.rows, cols, cols, "float32") + Work({"copy": 6 * linear.weights})
        cost += times(rotates, op.rotation(*size))
        works.append(times(len(widths), cost))
    return total(works)


def _score_expert(task: Task, rounding: Rounding) -> Work:
    """One expert at all widths that are measured, and its error on its tokens at each."""
    shape, widths = task.shape, task.recipe.widths
    seen, hidden = shape.down, shape.expert_hidden
    outer = hidden
    if rounding.draws:
        widths = widths[:NODES]  # which of them does not matter
        if shape.neurons is None:
            outer = rows_in_sketch(hidden)
            seen = outer, shape.intermediate
    works = [op.load(shape.expert_weights, shape.expert_disk)]
    if rounding.needs_hessian:
        works.append(expert_inputs(task, rounding, corrects=False, runs=1))
        works += (op.factor(cols, task.hessian_tokens) for _, cols in shape.with_hessian)
    tokens, in_16_bits = shape.expert_tokens(task.tokens), shape.products_in_16_bits
    if rounding.draws and shape.neurons is None:
        drawn = op.draw_products(
            *shape.gate_up, tokens, len(widths), in_16_bits, task.hessian_tokens
        )
        works.append(drawn)
    else:
        works.append(_offered(task, shape.gate_up, widths, rounding, task.hessian_tokens))
    works.append(_offered(task, seen, widths, rounding, task.hessian_tokens))
    gate_up = op.product(tokens, shape.expert_hidden, shape.parts * shape.inner)
    down, error = (op.product(tokens, shape.inner, size) for size in (hidden, outer))
    inner = Work({"copy": 5 * tokens * shape.inner})
    # The exact output; then for each width gate and up once and down for each of ROUNDED.
    works.append(gate_up + down + inner)
    if outer < hidden:  # S W, and the sketch of the exact output
        works += (op.product(outer, hidden, shape.intermediate), error)
    error = error + Work({"copy": 4 * tokens * outer})
    each = gate_up + inner + times(len(ROUNDED), error)
    chunks = -(-tokens // BATCH_TOKENS)
    works.append(times(len(widths), each + Work({"call": 30 * chunks})))
    return total(works)


def _offered(
    task: Task,
    size: tuple[int, int],
    widths: Sequence[float],
    rounding: Rounding,
    tokens: int | None = None,
) -> Work:
    """A matrix rounded to, or given the error of, each width, and dequantized.

    Args:
        size: N, K of the matrix.
        tokens: of its inputs, see operations.py.
    """
    rows, cols = size
    drawn = [
        bits
        for bits in widths
        if rounding.draws and stored_family(bits, rounding.family) == "trellis"
    ]
    in_16_bits = task.shape.products_in_16_bits
    works = [op.draw_errors(rows, cols, len(drawn), in_16_bits, tokens)] if drawn else []
    for bits in widths:
        if bits not in drawn:
            works.append(_rounded(rows, cols, bits, rounding, tokens))
            family = stored_family(bits, rounding.family)
            works.append(op.dequantize(rows, cols, bits, family))
    return total(works)


def _rounded(
    rows: int,
    cols: int,
    bits: float,
    rounding: Rounding,
    tokens: int | None = None,
    in_16_bits: bool = False,
) -> Work:
    """A matrix rounded to one width; widths of another family are rounded to nearest."""
    family = stored_family(bits, rounding.family)
    if family != rounding.family:
        return op.round_scalar(rows, cols, bits, rounding.group_size, feedback=False)
    if family == "trellis":
        return op.round_trellis(rows, cols, bits, rounding.needs_hessian, tokens, in_16_bits)
    group = rounding.codec(bits, cols).group_size
    return op.round_scalar(rows, cols, bits, group, rounding.needs_hessian, tokens)


def _score_tables(task: Task) -> Work:
    """Embedding and head rounded to nearest; the errors of a sample of logits."""
    works = []
    sampled = min(task.tokens, HEAD_TOKENS)
    for name, (rows, cols) in task.tables.items():
        if name not in task.open:
            continue
        works.append(op.load(rows * cols, task.shape.other_disk))
        for bits in task.open[name]:
            if bits == UNQUANTIZED:
                continue
            works.append(Work({f"nearest {bits}": rows * cols, "copy": 6 * rows * cols}))
            if name in task.head:
                works.append(op.load(task.shape.outside, task.shape.other_disk))
                works.append(op.product(sampled, cols, rows))
                works.append(op.product(sampled, cols, rows, "float32"))
                works.append(Work({"logits": sampled * rows}))
    return total(works)


def quantize(task: Task, widths: Widths) -> Work:
    """Round every weight to the widths of a plan (quantize.py)."""
    shape, recipe = task.shape, task.recipe
    linears = Rounding.of_linears(recipe, recipe.quantizer)
    experts = Rounding.of_experts(recipe, recipe.quantizer)
    walks = 2 if experts.corrects else 1
    works = [op.load(2 * shape.outside, shape.other_disk), _tables(task, widths)]
    works.append(times(walks, entering_loop(task)))
    for layer in shape.layers:
        at = task.at(layer)
        works.append(op.load(layer.weights, shape.other_disk))
        works.append(Work({"read": walks * task.states}))  # states that are kept to continue from
        before, behind = layer.by_turn(widths.tensors)
        runs = 1  # advance
        if linears.needs_hessian:  # linear_inputs of each; those behind experts get no correction
            runs += walks * bool(before) + bool(behind)
        for names, corrects in ((before, walks == 2), (behind, False)):
            works += (
                _quantize_linears(at, group, linears, widths, corrects)
                for group in layer.sharing_inputs(names)
            )
        if layer.has_experts:
            runs += 1  # route
        if walks == 2:
            runs += 1 + layer.has_experts  # pass_layer of the original: route, advance
        works.append(times(runs, layer_forward(at, layer)))
        if linears.balance:
            works.append(_even_linears(at, layer))
        if layer.has_experts and walks == 2:
            works.append(experts_forward(at, at.tokens))
            works.append(op.load(shape.experts * shape.expert_weights, shape.expert_disk))
    works += (
        times(count, _quantize_expert(task.at_experts, both, experts))
        for both, count in widths.experts.items()
        if LEFT_OUT not in both
    )
    return total(works)


def _quantize_linears(
    task: Task, group: Sequence[Linear], rounding: Rounding, widths: Widths, corrects: bool
) -> Work:
    """Linears with the same inputs, each rounded to its width."""
    cols, rotates = group[0].cols, rounding.family == "trellis"
    in_16_bits = task.shape.products_in_16_bits
    works = []
    if rounding.needs_hessian:
        works = [
            op.inputs(task.tokens, cols, rotates, corrects, in_16_bits=in_16_bits),
            op.factor(cols),
        ]
    for linear in group:
        bits = widths.tensors[linear.name]
        if corrects and rounding.needs_hessian:
            works.append(op.corrected(linear.rows, cols, rotates, False, None, in_16_bits))
        works.append(_rounded(linear.rows, cols, bits, rounding))
        works.append(_stored(linear.rows, cols, bits, rounding))
    return total(works)


def _quantize_expert(task: Task, widths: tuple[float, float], rounding: Rounding) -> Work:
    """One expert rounded to its two widths, and run."""
    shape, rotates = task.shape, rounding.family == "trellis"
    tokens, in_16_bits = task.hessian_tokens, shape.products_in_16_bits
    works = [op.load(shape.expert_weights, shape.expert_disk)]
    if rounding.needs_hessian:
        passes = 2 if rounding.corrects else 1
        works.append(expert_inputs(task, rounding, rounding.corrects, passes))
    for (rows, cols), bits in zip((shape.gate_up, shape.down), widths, strict=True):
        if rounding.needs_hessian:
            works.append(op.factor(cols, tokens))
        if rounding.corrects:
            works.append(op.corrected(rows, cols, rotates, True, tokens, in_16_bits))
        works.append(_rounded(rows, cols, bits, rounding, tokens, in_16_bits))
        works.append(_stored(rows, cols, bits, rounding))
    if rounding.corrects:
        works.append(op.gain(*shape.down, rotates, tokens, in_16_bits))
    own, sampled = shape.expert_tokens(task.tokens), min(task.tokens, SAMPLE)
    if rounding.needs_hessian and shape.neurons is None:
        # The output: of the inputs of down, which are there. (A card makes them again.)
        works.append(op.product(own, shape.inner, shape.expert_hidden))
        works.append(Work({"copy": 6 * own * shape.hidden}))
    else:
        works.append(expert_forward(task, own))
    works.append(expert_forward(task, shape.expert_tokens(sampled)))  # DropMeter
    return total(works)


def _stored(rows: int, cols: int, bits: float, rounding: Rounding) -> Work:
    """A rounded matrix packed and dequantized."""
    family = stored_family(bits, rounding.family)
    passes = 1 if family == "trellis" else 2 * bits  # compiled; a card hardly notices it
    packing = Work({"copy": passes * rows * cols, "read": int(rows * cols * bits / 8)})
    return packing + op.dequantize(rows, cols, bits, family)


def _tables(task: Task, widths: Widths) -> Work:
    """Embedding and head rounded to nearest, or stored as they are."""
    works = []
    for name, (rows, cols) in task.tables.items():
        bits = widths.tensors.get(name, UNQUANTIZED)
        if bits == UNQUANTIZED:
            works.append(Work({"read": rows * cols * task.shape.itemsize}))
        else:
            works.append(Work({f"nearest {bits}": rows * cols, "copy": 2 * bits * rows * cols}))
    return total(works)


def expert_inputs(task: Task, rounding: Rounding, corrects: bool, runs: int) -> Work:
    """Statistics of the inputs of an expert's two projections.

    Args:
        runs: of gate and up, which make the inputs of down.
    """
    shape, tokens = task.shape, task.hessian_tokens
    rotates = rounding.family == "trellis"
    inner = op.product(tokens, shape.expert_hidden, shape.parts * shape.inner)
    inner += Work({"copy": 5 * tokens * shape.inner})
    works = [
        op.inputs(tokens, width, rotates, corrects, count, shape.products_in_16_bits)
        for count, width in shape.with_hessian
    ]
    return total([*works, times(runs, inner), Work({"call": 60})])


def entering_loop(task: Task) -> Work:
    """What a walk computes before it brings all passes of a loop through its layers together."""
    shape = task.shape
    works = []
    for layer in shape.layers:
        if layer.runs > 1:
            before = replace(task, runs=layer.runs - 1)
            loaded = op.load(layer.weights, shape.other_disk)
            works.append(times(1 + layer.has_experts, layer_forward(before, layer)))
            if layer.has_experts:
                works.append(experts_forward(before, before.tokens))
                loaded += op.load(shape.experts * shape.expert_weights, shape.expert_disk)
            works.append(times(layer.runs - 1, loaded))
    return total(works)


def layer_forward(task: Task, layer: Layer) -> Work:
    """One run of a layer, except its routed experts, on all tokens."""
    shape, tokens = task.shape, task.tokens
    work = op.product(tokens, layer.weights, 1)
    work += Work({"attend": tokens * task.length * shape.heads})
    passes = PASSES_OF_LAYER * tokens * (shape.hidden + shape.attention)
    return work + Work({"copy": passes, "call": CALLS_OF_LAYER * task.batches})


def experts_forward(task: Task, tokens: int) -> Work:
    """All experts of a layer on the tokens that chose them."""
    return times(task.shape.experts, expert_forward(task, task.shape.expert_tokens(tokens)))


def expert_forward(task: Task, tokens: int) -> Work:
    """One expert on some tokens."""
    shape = task.shape
    copies = tokens * (5 * shape.inner + 6 * shape.hidden)
    work = op.product(tokens, shape.used_weights, 1)
    calls = CALLS_OF_EXPERT * -(-tokens // BATCH_TOKENS)
    return work + Work({"copy": copies, "call": calls})
