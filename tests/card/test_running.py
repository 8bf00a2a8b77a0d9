"""A compressed model on a card: nothing waits for the card in a step of decoding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import moepress
from moepress.chat import Conversation
from moepress.compress import compress
from moepress.hf import fused_router, load_model, own_attention
from moepress.kernels.divided import DividedExperts
from moepress.original.remote_code import tokenizer_of
from moepress.serve.stepping import Stepper
from tests.card.tensors import Card
from tests.conftest import small_recipe

IDS = torch.arange(5, 45).view(2, 20)


@pytest.fixture(scope="module")
def folder(
    model_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Widths with and without halves, an expert left out, and packed tables."""
    recipe = small_recipe(
        text_file, "default", bits=2, expert_bits=(0, 1.5, 2, 3), per_projection=False,
        sensitivity="none",
    )  # fmt: skip
    return compress(model_folder(), tmp_path_factory.mktemp("card") / "folder", recipe)


@torch.inference_mode()
def steps(model: Any, card: Card | None) -> Tensor:
    """Logits of three steps of decoding with a static cache. With a card nothing waits for it."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    where = {"device": model.device}
    found = [model(IDS.to(model.device), past_key_values=cache).logits[:, -1:]]
    position = torch.tensor([IDS.shape[1]], **where)
    for number in range(3):
        token = torch.full((2, 1), 7 + number, **where)
        # What is made once, such as tables of signs, is made in the first step.
        with card.without_waits() if card and number else nullcontext():
            out = model(token, past_key_values=cache, cache_position=position)
            position = position + 1
        found.append(out.logits)
    return torch.cat(found, 1).cpu()


def close(found: Tensor, expected: Tensor) -> None:
    """Compare logits. Kernels round otherwise than those of the CPU: a choice may change."""
    assert (found - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("pruning", [None, 0.3])
def test_a_step_of_decoding_does_not_wait(folder: Path, card: Card, pruning: float | None) -> None:
    expected = steps(load_model(folder, pruning=pruning), None)
    found = steps(load_model(folder, "cuda", pruning=pruning), card)
    close(found, expected)


def test_attention_of_a_step_is_ours(
    folder: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gives what PyTorch's attention gives, in the same model on the card."""
    model = load_model(folder, "cuda")
    calls: list[Tensor] = []
    plain = own_attention.attention

    def counted(q: Tensor, *rest: Any) -> Tensor:
        calls.append(q)
        return plain(q, *rest)

    monkeypatch.setattr(own_attention, "attention", counted)
    found = steps(model, card)
    assert len(calls) == 3 * model.config.num_hidden_layers
    for module in model.modules():
        setattr(module, own_attention.MARK, False)
    expected = steps(model, card)
    assert len(calls) == 3 * model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert model.config._attn_implementation == "sdpa"


def test_routers_of_a_step_are_ours(
    folder: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel chooses as the model's routers do, and nothing waits for it."""
    model = load_model(folder, "cuda")
    calls: list[Tensor] = []
    plain = fused_router.routed

    def counted(hidden: Tensor, *rest: Any) -> Any:
        calls.append(hidden)
        return plain(hidden, *rest)

    monkeypatch.setattr(fused_router, "routed", counted)
    expected = steps(model, card)
    assert not calls
    with fused_router.fused_routers(model):
        found = steps(model, card)
    assert len(calls) == 3 * model.config.num_hidden_layers
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.card
def test_batches_of_a_server(folder: Path, card: Card) -> None:
    found = []
    for device in ("cuda", "cpu"):
        stepper = Stepper(load_model(folder, device))
        assert stepper.batches and stepper.chunks
        states = [stepper.new() for _ in range(3)]
        for state, length in zip(states, (21, 2, 9), strict=True):
            stepper.prefill(state, list(range(3, 3 + length)))
        for number in range(3):
            logits = stepper.decode(states, [5 + number, 6, 7])
        found.append(logits.cpu())
    close(*found)


@pytest.mark.card
@pytest.mark.parametrize("memory", [None, 30_000])
def test_experts_beside_the_card(folder: Path, card: Card, memory: int | None) -> None:
    """Some experts are on the card, the others in memory or on disk."""
    model = load_model(folder, "cuda", gpu_memory=230_000, memory=memory)
    assert any(isinstance(m, DividedExperts) for m in model.modules())
    whole = load_model(folder)
    with torch.inference_mode():
        expected = whole(IDS).logits
        found = model(IDS.to("cuda")).logits.cpu()
    close(found, expected)


@pytest.mark.card
def test_commands_that_run_a_model(
    folder: Path,
    model_folder: Callable[..., Path],
    text_file: Path,
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda x, *_, **__: x)
    texts = [str(text_file)]
    results = [
        moepress.evaluate(
            folder,
            texts,
            against=model_folder(),
            length=48,
            limit=2,
            device=device,
            pruning=0.2,
        )
        for device in ("cuda", "cpu")
    ]
    on_card, on_cpu = (result.texts[0] for result in results)
    assert on_card.kl == pytest.approx(on_cpu.kl, rel=0.1)
    words = [moepress.generate(folder, "def f1(x):", tokens=4, device=d) for d in ("cuda", "cpu")]
    assert words[0] == words[1]
    tokenizer = tokenizer_of(folder)
    chat = Conversation(load_model(folder, "cuda"), tokenizer, raw=True, tokens=3)
    assert chat.say("def f1(x):", lambda text: None).tokens == 3
