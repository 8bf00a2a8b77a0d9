"""Describe a file or folder made by moepress, or a model that it can compress."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moepress.allocation.plan import BitAllocation
from moepress.blocks.form import is_normed
from moepress.blocks.gates import gate_of
from moepress.calibrate import KIND as CALIBRATION
from moepress.calibrate import Calibration
from moepress.costs.drop_costs import KIND as DROP_COSTS
from moepress.costs.drop_costs import DropCosts
from moepress.costs.scores import BOTH, ExpertScores
from moepress.errors import FileError, InputError
from moepress.format.arrays import kind_in
from moepress.format.checkpoint import (
    PLAN,
    SCORES,
    folder_bytes,
    is_compressed,
    tensor_bytes,
)
from moepress.format.checksums import verify as verify_bytes
from moepress.format.codec import width
from moepress.format.quantization import quantization_of
from moepress.original.folder import weight_files
from moepress.original.loops import loop_of
from moepress.original.sizes import bytes_by_part
from moepress.original.source import Source
from moepress.original.usable import check_usable
from moepress.pruning.stored import stored_pruning
from moepress.pruning.thresholds import cheapest, medians, reachable_share
from moepress.reading.json import read_json
from moepress.store.forecast import card_fits, forecast
from moepress.writing.ours import content_of

OTHERS = {  # JSON files of ours that are not described here, by their kind
    "evaluation": "an evaluation, which `moepress report` shows",
    "checksums": "checksums, which `moepress inspect FOLDER --verify` compares",
}
AVERAGES = ("average_bits", "expert_bits_per_weight", "bits_per_weight")  # that a plan has
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)  # dropped shares for which costs are shown


def inspect(
    path: str | Path,
    *,
    verify: bool = False,
    gpu_memory: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Describe a compressed folder, an original model, or one of the files named below.

    Args:
        path: the folder, or a file of scores, a calibration, costs of dropping experts, or a plan.
        verify: of a compressed folder, compare every byte of its tensors with their checksums.
        gpu_memory: of a compressed folder, say what a card with so many bytes for weights takes;
            None: what the cards of this machine take.
        trust_remote_code: run code in the model's folder, where transformers has no class for it.

    Returns:
        A dict that can be written as JSON; its "kind" says what `path` is.

    Raises:
        InputError: `path` is something else, or cannot be verified.
        FileError: it is damaged.
    """
    path = Path(path)
    if verify and not (path.is_dir() and is_compressed(path)):
        raise InputError(f"{path} cannot be verified. Expected a folder made by moepress.")
    if path.is_dir():
        if not is_compressed(path):
            return _original(path, trust_remote_code)
        verified = {"verified_tensors": verify_bytes(path, weight_files(path))} if verify else {}
        return _folder(path, trust_remote_code) | _on_cards(path, gpu_memory) | verified
    if path.is_file():
        content = content_of(path)  # under any name
        if content in ("scores", "a calibration") or path.suffix == ".safetensors":
            return _tensors(path)
        if content != "a plan" and path.suffix == ".json":
            _check_kind(path)
        if content == "a plan" or path.suffix == ".json":
            return _plan(BitAllocation.load(path))
    raise InputError(
        f"Cannot inspect {path}. Expected a model folder, or a .safetensors or .json file made by "
        "moepress score, calibrate or allocate."
    )


def _check_kind(path: Path) -> None:
    """Raise InputError for a JSON file of ours that is no plan; it says what the file is.

    Raises:
        FileError: the file is damaged.
    """
    fields = read_json(path, "The file")
    if not isinstance(fields, dict):
        return
    kind = fields.get("kind")
    what = OTHERS.get(kind) if isinstance(kind, str) else None
    if "kind" not in fields and "thresholds" in fields:
        what = "thresholds of pruning, which commands take as --prune"
    if what is not None:
        raise InputError(f"{path} holds {what}. Expected a plan, as `moepress allocate` writes it.")


def _tensors(path: Path) -> dict[str, Any]:
    """A .safetensors file; its metadata tells which kind."""
    kind = kind_in(path)
    if kind == CALIBRATION:
        return _calibration(Calibration.load(path))
    if kind == DROP_COSTS:
        return {"kind": "drop costs"} | _drop_costs(DropCosts.load(path))
    return _scores(ExpertScores.load(path))


