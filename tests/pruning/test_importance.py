"""Captured column means equal those of eager attention for any chunks, padding and caches."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moepress.original.architectures import decoder_layers
from moepress.pruning import importance
from moepress.pruning.capture import capture_attention, current_record
from moepress.pruning.importance import (
    AttentionRecord,
    column_means,
    protected_tokens,
    sampled_queries,
)
from tests.conftest import VOCAB, make_model


@dataclass(frozen=True)
class Way:
    """How 24 tokens of a prompt reach a model: in which chunks, with what padding and cache."""

    family: str = "mixtral"
    changes: dict[str, Any] = field(default_factory=dict)
    chunks: tuple[int, ...] = (24,)
    padding: tuple[int, ...] = (0, 0)  # of each sequence, in front
    cache: str | None = None
    window: int | None = None


WINDOW = {"sliding_window": 7}
WAYS = {
    "grouped heads": Way(),
    "one head for each key": Way(changes={"num_key_value_heads": 4}),
    "latent attention": Way("deepseek_v3"),
    "left padding": Way(padding=(5, 0)),
    "window": Way(changes=WINDOW, window=7),
    "window, left padding": Way(changes=WINDOW, window=7, padding=(0, 9)),
    "dynamic cache": Way(cache="dynamic"),
    "chunked prefill": Way(chunks=(10, 3, 11), cache="dynamic"),
    "chunked, left padding": Way(chunks=(12, 12), cache="dynamic", padding=(5, 0)),
    "chunked, window": Way(changes=WINDOW, window=7, chunks=(10, 3, 11), cache="dynamic"),
    "static cache": Way(cache="static"),
    "static, chunked": Way(chunks=(9, 15), cache="static"),
    "static, chunked, left padding": Way(chunks=(9, 15), cache="static", padding=(0, 3)),
    "static, window": Way(changes=WINDOW, window=7, cache="static", chunks=(3, 10, 11)),
    "latent attention, chunked, padding": Way(
        "deepseek_v3", chunks=(10, 14), cache="dynamic", padding=(2, 0)
    ),
}


def ids(sequences: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, VOCAB, (sequences, length), generator=torch.Generator().manual_seed(3))


def forward(model: Any, way: Way, each: Any) -> None:
    """Run the chunks of a way through a model; `each(first token, output)` after every chunk."""
    real = torch.ones(2, 24, dtype=torch.long)
    for row, count in enumerate(way.padding):
        real[row, :count] = 0
    cache = {
        None: lambda: None,
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
    }[way.cache]()
    done = 0
    for chunk in way.chunks:
        with torch.inference_mode():
            out = model(
                input_ids=ids()[:, done : done + chunk],
                attention_mask=real[:, : done + chunk] if any(way.padding) else None,
                past_key_values=cache,
                use_cache=cache is not None,
                output_attentions=model.config._attn_implementation == "eager",
            )
        each(done, out)
        done += chunk


def slow_means(weights: Tensor, first: int, way: Way) -> tuple[Tensor, Tensor]:
    """By loops: the mean of each key's column over heads and the real queries that see the key.

    Args:
        weights: [B, heads, Q, K] of eager attention, for tokens first .. first + Q - 1.
    """
    batch, heads, queries, keys = weights.shape
    # The cache of a window may have dropped early keys. The call's own tokens are the last ones or,
    # in a static cache that is not full, at their own positions.
    static = way.cache == "static" and keys > first + queries
    start = first if static else keys - queries
    if way.cache == "static" and way.window is not None and first + queries <= way.window:
        start = first
    means, real = torch.zeros(batch, queries), torch.zeros(batch, queries, dtype=torch.bool)
    for b in range(batch):
        for j in range(queries):
            real[b, j] = first + j >= way.padding[b]
            seen_by = [
                i
                for i in range(j, queries)
                if first + i >= way.padding[b] and (way.window is None or i - j < way.window)
            ]
            if real[b, j]:
                column = weights[b, :, seen_by, start + j].double()
                means[b, j] = column.sum() / (heads * len(seen_by))
    return means, real


class Seen:
    """The record that the experts of a layer find, of the last call."""

    def __init__(self, layer: nn.Module) -> None:
        self.record: AttentionRecord | None = None
        self.undo = capture_attention(layer, 1.0)
        self.undo.append(layer.mlp.register_forward_pre_hook(self._see).remove)

    def _see(self, *_: Any) -> None:
        self.record = current_record()

    @property
    def columns(self) -> tuple[Tensor, Tensor] | None:
        assert self.record is not None
        return self.record.columns


def records_of(model: nn.Module) -> list[Seen]:
    return [Seen(layer) for layer in decoder_layers(model)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WAYS)
def test_column_means_are_those_of_eager_attention(name: str, implementation: str) -> None:
    way = WAYS[name]
    eager = make_model(way.family, **way.changes)
    eager.set_attn_implementation("eager")
    expected = []
    forward(
        eager,
        way,
        lambda first, out: expected.append([slow_means(a, first, way) for a in out.attentions]),
    )
    model = make_model(way.family, **way.changes)
    model.set_attn_implementation(implementation)
    records = records_of(model)

    def compare(first: int, out: Any) -> None:
        for record, (mean, real) in zip(records, expected.pop(0), strict=True):
            assert record.columns is not None
            assert torch.equal(record.columns[1], real)
            torch.testing.assert_close(record.columns[0][real], mean[real], rtol=1e-5, atol=1e-6)

    forward(model, way, compare)
    assert not expected


def test_rows_sum_to_one_and_columns_do_not() -> None:
    """Row sums, which MC's released code uses, carry no information about attention."""
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    mean, _ = column_means(query, key, None)
    visible = torch.arange(9, 0, -1)  # queries that see each key
    assert (mean[0] * visible).sum().item() == pytest.approx(9, rel=1e-5)
    assert mean.std() > 0.01


