"""What giving an expert each codec would cost: phi, w and epsilon of every routed expert.

arXiv:2410.06270, section 3.2. For expert e of a layer with calibration tokens T_e routed to it:

    phi_e        = |T_e| / N                    how often it is chosen        (frequency)
    w_e          = sum of its routing weights / N                             (routing_weight)
    epsilon_e,b  = || Y - Y_b ||_F              Y: output of the MoE block, Y_b: the same with
                                                expert e alone at codec b     (error)

Only expert e's own tokens can differ between Y and Y_b, so epsilon is computed from them alone:
epsilon^2 = sum over t in T_e of || g_t,e (f_e(x_t) - f_e,b(x_t)) ||^2, g the routing weight. At 0
bits the expert is left out, f_e,0 = 0: its tokens do without it.

What the allocator minimises is the cost: the same sum with each token weighed by s_t of
sensitivity.py, the predicted KL in nats per token. It is kept by source of calibration text. The
other linears have one too, from the Hessian that their rounding uses: trace(E H E^T). With
sensitivity "none" an expert's cost is epsilon^2 over the energy of the residual stream.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.allocation.tensors import (
    check_group_sizes,
    every_name,
    file_bytes,
    fixed_bits,
    fixed_bytes,
    free_widths,
    linear_codec,
    linear_specs,
    offered_widths,
    packable,
    stored_bytes,
)
from moepress.calibrate import TEXT, identity, keep_ids, kept_ids, routing_statistics
from moepress.costs.embedding_and_head import score_ends
from moepress.costs.scores import EXPERT_ARRAYS, PARTS, ExpertScores
from moepress.costs.sensitivity import EXPERTS, SENSITIVITY, Sensitivity, sensitivity_of
from moepress.format.checkpoint import temporary_folder
from moepress.format.codec import LEFT_OUT
from moepress.original.journal import Journal
from moepress.original.source import ExpertWeights, Source
from moepress.original.walk import Routed, Walk, chunks, empty, expert_hidden
from moepress.progress import Progress
from moepress.recipe import END_BITS, Recipe, usual_width
from moepress.rounding.expert import round_down, round_gate_up
from moepress.rounding.linear import linear_inputs, output_cost, round_linear
from moepress.rounding.methods import Factor
from moepress.text import windows

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]


def score(
    source: Source | str | Path,
    recipe: Recipe,
    *,
    work: Path | None = None,
    device: str = "cpu",
    ids: Tensor | None = None,
) -> ExpertScores:
    """Measure every routed expert of a model at every offered width.

    Args:
        source: the original model, its folder, or its hub id.
        recipe: text, widths, quantizer to measure with. Its budget is not looked at.
        work: where finished layers are kept, to resume a stopped run; None: nowhere.
        device: where layers run, if `source` is a name.
        ids: [S, L] calibration sequences if at hand already; None: as the recipe says.

    Raises:
        InputError: `work` holds unfinished work of another kind.
    """
    source = source if isinstance(source, Source) else Source(source, device)
    check_group_sizes(source, recipe)
    with temporary_folder(work) as folder:
        ids = kept_ids(folder / TEXT, source, recipe) if ids is None else ids
        keep_ids(folder / TEXT, ids)
        layers = range(len(source.layers))
        journal = Journal(folder, identity(source, recipe, ids))
        if not all(journal.done(layer) for layer in layers):
            known = sensitivity_of(source, recipe, ids, folder / SENSITIVITY)
            walk = Walk(source, ids)
            with Progress("score", total=len(layers)) as progress:
                for layer in journal.remaining(walk):
                    result = score_layer(walk, layer, recipe, known, progress)
                    if layer == layers[-1]:
                        origin = origin_of_tokens(ids, recipe)
                        first = known.layer(0) if known else {}
                        result["ends_cost"] = score_ends(walk, recipe, first, origin)
                    journal.commit(walk, layer, result)
                    progress.advance()
        return collect(source, recipe, ids, journal)


def collect(source: Source, recipe: Recipe, ids: Tensor, journal: Journal) -> ExpertScores:
    """Put the results of all layers together."""
    rows = {layer: journal.result(layer) for layer in range(len(source.layers))}
    arrays = {
        name: np.stack([rows[layer][name].numpy() for layer in source.experts])
        for name in EXPERT_ARRAYS
    }
    arrays["cost"] = arrays["cost"].swapaxes(0, 1)  # [D, L, E, 3, B]
    arrays["linear_cost"] = _aligned(
        [rows[layer]["linear_cost"].numpy() for layer in rows],
        rows[max(rows)]["ends_cost"].numpy(),
        free_widths(source, recipe),
        recipe,
    )
    few = int((arrays["tokens"] < recipe.token_floor).sum())
    if few:
        logger.warning(
            "%d of %d experts saw fewer than %d calibration tokens, %d of them none: their scores "
            "say little. More or other text helps (`moepress inspect` shows the spread).",
            few, arrays["tokens"].size, recipe.token_floor, int((arrays["tokens"] == 0).sum()),
        )  # fmt: skip
    origin = origin_of_tokens(ids, recipe)
    tokens = torch.bincount(origin, minlength=len(recipe.calib)).tolist()
    return assemble(source, recipe, arrays, tokens, identity(source, recipe, ids))


def _aligned(
    linears: Sequence[Floats], ends: Floats, free: Mapping[str, tuple[int, ...]], recipe: Recipe
) -> Floats:
    """[D, M, W] costs of linears, then of ends, at all widths; infinite where one is not offered.

    Args:
        linears: [m, D, widths of linears] of each layer.
        ends: [m, D, widths of ends].
    """
    offered = offered_widths(free)
    costs = np.full((len(recipe.calib), len(free), len(offered)), np.inf)
    row = 0
    for part, widths in ((np.concatenate(linears), recipe.linear_bits), (ends, END_BITS)):
        if len(part):
            columns = [offered.index(bits) for bits in widths]
            costs[:, row : row + len(part), columns] = part.swapaxes(0, 1)
        row += len(part)
    return costs


def unmeasured(source: Source, recipe: Recipe) -> ExpertScores:
    """Scores with every number 0: enough to tell which budgets are possible."""
    experts = next(iter(source.experts.values())).experts
    shape = (len(source.experts), experts)
    errors = (*shape, len(PARTS), len(recipe.expert_bits))
    free = free_widths(source, recipe)
    linears = (len(free), len(offered_widths(free)))
    arrays = {
        "tokens": np.zeros(shape, dtype=np.int64),
        "routing_weight": np.zeros(shape),
        "squared_error": np.zeros(errors),
        "cost": np.zeros((len(recipe.calib), *errors)),
        "linear_cost": np.zeros((len(recipe.calib), *linears)),
        "output_energy": np.zeros(shape[0]),
        "residual_energy": np.zeros(shape[0]),
    }
    return assemble(source, recipe, arrays, [0] * len(recipe.calib), {})


def assemble(
    source: Source,
    recipe: Recipe,
    arrays: Mapping[str, Any],
    source_tokens: Sequence[int],
    provenance: dict[str, str],
) -> ExpertScores:
    """Arrays, and what the allocator must know of the model's size."""
    one = next(iter(source.experts.values()))
    free = free_widths(source, recipe)
    offered = offered_widths(free)
    linear_bytes = np.zeros((len(free), len(offered)), dtype=np.int64)
    for row, (name, widths) in enumerate(free.items()):
        for bits in widths:
            size = stored_bytes(source, recipe, name, bits)
            linear_bytes[row, offered.index(bits)] = size
    return ExpertScores(
        layers=tuple(source.experts),
        bits=recipe.expert_bits,
        linears=tuple(free),
        linear_bits=offered,
        linear_bytes=linear_bytes,
        total_tokens=sum(source_tokens),
        source_tokens=tuple(source_tokens),
        gate_up_shape=one.gate_up_shape,
        down_shape=one.down_shape,
        fixed_bytes=fixed_bytes(source, linear_specs(source, recipe), free),
        fixed_weights=sum(source.shape(name).numel() for name in every_name(source)),
        file_bytes=file_bytes(source, recipe),
        group_size=recipe.group_size,
        provenance=provenance,
        recipe=recipe.to_dict(),
        **arrays,
    )


