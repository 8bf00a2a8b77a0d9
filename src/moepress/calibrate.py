"""How often each expert is chosen, and with what weight: phi and w of arXiv:2410.06270, eq. 3.

What dropping experts from tokens would cost is measured on the way (drop_costs.py).

Also which tokens an expert's Hessian is made of: its own, and where they are few, others of its
layer, so that no direction of its input is free to be rounded at will.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moepress.costs.drop_costs import DropCosts, DropMeter
from moepress.errors import CheckpointError
from moepress.format.checkpoint import load_tensors, read_about, save_tensors
from moepress.original.source import Source
from moepress.original.walk import Routed, Walk
from moepress.progress import Progress
from moepress.recipe import ALLOCATION_FIELDS, Recipe
from moepress.text import windows

KIND = "moepress calibration"
ARRAYS = ("tokens", "routing_weight")
TEXT = "text.safetensors"  # calibration sequences, in the folder of unfinished work
# What a borrowed token counts beside a token of the expert's own. It is not what the expert will
# see; it only has to keep unseen directions from costing nothing.
BORROWED_WEIGHT = 0.1


@dataclass(frozen=True)
class Calibration:
    """Routing statistics of every routed expert. L MoE layers, E experts."""

    layers: tuple[int, ...]  # [L] decoder layer of each row
    tokens: npt.NDArray[np.int64]  # [L, E] calibration tokens routed to each expert
    routing_weight: npt.NDArray[np.float64]  # [L, E] sum of their routing weights
    total_tokens: int  # N
    token_floor: int  # below this an expert's Hessian borrows tokens
    drop_costs: DropCosts  # of the original model
    provenance: Mapping[str, str]

    @property
    def frequency(self) -> npt.NDArray[np.float64]:
        """phi [L, E]: share of the tokens that choose the expert."""
        return self.tokens / self.total_tokens

    @property
    def mean_weight(self) -> npt.NDArray[np.float64]:
        """w [L, E]: routing weight averaged over all tokens."""
        return self.routing_weight / self.total_tokens

    def below_floor(self) -> list[tuple[int, int, int]]:
        """(layer, expert, tokens) of every expert that saw fewer tokens than the floor."""
        rows, experts = np.nonzero(self.tokens < self.token_floor)
        return [
            (self.layers[row], int(e), int(self.tokens[row, e]))
            for row, e in zip(rows, experts, strict=True)
        ]

    def save(self, path: Path) -> None:
        """Write one safetensors file: arrays as tensors, the rest as JSON in its metadata."""
        arrays = {name: torch.from_numpy(getattr(self, name)) for name in ARRAYS}
        rest = {k: v for k, v in vars(self).items() if k not in ARRAYS}
        rest["drop_costs"] = self.drop_costs.rest()
        about = json.dumps({"kind": KIND, **rest}, sort_keys=True)
        save_tensors(path, arrays | self.drop_costs.arrays(), about)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, damaged, or no calibration.
        """
        arrays = load_tensors(path)
        fields = json.loads(read_about(path) or "{}")
        if fields.pop("kind", None) != KIND:
            raise CheckpointError(f"{path} is not a calibration made by `moepress calibrate`.")
        fields["layers"] = tuple(fields["layers"])
        fields["drop_costs"] = DropCosts.of(arrays, fields["drop_costs"])
        fields |= {name: arrays[name].numpy() for name in ARRAYS}
        return cls(**fields)


def calibrate(source: Source | str | Path, recipe: Recipe) -> Calibration:
    """Run the calibration text through the model: what the routers choose, what dropping costs.

    Args:
        source: the original model, its folder, or its hub id.
        recipe: names the text, its amount and the seed.
    """
    source = source if isinstance(source, Source) else Source(source)
    ids = calibration_ids(source, recipe)
    walk = Walk(source, ids)
    rows = {}
    with Progress("calibrate", total=len(source.layers)) as progress:
        for layer in range(len(source.layers)):
            progress.update(layer=layer)
            with source.loaded(source.layer_path(layer)):
                if layer in source.experts:
                    rows[layer] = calibrate_layer(walk, layer, recipe)
                else:
                    walk.advance(layer, None)
            progress.advance()
    provenance = identity(source, recipe, ids)
    return Calibration(
        layers=tuple(rows),
        tokens=np.stack([row["tokens"].numpy() for row in rows.values()]),
        routing_weight=np.stack([row["routing_weight"].numpy() for row in rows.values()]),
        total_tokens=ids.numel(),
        token_floor=recipe.token_floor,
        drop_costs=DropCosts.of_layers(rows, provenance),
        provenance=provenance,
    )


