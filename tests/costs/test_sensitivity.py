"""The backward walk against autograd on the whole model; interrupted runs resume."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moepress.blocks import adapt
from moepress.costs.sensitivity import EMBEDDING, EXPERTS, head_gradient, measure_sensitivity
from moepress.draws import drawn_tokens, gumbel_noise
from moepress.errors import CheckpointError, InputError, MoepressError, NumericalError
from moepress.original import batches as batch_sizes
from moepress.original.source import Source
from moepress.original.walk import Walk
from tests.conftest import FAMILIES
from tests.families.models import make_model, save_model
from tests.original.test_walk import some_ids

Folder = Callable[..., Path]
MADE_OF = {"work": "1"}
TOKENS = 5 * 24
OTHER_FORMS: dict[str, dict[str, Any]] = {
    "doge": {},
    "gpt_oss": {},
    "nemotron_h": {"moe_latent_size": 32},
    "llama4_text": {},
    "gemma4_text": {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 384},
}


def drawn_text(source: Source, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The next tokens [S, L] that `head_gradient` draws, and the gradient [S, L, H] it returns."""
    drawn = []

    def record(log_probabilities: Tensor, noise: Tensor) -> Tensor:
        drawn.append(drawn_tokens(log_probabilities, noise))
        return drawn[-1]

    walk = Walk(source, ids)
    for layer in range(len(source.layers)):
        with source.loaded(source.layer_paths[layer]):
            routed = walk.route(layer) if layer in source.experts else None
            walk.advance(layer, routed and walk.experts_output(layer, routed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moepress.costs.sensitivity.drawn_tokens", record)
        gradient = head_gradient(walk, seed).states
    return torch.cat(drawn).view(ids.shape), gradient


@contextmanager
def gradients_at(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Gradients at the outputs of modules in one backward pass of the whole model."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def forward(module: nn.Module, args: object, out: Tensor) -> None:
            out.register_hook(lambda gradient: found.__setitem__(name, gradient))

        return forward

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    yield found
    for handle in handles:
        handle.remove()


# granitemoe scales the outputs of the embedding and of the head. Of the others, gpt_oss has biases,
# nemotron_h no gate, and a linear that reads the experts' output; llama4 scales the inputs of
# experts by the routing weight, and gemma4 computes an argument of each layer from the embedding.
# In doge tokens choose neurons, by logits of other tokens of the batch too: the model must run with
# the same batches.
@pytest.mark.parametrize(
    ("family", "batch_tokens", "logit_tokens"),
    [
        (family, *sizes)
        for family in (*FAMILIES, "granitemoe", *OTHER_FORMS)
        for sizes in ((48, 10), (4096, 4096))  # uneven last batches, and all in one
        if family != "doge" or sizes == (4096, 4096)
    ],
)
def test_sensitivity_is_from_the_gradient_of_the_whole_model(
    model_folder: Folder,
    family: str,
    batch_tokens: int,
    logit_tokens: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_sizes, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(batch_sizes, "LOGIT_TOKENS", logit_tokens)
    folder = (
        save_model(make_model(family, **OTHER_FORMS[family]), tmp_path / "model")
        if family in OTHER_FORMS
        else model_folder(family)
    )
    source, ids = Source(folder), some_ids()
    found = measure_sensitivity(source, ids, tmp_path / "work", MADE_OF, seed=3)
    drawn, _ = drawn_text(source, ids, seed=3)

    model = AutoModelForCausalLM.from_pretrained(folder)
    adapt(model)
    modules = {EMBEDDING: model.get_input_embeddings()}
    for layer in range(len(source.layers)):
        for name in found.layer(layer):
            path = source.experts[layer].path if name == EXPERTS else name.removesuffix(".weight")
            if name != EMBEDDING:
                modules[f"{layer} {name}"] = model.get_submodule(path)
    with gradients_at(modules) as gradients:
        likelihood = model(ids).logits.log_softmax(-1).gather(-1, drawn[..., None]).sum()
        likelihood.backward()
    assert len(gradients) > 6
    for key, gradient in gradients.items():
        layer, _, name = key.rpartition(" ")
        width = gradient.shape[-1]
        expected = gradient.reshape(-1, width).square().sum(1) / (2 * TOKENS * width)
        measured = found.layer(int(layer or 0))[name]
        # Only the order of float32 sums differs, of a few hundred terms each. A gradient can
        # cancel in them, so its error is relative to the largest of all tokens: 1e-6 or so.
        largest = expected.max().item()
        torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-5 * largest, msg=key)


def test_drawn_text_follows_the_seed(model_folder: Folder) -> None:
    source, ids = Source(model_folder()), some_ids()
    one, two, other = (drawn_text(source, ids, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_drawn_text_is_what_the_whole_model_gives_for_the_noise_of_the_seed(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many positions are worked on at a time."""
    folder, ids = model_folder(), some_ids()
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapt(model)
    with torch.no_grad():
        likely = model(ids).logits.double().log_softmax(-1)
    noise = gumbel_noise(ids.shape, likely.shape[-1], seed=3)
    best = (likely + noise.at(noise.starts.flatten(0, 1)).view(likely.shape)).topk(2)
    clear = best.values[..., 0] - best.values[..., 1] > 1e-4  # float32 logits are off by 1e-6
    assert clear.float().mean() > 0.99
    for positions in (10, 4096):
        monkeypatch.setattr(batch_sizes, "LOGIT_TOKENS", positions)
        drawn, _ = drawn_text(Source(folder), ids, seed=3)
        assert torch.equal(drawn[clear], best.indices[..., 0][clear])


def test_a_model_that_predicts_nan_is_told(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = Walk.head
    monkeypatch.setattr(Walk, "head", lambda *given: head(*given) * torch.nan)
    with pytest.raises(NumericalError, match="predict the next token"):
        measure_sensitivity(Source(model_folder()), some_ids(), tmp_path, MADE_OF, seed=0)


@pytest.mark.parametrize("dies_after", range(1, 12))
def test_a_killed_run_resumes_with_the_same_bytes(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_after: int
) -> None:
    """Killed at any of its writes."""
    module = importlib.import_module("moepress.costs.sensitivity")
    source, ids = Source(model_folder("deepseek_v3")), some_ids()
    measure_sensitivity(source, ids, tmp_path / "whole", MADE_OF, seed=0)
    writes = 0
    real = module.save_unfinished

    def dies(*args: object) -> None:
        nonlocal writes
        writes += 1
        if writes == dies_after:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(module, "save_unfinished", dies)
    try:
        measure_sensitivity(source, ids, tmp_path / "cut", MADE_OF, seed=0)
    except KeyboardInterrupt:
        pass
    else:
        assert dies_after > writes
    monkeypatch.setattr(module, "save_unfinished", real)
    measure_sensitivity(source, ids, tmp_path / "cut", MADE_OF, seed=0)
    whole, cut = (
        {p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("whole", "cut")
    )
    assert whole == cut
    assert sorted(whole) == [
        "identity.json", "sensitivity-0000.safetensors", "sensitivity-0001.safetensors",
    ]  # fmt: skip


def test_a_work_folder_of_another_run_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    source, ids = Source(model_folder()), some_ids()
    measure_sensitivity(source, ids, tmp_path, MADE_OF, seed=0)
    with pytest.raises(InputError, match="differs in: work"):
        measure_sensitivity(source, ids, tmp_path, {"work": "2"}, seed=0)


def test_a_layer_without_a_gradient_is_named(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Walk.run

    def detached(*args: Any) -> Any:
        states, carried = run(*args)
        return states.detach(), carried

    monkeypatch.setattr(Walk, "run", detached)
    with pytest.raises(MoepressError, match=r"Layer 1 cannot be differentiated.*'fast'"):
        measure_sensitivity(Source(model_folder()), some_ids(), tmp_path, MADE_OF, seed=0)


def test_a_full_disk_is_reported_before_the_work(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("moepress.costs.sensitivity")
    states = 4 * 5 * 24 * 64  # float32, [S, L, H]
    source = Source(model_folder())

    def leaves_free(free: int) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)

    # Three states, of two layers; the gradient after a layer and that before it.
    leaves_free(5 * states - 1)
    with pytest.raises(CheckpointError, match=r"states of all layers.*--sequences"):
        measure_sensitivity(source, some_ids(), tmp_path, MADE_OF, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["identity.json"]
    leaves_free(5 * states)
    most = 0
    real = module.save_unfinished

    def measured(path: Path, tensors: dict[str, Tensor]) -> None:
        nonlocal most
        if path.name.startswith("sensitivity-0000"):
            raise KeyboardInterrupt
        real(path, tensors)
        kept = [p.stat().st_size // states for p in tmp_path.glob("[sg]*-*.safetensors")]
        most = max(most, sum(kept))

    monkeypatch.setattr(module, "save_unfinished", measured)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(source, some_ids(), tmp_path, MADE_OF, seed=0)
    assert most == 5
    monkeypatch.setattr(module, "save_unfinished", real)
    leaves_free(states)  # nothing large is written any more
    measure_sensitivity(source, some_ids(), tmp_path, MADE_OF, seed=0)


def test_files_left_by_a_killed_run_are_deleted(model_folder: Folder, tmp_path: Path) -> None:
    source = Source(model_folder())
    measure_sensitivity(source, some_ids(), tmp_path, MADE_OF, seed=0)
    done = {p.name for p in tmp_path.iterdir()}
    for name in ("states-0000", "states-0001", "states-0002", "gradient-0001", "gradient-0002"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    measure_sensitivity(source, some_ids(), tmp_path, MADE_OF, seed=0)
    assert {p.name for p in tmp_path.iterdir()} == done
