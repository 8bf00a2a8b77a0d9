"""Attention of one token by our kernel: when it is taken. The CPU takes the card's place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, StaticCache

from moepress.hf import own_attention
from moepress.hf.own_attention import attend_on_card
from tests.conftest import make_model

IDS = torch.arange(40).view(2, 20) + 3


class Calls(list[tuple[int, ...]]):
    """Shapes of the queries that our op gets."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The calls of the op, where a CPU counts as a card."""
    seen = Calls()
    plain = own_attention.attention

    def counted(q: Tensor, *rest: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            seen.append(tuple(q.shape))
        return plain(q, *rest)

    monkeypatch.setattr(own_attention, "attention", counted)
    monkeypatch.setattr(own_attention, "CARD", "cpu")
    monkeypatch.setattr(own_attention, "_agreed", {})
    before = AttentionInterface._global_mapping["sdpa"]
    yield seen
    AttentionInterface.register("sdpa", before)


def ours(model: nn.Module) -> Any:
    found = copy.deepcopy(model)
    attend_on_card(found)
    attend_on_card(found)  # changes nothing
    return found


@torch.no_grad()
def steps(model: Any, kind: str, mask: Tensor | None = None) -> Tensor:
    """Logits of two steps of decoding after a prompt."""
    cache = StaticCache(config=model.config, max_cache_len=32) if kind == "static" else None
    out = model(IDS, attention_mask=mask, past_key_values=cache, use_cache=True)
    found = []
    for number in range(2):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        token = torch.full((2, 1), 9 + number)
        position = torch.tensor([IDS.shape[1] + number])
        out = model(
            token, attention_mask=mask, past_key_values=out.past_key_values, cache_position=position
        )
        found.append(out.logits)
    return torch.cat(found, 1)


def test_a_kernel_that_differs_is_left_alone(
    calls: Calls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first call of a kind is computed both ways; its result is PyTorch's."""
    model = make_model("mixtral")
    expected = steps(model, "growing")
    right = own_attention.attention
    monkeypatch.setattr(own_attention, "attention", lambda *given: right(*given) * 1.1)
    assert torch.equal(steps(ours(model), "growing"), expected)
    assert len(calls) == 1
    assert caplog.text.count("Attention of one token differs by 0.1 between") == 1


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_decoding_is_as_before(calls: Calls, family: str, padded: bool, kind: str) -> None:
    model = make_model(family)
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    expected = steps(model, kind, mask if padded else None)
    assert not calls
    found = steps(ours(model), kind, mask if padded else None)
    torch.testing.assert_close(found, expected)
    heads, size = model.config.num_attention_heads, 64 // model.config.num_attention_heads
    assert calls == [(2, heads, 1, size)] * 2 * model.config.num_hidden_layers


def test_other_calls_are_left_alone(calls: Calls) -> None:
    plain = make_model("mixtral")
    model = ours(plain)
    token = IDS[:, :1]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
    model(token)  # gradients
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(token)
        plain(token)  # not marked
        for implementation in ("eager", "sdpa"):
            assert not calls
            model.set_attn_implementation(implementation)
            model(token)
    assert len(calls) == 2
    assert model.config.to_dict() == plain.config.to_dict()


def test_heads_of_keys_and_values_of_different_sizes(calls: Calls) -> None:
    plain = make_model("deepseek_v3")
    torch.testing.assert_close(steps(ours(plain), "growing"), steps(plain, "growing"))
    assert not calls


class Attention(nn.Module):
    """What the function is called with."""

    is_causal = True
    num_key_value_groups = 2

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.config = make_model("mixtral").config
        self.weight = nn.Parameter(torch.ones(1))
        self.is_causal = causal


def test_arguments(calls: Calls) -> None:
    module = Attention()
    attend_on_card(module)
    attend = AttentionInterface._global_mapping["sdpa"]
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8)
    mask = torch.rand(2, 1, 1, 9) < 0.8
    bias = torch.randn(1, 4, 1, 9)

    def taken(*args: Any, of: nn.Module = module, **named: Any) -> bool:
        calls.clear()
        found, none = attend(of, *args, **named)
        expected = as_before(of, *args, **named)
        torch.testing.assert_close(found, expected)
        assert none is None
        return bool(calls)

    assert taken(q, k, k, None)
    assert taken(q, k, k, mask, scaling=0.3, sliding_window=4, position_ids=torch.ones(2, 1))
    assert taken(q, k, k, bias, is_causal=True, output_attentions=False, softcap=None)
    assert not taken(q, k, k, mask, position_bias=bias)
    assert not taken(q, k, k, mask, output_attentions=True)
    assert not taken(q, k, k, mask, s_aux=torch.ones(4))
    assert not taken(q.expand(2, 4, 3, 8), k, k, None)
    assert not taken(q, k, k[..., :4], None)
    assert not taken(q[:1], k, k, None)
    assert not taken(q.double(), k.double(), k.double(), None)
    assert not taken(q, k, k, mask[0])
    assert not taken(q[..., :7], k[..., :7], k[..., :7], None)
    assert not taken(
        q, k.repeat_interleave(2, 1), k.repeat_interleave(2, 1), None, of=Attention(False)
    )
    torch.manual_seed(0)
    calls.clear()
    attend(module, q, k, k, None, dropout=0.5)
    assert not calls


def as_before(module: nn.Module, *args: Any, **named: Any) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: Tensor = sdpa_attention_forward(module, *args, **named)[0]
    return found


def test_towers_are_not_causal(calls: Calls) -> None:
    module = Attention(causal=False)
    attend_on_card(module)
    assert not hasattr(module, own_attention.MARK)


@pytest.mark.parametrize("padded", [False, True])
def test_a_compiled_step_has_the_op(calls: Calls, padded: bool) -> None:
    plain = make_model("mixtral")
    model = ours(plain)
    mask = torch.ones(2, 21, dtype=torch.long)
    if padded:
        mask[1, :5] = 0
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    found = []
    for one, run in (
        (plain, plain.forward),
        (model, torch.compile(model.forward, backend=backend, fullgraph=True)),
    ):
        with torch.no_grad():
            cache = StaticCache(config=one.config, max_cache_len=32)
            one(IDS, attention_mask=mask[:, :-1], past_key_values=cache)
            found.append(
                run(
                    IDS[:, -1:],
                    attention_mask=mask,
                    past_key_values=cache,
                    cache_position=torch.tensor([20]),
                ).logits
            )
    torch.testing.assert_close(*found)
    assert len(graphs) == 1 and graphs[0].print_readable(False).count("moepress.attention") == 2
