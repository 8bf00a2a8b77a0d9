"""Attention of decoded tokens on the card: against float64, in a model, and beside PyTorch's.

Times are those of one of several calls in a CUDA graph. Each call has keys and values of its own,
as layers have, so that none finds them in the cache of the card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from moepress import kernels
from moepress.hf import own_attention
from moepress.kernels import reference
from moepress.self_test import ROUNDING
from on_gpu.card import Card
from on_gpu.case import Case, CheckError, Row
from on_gpu.compare import Worst

ATTENTION = (  # batches, query heads, key heads, tokens, positions, size of a head
    (1, 32, 8, 1, 512, 128), (2, 8, 1, 1, 100, 64), (1, 24, 2, 1, 333, 128), (2, 4, 2, 3, 65, 256),
    (1, 4, 4, 1, 1, 40),
)  # fmt: skip
HEADS, SHARED, SIZE = 32, 8, 128  # heads of queries, of keys and values, numbers of a head
CALLS = 32
TIMED = ((1, 512), (1, 4096), (1, 32768), (16, 512))  # batches, positions
STEPS = 3  # of the model whose logits are compared
CLOSE = 0.015  # of the norm of the logits: rounding makes .0056, outputs of 1.1 times the size .027

Pair = tuple[Tensor, Tensor]


def check_cases(card: Card) -> Iterator[Case]:
    """For the part `checks`."""
    yield Case("attention", partial(check_attention, card), 60)


def cases(card: Card) -> Iterator[Case]:
    yield Case("logits of a model", partial(check_model, card), 90)
    for batches, positions in ((1, 64), (2, 32)) if card.tiny else TIMED:
        yield Case(f"{batches} x {positions}", partial(times, card, batches, positions), 60)


def check_attention(card: Card) -> list[Row]:
    """Rows with and without a mask, and one that sees nothing. Errors: of a head."""
    worst, generator = Worst(), torch.Generator().manual_seed(0)
    for batches, heads, shared, tokens, positions, size in ATTENTION:
        q = torch.randn(batches, heads, tokens, size, generator=generator)
        k, v = torch.randn(2, batches, positions, shared, size, generator=generator).transpose(2, 3)
        mask = torch.rand(batches, 1, tokens, positions, generator=generator) < 0.6
        mask[..., 0] = True
        mask[0, 0, 0] = False
        for dtype, given in ((d, m) for d in ROUNDING for m in (None, mask)):
            here = [x.to(dtype) for x in (q, k, v)]
            exact = reference.attention(*(x.double() for x in here), given, size**-0.5)
            there = [x.to(card.device) for x in here]
            found = kernels.attention(
                *there, None if given is None else given.to(card.device), size**-0.5
            )
            label = f"{batches} x {heads} ({shared}) heads of {size}, {positions} keys, {dtype}"
            worst(label, found, exact, 1e-5, dtype)
            if given is not None:
                worst.expect(label + ": zeros", not found[0, 0].any())
    return worst.rows()


# In a model


@torch.inference_mode()
def check_model(card: Card) -> list[Row]:
    """Logits of decoded tokens with the op in every layer, and with transformers' attention."""
    model = small_model(card)
    plain = decoded_logits(card, model)
    # Without a card the type of its device is another, and the op is the reference.
    with patch.object(own_attention, "CARD", card.device.type):
        own_attention.attend_on_card(model)
        with patch.object(own_attention, "attention", wraps=kernels.attention) as op:
            found = decoded_logits(card, model)
    error = float((found - plain).norm() / plain.norm())
    row: Row = {"calls": op.call_count, "error": error}
    if not error < CLOSE or op.call_count != STEPS * model.config.num_hidden_layers:
        raise CheckError(f"expected a call of every layer, and an error below {CLOSE}: {row}")
    return [row]


