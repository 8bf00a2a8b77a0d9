"""What every family must do, one function a step. Each raises where the family fails.

A step works on a `Case`: a tiny original model and its compressed folder. The model's own class
with the dequantized weights is the oracle of the packed model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import moepress
from moepress import kernels
from moepress.compress import compress
from moepress.hf import load_model
from moepress.prune import prune, stored_costs
from moepress.pruning.thresholds import dropped_share
from moepress.recipe import Recipe
from tests.conftest import small_recipe
from tests.families.composites import COMPOSITES
from tests.families.models import model_class, open_model

SHARE = 0.15  # of the choices of experts, to drop
WIDE = {  # 8 bits for all that can be packed
    "bits": 8,
    "expert_bits": (8,),
    "attention_bits": 8,
    "shared_expert_bits": 8,
    "dense_mlp_bits": 8,
    "quantizer": "rtn",
    "measure": "rtn",
}
# Most tokens have two experts of the same routing weight; of doge many, in bfloat16.
TIES = ("phimoe", "doge")
NEW = 4  # tokens to generate
# Families whose own class in transformers 5.24 fails with a static cache, and how.
NO_STATIC_CACHE = {
    **dict.fromkeys(
        (
            "inkling2",
            "inkling2_text",
            "inkling2_loop",
            "inkling2_loop_text",
            "inkling_mm_model",
            "inkling_text",
        ),
        "size of tensor a",
    ),
    "deepseek_v4": "heavily_compressed_attention",
}


@dataclass(frozen=True)
class Case:
    """A family's tiny model, and the folder that a recipe makes of it."""

    family: str
    original: Path
    text: Path
    recipe: str  # name
    work: Path  # for what is made from the original

    @cached_property
    def folder(self) -> Path:
        recipe = small_recipe(self.text, self.recipe, bits=2.5)
        return compress(self.original, self.work / "packed", recipe)

    @cached_property
    def packed(self) -> Any:
        """The packed model, of the family's own class."""
        return model_class(self.family).from_pretrained(self.folder).eval()

    @cached_property
    def plain(self) -> Any:
        """The family's own class with the dequantized weights."""
        folder = moepress.dequantize(self.folder, self.work / "plain")
        return open_model(self.family, folder)

    def ids(self, sequences: int = 2, length: int = 24) -> Tensor:
        """[sequences, length] tokens of the calibration text."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.original)
        ids = tokenizer(self.text.read_text()[:4000], return_tensors="pt").input_ids
        return ids[:, : sequences * length].view(sequences, length)


def compress_step(case: Case) -> None:
    """The original is described and compressed, the result described and reported."""
    assert moepress.inspect(case.original)["kind"] == "original model"
    assert moepress.inspect(case.folder)["kind"] == "compressed model"
    if case.recipe == "default":  # a second report would cost a second and show the same
        assert moepress.report(case.folder).stat().st_size > 10_000


def load_step(case: Case) -> None:
    """It opens through the class that config.json names, and through the class that users type."""
    for kind in (model_class(case.family), auto_class(case.family)):
        model, info = kind.from_pretrained(case.folder, output_loading_info=True)
        assert not any(info.values()), info
        assert any(p.dtype == torch.uint8 for p in model.parameters())
        assert (type(model) is type(case.packed)) or kind is auto_class(case.family)


@torch.inference_mode()
def logits_step(case: Case) -> None:
    """Its logits are the oracle's: of a batch, of a left-padded batch, with a static cache."""
    ids = case.ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    with kernels.only("reference"):
        same(case.packed(input_ids=ids).logits, case.plain(input_ids=ids).logits)
        got, expected = (model(**padded).logits for model in (case.packed, case.plain))
        same(got[mask == 1], expected[mask == 1])
        same(scores(case.packed, padded, "dynamic"), scores(case.plain, padded, "dynamic"))
        if case.family in NO_STATIC_CACHE:
            with pytest.raises(Exception, match=NO_STATIC_CACHE[case.family]):
                scores(case.plain, padded, "static")
            return
        same(scores(case.packed, padded, "static"), scores(case.plain, padded, "static"))


