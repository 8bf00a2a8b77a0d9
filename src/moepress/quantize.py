"""Apply a plan: round every weight of a model, layer by layer, and write the compressed folder.

Each layer is rounded on the outputs of the rounded layers before it: its inputs when the compressed
model runs. Within a layer attention, shared experts and dense MLPs are rounded first. Then each
routed expert is rounded on its own tokens, as they are once attention is rounded: gate and up
first, then down on the inputs that the rounded gate and up give it. A second walk carries the
states of the original model, so that weights can make up for the errors of earlier layers
(rounding/correction.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from moepress.allocation.plan import BitAllocation
from moepress.allocation.tensors import ModelTensors
from moepress.checks import check_alike
from moepress.costs.drop_costs import DropCosts, DropMeter, drop_seed
from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import (
    DROP_COSTS,
    PLAN,
    SHARDS,
    WORK,
    finish_folder,
    finished_config,
    quantization_config,
    shard_name,
)
from moepress.format.checksums import write_checksums
from moepress.format.codec import LEFT_OUT, PackedSpec, codec_for
from moepress.format.journal import IDENTITY_FILE, Journal
from moepress.format.unfinished import check_finished, load_unfinished, save_unfinished
from moepress.format.written import compare_written
from moepress.kernels.prepare import prepare_rounding
from moepress.original.architectures import reads_experts
from moepress.original.batches import empty
from moepress.original.companions import companions
from moepress.original.experts import ExpertWeights, Routed
from moepress.original.resident import ResidentExperts, experts_bytes, have_room
from moepress.original.source import Source
from moepress.original.usable import check_usable
from moepress.original.walk import Walk
from moepress.outside import copied_shards, write_outside_layers
from moepress.progress import Progress
from moepress.ranks import here
from moepress.rounding.balance import experts_to_round
from moepress.rounding.even_linears import even_linears
from moepress.rounding.expert import experts_at_once, round_experts, rounded_expert
from moepress.rounding.linear import linear_inputs, packed_bytes, quantize_linears
from moepress.rounding.options import Rounding
from moepress.rounding.pre_quant_scale import find_scale, stored_scale, with_plain_columns
from moepress.work import (
    FULL_RECIPE,
    PLAN_DIGEST,
    ROUNDING,
    begin,
    check_output,
    claim,
    identity,
    kept_ids,
    output_held,
    own_text,
)
from moepress.writing.held import discard

# Key of the states of the original model's walk in the work folder. "twin" is an older word for it,
# and is kept because unfinished work on disk has it.
ORIGINAL_STATES = "twin"
STATES_SHARE = 0.03  # of a card's free memory for the states of a walk: rounding needs the room


def quantize(
    source: Source | str | Path,
    plan: BitAllocation,
    out: str | Path,
    *,
    device: str = "cpu",
    ids: Tensor | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the compressed model folder of a plan.

    Args:
        source: the original model that the plan's scores were measured on.
        plan: widths of every expert and open tensor, and the recipe for everything else.
        out: folder to make. A stopped run is continued by the same call.
        device: where layers run, if `source` is a folder or hub id.
        ids: [S, L] calibration sequences; None: those that the plan's recipe asks for.
        trust_remote_code: see `Source`.

    Returns:
        `out`, which transformers can open once moepress is imported.

    Raises:
        InputError: the plan was made for another model, or `out` holds something else.
        CheckpointError: no space left; finished layers are kept.
    """
    out = Path(out)
    here().agreed(lambda: check_output(out))
    source = source if isinstance(source, Source) else Source(source, device, trust_remote_code)
    check_plan(source, plan)
    check_usable(source)
    check_alike(source, {"the plan": plan.recipe.digest("calib") + plan.digest()})
    with output_held(out) as folder:
        if ids is None:
            known = _work(source, plan, None)
            if own_text(plan.recipe) and here().agreed(lambda: claim(out, known)):
                return out
            ids = here().agreed(lambda: kept_ids(folder, source, plan.recipe))
        return quantize_tensors(source, plan, ModelTensors.of(source, plan.recipe), ids, out)


