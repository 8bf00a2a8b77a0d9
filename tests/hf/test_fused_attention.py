"""Attention of one token by our op while `fused_attention` is entered: which calls, same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations import sdpa_attention

from moepress.hf import own_attention
from moepress.hf.captured import PROOFS, CapturedSteps
from moepress.hf.fixed_cache import FixedCache
from moepress.hf.fused_attention import fused_attention
from moepress.hf.grouped_attention import group_queries
from moepress.hf.own_attention import MARK
from moepress.kernels import backends, cpu, reference
from tests.families.models import make_model
from tests.hf.tape import tape

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason="needs the library")

HERE = ("cpu",)
IDS = (torch.arange(24)[None] * 7) % 300 + 5
# Windows, chunks, states of linear attention beside attention, sinks (not taken), softcaps.
FAMILIES = (
    "mixtral", "qwen3_moe", "gemma4_text", "llama4_text", "qwen3_next", "jamba", "gpt_oss",
    "deepseek_v3",
)  # fmt: skip
NOT_TAKEN = {"gpt_oss", "deepseek_v3"}  # sinks; keys and values of different sizes


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """What our op is called with by models."""
    seen: list[tuple[Tensor, ...]] = []
    plain = own_attention.attention

    def counted(*given: Any) -> Tensor:
        seen.append(given)
        return plain(*given)

    monkeypatch.setattr(own_attention, "attention", counted)
    return seen


def marks(model: nn.Module) -> list[Any]:
    return [vars(module)[MARK] for module in model.modules() if MARK in vars(module)]


@torch.no_grad()
def steps(model: Any) -> Tensor:
    """Logits of a prompt and of two tokens after it, of which a fixed cache has room for many."""
    cache = DynamicCache(config=model.config)
    found = [model(IDS, past_key_values=cache).logits[:, -1:]]
    fixed = FixedCache(cache, room=64)
    fixed.load(cache)
    for token in (IDS[:, :1], IDS[:, 1:2]):
        here = fixed.position.here
        out = model(token, past_key_values=fixed, position_ids=here[None], cache_position=here)
        fixed.position.move_on()
        fixed.advance()
        found.append(out.logits)
    return torch.cat(found, 1).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family: str, calls: list[tuple[Tensor, ...]]) -> None:
    model = make_model(family)
    expected = steps(model)
    with fused_attention(model, HERE):
        assert set(marks(model)) <= set(HERE)
        found = steps(model)
    assert bool(calls) == (family not in NOT_TAKEN)
    assert all(q.shape[2] == 1 and mask is not None for q, _, _, mask, _ in calls)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert not marks(model)
    calls.clear()
    assert torch.equal(steps(model), expected) and not calls


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_bfloat16_are_those_of_exact_attention(
    family: str, calls: list[tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own rounds between its steps: a router may then choose another expert."""
    model = make_model(family).to(torch.bfloat16)

    def exact(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return reference.attention(q.double(), k.double(), v.double(), *rest).to(q.dtype)

    with fused_attention(model, HERE):
        found = steps(model)
        monkeypatch.setattr(own_attention, "attention", exact)
        expected = steps(model)
    assert bool(calls) == (family not in NOT_TAKEN)
    assert (found - expected).norm() <= 0.01 * expected.norm()


def test_every_layer_calls_it(calls: list[tuple[Tensor, ...]]) -> None:
    model = make_model("qwen3_moe")
    with fused_attention(model, HERE):
        steps(model)
    assert len(calls) == 2 * model.config.num_hidden_layers
    q, k, v, mask, scale = calls[0]
    assert k.shape[2] == v.shape[2] == 64 and mask.shape == (1, 1, 1, 64)
    assert mask.sum() == IDS.shape[1] + 1 and scale == q.shape[-1] ** -0.5


def test_a_growing_cache_and_the_mask_that_hides_nothing(calls: list[tuple[Tensor, ...]]) -> None:
    """Without padding transformers makes no mask; grouped_attention.py gives one of one number."""
    model = make_model("qwen3_moe")
    found = []
    for grouped in (False, True):
        if grouped:
            group_queries(model)
        for devices in ((), HERE):
            cache = DynamicCache(config=model.config)
            with torch.no_grad(), fused_attention(model, devices):
                model(IDS, past_key_values=cache)
                found.append(model(IDS[:, :1], past_key_values=cache).logits)
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])
    layers = model.config.num_hidden_layers
    shapes = [None if mask is None else tuple(mask.shape) for _, _, _, mask, _ in calls]
    given = (1, 1, 1, 1) if hasattr(sdpa_attention, "pack_gqa") else None  # not in 5.17
    assert shapes == [None] * layers + [given] * layers


def test_other_devices_are_left_alone(calls: list[tuple[Tensor, ...]]) -> None:
    model = make_model("mixtral")
    with fused_attention(model):
        assert not marks(model)
        steps(model)
    assert not calls


def test_without_the_kernel_nothing_changes(calls: list[tuple[Tensor, ...]]) -> None:
    model = make_model("mixtral")
    with backends.only("reference"), fused_attention(model, HERE):
        assert not marks(model)
        steps(model)
    assert not calls


def test_marked_modules_stay_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mixtral")
    before = AttentionInterface._global_mapping["sdpa"]
    with monkeypatch.context() as patched:
        patched.setattr(own_attention, "CARD", "cpu")
        own_attention.attend_on_card(model)
    with fused_attention(model, HERE), fused_attention(model, HERE):
        assert len(marks(model)) == model.config.num_hidden_layers
    assert len(marks(model)) == model.config.num_hidden_layers
    AttentionInterface.register("sdpa", before)


def test_an_error_restores_everything() -> None:
    model = make_model("mixtral")
    with pytest.raises(KeyboardInterrupt), fused_attention(model, HERE):
        assert marks(model)
        raise KeyboardInterrupt
    assert not marks(model)


def test_a_module_that_moved_is_left_alone(calls: list[tuple[Tensor, ...]]) -> None:
    """Marked on a card, computed here: nothing changes for CPUs outside of the context."""
    model = make_model("mixtral")
    for module in own_attention.causal_attention(model, HERE):
        setattr(module, MARK, "cuda")
    steps(model)
    assert not calls


def test_many_tokens_and_gradients_are_computed_as_ever(calls: list[tuple[Tensor, ...]]) -> None:
    model = make_model("mixtral")
    with fused_attention(model, HERE):
        model(IDS[:, :1]).logits.sum().backward()
        with torch.no_grad():
            model(IDS)
            with torch.autocast("cpu", torch.bfloat16):
                model(IDS[:, :1])
            assert not calls
            model(IDS[:, :1])
    assert len(calls) == model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next", "gemma4_text"])
@torch.inference_mode()
def test_captured_steps(family: str, calls: list[tuple[Tensor, ...]]) -> None:
    model = make_model(family)
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **given)
    with CapturedSteps(model, capture=tape, devices=HERE, fusion=fused_attention) as captured:
        found = model.generate(IDS, **given)
    assert torch.equal(found, expected)
    assert (captured.refused, captured.fused) == (None, True)
    assert captured.replayed == 12 - 1 - PROOFS
    assert calls and not marks(model)