def small_model(card: Card) -> Any:
    """Mixtral with 4 small layers and random weights, in bfloat16.

    Every token takes both experts: else rounding would choose other ones for some token.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    width = 128 if card.tiny else 1024
    config = MixtralConfig(
        num_hidden_layers=4, hidden_size=width, intermediate_size=512, num_attention_heads=8,
        num_key_value_heads=2, head_dim=width // 8, vocab_size=512, num_local_experts=2,
        num_experts_per_tok=2, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return MixtralForCausalLM(config).to(card.device, torch.bfloat16).eval()


def decoded_logits(card: Card, model: Any) -> Tensor:
    """[2, STEPS, V] float32: two texts, one of them padded, and a static cache."""
    from transformers import StaticCache

    prompt = torch.arange(60, device=card.device).view(2, 30) + 3
    mask = torch.ones_like(prompt)
    mask[1, :7] = 0
    cache = StaticCache(config=model.config, max_cache_len=128)
    model(prompt, attention_mask=mask, past_key_values=cache)
    found = []
    for step in range(STEPS):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        ids = torch.full((2, 1), 9 + step, device=card.device)
        found.append(model(ids, attention_mask=mask, past_key_values=cache).logits.float())
    return torch.cat(found, 1)


# Times


class Attending(nn.Module):
    """What transformers' function reads of a layer's attention."""

    num_key_value_groups = HEADS // SHARED
    is_causal = True


@torch.inference_mode()
def times(card: Card, batches: int, positions: int) -> list[Row]:
    """Microseconds of one call in bfloat16, and then those of the op's kernels.

    The mask is that of a static cache, and shows all positions; `op_eighth_us`: the first eighth.
    `gb_per_s`: keys and values of a call over `op_us`.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def drawn(heads: int, tokens: int) -> Tensor:
        sizes = batches, heads, tokens, SIZE
        return torch.randn(*sizes, device=card.device, dtype=torch.bfloat16, generator=generator)

    def seen(count: int) -> Tensor:
        """[batches, 1, 1, positions] bool"""
        shown = torch.arange(positions, device=card.device) < count
        return shown.expand(batches, 1, 1, -1).contiguous()

    def op(mask: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        return kernels.attention(q, k, v, mask, SIZE**-0.5)

    def of_torch(mask: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).contiguous()  # as the others return it

    generator = card.generator()
    q = drawn(HEADS, 1)
    pairs = [
        (drawn(SHARED, positions), drawn(SHARED, positions))
        for _ in range(2 if card.tiny else CALLS)
    ]
    full, eighth, module = seen(positions), seen(positions // 8), Attending()
    ours = microseconds(card, partial(op, full), pairs)
    others: dict[str, Callable[..., Any]] = {
        "transformers_us": lambda k, v: sdpa_attention_forward(module, q, k, v, full)[0],
        "torch_us": partial(of_torch, full),
        "torch_no_mask_us": partial(of_torch, None),
    }
    row: Row = {
        "batch": batches,
        "positions": positions,
        "op_us": ours,
        "op_eighth_us": microseconds(card, partial(op, eighth), pairs),
        "op_no_mask_us": microseconds(card, partial(op, None), pairs),
        **{name: microseconds_or_error(card, call, pairs) for name, call in others.items()},
        "gb_per_s": sum(x.numel() * x.element_size() for x in pairs[0]) / ours / 1e3,
    }
    return [row, *kernels_of(card, partial(op, full), pairs)]


def microseconds(card: Card, call: Callable[..., Any], pairs: list[Pair]) -> float:
    """Of one of the calls with each pair of keys and values, replayed as one CUDA graph."""
    replay, _ = card.captured(lambda: [call(k, v) for k, v in pairs])
    return 1e6 * card.seconds(replay) / len(pairs)


def microseconds_or_error(card: Card, call: Callable[..., Any], pairs: list[Pair]) -> float | str:
    """`microseconds`, or why others' attention does not run: for lack of memory, say."""
    try:
        return microseconds(card, call, pairs)
    except RuntimeError as error:
        card.synchronize()
        card.release()
        return f"{type(error).__name__}: {error}"[:80]


def kernels_of(card: Card, call: Callable[..., Any], pairs: list[Pair]) -> list[Row]:
    """The kernels of a call, and microseconds of each."""
    found = card.profiled(lambda: [call(k, v) for k, v in pairs])
    return [
        {"batch": len(pairs[0][0]), "positions": pairs[0][0].shape[2], "kernel": row["kernel"],
         "calls": row["calls"] / len(pairs), "us": row["us"] / max(row["calls"], 1)}
        for row in found
    ]  # fmt: skip