@torch.inference_mode()
def score_layer(
    walk: Walk, layer: int, recipe: Recipe, known: Sensitivity | None, progress: Progress
) -> dict[str, Tensor]:
    """Measure the experts and linears of one layer and bring the walk through it."""
    source = walk.source
    sensitivity = known.layer(layer) if known else {}
    origin = origin_of_tokens(walk.ids, recipe)
    progress.update(layer=layer, note="linears")
    linear_cost = score_linears(walk, layer, recipe, sensitivity, origin)
    if layer not in source.experts:
        walk.advance(layer, None)
        return {"linear_cost": linear_cost}
    experts = source.experts[layer]
    routed = walk.route(layer).weighed(sensitivity.get(EXPERTS))
    module = source.model.get_submodule(experts.path)
    output = empty(tuple(routed.hidden.shape), torch.float32).zero_()
    sources, widths = len(recipe.calib), len(recipe.expert_bits)
    errors = torch.zeros(experts.experts, len(PARTS), widths, dtype=torch.float64)
    costs = torch.zeros(sources, experts.experts, len(PARTS), widths, dtype=torch.float64)
    for expert in range(experts.experts):
        progress.update(layer=layer, expert=expert, experts=experts.experts)
        if not len(routed.of(expert)[0]):
            continue  # never chosen: no output, no error, and its weights need not be read
        weights = source.expert(layer, expert)
        offered = quantized_widths(module, weights, routed, layer, expert, recipe)
        errors[expert], costs[:, expert] = measure(
            module, weights, offered, routed, expert, output, origin, sources
        )
    tokens, routing_weight = routing_statistics(routed, experts.experts)
    output_energy = sum(output[part].square().sum().item() for part in chunks(output))
    residual_energy = walk.advance(layer, output)
    return {
        "tokens": tokens,
        "routing_weight": routing_weight,
        "squared_error": errors,
        "cost": costs if known else costs / residual_energy,
        "linear_cost": linear_cost,
        "output_energy": torch.tensor(output_energy, dtype=torch.float64),
        "residual_energy": torch.tensor(residual_energy, dtype=torch.float64),
    }


