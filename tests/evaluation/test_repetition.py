"""Loops are found, and nothing else is taken for one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.evaluation.repetition import (
    CYCLES,
    LOOP_TOKENS,
    NEW_TOKENS,
    ends_in_loop,
    measure_repetition,
    prompts_of,
)
from tests.conftest import make_model


def oracle(tokens: list[int]) -> bool:
    """The definition: the end is some cycle, repeated often enough and long enough."""
    for period in range(1, len(tokens) + 1):
        length = max(CYCLES * period, LOOP_TOKENS)
        if length <= len(tokens):
            tail = tokens[-length:]
            if all(tail[i] == tail[i % period] for i in range(length)):
                return True
    return False


@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.integers(0, 60),
)
def test_loops_are_those_of_the_definition(start: list[int], cycle: list[int], more: int) -> None:
    tokens = start + (cycle * 60)[:more]
    assert ends_in_loop(tokens) == oracle(tokens)


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([7] * LOOP_TOKENS, True),
        ([*range(100), *[7] * (LOOP_TOKENS - 1)], False),  # a few blank lines
        ([*range(20), *[1, 2, 3, 4, 5, 6, 7, 8] * CYCLES], True),
        ([*range(20), *[1, 2, 3, 4, 5, 6, 7, 8] * CYCLES, 9], False),  # the loop ended
        ([*range(32)] * 3, False),  # three repetitions are not enough
        ([*range(32)] * 4, True),
        ([], False),
    ],
)
def test_loops_by_hand(tokens: list[int], loops: bool) -> None:
    assert ends_in_loop(tokens) == loops


def test_generations_are_counted_and_an_end_is_no_loop() -> None:
    loop, ended, free = [5, 6] * 64, [5] * 100 + [1] * 28, list(range(10, 138))

    def generate(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        assert options["do_sample"] is False and options["max_new_tokens"] == NEW_TOKENS
        assert input_ids.shape == (3, 8)
        return torch.cat([input_ids, torch.tensor([loop, ended, free])], dim=1)

    model = SimpleNamespace(
        device=torch.device("cpu"),
        generation_config=SimpleNamespace(eos_token_id=1, pad_token_id=None),
        generate=generate,
    )
    found = measure_repetition(model, torch.zeros(3, 8, dtype=torch.long))
    assert (found.looping, found.generations) == (1, 3)
    assert found.share == pytest.approx(1 / 3)


def test_a_padding_that_is_no_token() -> None:
    """Old models have -1 for "none". One text ends at once, the others go on."""
    model, prompts = make_model("mixtral"), torch.arange(24).view(3, 8) + 5
    with torch.inference_mode():
        end = int(model(prompts).logits[0, -1].argmax())
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, -1
    found = measure_repetition(model, prompts)
    assert found.generations == 3 and found.looping < 3


def test_prompts_are_spread_over_the_texts() -> None:
    ids = torch.arange(10)[:, None].expand(10, 64)
    assert prompts_of(ids, 4)[:, 0].tolist() == [0, 3, 6, 9]
    assert prompts_of(ids, 99).shape == (10, 32)
