"""Captured steps on the card: what is captured does not wait, and the tokens are those of before.

There are no graphs here: a replay calls the work again. tests/hf/test_captured.py repeats ops.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moepress
from moepress.chat import Conversation
from moepress.compress import compress
from moepress.hf import load_model
from moepress.hf.captured import PROOFS, CapturedSteps
from moepress.hf.cuda_graph import Graph
from moepress.hf.fused_norms import fused_norms
from moepress.hf.fused_rotary import fused_rotary
from moepress.kernels.cuda import launch as launching
from moepress.kernels.cuda import small
from moepress.original.remote_code import tokenizer_of
from tests.card.runtime import MULTIPROCESSORS
from tests.card.tensors import Card
from tests.conftest import small_recipe

IDS = torch.arange(5, 17)[None]
TOKENS = 7


def recorder(card: Card) -> Callable[[Callable[[], Tensor], torch.device], Graph]:
    def capture(work: Callable[[], Tensor], device: torch.device) -> Graph:
        assert device.type == "cuda"
        work()
        with card.without_waits():
            result = work().clone()

        def replay() -> None:
            with card.without_waits():
                result.copy_(work())

        return Graph(result, replay)

    return capture


@pytest.fixture(scope="module")
def folder(
    model_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return compress(
        model_folder(), tmp_path_factory.mktemp("card") / "folder", small_recipe(text_file, bits=2)
    )


@pytest.mark.parametrize("pruning", [None, 0.3])
def test_packed_models_are_captured(folder: Path, card: Card, pruning: float | None) -> None:
    model = load_model(folder, "cuda", pruning=pruning)
    ids = IDS.to("cuda")
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode():
        expected = model.generate(ids, **options)
        with CapturedSteps(model, capture=recorder(card)) as steps:
            found = model.generate(ids, **options)
    assert (steps.refused, steps.replayed) == (None, TOKENS - 1 - PROOFS)
    assert found.tolist() == expected.tolist()


def test_small_ops_do_not_wait(folder: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, rotary embeddings and the cache by our kernels."""
    launched: set[str] = set()
    launch = launching.launcher_for(torch.device("cuda")).launch

    def run(kernel: str, *given: Any) -> None:
        launched.add(kernel)
        launch(kernel, *given)

    launcher = launching.Launcher(run, MULTIPROCESSORS)
    monkeypatch.setitem(launching.LAUNCHERS, "cuda", lambda device: launcher)
    model = load_model(folder, "cuda")
    ids = IDS.to("cuda")
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode():
        expected = model.generate(ids, **options)
        assert not launched & set(small.KERNELS)
        with (
            fused_norms(model), fused_rotary(model),
            CapturedSteps(model, capture=recorder(card)) as steps,
        ):  # fmt: skip
            found = model.generate(ids, **options)
    assert (steps.refused, steps.replayed) == (None, TOKENS - 1 - PROOFS)
    assert found.tolist() == expected.tolist() and launched >= set(small.KERNELS)


def test_experts_beside_the_card_are_left_alone(folder: Path, card: Card) -> None:
    model = load_model(folder, "cuda", gpu_memory=230_000)
    with CapturedSteps(model, capture=recorder(card)):
        assert "forward" not in vars(model)


@pytest.mark.card
def test_commands_capture(folder: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def capture(work: Callable[[], Tensor], device: torch.device) -> Graph:
        graphs.append(recorder(card)(work, device))
        return graphs[-1]

    monkeypatch.setitem(CapturedSteps.__init__.__kwdefaults__, "capture", capture)
    words = [moepress.generate(folder, "def f1(x):", tokens=6, device=d) for d in ("cuda", "cpu")]
    assert words[0] == words[1] and len(graphs) == 1
    chat = Conversation(load_model(folder, "cuda"), tokenizer_of(folder), raw=True, tokens=6)
    assert [chat.say(text, lambda piece: None).tokens for text in ("def f1(x):", " and")] == [6, 6]
    assert chat.steps.replayed == 2 * 5 - PROOFS - 1 and chat.steps.refused is None
    assert len(graphs) == 2
