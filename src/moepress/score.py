"""Scoring: measure what each width of each routed expert and each open tensor costs.

For each routed expert, phi, w and epsilon of arXiv:2410.06270, section 3.2, are measured. For
expert e of a layer with calibration tokens T_e routed to it, N tokens in all:

    phi_e        = |T_e| / N                    how often it is chosen
    w_e          = sum of its routing weights / N
    epsilon_e,b  = || Y - Y_b ||_F              Y: output of the MoE block, Y_b: the same with
                                                only expert e rounded, to width b

Y and Y_b differ only at the tokens of expert e, so epsilon is computed from these:
epsilon^2 = sum over t in T_e of || g_t,e (f_e(x_t) - f_e,b(x_t)) ||^2, g the routing weight. At 0
bits the expert is left out: f_e,0 = 0.

The cost, which the allocator minimises, is the same sum with each token weighted by its sensitivity
s_t (costs/sensitivity.py): the predicted KL in nats per token. Costs are kept text by text. Open
linears (costs/linear_costs.py), the embedding and the head (costs/embedding_and_head.py) have costs
of the same kind. With sensitivity "none" the cost of an expert is epsilon^2 over the energy of the
residual stream.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moepress.allocation.tensors import ModelTensors, file_bytes
from moepress.checks import checked
from moepress.costs.embedding_and_head import score_embedding_and_head
from moepress.costs.expert_costs import measure, rounded_weights
from moepress.costs.interpolation import Interpolation
from moepress.costs.linear_costs import score_linears
from moepress.costs.noisy_expert import draw_experts_ahead
from moepress.costs.scored import scored_count, scored_sequences, wanted_tokens
from moepress.costs.scores import EXPERT_ARRAYS, ROUNDED, ExpertScores
from moepress.costs.sensitivity import EXPERTS, SENSITIVITY, Sensitivity, measure_sensitivity
from moepress.costs.texts import Texts
from moepress.format.checkpoint import temporary_folder
from moepress.format.journal import Journal
from moepress.kernels.prepare import prepare_rounding
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.progress import Progress
from moepress.ranks import here
from moepress.recipe import TABLE_BITS, Recipe
from moepress.rounding.balance import experts_to_round
from moepress.rounding.even_linears import even_linears
from moepress.rounding.expert import experts_at_once
from moepress.rounding.options import Rounding
from moepress.rounding.pre_quant_scale import scale_bytes, scale_if_worth
from moepress.work import identity, keep_ids, kept_ids, text_digest, work_held
from moepress.workload.shapes import ModelShape
from moepress.writing.files import check_file, check_place
from moepress.writing.held import check_work, discard

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]

# Key of the costs of embedding and head in the last layer's file of the work folder. The name is
# older than the words used elsewhere; it is kept because unfinished work on disk has it.
TABLES_COST = "ends_cost"
# Key of whether the inputs of a layer's experts are scaled, in the layer's file there.
SCALED = "scaled"
EXPERTS_AHEAD = 3  # experts of a layer whose errors are drawn while a card scores another


def score(
    source: Source | str | Path,
    recipe: Recipe,
    *,
    work: Path | None = None,
    device: str = "cpu",
    ids: Tensor | None = None,
    trust_remote_code: bool = False,
) -> ExpertScores:
    """Measure every routed expert and every open tensor of a model at every offered width.

    Args:
        source: the original model, its folder, or its hub id.
        recipe: text, widths, quantizer to measure with. Its budget is ignored.
        work: folder for finished layers, to continue a stopped run; None: a temporary one.
        device: where layers run, if `source` is a folder or hub id.
        ids: [S, L] calibration sequences; None: those that the recipe asks for.
        trust_remote_code: see `Source`.

    Raises:
        InputError: `work` holds unfinished work of another identity, or files that are not of
            moepress, or another process works there.
    """
    source = source if isinstance(source, Source) else Source(source, device, trust_remote_code)
    recipe = checked(source, recipe)
    with temporary_folder(None) if work is None else work_held(work) as own_folder:
        folder = here().agreed(lambda: own_folder)
        ids = here().agreed(lambda: kept_ids(folder, source, recipe)) if ids is None else ids
        return score_tensors(source, recipe, ModelTensors.of(source, recipe), ids, folder)


def score_to_file(
    model: str | Path,
    recipe: Recipe,
    out: Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> None:
    """`score`, written to a file. Unfinished work is in a folder beside it, `out` + ".work".

    Raises:
        InputError: as of `score`; or `out` or that folder cannot be written or is not of moepress.
    """
    ranks = here()
    work = out.with_name(out.name + ".work")
    ranks.agreed(lambda: _check_places(out, work))
    source = Source(model, device, trust_remote_code)
    recipe = checked(source, recipe)
    with work_held(work) as folder:
        ids = ranks.agreed(lambda: kept_ids(folder, source, recipe))
        scores = score_tensors(source, recipe, ModelTensors.of(source, recipe), ids, folder)
        ranks.agreed(lambda: scores.save(out))
        ranks.agreed(lambda: discard(folder))


def _check_places(out: Path, work: Path) -> None:
    """Check that the scores and their unfinished work can be written."""
    check_file(out, "scores")
    check_work(work)
    check_place(work / "lock")


def score_tensors(
    source: Source, recipe: Recipe, tensors: ModelTensors, ids: Tensor, folder: Path
) -> ExpertScores:
    """Measure routed experts and open tensors; continue the unfinished work in `folder`, if any.

    Args:
        ids: [S, L] calibration sequences.
    """
    made_of = identity(source, recipe, ids)
    journal = Journal(folder, made_of, len(source.layers), device=source.device)
    here().agreed(lambda: keep_ids(folder, ids))
    whole = Texts.of(ids, [weight for _, weight in recipe.calib])
    ids, texts = _scored(source, recipe, ids, whole)
    if journal.todo:
        prepare_rounding(source.device)
        sensitivity = _sensitivity(source, recipe, ids, folder / SENSITIVITY)
        walk = Walk(source, ids)
        with Progress("score", total=len(source.layers)) as progress:
            progress.skip(journal.first)
            for layer in journal.remaining(walk.restore):
                with source.layer_loaded(layer):
                    result = score_layer(walk, layer, recipe, tensors, sensitivity, texts, progress)
                if layer == len(source.layers) - 1:
                    result[TABLES_COST] = score_embedding_and_head(
                        walk,
                        tensors.open_tables,
                        recipe.group_size,
                        sensitivity.layer(0) if sensitivity else {},
                        texts,
                    )
                journal.commit(layer, result, walk.tensors)
                progress.advance()
    return here().agreed(lambda: _collect(source, recipe, tensors, made_of, texts, whole, journal))


def _scored(source: Source, recipe: Recipe, ids: Tensor, texts: Texts) -> tuple[Tensor, Texts]:
    """The sequences that costs are measured on, and their texts (costs/scored.py)."""
    weights = [weight for _, weight in recipe.calib]
    used = ModelShape.of(source).used
    sequences, length = ids.shape
    count = scored_count(sequences, length, len(weights), used, wanted_tokens(recipe))
    chosen = scored_sequences(sequences, weights, count)
    return ids[chosen], texts.some(chosen, length)


def _sensitivity(source: Source, recipe: Recipe, ids: Tensor, folder: Path) -> Sensitivity | None:
    """Sensitivities, measured or read from `folder`; None: the recipe asks for none."""
    if recipe.sensitivity == "none":
        return None
    made_of = {
        "model": source.fingerprint,
        "text": text_digest(ids),
        "seed": str(recipe.seed),
        "computed with": str(source.compute_dtype),
    }
    return measure_sensitivity(source, ids, folder, made_of, recipe.seed)


@torch.inference_mode()
def score_layer(
    walk: Walk,
    layer: int,
    recipe: Recipe,
    tensors: ModelTensors,
    sensitivity: Sensitivity | None,
    texts: Texts,
    progress: Progress,
) -> dict[str, Tensor]:
    """Measure the experts and open linears of one loaded layer, and bring the walk through it."""
    source = walk.source
    of_layer = sensitivity.layer(layer) if sensitivity else {}
    texts = texts.repeated(len(walk.passes))
    progress.update(layer=layer, note="linears")
    of_all_linears = Rounding.of_linears(recipe, recipe.measure)
    if of_all_linears.balance:
        packed = tensors.open.keys() | tensors.fixed_specs.keys()
        even_linears(walk, layer, packed)
    of_linears = partial(
        score_linears,
        walk,
        layer,
        {name: module for name, module in source.packable[layer].items() if name in tensors.open},
        recipe.linear_bits,
        of_all_linears,
        of_layer,
        texts,
    )
    linear_cost = of_linears()
    if layer not in source.experts:
        walk.advance(layer, None)
        return {"linear_cost": linear_cost}
    experts = source.experts[layer].experts
    rounding = Rounding.of_experts(recipe, recipe.measure)
    routed = walk.route(layer).with_sensitivity(of_layer.get(EXPERTS))
    if rounding.balance:
        routed = scale_if_worth(walk, layer, routed)
    interpolation = _interpolation(source, layer, recipe, rounding)
    options = (len(ROUNDED), len(recipe.expert_bits))
    errors = torch.zeros(experts, *options, dtype=torch.float64)
    costs = torch.zeros(texts.count, experts, *options, dtype=torch.float64)
    tokens, routing_weight = routed.statistics(experts)
    # An expert that no token chose has no output and no error: its weights are not read.
    sums = walk.token_sums(routed, walk.chosen(layer, routed))
    step = 1
    if not rounding.draws:
        step = experts_at_once(source, layer, rounding, len(recipe.widths)).downs
    read = experts_to_round(walk, layer, sums.own, routed, rounding)
    done = 0
    while together := list(islice(read, step)):
        if rounding.draws and source.device.type == "cuda":
            soon = sums.own[done : done + 1 + EXPERTS_AHEAD]
            draw_experts_ahead(soon, together[0], rounding)
        offered = rounded_weights(together, rounding, interpolation.measured)
        for expert, (seen, weights) in zip(together, offered, strict=True):
            progress.update(layer=layer, expert=expert.number, experts=experts)
            measured = map(interpolation.at_all, measure(expert, seen, weights, texts, sums))
            errors[expert.number], costs[:, expert.number] = measured
            done += 1
    walk.ranks.sum_up(errors)
    walk.ranks.sum_up(costs)
    output = sums.result()
    linear_cost += of_linears(experts_output=output)
    of_batches = (output[walk.tokens_of(batch)] for batch in walk.batches)
    output_energy = walk.division.total([rows.square().sum().item() for rows in of_batches])
    residual_energy = walk.advance(layer, output)
    return {
        "tokens": tokens,
        "routing_weight": routing_weight,
        SCALED: torch.tensor(routed.pre_quant_scale is not None),
        "squared_error": errors,
        "cost": costs if sensitivity else costs / residual_energy,
        "linear_cost": linear_cost,
        "output_energy": torch.tensor(output_energy, dtype=torch.float64),
        "residual_energy": torch.tensor(residual_energy, dtype=torch.float64),
    }


def _interpolation(source: Source, layer: int, recipe: Recipe, rounding: Rounding) -> Interpolation:
    """The widths to measure in a layer: a few if errors are drawn."""
    if not rounding.draws:
        return Interpolation.none(recipe.expert_bits)
    experts = source.experts[layer]
    rows = experts.gate_up_shape[0], experts.down_shape[0]
    return Interpolation.of_drawn(recipe.expert_bits, rows, source.device)


def _collect(
    source: Source,
    recipe: Recipe,
    tensors: ModelTensors,
    made_of: dict[str, str],
    texts: Texts,
    whole: Texts,
    journal: Journal,
) -> ExpertScores:
    """Combine the results of all layers.

    Args:
        made_of: what the scores depend on.
        texts: of the scored tokens.
        whole: of all calibration tokens. Costs count in its proportion of texts.
    """
    rows = {layer: journal.result(layer) for layer in range(len(source.layers))}
    arrays = {
        name: np.stack([rows[layer][name].numpy() for layer in source.experts])
        for name in EXPERT_ARRAYS
    }
    arrays["cost"] = arrays["cost"].swapaxes(0, 1)  # [D, L, E, 3, B]
    arrays["linear_cost"] = _linear_costs(
        np.concatenate([rows[layer]["linear_cost"].numpy() for layer in rows]),
        rows[max(rows)][TABLES_COST].numpy(),
        tensors.widths,
        recipe.linear_bits,
    )
    shares = texts.shares_of(whole).numpy()
    arrays["cost"] = arrays["cost"] * shares[:, None, None, None, None]
    arrays["linear_cost"] = arrays["linear_cost"] * shares[:, None, None]
    scored, text_tokens = len(texts.of_token), whole.tokens().tolist()
    never = torch.tensor(False)  # of layers that an older version has scored
    scaled = [layer for layer in source.experts if rows[layer].get(SCALED, never)]
    scores = _assembled(source, recipe, tensors, arrays, scored, text_tokens, made_of, scaled)
    few = int((scores.reached < recipe.token_floor).sum())
    none = int((scores.tokens == 0).sum())
    if few:
        logger.warning(
            "%d of %d experts saw fewer than %d calibration tokens%s%s: their scores say little. "
            "More or other text helps (`moepress inspect` shows the spread).",
            few, scores.tokens.size, recipe.token_floor, f", {none} of them none" if none else "",
            "" if len(whole.of_token) == scored else f" of the {scored:,} that are scored",
        )  # fmt: skip
    return scores


def _linear_costs(
    linears: Floats, tables: Floats, widths: Sequence[int], linear_bits: Sequence[int]
) -> Floats:
    """[D, M, W] costs of linears, then of embedding and head, at all widths.

    Infinite where a width is not offered.

    Args:
        linears: [M', D, widths of `linear_bits`].
        tables: [M - M', D, widths of TABLE_BITS].
        widths: [W].
    """
    counts = len(linears), len(tables)
    costs = np.full((linears.shape[1], sum(counts), len(widths)), np.inf)
    for rows, costs_of_rows, offered in (
        (slice(0, counts[0]), linears, linear_bits),
        (slice(counts[0], None), tables, TABLE_BITS),
    ):
        if len(costs_of_rows):
            options = [widths.index(bits) for bits in offered]
            costs[:, rows, options] = costs_of_rows.swapaxes(0, 1)
    return costs


def unmeasured(source: Source, recipe: Recipe, tensors: ModelTensors) -> ExpertScores:
    """Scores with the model's sizes and all measurements 0, to check a budget before scoring."""
    shape = (len(source.experts), source.one_layer_of_experts.experts)
    errors = (*shape, len(ROUNDED), len(recipe.expert_bits))
    linear_cost = np.full((len(recipe.calib), len(tensors.open), len(tensors.widths)), np.inf)
    for row, offered in enumerate(tensors.open.values()):
        linear_cost[:, row, [tensors.widths.index(bits) for bits in offered]] = 0
    arrays = {
        "tokens": np.zeros(shape, dtype=np.int64),
        "routing_weight": np.zeros(shape),
        "squared_error": np.zeros(errors),
        "cost": np.zeros((len(recipe.calib), *errors)),
        "linear_cost": linear_cost,
        "output_energy": np.zeros(shape[0]),
        "residual_energy": np.zeros(shape[0]),
    }
    return _assembled(source, recipe, tensors, arrays, 0, [0] * len(recipe.calib), {})


def _assembled(
    source: Source,
    recipe: Recipe,
    tensors: ModelTensors,
    arrays: Mapping[str, Any],
    scored: int,
    text_tokens: Sequence[int],
    provenance: dict[str, str],
    scaled: Sequence[int] = (),
) -> ExpertScores:
    """Scores of measured arrays and of the model's sizes, which the allocator needs.

    Args:
        arrays: fields of `ExpertScores` that are measured.
        scored: number of tokens that costs are measured on.
        text_tokens: [D] number of tokens of each text.
        scaled: layers whose experts get scaled inputs.
    """
    one = source.one_layer_of_experts
    linear_bytes = np.zeros((len(tensors.open), len(tensors.widths)), dtype=np.int64)
    for row, (name, offered) in enumerate(tensors.open.items()):
        for bits in offered:
            linear_bytes[row, tensors.widths.index(bits)] = tensors.nbytes(name, bits)
    return ExpertScores(
        layers=tuple(source.experts),
        scaled_layers=tuple(scaled),
        bits=recipe.expert_bits,
        linears=tuple(tensors.open),
        linear_bits=tensors.widths,
        linear_bytes=linear_bytes,
        total_tokens=scored,
        text_tokens=tuple(text_tokens),
        gate_up_shape=one.form.shapes[0],
        down_shape=one.form.shapes[1],
        fixed_bytes=tensors.fixed_bytes + len(scaled) * scale_bytes(source),
        other_weights=sum(source.shape(name).numel() for name in source.all_names),
        file_bytes=file_bytes(source, recipe, tensors),
        group_size=recipe.group_size,
        provenance=provenance,
        recipe=recipe.to_dict(),
        **arrays,
    )