def quantize_tensors(
    source: Source, plan: BitAllocation, tensors: ModelTensors, ids: Tensor, out: Path
) -> Path:
    """`quantize` for a checked plan, with the model's tensors and calibration sequences given.

    The output must be held (`output_held`).
    """
    work = _work(source, plan, ids)
    ranks = here()
    if ranks.agreed(lambda: claim(out, work)):
        return out
    ranks.agreed(lambda: begin(out, ids, work))
    layers = len(source.layers)
    folder = out / WORK / ROUNDING
    ranks.agreed(lambda: _check_shards(out, folder))
    journal = Journal(folder, work, layers, lambda i: out / shard_name(i), source.device)
    todo = journal.todo
    states = ids.numel() * source.hidden
    ranks.agreed(lambda: check_space(out, plan, len(todo) / layers, states))
    packed = tensors.specs(plan.linear_bits)
    ranks.agreed(lambda: plan.save(out / PLAN))
    ranks.agreed(lambda: write_outside_layers(source, packed, out, folder))
    if todo:
        prepare_rounding(source.device)
        _quantize_layers(source, plan, packed, ids, journal, out)
    ranks.agreed(lambda: _finish(source, plan, packed, ids, work, out))
    return out


def _work(source: Source, plan: BitAllocation, ids: Tensor | None) -> dict[str, str]:
    """The identity of a plan's application."""
    made_of = identity(source, plan.recipe, ids)
    return made_of | {FULL_RECIPE: plan.recipe.digest(), PLAN_DIGEST: plan.digest()}


def _check_shards(out: Path, folder: Path) -> None:
    """Check the shards that a stopped run left; delete them if nothing says whose they are.

    That is so where a user has deleted the work folder to start over: they may be of other work.

    Raises:
        FileError: one is cut or damaged.
    """
    known = (folder / IDENTITY_FILE).is_file()
    for path in sorted(path for name in SHARDS for path in out.glob(name)):
        if known:
            check_finished(path, delete=folder)
        else:
            path.unlink()


def _finish(
    source: Source,
    plan: BitAllocation,
    packed: Mapping[str, PackedSpec],
    ids: Tensor,
    work: Mapping[str, str],
    out: Path,
) -> None:
    """Write what describes the finished layers, and delete the work folder."""
    drop_costs = {layer: load_unfinished(_drops_file(out, layer)) for layer in source.experts}
    DropCosts.of_layers(drop_costs, identity(source, plan.recipe, ids)).save(out / DROP_COSTS)
    names = (*map(shard_name, (None, *range(len(source.layers)))), *copied_shards(source))
    shards = [out / name for name in names]
    specs = {**packed, **expert_specs(source, plan)}
    quantization = quantization_config(specs, work, source.has_common_experts)
    written = partial(compare_written, folder=out / WORK / ROUNDING)
    write_checksums(out, shards, finished_config(source.config_json(), quantization), written)
    finish_folder(out, source.config_json(), companions(source.folder), quantization, shards)
    discard(out / WORK)


def _quantize_layers(
    source: Source,
    plan: BitAllocation,
    packed: Mapping[str, PackedSpec],
    ids: Tensor,
    journal: Journal,
    out: Path,
) -> None:
    """Round the unfinished layers, and commit each of them to the journal."""
    walk = Walk(source, ids, share=STATES_SHARE)
    original = None
    if Rounding.of_experts(plan.recipe, plan.recipe.quantizer).corrects:
        original = walk.fork()

    def restore(tensors: Mapping[str, Tensor]) -> None:
        walk.restore(tensors)
        if original is not None:
            original.restore(tensors, ORIGINAL_STATES)

    def states() -> dict[str, Tensor]:
        others = {} if original is None else original.tensors(ORIGINAL_STATES)
        return walk.tensors() | others

    with Progress("quantize", total=len(source.layers)) as progress:
        progress.skip(journal.first)
        for layer in journal.remaining(restore):
            with source.layer_loaded(layer):
                tensors, drops = quantize_layer(walk, layer, plan, packed, progress, original)
            if drops is not None and walk.ranks.first:
                save_unfinished(_drops_file(out, layer), drops)
            journal.commit(layer, tensors, states)
            progress.advance()