@pytest.mark.parametrize("chunk_scores", [1, 300, 1 << 22])
@pytest.mark.parametrize("queries", [None, 1, 2, 5, 6, 13, 40])
def test_sampled_queries_and_small_chunks(
    chunk_scores: int, queries: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "CHUNK_SCORES", {"cpu": chunk_scores, "cuda": 1})
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 13, 8), torch.randn(2, 2, 13, 8)
    mean, real = column_means(query, key, None, queries=queries)
    rows, counts = sampled_queries(13, queries, query.device)
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) / 8**0.5
    hidden = torch.ones(13, 13).triu(1).bool()
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    for j in range(13):
        asked = [(i, n) for i, n in zip(rows.tolist(), counts.tolist(), strict=True) if i >= j]
        column = sum(n * weights[:, :, i, j].mean(1) for i, n in asked)
        expected = column / max(sum(n for _, n in asked), 1e-9) * torch.ones(2)
        torch.testing.assert_close(mean[:, j], expected)
    assert real.all()


@pytest.mark.parametrize(("length", "queries"), [(13, None), (13, 13), (13, 1), (1000, 7), (9, 8)])
def test_a_sample_stands_for_all_and_holds_the_last(length: int, queries: int | None) -> None:
    rows, counts = sampled_queries(length, queries, torch.device("cpu"))
    assert len(rows) == min(length, queries or length)
    assert rows.tolist() == sorted(set(rows.tolist())) and rows[0] >= 0 and rows[-1] < length
    assert counts.sum().item() == pytest.approx(length)
    last = (queries or length) // 2
    assert rows.tolist()[len(rows) - last :] == list(range(length - last, length))


def test_added_masks_and_biases() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    causal = torch.ones(6, 6).tril().bool()[None, None]
    bias = torch.randn(1, 2, 6, 6)
    numbers = torch.zeros(1, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    scores = (query @ key.transpose(2, 3) / 8**0.5 + bias).masked_fill(~causal, -torch.inf)
    expected = scores.softmax(-1).sum((1, 2)) / (2 * causal.sum((0, 1, 2)))
    for mask in (causal, numbers):
        mean, _ = column_means(query, key, mask, bias=bias)
        torch.testing.assert_close(mean, expected)


def hidden_of_norms(norms: list[list[float]]) -> Tensor:
    """Hidden states [B * Q, 4] with the given L1 norms."""
    return torch.tensor(norms).flatten()[:, None].expand(-1, 4) / 4


def test_the_most_important_are_protected_in_every_sequence() -> None:
    mean = torch.tensor([[1.0, 0.5, 0.1, 0.1], [9.0, 0.1, 0.1, 0.2]])
    real = torch.tensor([[True] * 4, [False, True, True, True]])
    record = AttentionRecord((2, 4), columns=(mean, real))
    hidden = hidden_of_norms(
        [[1, 3, 1, 1], [9, 2, 1, 1]]
    )  # importance 1, 1.5, .1, .1; -, .2, .1, .2
    one = protected_tokens(hidden, record, 0.25)  # 1 of 4 tokens; 0.75 of 3, rounded down
    assert one is not None
    assert one.view(2, 4).int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    most = protected_tokens(hidden, record, 0.7)  # 2.8 of 4, 2.1 of 3
    assert most is not None
    assert most.view(2, 4).int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 1]]  # ties: the earlier one
    everything = protected_tokens(hidden, record, 1.0)
    assert everything is not None and torch.equal(everything.view(2, 4), real)


def test_without_attention_the_norm_decides_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    importance._warn_of_norms_alone.cache_clear()
    hidden = hidden_of_norms([[1, 3, 2, 1]])
    for _ in range(2):
        chosen = protected_tokens(hidden, AttentionRecord((1, 4)), 0.5)
        assert chosen is not None and chosen.tolist() == [False, True, True, False]
    assert caplog.text.count("is decided by their norm alone") == 1


@pytest.mark.parametrize(
    "record",
    [None, AttentionRecord((2, 4))],  # experts that see other tokens than their layer
)
def test_where_no_token_is_protected(record: AttentionRecord | None) -> None:
    assert protected_tokens(torch.ones(4, 8), record, 0.5) is None


