"""Apply a plan: round every weight of a model, layer by layer, and write the compressed folder.

Each layer sees the outputs of the layers already rounded, as it will when the model runs. Within a
layer: attention and shared experts first, on the inputs they have; then, behind the rounded
attention, each routed expert on its own tokens, gate and up first, down on what they now give. The
original model goes along, so that weights can make up for what the layers before changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepress.allocation.plan import BitAllocation
from moepress.allocation.tensors import codec_for, linear_specs
from moepress.calibrate import TEXT, drop_seed, identity, keep_ids, kept_ids
from moepress.costs.drop_costs import DropCosts, DropMeter
from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import (
    DROP_COSTS,
    PLAN,
    finish_folder,
    is_compressed,
    load_json,
    load_tensors,
    quantization_config,
    save_tensors,
    shard_name,
)
from moepress.format.codec import LEFT_OUT, PackedSpec
from moepress.original.journal import Journal
from moepress.original.source import ExpertWeights, Source
from moepress.original.walk import Routed, Walk, add_expert_output, empty
from moepress.progress import Progress
from moepress.recipe import Recipe
from moepress.rounding.expert import round_down, round_gate_up
from moepress.rounding.linear import Shared, linear_inputs, round_linear
from moepress.rounding.methods import (
    Factor,
    QuantizedMatrix,
    TrellisMatrix,
    needs_hessian,
    quantize_matrix,
)

WORK = ".moepress"  # folder inside the output that holds unfinished work


def quantize(
    source: Source | str | Path,
    plan: BitAllocation,
    out: str | Path,
    *,
    device: str = "cpu",
    ids: Tensor | None = None,
) -> Path:
    """Write the compressed model folder of a plan.

    Args:
        source: the original model that the plan's scores were measured on.
        plan: code bits of every expert, and the recipe for everything else.
        out: folder to make, or to go on with after a stop.
        device: where layers run, if `source` is a name.
        ids: [S, L] calibration sequences if at hand already; None: as the recipe says.

    Returns:
        `out`, which transformers can open once moepress is imported.

    Raises:
        InputError: the plan is of another model, or `out` holds something else.
        CheckpointError: no space left; finished layers are kept.
    """
    out = Path(out)
    source = source if isinstance(source, Source) else Source(source, device)
    check_plan(source, plan)
    ids = kept_ids(out / WORK / TEXT, source, plan.recipe) if ids is None else ids
    work = identity(source, plan.recipe, ids) | {
        "full_recipe": plan.recipe.digest(),
        "plan": plan.digest(),
    }
    if claim(out, work):
        return out
    keep_ids(out / WORK / TEXT, ids)
    journal = Journal(out / WORK / "quantize", work, lambda layer: out / shard_name(layer))
    layers = range(len(source.layers))
    todo = [layer for layer in layers if not journal.done(layer)]
    check_space(out, plan, len(todo) / len(layers), ids.numel() * source.hidden)
    plan.save(out / PLAN)
    packed = linear_specs(source, plan.recipe, plan.linear_bits)
    if not (out / shard_name(None)).is_file():
        save_tensors(out / shard_name(None), outside_layers(source, packed))
    if todo:
        walk = Walk(source, ids)
        twin = walk.twin() if corrects(plan.recipe) else None
        with Progress("quantize", total=len(layers)) as progress:
            for layer in journal.remaining(walk, twin):
                tensors, drops = quantize_layer(walk, layer, plan, packed, progress, twin)
                if drops is not None:
                    save_tensors(drops_file(out, layer), drops)
                journal.commit(walk, layer, tensors, twin)
                progress.advance()
    drop_costs = {layer: load_tensors(drops_file(out, layer)) for layer in source.experts}
    DropCosts.of_layers(drop_costs, identity(source, plan.recipe, ids)).save(out / DROP_COSTS)
    finish_folder(
        out,
        source.folder / "config.json",
        source.companions(),
        quantization_config(packed | expert_specs(source, plan), work),
        [out / shard_name(layer) for layer in (None, *layers)],
    )
    shutil.rmtree(out / WORK)
    return out


@torch.inference_mode()
def quantize_layer(
    walk: Walk,
    layer: int,
    plan: BitAllocation,
    packed: Mapping[str, PackedSpec],
    progress: Progress,
    twin: Walk | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Round one loaded layer and bring the walk through it.

    Args:
        twin: the original model's walk, which is brought through the layer too; None: weights are
            rounded as they are, no errors of the layers before are made up for.

    Returns:
        Its stored tensors, and what dropping its rounded experts from tokens would cost, on the
        states that the compressed model has; None for a layer without routed experts.
    """
    source = walk.source
    prefix = source.layer_path(layer)
    progress.update(layer=layer, note="attention and dense linears")
    linears = {
        name: source.model.get_submodule(name.removesuffix(".weight"))
        for name in source.names(prefix)
        if name in packed
    }
    informed = needs_hessian(plan.recipe.quantizer)
    inputs = linear_inputs(walk, layer, linears, plan.recipe, twin) if informed else []
    passed = twin.pass_layer(layer) if twin is not None else None
    tensors = quantize_linears(source, linears, packed, plan.recipe, inputs)
    for name in source.names(prefix):
        if name not in tensors:
            tensors[name] = source.current(name).to("cpu", source.stored_dtype(name))
    if layer not in source.experts:
        walk.advance(layer, None)
        return tensors, None
    experts = source.experts[layer]
    module = source.model.get_submodule(experts.path)
    original = None if passed is None else passed.hidden
    routed = replace(walk.route(layer), original=original)
    output = empty(tuple(routed.hidden.shape), torch.float32).zero_()
    widths_of = plan.bits[plan.layers.index(layer)].tolist()
    left_out = [expert for expert, widths in enumerate(widths_of) if LEFT_OUT in widths]
    meter = DropMeter(routed, experts.experts, drop_seed(plan.recipe, layer), left_out)
    none = torch.empty(0, dtype=torch.uint8)
    stored = {"gate_up_proj": [none], "down_proj": [none]}  # of experts that are not left out
    for expert, widths in enumerate(widths_of):
        progress.update(layer=layer, expert=expert, experts=experts.experts)
        if expert in left_out:
            continue
        weights = source.expert(layer, expert)
        gate_up, down = round_expert(module, weights, routed, layer, expert, plan.recipe, widths)
        stored["gate_up_proj"].append(packed_bytes(gate_up))
        stored["down_proj"].append(packed_bytes(down))
        rounded = ExpertWeights(*(m.dequantize(weights.down.dtype) for m in (gate_up, down)))
        add_expert_output(output, module, rounded, routed, expert)
        meter.add(module, rounded, expert)
    energy = walk.advance(layer, output)
    tensors |= {f"{experts.path}.{name}": torch.cat(parts) for name, parts in stored.items()}
    return tensors, meter.result(energy / walk.ids.numel())