def _folder(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """A compressed model: bytes by part, widths of the experts, averages, pruning."""
    quantization = quantization_of(folder)
    widths: defaultdict[str, Counter[float]] = defaultdict(Counter)
    for name, spec in quantization.specs().items():
        if len(spec.bits) > 1:
            widths[name.rpartition(".")[2]].update(spec.bits)
    plan = BitAllocation.load(folder / PLAN) if (folder / PLAN).exists() else None
    pruning = stored_pruning(folder)
    return {
        "kind": "compressed model",
        "folder_bytes": folder_bytes(folder),
        "tensor_bytes": sum(map(tensor_bytes, weight_files(folder))),
        "bytes_by_part": {
            part: size.stored for part, size in bytes_by_part(folder, trust_remote_code).items()
        },
        "experts_by_bits": {
            name: {str(bits): count for bits, count in sorted(counts.items())}
            for name, counts in widths.items()
        },
        **{name: getattr(plan, name, None) for name in AVERAGES},  # None: a copy without plan
        "pruning": None if pruning is None else pruning.to_json(),
        **_speed(folder),
        "provenance": quantization.provenance,
    }


def _speed(folder: Path) -> dict[str, Any]:
    """How fast a folder that comes with its calibration counts will run here, on the CPU.

    Nothing where that cannot be forecast, such as on a machine with too little memory: `doctor`
    says why.
    """
    if not (folder / SCORES).is_file():
        return {}
    try:
        return {"speed_here": forecast(folder).to_dict()}
    except FileError:
        raise
    except InputError:
        return {}


def _on_cards(folder: Path, gpu_memory: int | None) -> dict[str, Any]:
    """What cards take of a compressed folder, by card; nothing where there is none."""
    found = {name: fit.to_dict() for name, fit in card_fits(folder, gpu_memory).items()}
    return {"fits": found} if found else {}


def _original(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """An original model: its sizes."""
    source = Source(folder, trust_remote_code=trust_remote_code)
    check_usable(source)
    one = source.one_layer_of_experts
    expert_weights = sum(experts.weights for experts in source.experts.values())
    other_weights = sum(source.shape(name).numel() for name in source.all_names)
    stored = source.checkpoint.describe()
    return {
        "kind": "original model",
        "architecture": type(source.model).__name__,
        "dtype": str(source.dtype).removeprefix("torch."),
        **({"quantization": stored} if stored else {}),
        "layers": len(source.layers),
        **_loop(source),
        "layers_with_experts": len(source.experts),
        "experts_per_layer": one.experts,
        "hidden_size": one.hidden,
        "expert_intermediate_size": one.intermediate,
        **_form(source),
        "expert_weights": expert_weights,
        "other_weights": other_weights,
        "copied_weights": sum(source.shape(name).numel() for name in source.copied),
        "unused_tensors": len(source.unused),
        "bytes": sum(path.stat().st_size for path in source.files),
        "fingerprint": source.fingerprint,
    }


def _loop(source: Source) -> dict[str, Any]:
    """The layers that a model runs several times; nothing for all other models."""
    loop = loop_of(source.text_config, len(source.layers))
    return {"looped_layers": list(loop.layers), "passes": loop.passes} if loop.passes > 1 else {}


def _form(source: Source) -> dict[str, Any]:
    """What the experts of an original model compute, and what they are padded to."""
    experts = source.one_layer_of_experts
    module = source.model.get_submodule(experts.path)
    gate = gate_of(module)
    described = gate is not None and not is_normed(module)
    run = "together" if described else "one by one: no kernel has their function"
    if experts.form.by_neuron:
        run = "by neuron: a token reads the rows of its tables that it chooses"
    return {
        "expert_gate": str(gate) if described else "a function of the model's own",
        "experts_run": run,
        "expert_biases": bool(experts.biases),
        "expert_shapes_packed": [list(shape) for shape in experts.form.packed_shapes],
    }


def _scores(scores: ExpertScores) -> dict[str, Any]:
    """Scores: what was measured, and how evenly experts are used."""
    layers, experts = scores.tokens.shape
    energy = float(scores.output_energy.sum())  # 0: no expert has an output
    return {
        "kind": "scores",
        "layers": layers,
        "experts": experts,
        "widths": list(scores.bits),
        "calibration_tokens": scores.all_tokens,
        "scored_tokens": scores.total_tokens,
        "tokens_per_expert": _spread(scores.reached),
        "experts_never_chosen": int((scores.tokens == 0).sum()),
        "relative_error_by_bits": {
            str(bits): float(scores.squared_error[:, :, BOTH, option].sum()) / energy
            if energy
            else None
            for option, bits in enumerate(scores.bits)
        },
        "provenance": dict(scores.provenance),
    }


def _drop_costs(costs: DropCosts) -> dict[str, Any]:
    """Cost of dropping experts; "median_ratio" is the paper's mu, by layer and rank."""
    return {
        "experts_per_token": costs.top_k,
        "routing_weights_normalised": costs.normalised,
        "median_ratio": [row[1:] for row in medians(costs).round(4).tolist()],
        "predicted_cost_by_share_dropped": {
            f"{share:.2f}": min(cheapest(costs, share, r)[1] for r in (False, True))
            for share in SHARES
            if share <= reachable_share(costs)
        },
    }


def _calibration(calibration: Calibration) -> dict[str, Any]:
    """Calibration: how often experts are chosen, and which fall below the token floor."""
    layers, experts = calibration.tokens.shape
    below = calibration.below_floor()
    return {
        "kind": "calibration",
        "layers": layers,
        "experts": experts,
        "calibration_tokens": calibration.total_tokens,
        "tokens_per_expert": _spread(calibration.tokens),
        "token_floor": calibration.token_floor,
        "experts_below_floor": [
            {"layer": layer, "expert": expert, "tokens": tokens} for layer, expert, tokens in below
        ],
        "pruning": _drop_costs(calibration.drop_costs),
        "provenance": dict(calibration.provenance),
    }


def _plan(plan: BitAllocation) -> dict[str, Any]:
    """A bit allocation."""
    return {
        "kind": "plan",
        "average_bits": plan.average_bits,
        "expert_bits_per_weight": plan.expert_bits_per_weight,
        "bits_per_weight": plan.bits_per_weight,
        "folder_bytes": plan.folder_bytes,
        "predicted_loss": plan.predicted_loss,
        "experts_by_bits": {
            name: {
                str(bits): count
                for bits, count in sorted(Counter(map(width, plan.bits[:, :, p].flat)).items())
            }
            for p, name in enumerate(("gate_up_proj", "down_proj"))
        },
        "others_by_bits": {
            str(bits): count for bits, count in sorted(Counter(plan.linear_bits.values()).items())
        },
        "provenance": dict(plan.provenance),
    }


def _spread(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    return {
        "least": int(counts.min()),
        "median": float(np.median(counts)),
        "most": int(counts.max()),
    }
