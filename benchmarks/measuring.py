"""Shared by the benchmarks of quality: options, text, and one evaluator for every model.

The evaluator runs every model in transformers, in float32, on the same windows of held-out text,
and compares its predictions with stored ones of the original.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moepress import hf
from moepress.demo import MODEL
from moepress.evaluate import TextResult, compare, summary
from moepress.format.checkpoint import is_compressed
from moepress.kernels.modules import set_activation_bits
from moepress.original.architectures import decoder_layers
from moepress.original.batches import empty
from moepress.recipe import Recipe
from moepress.text.windows import evaluation_tokens

LENGTH = 256  # tokens of a window, and of a calibration sequence
WINDOWS_AT_A_TIME = 16


def options(about: str) -> argparse.ArgumentParser:
    """A parser of the options that all benchmarks have: model, texts, and how much text is used.

    Args:
        about: docstring of the script; its first line becomes the description.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=MODEL)
    parser.add_argument("--calib", nargs="+", default=["stdlib"])
    parser.add_argument("--valid", nargs="+", default=["stdlib"])
    parser.add_argument("--sequences", type=int, default=120, help=f"of {LENGTH} tokens")
    parser.add_argument("--windows", type=int, default=16, help=f"of {LENGTH} tokens, of each text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def calibration(given: argparse.Namespace) -> dict[str, Any]:
    """The recipe fields that choose the calibration set."""
    return {
        "calib": tuple((text, 1.0) for text in given.calib),
        "sequences": given.sequences,
        "sequence_length": LENGTH,
    }


def base_recipe(given: argparse.Namespace) -> Recipe:
    return Recipe(**calibration(given))


def opened(folder: Path) -> Any:
    """Open a compressed or original model in float32; packed products keep 15-bit activations."""
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if is_compressed(folder):
        set_activation_bits(model, 16)
    return model


def layer_weights(model: Any) -> dict[str, Tensor]:
    """Every matrix of the decoder layers, by parameter name; fused experts are one tensor.

    Benchmarks count bits per weight over these weights. Norms and biases do not count, because no
    method changes them.
    """
    paths = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        paths[id(parameter)]: parameter.data
        for layer in decoder_layers(model)
        for parameter in layer.parameters()
        if parameter.dim() > 1
    }


@dataclass(frozen=True)
class Comparison:
    """How a model differs from the original, text by text."""

    texts: tuple[TextResult, ...]

    @property
    def ratio(self) -> float:
        """Geometric mean over texts of the perplexity ratio."""
        logs = [math.log(t.ratio) for t in self.texts if t.ratio is not None]
        return math.exp(sum(logs) / len(logs))

    @property
    def kl(self) -> float:
        """Mean over texts of the mean KL(original || model), in nats per token."""
        return self._mean("kl")

    @property
    def changed_top(self) -> float:
        """Mean over texts of the share of positions whose most likely next token changed."""
        return self._mean("changed_top")

    def _mean(self, name: str) -> float:
        return sum(getattr(t, name) for t in self.texts) / len(self.texts)


class Evaluator:
    """Compares models with an original whose predictions are stored (on disk if they are large).

    Args:
        original: folder of the original model.
        texts: as `moepress.text.windows` names them.
        windows: number of windows of each text.
    """

    def __init__(self, original: Path, texts: list[str], windows: int) -> None:
        tokenizer = AutoTokenizer.from_pretrained(original)
        self.tokens = evaluation_tokens([(t, 1.0) for t in texts], tokenizer, LENGTH, windows)
        model = opened(original)
        self._reference = empty((*self.tokens.ids.shape, model.config.vocab_size), torch.float32)
        for batch, logits in self._predictions(model):
            self._reference[batch] = logits

    def __call__(self, model: Any) -> Comparison:
        measured = [
            compare(self.tokens.ids[batch], logits, self._reference[batch])
            for batch, logits in self._predictions(model)
        ]
        columns = {k: self.tokens.scored(torch.cat([m[k] for m in measured])) for k in measured[0]}
        results = []
        for name in dict.fromkeys(self.tokens.texts):
            rows = torch.tensor([text == name for text in self.tokens.texts])
            results.append(summary(name, {k: v[rows].flatten() for k, v in columns.items()}))
        return Comparison(tuple(results))

    @torch.inference_mode()
    def _predictions(self, model: Any) -> Iterator[tuple[slice, Tensor]]:
        """Yield (batch, logits [b, L, V]) for every batch of windows, in order."""
        for start in range(0, len(self.tokens.ids), WINDOWS_AT_A_TIME):
            batch = slice(start, min(start + WINDOWS_AT_A_TIME, len(self.tokens.ids)))
            yield batch, model(input_ids=self.tokens.ids[batch], use_cache=False).logits