def calibrate_layer(walk: Walk, layer: int, recipe: Recipe) -> dict[str, Tensor]:
    """Statistics of one loaded layer with experts; brings the walk through it."""
    experts = walk.source.experts[layer].experts
    routed = walk.route(layer)
    tokens, weight = routing_statistics(routed, experts)
    meter = DropMeter(routed, experts, drop_seed(recipe, layer))
    energy = walk.advance(layer, walk.experts_output(layer, routed, meter.add))
    drops = meter.result(energy / walk.ids.numel())
    return {"tokens": tokens, "routing_weight": weight, **drops}


def drop_seed(recipe: Recipe, layer: int) -> int:
    """Seed of the sample of a layer's tokens on which dropping experts is measured."""
    return recipe.seed * 1_000_003 + layer


def routing_statistics(routed: Routed, experts: int) -> tuple[Tensor, Tensor]:
    """Tokens [E] int64 and summed routing weight [E] float64 of each expert."""
    chosen = routed.index.flatten()
    real = chosen < experts  # an index of E means that no expert was chosen
    weight = routed.weight.flatten().double()[real]
    tokens = torch.bincount(chosen[real], minlength=experts)
    return tokens, torch.zeros(experts, dtype=torch.float64).index_add_(0, chosen[real], weight)


def hessian_tokens(
    routed: Routed, layer: int, expert: int, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """Which tokens make an expert's Hessian, and what each counts.

    H = sum_t c_t x_t x_t^T with c = g^2, g the routing weight, because the block's output error is
    g (f(x) - f_b(x)): its square is what rounding should keep small. `hessian_weight="none"` is
    the plain H of the paper. An expert with fewer tokens than `token_floor` borrows random others
    of its layer up to it, at a tenth of the mean count.

    Returns:
        Tokens [T_h] int64 and counts [T_h] float32.
    """
    tokens, gate = routed.of(expert)
    counts = gate.square() if recipe.hessian_weight == "routing" else torch.ones_like(gate)
    missing = min(recipe.token_floor, len(routed.hidden)) - len(tokens)
    if missing <= 0:
        return tokens, counts
    free = torch.ones(len(routed.hidden), dtype=torch.bool)
    free[tokens] = False
    others = free.nonzero().flatten()
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + layer * 10_007 + expert)
    borrowed = others[torch.randperm(len(others), generator=generator)[:missing]]
    each = BORROWED_WEIGHT * (counts.mean() if len(tokens) else torch.tensor(1.0))
    return torch.cat([tokens, borrowed]), torch.cat([counts, each.expand(len(borrowed))])


def calibration_ids(source: Source, recipe: Recipe) -> Tensor:
    """The calibration sequences [S, L] int64 that a recipe asks for."""
    tokens = windows.load_tokens(
        recipe.calib,
        tokenizer(source),
        recipe.sequences,
        recipe.sequence_length,
        recipe.seed,
        model=lambda: whole_model(source),
    )
    windows.check_vocab(tokens, source.config.get_text_config().vocab_size)
    return tokens.ids


def kept_ids(path: Path, source: Source, recipe: Recipe) -> Tensor:
    """The sequences that an interrupted run kept, or else those that the recipe asks for.

    Text that the model writes itself may differ with the number of threads; a run goes on with
    what it began with.
    """
    return load_tensors(path)["ids"] if path.is_file() else calibration_ids(source, recipe)


def keep_ids(path: Path, ids: Tensor) -> None:
    if not path.is_file():
        save_tensors(path, {"ids": ids})


def tokenizer(source: Source) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.folder)


def whole_model(source: Source) -> object:
    """The original model in memory, for sampling from it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=source.compute_dtype)
    return model.to(source.device)


def text_digest(ids: Tensor) -> str:
    """A short hash of calibration sequences."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


def identity(source: Source, recipe: Recipe, ids: Tensor) -> dict[str, str]:
    """What scores depend on: model, text, and the fields of the recipe that matter to them."""
    from moepress import __version__

    return {
        "model": Path(source.name).name,
        "model_fingerprint": source.fingerprint,
        "text": text_digest(ids),
        "recipe": recipe.digest(*ALLOCATION_FIELDS),
        "moepress": __version__,
    }
