"""Adapters on a packed model are trained: gradients pass through it, its own bytes stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import moepress
from moepress.compress import compress
from tests.conftest import small_recipe

IDS = torch.tensor([[5, 9, 300, 17, 2, 44, 8, 31], [7, 7, 1, 90, 200, 3, 12, 60]])


@pytest.fixture(scope="module")
def made(
    model_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A compressed folder whose embedding and head are packed too."""
    recipe = small_recipe(text_file, sequences=4, embedding_bits=8, head_bits=8)
    out = tmp_path_factory.mktemp("x") / "x"
    return compress(model_folder("qwen2_moe"), out, recipe, bits=2)


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def gradients(model: Any) -> dict[str, Tensor]:
    """Of the loss, with respect to what is not packed, and to the first layer's inputs."""
    states: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, y: states.append(y.detach().requires_grad_()) or states[0]
    )
    model(input_ids=IDS, labels=IDS).loss.backward()
    named = {k: v.grad for k, v in model.named_parameters() if v.dtype != torch.uint8}
    return named | {"states": states[0].grad}


@pytest.mark.usefixtures("reference_backend")
def test_a_packed_model_has_the_gradients_of_its_weights(made: Path, tmp_path: Path) -> None:
    plain = opened(moepress.dequantize(made, tmp_path / "plain"))
    packed, expected = gradients(opened(made)), gradients(plain)
    scales = {name for name in packed if name.endswith("_pre_quant_scale")}  # of packed ones alone
    assert all(packed[name].any() for name in scales)
    assert packed.keys() - scales < expected.keys() and "model.layers.0.mlp.gate.weight" in packed
    for name in packed.keys() - scales:
        value = packed[name]
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_lora_is_trained_saved_and_loaded(made: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    before = opened(made)
    with torch.no_grad():
        plain = before(IDS).logits
    torch.manual_seed(0)
    targets = ["q_proj", "o_proj", "up_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(opened(made), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 3  # adapters alone, those of the shared experts too
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3

    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(opened(made), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        with loaded.disable_adapter():
            assert torch.equal(loaded(IDS).logits, plain)
    with pytest.raises(RuntimeError):
        loaded.merge_and_unload()  # packed bytes take no sums
    ours, theirs = before.state_dict(), loaded.unload().state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