def test_decoding_and_packed_sequences_are_not_recorded() -> None:
    model = make_model("mixtral")
    records = records_of(model)
    with torch.inference_mode():
        cache = model(ids(), use_cache=True).past_key_values
        assert all(seen.columns is not None for seen in records)
        model(ids(length=1), past_key_values=cache, use_cache=True)
        assert all(seen.record is None for seen in records)
        model(ids())
        assert all(seen.columns is not None for seen in records)
        lengths = torch.tensor([0, 10, 24], dtype=torch.int32)
        model(ids(1), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)
    assert all(seen.record is None for seen in records)
    assert current_record() is None


def test_calls_of_less_than_one_protected_token_are_not_recorded() -> None:
    model = make_model("mixtral")
    found = []
    for layer in decoder_layers(model):
        capture_attention(layer, 0.05)
        layer.mlp.experts.register_forward_pre_hook(lambda *_: found.append(current_record()))
    with torch.inference_mode():
        model(ids(length=19))
        assert found == [None, None]
        model(ids(length=20))
    assert all(record is not None for record in found[2:])


def test_capturing_can_be_undone_and_others_are_left_alone() -> None:
    functions = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    model, other = make_model("mixtral"), make_model("mixtral")
    layer = decoder_layers(model)[0]
    before = layer.forward
    seen, beside = Seen(layer), Seen(decoder_layers(other)[0])
    with torch.inference_mode():
        other(ids())
        assert seen.record is None and beside.columns is not None
        model(ids())
        assert seen.columns is not None
        while seen.undo:
            seen.undo.pop()()
        seen.record = None
        model(ids())
    assert seen.record is None
    assert ALL_ATTENTION_FUNCTIONS._global_mapping == functions
    assert layer.forward == before and "forward" not in vars(layer)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in layer.modules())


def test_what_others_put_around_a_layer_stays() -> None:
    """As accelerate does when a model is spread over devices, before and after."""
    model = make_model("mixtral")
    layer = decoder_layers(model)[0]
    calls = []

    def around(name: str) -> None:
        inner = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return inner(*args, **kwargs)

        layer.forward = forward

    around("before")
    seen = Seen(layer)
    around("after")
    with torch.inference_mode():
        model(ids())
        assert seen.columns is not None and calls == ["after", "before"]
        while seen.undo:
            seen.undo.pop()()
        seen.record = None
        model(ids())
    assert seen.record is None and calls == ["after", "before"] * 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_stopped_call_leaves_nothing_behind(error: type[BaseException]) -> None:
    model = make_model("mixtral")
    records_of(model)

    def stop(*_: Any) -> None:
        raise error

    decoder_layers(model)[1].self_attn.register_forward_hook(stop)
    with pytest.raises(error):
        model(ids())
    assert current_record() is None
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_copy_of_a_model_records_itself() -> None:
    model = make_model("mixtral")
    records_of(model)
    copied = copy.deepcopy(model)
    layer = decoder_layers(copied)[0]
    assert layer.forward.layer is layer
    assert layer.forward.forward.__self__ is layer


def test_padding_is_left_out_of_the_sample() -> None:
    """With more tokens than sampled queries, each sequence has the means that it has alone."""
    torch.manual_seed(0)
    query, key = torch.randn(3, 4, 40, 8), torch.randn(3, 2, 40, 8)
    front, behind = [0, 25, 0], [0, 0, 30]
    real = torch.ones(3, 40, dtype=torch.bool)
    real[1, :25], real[2, 10:] = False, False
    causal = torch.ones(40, 40).tril().bool()
    mask = causal & real[:, None, None, :]
    mean, found = column_means(query, key, mask, queries=12)
    assert torch.equal(found, real)
    for b in range(3):
        here = slice(front[b], 40 - behind[b])
        alone, _ = column_means(
            query[b : b + 1, :, here], key[b : b + 1, :, here], None, queries=12
        )
        torch.testing.assert_close(mean[b, here], alone[0])


def test_attention_may_be_changed_afterwards() -> None:
    model = make_model("mixtral")
    records = records_of(model)
    found = []
    for implementation in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.inference_mode():
            model(ids())
        assert records[0].columns is not None
        found.append(records[0].columns[0])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def hybrid_model() -> nn.Module:
    """A layer of linear attention, then one of softmax attention."""
    hybrid = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
    sizes = {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    return make_model("qwen3_next", **hybrid, **sizes)


def test_layers_without_softmax_attention_use_the_norm_alone() -> None:
    model = hybrid_model()
    linear, softmax = records_of(model)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :9] = 0
    with torch.inference_mode():
        model(ids(), attention_mask=mask, use_cache=False)
    assert linear.columns is None and linear.record.shape == (2, 24)
    assert softmax.columns is not None
    chosen = protected_tokens(
        torch.ones(48, 8), linear.record, 0.5
    )  # padding is recorded nevertheless
    assert chosen is not None and chosen.view(2, 24).sum(1).tolist() == [7, 12]
    assert not chosen.view(2, 24)[0, :9].any()