def drops_file(out: Path, layer: int) -> Path:
    """Where a finished layer's drop costs wait for those of the others."""
    return out / WORK / "quantize" / f"drops-{layer:04d}.safetensors"


def round_expert(
    module: Any,
    weights: ExpertWeights,
    routed: Routed,
    layer: int,
    expert: int,
    recipe: Recipe,
    widths: Sequence[int],
) -> tuple[QuantizedMatrix | TrellisMatrix, QuantizedMatrix | TrellisMatrix]:
    """Gate and up at the first width, then down, on what they now give, at the second."""
    where = (routed, layer, expert, recipe, recipe.quantizer)
    (gate_up,) = round_gate_up(weights.gate_up, *where, widths[:1])
    rounded = gate_up.dequantize(weights.gate_up.dtype)
    (down,) = round_down(weights.down, rounded, module, *where, widths[1:], weights.gate_up)
    return gate_up, down


def corrects(recipe: Recipe) -> bool:
    """Whether weights make up for errors of the layers before."""
    return recipe.correction > 0 and needs_hessian(recipe.quantizer)


def quantize_linears(
    source: Source,
    names: Iterable[str],
    packed: Mapping[str, PackedSpec],
    recipe: Recipe,
    inputs: list[Shared],
) -> dict[str, Tensor]:
    """Round a layer's linears in place; returns their packed bytes.

    Args:
        names: of the linears' weights.
        inputs: of all of them, used up one by one; empty where the quantizer asks for none.
    """
    tensors: dict[str, Tensor] = {}

    def put(name: str, wanted: Tensor, factor: Factor | None) -> None:
        (codec,) = packed[name].codecs
        matrix = round_linear(wanted, codec, factor, recipe, recipe.quantizer)
        tensors[name] = packed_bytes(matrix)
        source.put(name, matrix.dequantize(source.current(name).dtype))

    if not inputs:
        for name in names:
            put(name, source.current(name), None)
    while inputs:  # a Hessian and a drift may take gigabytes: let go when they have served
        sharing, known = inputs.pop()
        wanted = [
            known.corrected(source.current(name), recipe.damping, recipe.correction)
            for name in sharing
        ]
        factor = known.factor(recipe.damping)
        del known
        for name, weight in zip(sharing, wanted, strict=True):
            put(name, weight, factor)
    return tensors


