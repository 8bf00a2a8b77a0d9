"""Costs of the embedding and the head against the predictions of a model that has them rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from moepress.allocate import allocate
from moepress.allocation.tensors import ModelTensors
from moepress.compress import compress
from moepress.costs import embedding_and_head
from moepress.costs.scores import ExpertScores
from moepress.costs.sensitivity import EMBEDDING, SENSITIVITY, Sensitivity
from moepress.costs.texts import Texts
from moepress.format.codec import Codec
from moepress.format.quantization import packed_specs
from moepress.original import batches as batch_sizes
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.progress import Progress
from moepress.recipe import TABLE_BITS
from moepress.rounding.methods import quantize_matrix
from moepress.score import score
from moepress.work import calibration_ids
from tests.conftest import VOCAB, small_recipe
from tests.original.test_walk import some_ids

Folder = Callable[..., Path]


def measured_costs(scores: ExpertScores) -> dict[str, list[float]]:
    columns = [scores.linear_bits.index(bits) for bits in TABLE_BITS]
    return {
        name: scores.linear_cost.sum(axis=0)[row, columns].tolist()
        for row, name in enumerate(scores.linears)
        if "layers" not in name
    }


# The second ties its head to its embedding, the third scales the outputs of both.
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe"])
def test_costs_of_embedding_and_head_are_those_of_rounding_them(
    model_folder: Folder,
    text_file: Path,
    tmp_path: Path,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_sizes, "LOGIT_TOKENS", 13)  # uneven parts of 32
    folder = model_folder(family)
    source = Source(folder)
    recipe = small_recipe(text_file, "default", measure="rtn", expert_bits=(2,))
    found = measured_costs(score(source, recipe, work=tmp_path))
    assert found.keys() == source.embedding_and_head.keys()
    assert len(found) == (1 if family == "qwen2_moe" else 2)
    ids = calibration_ids(source, recipe)
    s = Sensitivity(tmp_path / SENSITIVITY).layer(0)[EMBEDDING]
    model = AutoModelForCausalLM.from_pretrained(folder)
    states: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.inference_mode():
        model(ids)
    scaling = getattr(model.config, "logits_scaling", 1.0)

    def predictions(head: torch.Tensor) -> torch.Tensor:  # KL of 8 bits is below float32's noise
        return (states[0].double() @ head.double().T / scaling).log_softmax(-1)

    exact = predictions(model.get_output_embeddings().weight.detach())
    for name, roles in source.embedding_and_head.items():
        weight = source.tensor(name)
        for column, bits in enumerate((4, 8)):
            rounded = quantize_matrix("rtn", weight, Codec(bits, 32)).dequantize()
            expected = 0.0
            if "embedding" in roles:
                rows = (rounded - weight)[ids.flatten()]
                expected += float((s * rows.square().sum(1)).sum())
            if "head" in roles:  # the KL itself, not its second order
                moved = predictions(rounded)
                expected += (
                    float(F.kl_div(moved, exact, reduction="none", log_target=True).sum())
                    / ids.numel()
                )
            assert found[name][column] == pytest.approx(expected, rel=0.25 if bits == 4 else 0.05)
        assert found[name][2] == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_errors_are_computed_some_rows_at_a_time(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_and_head, "ROWS_AT_ONCE", 7)
    weight = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = quantize_matrix("rtn", weight, Codec(bits, 32)).dequantize()
    found = embedding_and_head.rounding_error(weight, Codec(bits, 32))
    assert torch.equal(found, rounded - weight)


@pytest.mark.parametrize(
    ("head_tokens", "sampled"),
    [(120, [[0, 1], [2, 3], [4]]), (60, [[0], [2], [4]]), (24, [[0], [0], [0]])],
)
def test_costs_of_the_head_are_means_over_the_sampled_sequences_of_each_text(
    model_folder: Folder,
    head_tokens: int,
    sampled: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five sequences of three texts. A text without a sampled sequence gets the mean of all."""
    monkeypatch.setattr(embedding_and_head, "HEAD_TOKENS", head_tokens)
    folder, ids = model_folder(), some_ids(5, 24)
    walk = Walk(Source(folder), ids)
    with Progress("test", total=2) as progress:
        walk.finish(progress)
    generator = torch.Generator().manual_seed(0)
    error = 0.01 * torch.randn(VOCAB, 64, generator=generator)
    texts = Texts(3, torch.tensor([0, 0, 1, 1, 2]).repeat_interleave(24))
    found = embedding_and_head.head_costs(walk, error, texts)

    model = AutoModelForCausalLM.from_pretrained(folder)
    states: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.inference_mode():
        p = model(ids).logits.double().softmax(-1)
    e = states[0].double() @ error.double().T
    variance = (p * e.square()).sum(-1) - (p * e).sum(-1).square()  # [S, L]
    of_sequence = variance.mean(1) / 2
    share = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    expected = share * torch.stack([of_sequence[rows].mean() for rows in sampled])
    # A sum of V = 384 terms in float32 has an error of V UNIT = 2e-5 of E e^2, which is Var(e) here
    # up to a few times.
    assert found.tolist() == pytest.approx(expected.tolist(), rel=2e-4)


def test_embedding_and_head_are_rounded_when_the_budget_is_small(
    model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    source = Source(model_folder())
    recipe = small_recipe(text_file, "default")
    scores = score(source, recipe)
    sizes = []
    for bits in (1.1, 2.0, 3.9):
        plan = allocate(scores, recipe.with_changes(bits=bits))
        widths = {name: plan.linear_bits[name] for name in source.embedding_and_head}
        sizes.append(sum(ModelTensors.of(source, recipe).nbytes(n, b) for n, b in widths.items()))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    out = compress(source.folder, tmp_path / "out", recipe.with_changes(bits=1.1))
    specs = packed_specs(out)
    plan = allocate(scores, recipe.with_changes(bits=1.1))
    for name in source.embedding_and_head:
        assert (name in specs) == (plan.linear_bits[name] != 16)
        assert name not in specs or specs[name].bits == (plan.linear_bits[name],)
    AutoModelForCausalLM.from_pretrained(out)(torch.arange(9)[None])


def test_widths_that_the_recipe_fixes_are_not_offered(
    model_folder: Folder, text_file: Path
) -> None:
    source = Source(model_folder())
    recipe = small_recipe(text_file, "default", head_bits=16, embedding_bits=8)
    assert not ModelTensors.of(source, recipe).open.keys() & source.embedding_and_head.keys()
    only = ModelTensors.of(source, recipe.with_changes(head_bits=None)).open
    assert only["lm_head.weight"] == TABLE_BITS