@torch.inference_mode()
def close_step(case: Case) -> None:
    """With 8 bits for everything it is close to the original.

    The recipe of this is its own, so it is done once.
    """
    if case.recipe == "default":
        return
    original = open_model(case.family, case.original)
    wide = compress(case.original, case.work / "wide", wide_recipe(case.text, original))
    packed = model_class(case.family).from_pretrained(wide).eval()
    exact, close = (model(input_ids=case.ids()).logits for model in (original, packed))
    errors = (close - exact).norm(dim=-1) / exact.norm(dim=-1)
    # Of most tokens: with random weights, routers choose other experts for a few of them.
    assert errors.median() < 0.1


def generate_step(case: Case) -> None:
    """It writes, with the kernels that users have."""
    prompt = "def f1(x):"
    text = moepress.generate(case.folder, prompt, tokens=NEW)
    assert text.startswith(prompt) and len(text) > len(prompt)


@torch.inference_mode()
def prune_step(case: Case) -> None:
    """The share that is asked for is expected to be dropped, or as much as ties leave, and is.

    The calibration set has few tokens, and those here are others: hence the second tolerance.
    """
    model = load_model(case.folder)
    with prune(model, SHARE, protect=0, count=True) as pruned:
        thresholds = np.array(list(pruned.pruning.thresholds.values()))
        expected = dropped_share(stored_costs(case.folder), thresholds)
        assert case.family in TIES or abs(expected - SHARE) < 0.02
        model(input_ids=case.ids(16, 40))
        assert abs(pruned.statistics().share - expected) < 0.1
        model.generate(case.ids(), max_new_tokens=NEW, do_sample=False)


def serve_step(case: Case) -> None:
    """The server opens it and answers. In this process, without a port.

    Composites need a processor of images beside the tokenizer, which the tiny models have not.
    """
    if case.family in COMPOSITES:
        return
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    from starlette.testclient import TestClient

    answers = []

    def ask(server: Any) -> None:
        body = {"model": str(case.folder), "prompt": "def f1(x):", "max_tokens": NEW}
        client = TestClient(server.config.app, "http://localhost")
        answers.append(client.post("/v1/completions", json=body))

    with mock.patch("uvicorn.Server.run", ask):
        moepress.serve(case.folder, port=0)
    (answer,) = answers
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"]


STEPS: Mapping[str, Callable[[Case], None]] = {
    "compress": compress_step,
    "load": load_step,
    "logits": logits_step,
    "8 bits": close_step,
    "generate": generate_step,
    "prune": prune_step,
    "serve": serve_step,
}


def same(got: Tensor, expected: Tensor) -> None:
    """Check that logits are equal, but for the order of sums in float32."""
    spread = float(expected.float().std())
    torch.testing.assert_close(got.float(), expected.float(), rtol=1e-3, atol=1e-3 * spread)


def scores(model: Any, inputs: Mapping[str, Tensor], cache: str) -> Tensor:
    """Scores of the tokens that a model generates, [NEW, batch, V]."""
    made = model.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        cache_implementation=cache, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(made.logits)


def wide_recipe(text: Path, model: nn.Module) -> Recipe:
    """Everything at 8 bits; embeddings and heads that are no plain modules stay as they are."""
    tables = {
        "embedding_bits": type(model.get_input_embeddings()) is nn.Embedding,
        "head_bits": type(model.get_output_embeddings()) is nn.Linear
        and "lm_head" not in (model._keep_in_fp32_modules_strict or ()),
    }
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        tables = dict.fromkeys(tables, all(tables.values()))
    return small_recipe(
        text, "fast", **WIDE, **{name: 8 if plain else 16 for name, plain in tables.items()}
    )


def auto_class(family: str) -> Any:
    """The class that users open the family with."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    composite = family in COMPOSITES or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if composite else AutoModelForCausalLM
