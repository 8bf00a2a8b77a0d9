"""Captured steps on the card: what is captured does not wait, and the tokens are those of before.

There are no graphs here: a replay calls the work again. tests/hf/test_captured.py repeats ops.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import moepress
from moepress.chat import Conversation
from moepress.compress import compress
from moepress.hf import load_model
from moepress.hf.captured import PROOFS, STEP, CapturedSteps, room_for
from moepress.hf.cuda_graph import Graph, numbers_made_there
from moepress.hf.fused_norms import fused_norms
from moepress.hf.fused_rotary import fused_rotary
from moepress.hf.late_stops import late_stops
from moepress.kernels.cuda import launch as launching
from moepress.kernels.cuda import small
from moepress.original.remote_code import tokenizer_of
from moepress.serve.stepping import BESIDE, Stepper
from tests.card.runtime import MULTIPROCESSORS
from tests.card.tensors import Card
from tests.conftest import small_recipe

IDS = torch.arange(5, 17)[None]
TOKENS = 7


class Heard(BaseStreamer):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None: ...


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


def test_a_text_ends_a_step_late(folder: Path, card: Card) -> None:
    """A token more takes no other wait than for what the token before it has copied."""
    model = load_model(folder, "cuda")
    ids = IDS.to("cuda")
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    waits = []
    with torch.inference_mode(), CapturedSteps(model, capture=recorder(card)) as steps:
        model.generate(ids, max_new_tokens=TOKENS, **options)
        for tokens in (8, 20):
            before = Counter(card.waits)
            found = model.generate(ids, max_new_tokens=tokens, **options)
            waits.append(card.waits - before)
        heard = Heard()
        end = int(found[0, IDS.shape[1] + 9])
        first = found[0, IDS.shape[1] :].tolist().index(end)
        replayed = steps.replayed
        stopped = model.generate(
            ids, max_new_tokens=20, streamer=heard, **{**options, "eos_token_id": end}
        )
        assert steps.replayed - replayed == first + 1 - 1  # one too many, one is compared
        kept = model.generate(ids, max_new_tokens=20, return_dict_in_generate=True, **options)
    more = waits[1] - waits[0]
    assert sum(more.values()) == 12 and all(why.startswith("event") for why in more)
    assert stopped.tolist() == found[:, : IDS.shape[1] + first + 1].tolist()
    assert heard.tokens == stopped[0].tolist()
    cache = next(v for v in kept.values() if isinstance(v, DynamicCache))
    assert cache.get_seq_length() == IDS.shape[1] + 20 - 1


def test_a_text_ends_at_once_where_steps_are_not_captured(folder: Path, card: Card) -> None:
    model = load_model(folder, "cuda")
    ids = IDS.to("cuda")
    with torch.inference_mode(), late_stops("cuda", lambda: False):
        before = Counter(card.waits)
        model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    assert not any(why.startswith("event") for why in card.waits - before)


def test_numbers_are_made_on_the_card(card: Card) -> None:
    """As transformers 5.17 makes masks of eager attention; torch gives the same tensors."""
    for number in (0.0, 3, True):
        for options in ({}, {"dtype": torch.bfloat16}):
            given = {"device": torch.device("cuda"), **options}
            before = Counter(card.uploads)
            plain = torch.tensor(number, **given)
            assert sum((card.uploads - before).values()) == 1
            with card.without_waits(), numbers_made_there():
                found = torch.tensor(number, **given)
            assert (found.device, found.dtype, found.shape) == (plain.device, plain.dtype, ())
            assert found.tolist() == plain.tolist()
    with numbers_made_there():
        assert torch.tensor([1, 2], device="cuda").tolist() == [1, 2]
        assert torch.tensor(2.5).item() == 2.5


def test_experts_beside_the_card_are_left_alone(folder: Path, card: Card) -> None:
    model = load_model(folder, "cuda", gpu_memory=230_000)
    with CapturedSteps(model, capture=recorder(card)):
        assert "forward" not in vars(model)


def test_a_server_captures_a_sequence_that_is_alone(folder: Path, card: Card) -> None:
    """It goes on among others, and again alone; logits are those without graphs."""
    model = load_model(folder, "cuda")
    found = []
    for capture in (recorder(card), None):
        stepper = Stepper(model)
        assert "forward" not in vars(model)
        devices = () if capture is None else ("cuda",)
        stepper.steps = CapturedSteps(model, capture=capture or recorder(card), devices=devices)
        one, two = stepper.new(), stepper.new()
        stepper.prefill(one, range(5, 17))
        logits = [stepper.decode([one], [7 + number]) for number in range(PROOFS + 3)]
        stepper.prefill(two, range(30, 40))  # while the other is shown
        logits += [stepper.decode([one, two], [9, 3]) for _ in range(2)]
        assert "forward" not in vars(model)
        logits += [stepper.decode([two], [9 + number]) for number in range(4)]
        logits += [stepper.decode([one], [9 + number]) for number in range(3)]
        if capture is not None:
            assert (stepper.steps.refused, stepper.steps.replayed) == (None, 3 + 3 + 2)
        stepper.decode([one, two], [1, 1])
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_memory_beside_the_caches_of_a_server(folder: Path, card: Card) -> None:
    """A captured step keeps its cache when others join. It is bounded by the budget of caches."""
    model = load_model(folder, "cuda")
    stepper = Stepper(model)
    step = stepper.least_bytes + room_for(12) * stepper.token_bytes
    held = {}
    for share in (0.0, 1.0):
        stepper.steps = CapturedSteps(model, capture=recorder(card))
        stepper.keep_within(int(share * BESIDE * step))
        for text in (12, STEP + 1):
            one, two = stepper.new(), stepper.new()
            stepper.prefill(one, range(5, 5 + text))
            stepper.decode([one], [7])
            alone = "forward" in vars(model)
            stepper.prefill(two, range(5, 17))
            stepper.decode([one, two], [7, 8])
            gc.collect()
            held[share, text] = alone, card.allocated
            del one, two
    (none, least), (one, more) = held[0.0, 12], held[1.0, 12]
    assert (none, one) == (False, True)
    assert 0.8 * step < more - least < 1.1 * step  # what the graph computes comes on top
    assert not held[1.0, STEP + 1][0]  # its step would take more
    assert held[1.0, STEP + 1][1] - held[0.0, STEP + 1][1] == more - least


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
