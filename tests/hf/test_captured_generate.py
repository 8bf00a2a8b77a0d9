"""`generate` of packed models on a CPU captures steps by itself, and is as before otherwise."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moepress.compress import compress
from moepress.hf import captured, captured_generate
from moepress.hf.captured import PROOFS
from moepress.kernels import cpu
from tests.conftest import small_recipe
from tests.families.models import make_model

if cpu.missing() is not None:
    pytest.skip("the library is not compiled", allow_module_level=True)

TOKENS = 24
IDS = (torch.arange(12)[None] * 7) % 300 + 5


@pytest.fixture(scope="module")
def packed(
    model_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("generate") / "folder"
    return compress(model_folder(), out, small_recipe(text_file, bits=2))


def written(model: Any, **options: Any) -> Tensor:
    given = {"do_sample": False, "eos_token_id": None, "max_new_tokens": TOKENS, **options}
    out: Tensor = model.generate(IDS, attention_mask=torch.ones_like(IDS), **given)
    return out


def replayed(model: Any) -> int:
    return captured_generate._of(model).steps.replayed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_text_is_the_same_again(packed: Path, dtype: torch.dtype) -> None:
    """The first is compared for three steps, the next ones for one."""
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
    texts = [written(model) for _ in range(3)]
    assert replayed(model) == 3 * (TOKENS - 1) - PROOFS - 2
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])
    assert "forward" not in vars(model)


def test_other_models_do_not_notice() -> None:
    model = make_model("mixtral")
    written(model)
    assert model not in captured_generate._models


def test_several_threads(packed: Path) -> None:
    """One of them has captured steps; the others compute as ever, meanwhile."""
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    expected = written(model)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(written(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(one, expected) for one in found)


def test_copies_and_models_that_are_gone(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    expected = written(model)
    other = copy.deepcopy(model)
    for parameter in other.model.norm.parameters():
        parameter.data.neg_()
    assert not torch.equal(written(other), expected)
    assert torch.equal(written(model), expected) and replayed(other)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_text_that_would_take_too_much_memory(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head
    room = captured.ROOM + captured.STEP
    monkeypatch.setattr(captured, "free_memory", lambda device: 2 * room * token - 1)
    expected = written(model)
    assert not replayed(model)
    monkeypatch.setattr(captured, "free_memory", lambda device: 2 * room * token)
    assert torch.equal(written(model), expected) and replayed(model)