def origin_of_tokens(ids: Tensor, recipe: Recipe) -> Tensor:
    """The source of calibration text, 0 .. D-1, that each token comes from. [T] int64."""
    shares = windows.divide(len(ids), [weight for _, weight in recipe.calib])
    of_sequence = torch.arange(len(shares)).repeat_interleave(torch.tensor(shares))
    return of_sequence.repeat_interleave(ids.shape[1])


def score_linears(
    walk: Walk, layer: int, recipe: Recipe, sensitivity: Mapping[str, Tensor], origin: Tensor
) -> Tensor:
    """Cost [M, D, W] float64 of each free linear of a layer on each source of text, at each width.

    One Hessian serves all tokens: each is taken to have its share of the squared error.
    """
    source = walk.source
    modules = {
        name: module
        for name, module in packable(source, layer).items()
        if fixed_bits(source, layer, name, recipe) is None
    }
    factors: dict[str, Factor] = {}
    for names, inputs in linear_inputs(walk, layer, modules, recipe):
        factors |= dict.fromkeys(names, inputs.factor(recipe.damping))
    costs = torch.zeros(
        len(modules), len(recipe.calib), len(recipe.linear_bits), dtype=torch.float64
    )
    for row, (name, module) in enumerate(modules.items()):
        known = sensitivity.get(name, torch.zeros(0)).double()
        if len(known) != len(origin) or not known.sum() > 0:
            costs[row] = usual_width_only(name, recipe)
            continue
        weight = source.current(name)
        parts = torch.bincount(origin, known, minlength=len(recipe.calib)) / len(origin)
        for column, bits in enumerate(recipe.linear_bits):
            codec = linear_codec(bits, module.in_features, recipe)
            matrix = round_linear(weight, codec, factors[name], recipe, recipe.measure)
            rounded = matrix.dequantize(weight.dtype)
            costs[row, :, column] = parts * output_cost(weight, rounded, factors[name], recipe)
    return costs


