"""Pruning with protection leaves other models, other threads and other implementations alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moepress import kernels
from moepress.original.architectures import decoder_layers
from moepress.prune import Pruning, prune
from moepress.pruning import importance
from tests.conftest import VOCAB, make_model

IDS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
AFMOE = {  # calls attention with the keyword attention_mask
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_dense_layers": 1,
    "head_dim": 16,
}


@torch.inference_mode()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    out: Tensor = model(ids).logits
    return out


def first_only(layers: range, protect: float) -> Pruning:
    """Drops every second choice of tokens that are not protected."""
    return Pruning(dict.fromkeys(layers, (0.0, 1.0)), True, protect)


def test_afmoe_runs_pruned() -> None:
    model = make_model("afmoe", **AFMOE)
    with torch.no_grad():  # routers begin as zeros: all ratios were 1
        for weight in model.model.layers[1].mlp.parameters():
            weight.normal_()
    plain = logits(model)
    found = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with prune(model, first_only(range(1, 2), 0.3), count=True) as pruned:
            found[implementation] = logits(model)
        assert pruned.statistics().protected == (2 * 7,)
    assert not torch.allclose(found["sdpa"], plain, rtol=1e-2)
    torch.testing.assert_close(found["sdpa"], found["eager"], rtol=1e-4, atol=1e-4)


def test_other_models_of_the_process_are_left_alone() -> None:
    """BERT calls sdpa with the keyword attention_mask, and its attention is not causal."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=VOCAB, hidden_size=32, **sizes)).eval()
    before = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    with torch.inference_mode():
        expected = bert(IDS).last_hidden_state
        prune(make_model("mixtral"), first_only(range(2), 0.3))
        assert torch.equal(bert(IDS).last_hidden_state, expected)
    assert ALL_ATTENTION_FUNCTIONS._global_mapping == before


def test_threads_do_not_share_what_attention_tells() -> None:
    """Two prompts in one model; both are past their attention before either reaches the experts."""
    model = make_model("mixtral")
    together = threading.Barrier(2, timeout=30)

    def wait(*_: Any) -> None:
        together.wait()

    prompts = list(IDS[:, None])
    with kernels.only("reference"), prune(model, first_only(range(2), 0.3), count=True) as pruned:
        expected = [logits(model, ids) for ids in prompts]
        once = pruned.statistics()
        for layer in decoder_layers(model):
            layer.mlp.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda ids: logits(model, ids), prompts))
        twice = pruned.statistics()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert twice.tokens == tuple(2 * n for n in once.tokens)
    assert twice.protected == tuple(2 * n for n in once.protected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [DynamicCache, partial(StaticCache, max_cache_len=64)])
@torch.inference_mode()
def test_padding_behind_a_text_that_goes_on(implementation: str, cache: Any) -> None:
    """The same tokens are protected without it."""
    model = make_model("mixtral")
    model.set_attn_implementation(implementation)

    def second_part(padding: int) -> Tensor:
        held = cache(config=model.config)
        model(IDS[:1, :10], past_key_values=held)
        ids = torch.cat([IDS[1:], torch.zeros(1, padding, dtype=torch.int64)], 1)
        mask = torch.ones(1, 10 + ids.shape[1], dtype=torch.int64)
        mask[:, 10 + IDS.shape[1] :] = 0
        out: Tensor = model(ids, attention_mask=mask, past_key_values=held).logits
        return out[:, : IDS.shape[1]]

    with prune(model, first_only(range(2), 0.3)):
        torch.testing.assert_close(second_part(6), second_part(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_run_again_for_gradients_protect_the_same_tokens(reentrant: bool) -> None:
    model = make_model("mixtral").train()
    states = model.get_input_embeddings()(IDS).detach()

    def gradient() -> Tensor:
        given = states.clone().requires_grad_()
        model(inputs_embeds=given, use_cache=False).logits.square().sum().backward()
        assert given.grad is not None
        return given.grad

    with prune(model, first_only(range(2), 0.3)):
        expected = gradient()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(gradient(), expected)


@pytest.mark.parametrize("tokens", [1, 24])
def test_a_pruned_layer_compiles_to_one_graph(tokens: int) -> None:
    """With the tokens protected that are protected without torch.compile."""
    model = make_model("mixtral")
    model.set_experts_implementation("batched_mm")
    layer = decoder_layers(model)[0]
    states = torch.randn(2, tokens, 64)
    positions = model.model.rotary_emb(states, torch.arange(tokens)[None])
    with prune(model, first_only(range(2), 0.3)), torch.inference_mode():
        expected = layer(states, position_embeddings=positions)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(states, position_embeddings=positions), expected)
    torch._dynamo.reset()


def test_attention_without_weights_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """An implementation that is neither PyTorch's nor eager: the norm alone decides."""

    def unknown(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        hidden = torch.ones(query.shape[2], query.shape[2]).triu(1).bool()
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    importance._warn_of_norms_alone.cache_clear()
    model = make_model("mixtral")
    with prune(model, first_only(range(2), 0.3)):
        logits(model)
        assert not caplog.records
        ALL_ATTENTION_FUNCTIONS["unknown"] = unknown
        try:
            model.config._attn_implementation = "unknown"
            logits(model)
        finally:
            del ALL_ATTENTION_FUNCTIONS["unknown"]
    assert "is decided by their norm alone" in caplog.text
