"""`generate` of packed models on a CPU captures steps by itself, and is as before otherwise."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from moepress.hf import captured, captured_generate
from moepress.hf.captured import PROOFS
from moepress.kernels import cpu
from tests.families.models import make_model

if cpu.missing() is not None:
    pytest.skip("the library is not compiled", allow_module_level=True)

TOKENS = 24
IDS = (torch.arange(12)[None] * 7) % 300 + 5


def written(model: Any, **options: Any) -> Any:
    given = {"do_sample": False, "eos_token_id": None, "max_new_tokens": TOKENS, **options}
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), **given)


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


def test_hooks_of_others_are_called(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    expected = written(model)
    before, layer, seen = replayed(model), model.model.layers[0], []
    handle = layer.register_forward_hook(lambda *_: seen.append(0))
    assert torch.equal(written(model), expected)
    assert replayed(model) == before and len(seen) == TOKENS
    handle.remove()
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(0)):
        written(model)
    assert replayed(model) == before
    assert torch.equal(written(model), expected) and replayed(model) > before


def test_forwards_that_others_have_replaced_are_called(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    expected = written(model)
    before, layer, seen = replayed(model), model.model.layers[0], []
    plain = layer.forward

    @wraps(plain)
    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(0)
        return plain(*args, **kwargs)

    layer.forward = watched
    assert torch.equal(written(model), expected)
    assert replayed(model) == before and len(seen) == TOKENS
    del layer.forward
    assert torch.equal(written(model), expected) and replayed(model) > before


def test_another_precision_is_captured_anew(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        written(model)
    options = {"output_logits": True, "return_dict_in_generate": True}
    found = torch.cat(written(model, **options)["logits"])
    plain = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        expected = torch.cat(written(plain, **options)["logits"])
    assert replayed(model) and not replayed(plain)
    assert captured.distance(found, expected) < 1e-4


def test_who_calls_and_copies_while_a_text_is_written(packed: Path) -> None:
    """Another thread runs the model, keeps its forward, and copies it."""
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    expected, mask = written(model), torch.ones_like(IDS)
    logits = model(IDS, attention_mask=mask).logits
    kept: list[Any] = []

    def other() -> None:
        assert torch.equal(model(IDS, attention_mask=mask).logits, logits)
        kept.extend((model.forward, copy.deepcopy(model)))

    class Between(BaseStreamer):
        def put(self, value: Tensor) -> None:
            if not kept:
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()

        def end(self) -> None: ...

    assert torch.equal(written(model, streamer=Between()), expected)
    forward, copied = kept
    with torch.no_grad():
        assert torch.equal(forward(IDS, attention_mask=mask).logits, logits)
    for parameter in model.model.norm.parameters():
        parameter.data.neg_()
    assert torch.equal(written(copied), expected)
    assert not torch.equal(written(model), expected)


def test_a_text_that_would_take_too_much_memory(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head
    room = captured.room_for(1)
    monkeypatch.setattr(captured, "free_memory", lambda device: 2 * room * token - 1)
    expected = written(model)
    assert not replayed(model)
    monkeypatch.setattr(captured, "free_memory", lambda device: 2 * room * token)
    assert torch.equal(written(model), expected) and replayed(model)


def test_tensors_that_were_read_from_a_cache_stay_as_they_are(packed: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    cache = written(model, return_dict_in_generate=True)["past_key_values"]
    read = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    before, steps = [x.clone() for x in read], replayed(model)
    del cache
    model.generate(IDS.flip(1), do_sample=False, eos_token_id=None, max_new_tokens=TOKENS)
    assert replayed(model) > steps
    assert all(torch.equal(x, old) for x, old in zip(read, before, strict=True))


def test_steps_are_captured_after_a_text_that_was_looked_up(packed: Path) -> None:
    """Layers with a window then keep more than it, of that text alone."""
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    model.config.sliding_window = 8
    looked_up = written(model, prompt_lookup_num_tokens=2)
    assert replayed(model) == 0
    assert torch.equal(written(model), looked_up) and replayed(model) > 0