@torch.inference_mode()
def outside_layers(source: Source, packed: Mapping[str, PackedSpec]) -> dict[str, Tensor]:
    """Embedding, final norm and head: as they are, or rounded to nearest where asked."""
    tensors = {}
    for name in source.names(None):
        value = source.tensor(name).to("cpu")
        if name in packed:
            (codec,) = packed[name].codecs
            value = packed_bytes(quantize_matrix("rtn", value, codec, None))
        tensors[name] = value
    return tensors


def packed_bytes(matrix: QuantizedMatrix | TrellisMatrix) -> Tensor:
    return matrix.pack().to("cpu")


def expert_specs(source: Source, plan: BitAllocation) -> dict[str, PackedSpec]:
    """How the fused parameters of all routed experts are packed, by parameter name."""
    specs = {}
    for row, layer in enumerate(plan.layers):
        experts = source.experts[layer]
        for column, (name, (_, cols)) in enumerate(
            (("gate_up_proj", experts.gate_up_shape), ("down_proj", experts.down_shape))
        ):
            widths = tuple(int(b) for b in plan.bits[row, :, column])
            family = plan.recipe.expert_codec
            group = codec_for(plan.recipe.widths[0], cols, plan.group_size, family).group_size
            specs[f"{experts.path}.{name}"] = PackedSpec(widths, group, family)
    return specs


def check_plan(source: Source, plan: BitAllocation) -> None:
    """Raise InputError if a plan was made for another model."""
    made_for = plan.provenance.get("model_fingerprint")
    if made_for != source.fingerprint:
        raise InputError(
            f"The plan is for model {plan.provenance.get('model')} ({made_for}), but {source.name} "
            f"is {source.fingerprint}. Give the model that was scored, or score this one."
        )


def claim(out: Path, work: Mapping[str, str]) -> bool:
    """Take `out` for this work. True: the work is complete there already.

    Raises:
        InputError: `out` holds other work, or files that are not ours.
    """
    if not out.exists():
        out.mkdir(parents=True)
        return False
    if out.is_dir() and is_compressed(out):
        made = load_json(out / "config.json")["quantization_config"].get("provenance", {})
        differs = sorted(key for key, value in work.items() if made.get(key) != value)
        if differs:
            raise InputError(
                f"{out} is a finished model of other work (differs in: {', '.join(differs)}). "
                "Choose another output or delete that folder."
            )
        shutil.rmtree(out / WORK, ignore_errors=True)
        return True
    check_output(out)
    return False


def check_output(out: Path) -> None:
    """Raise InputError if `out` is neither new nor empty nor ours."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file. Expected a folder that is new, empty or ours.")
    if out.exists() and any(out.iterdir()) and not ((out / WORK).is_dir() or is_compressed(out)):
        raise InputError(
            f"{out} is not empty and was not made by moepress. Choose another output folder."
        )


def check_space(out: Path, plan: BitAllocation, share: float, states: int) -> None:
    """Raise CheckpointError before the work if the disk cannot hold its end."""
    walks = 2 if corrects(plan.recipe) else 1
    need = int(plan.folder_bytes * share) + walks * 2 * 4 * states
    free = shutil.disk_usage(out).free
    if free < need:
        raise CheckpointError(
            f"No space left for {out}: the compressed model and the work files need about "
            f"{need:,} bytes, {free:,} are free. Free some and run the same command again to go on."
        )