@torch.inference_mode()
def quantize_layer(
    walk: Walk,
    layer: int,
    plan: BitAllocation,
    packed: Mapping[str, PackedSpec],
    progress: Progress,
    original: Walk | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Round one loaded layer and bring the walk through it.

    Args:
        original: a walk of the original model, which is brought through the layer too; None:
            weights do not make up for the errors of earlier layers.

    Returns:
        The layer's stored tensors, and the drop costs of its rounded experts on the states of the
        compressed model; None for a layer without routed experts.
    """
    source, recipe = walk.source, plan.recipe
    names = source.names(source.layer_paths[layer])
    progress.update(layer=layer, note="attention and dense linears")
    if original is not None:
        original.expect(layer)
    linears = {name: source.module(name) for name in names if name in packed}
    last = {name: linears.pop(name) for name in names if name in packed and reads_experts(name)}
    rounding = Rounding.of_linears(recipe, recipe.quantizer)
    if rounding.balance:
        even_linears(walk, layer, packed)
    inputs = []
    if rounding.needs_hessian:
        inputs = linear_inputs(walk, layer, linears, rounding, original)
    passed = original.pass_layer(layer) if original is not None else None
    tensors = quantize_linears(walk, linears, packed, rounding, inputs)
    for name in names:
        if name not in tensors and name not in last:
            value = source.as_packed(layer, name, source.current(name))
            tensors[name] = value.to("cpu", source.stored_dtype(name))
    if layer not in source.experts:
        walk.advance(layer, None)
        return tensors, None
    routed = replace(walk.route(layer), original=None if passed is None else passed.hidden)

    def round_last(output: Tensor) -> None:
        inputs = []
        if rounding.needs_hessian:
            inputs = linear_inputs(walk, layer, last, rounding, experts_output=output)
        tensors.update(quantize_linears(walk, last, packed, rounding, inputs))

    finish = round_last if last else None
    experts, drops = quantize_experts(walk, layer, plan, routed, progress, finish)
    return tensors | experts, drops


def quantize_experts(
    walk: Walk,
    layer: int,
    plan: BitAllocation,
    routed: Routed,
    progress: Progress,
    finish: Callable[[Tensor], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Round the routed experts of a layer, and bring the walk through the layer.

    Args:
        finish: called with the output [T, H] of the rounded experts before that; None: not needed.

    Returns:
        As `quantize_layer`.
    """
    experts = walk.source.experts[layer]
    rounding = Rounding.of_experts(plan.recipe, plan.recipe.quantizer)
    places, tensors = packed_places(walk.source, plan, layer)
    if layer in plan.scaled_layers:
        scale, _ = find_scale(walk, layer, routed)
        routed = routed.with_pre_quant_scale(scale)
        tensors |= stored_scale(walk.source, layer, scale)
    widths_of = plan.widths()[plan.layers.index(layer)]
    left_out = [number for number, widths in enumerate(widths_of) if LEFT_OUT in widths]
    seed = drop_seed(plan.recipe.seed, layer)
    meter = DropMeter(routed, experts.experts, seed, left_out, walk.ranks)
    numbers = [number for number in range(len(widths_of)) if number not in left_out]
    sums = walk.token_sums(routed, numbers)
    resident: list[ExpertWeights | None] | None = None  # the rounded ones, if they run together
    if numbers and finish is None and _run_together(walk, layer, routed):
        resident = [None] * len(widths_of)
    room = experts_at_once(walk.source, layer, rounding, kept=resident is not None)
    read = experts_to_round(walk, layer, sums.own, routed, rounding)
    while originals := list(islice(read, room.experts)):
        progress.update(layer=layer, expert=originals[0].number, experts=experts.experts)
        widths = [widths_of[expert.number] for expert in originals]
        together = round_experts(originals, rounding, widths, room.downs)
        for expert, found in zip(originals, together, strict=True):
            matrices = found.gate_up, found.down
            for name, matrix in zip(experts.parameters, matrices, strict=True):
                start, stop = places[name][expert.number : expert.number + 2]
                tensors[name][start:stop] = packed_bytes(matrix)
            rounded = rounded_expert(expert, found)
            meter.add(rounded)
            if resident is None:
                sums.add_output(rounded)
            else:
                resident[expert.number] = with_plain_columns(rounded).weights
        # before the next are read
        del originals, together, expert, found, matrices, matrix, rounded
    for number, owner in sums.owners.items():
        for name, offsets in places.items():
            walk.ranks.give_first(tensors[name][offsets[number] : offsets[number + 1]], owner)
    if resident is None:
        output = sums.result()
        if finish is not None:
            finish(output)
        energy = walk.advance(layer, output)
    else:
        module = walk.experts_module(layer)
        energy = walk.advance_with(ResidentExperts(layer, module, experts.form, resident))
    return tensors, meter.result(energy / walk.tokens)


def _run_together(walk: Walk, layer: int, routed: Routed) -> bool:
    """Whether the rounded experts of a layer stay on the card, and run together at last.

    They do if they take less room than the sums of their outputs over all tokens.
    """
    sums = 4 * routed.hidden.numel()
    alone = walk.ranks.count == 1
    return alone and have_room(walk.source, layer) and experts_bytes(walk.source, layer) < sums


def _drops_file(out: Path, layer: int) -> Path:
    """File with the drop costs of a finished layer, until those of all layers are combined."""
    return out / WORK / ROUNDING / f"drops-{layer:04d}.safetensors"


def packed_places(
    source: Source, plan: BitAllocation, layer: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Room for the packed bytes of a layer's routed experts, by parameter name.

    Returns:
        The offset of each expert and the total number of bytes; and uint8 tensors of that many
        bytes, not filled yet. Large ones are mapped from a temporary file: the packed experts of a
        layer of DeepSeek-V3 take 3.5 GB at 2.5 bits.
    """
    experts = source.experts[layer]
    shapes = experts.gate_up_shape, experts.down_shape
    specs = layer_specs(source, plan, layer)
    places = {
        name: specs[name].offsets(*shape)
        for name, shape in zip(experts.parameters, shapes, strict=True)
    }
    return places, {name: empty((of[-1],), torch.uint8) for name, of in places.items()}


def expert_specs(source: Source, plan: BitAllocation) -> dict[str, PackedSpec]:
    """How the fused parameters of all routed experts are packed, by parameter name."""
    specs: dict[str, PackedSpec] = {}
    for layer in plan.layers:
        specs |= layer_specs(source, plan, layer)
    return specs


def layer_specs(source: Source, plan: BitAllocation, layer: int) -> dict[str, PackedSpec]:
    """`expert_specs` for one layer."""
    experts, row = source.experts[layer], plan.layers.index(layer)
    specs = {}
    for projection, (name, (_, cols)) in enumerate(
        zip(experts.parameters, (experts.gate_up_shape, experts.down_shape), strict=True)
    ):
        widths = tuple(plan.bits[row, :, projection].tolist())
        family = plan.recipe.expert_codec
        group = codec_for(plan.recipe.widths[0], cols, plan.group_size, family).group_size
        scaled = projection == 0 and layer in plan.scaled_layers
        specs[name] = PackedSpec(widths, group, family, scaled)
    return specs


def check_plan(source: Source, plan: BitAllocation) -> None:
    """Raise InputError if a plan was made for another model."""
    made_for = plan.provenance.get("model_fingerprint")
    if made_for != source.fingerprint:
        raise InputError(
            f"The plan is for model {plan.provenance.get('model')} ({made_for}), but {source.name} "
            f"is {source.fingerprint}. Give the model that was scored, or score this one."
        )


def check_space(out: Path, plan: BitAllocation, share: float, states: int) -> None:
    """Raise CheckpointError, before any work, if the disk cannot hold the result.

    Args:
        share: of the layers that is unfinished.
        states: number of elements of a walk's states.
    """
    walks = 2 if Rounding.of_experts(plan.recipe, plan.recipe.quantizer).corrects else 1
    need = int(plan.folder_bytes * share) + walks * 2 * 4 * states
    free = shutil.disk_usage(out).free
    if free < need:
        raise CheckpointError(
            f"No space left for {out}: the compressed model and the work files need about "
            f"{need:,} bytes, {free:,} are free. Free some and run the same command again to go on."
        )