def usual_width_only(name: str, recipe: Recipe) -> Tensor:
    """Costs [W] float64 of a linear that the loss says nothing about: unknown is not harmless."""
    usual = usual_width(recipe.linear_bits)
    logger.warning(
        "no gradient of the loss reaches every token of %s: its width is not chosen, it gets %d",
        name, usual,
    )  # fmt: skip
    costs = torch.full((len(recipe.linear_bits),), torch.inf, dtype=torch.float64)
    costs[recipe.linear_bits.index(usual)] = 0
    return costs


def quantized_widths(
    module: Any, weights: ExpertWeights, routed: Routed, layer: int, expert: int, recipe: Recipe
) -> list[ExpertWeights | None]:
    """The expert at every offered width, dequantized, each projection beside the original other.

    None where it is left out.
    """
    where = (routed, layer, expert, recipe, recipe.measure, recipe.widths)
    gate_ups = round_gate_up(weights.gate_up, *where)
    downs = round_down(weights.down, weights.gate_up, module, *where)
    dtype = weights.down.dtype
    rounded = [
        ExpertWeights(gate_up.dequantize(dtype), down.dequantize(dtype))
        for gate_up, down in zip(gate_ups, downs, strict=True)
    ]
    return [None] * (LEFT_OUT in recipe.expert_bits) + rounded


def measure(
    module: Any,
    weights: ExpertWeights,
    offered: Sequence[ExpertWeights | None],
    routed: Routed,
    expert: int,
    output: Tensor,
    origin: Tensor,
    sources: int,
) -> tuple[Tensor, Tensor]:
    """Squared output error of every part at every width; adds the exact output to `output`.

    Args:
        offered: the expert at each width, None where it is left out.
        origin: [T] source of text of each token, of `sources`.

    Returns:
        [3, B] float64, by PARTS: gate_up alone, down alone, both quantized; and [D, 3, B] float64,
        the same with each token weighed by its importance, source by source.
    """
    errors = torch.zeros(len(PARTS), len(offered), dtype=torch.float64)
    costs = torch.zeros(sources, len(PARTS), len(offered), dtype=torch.float64)
    tokens, gate = routed.of(expert)
    for part in chunks(tokens):
        token = tokens[part]
        x = routed.hidden[token].to(weights.down.device)
        g = gate[part, None].to(x.device)
        hidden = expert_hidden(module, weights.gate_up, x)
        exact = F.linear(hidden, weights.down).float() * g
        output.index_add_(0, token, exact.cpu())
        for column, candidate in enumerate(offered):
            for row, y in enumerate(_part_outputs(module, weights, candidate, hidden, x)):
                error = exact if y is None else y.float() * g - exact
                squared = error.square().sum(1).double().cpu()
                errors[row, column] += squared.sum()
                if routed.importance is not None:
                    squared *= routed.importance[token]
                costs[:, row, column] += torch.bincount(origin[token], squared, minlength=sources)
    return errors, costs


def _part_outputs(
    module: Any, weights: ExpertWeights, candidate: ExpertWeights | None, hidden: Tensor, x: Tensor
) -> Iterator[Tensor | None]:
    """What an expert gives with each of PARTS rounded; None: nothing, it is left out.

    Args:
        hidden: what the original gate and up make of the inputs x.
    """
    if candidate is None:
        yield from (None,) * len(PARTS)
        return
    changed = expert_hidden(module, candidate.gate_up, x)
    yield F.linear(changed, weights.down)
    yield F.linear(hidden, candidate.down)
    yield F.linear(changed, candidate.down)
