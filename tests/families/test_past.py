"""Texts that go on from the beginning of another one, in every family: the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moepress.hf import text_model
from moepress.hf.captured import distance
from moepress.hf.past import Past
from moepress.serve.stepping import CLOSE, Stepper
from tests.families.models import make_model
from tests.families.state import FAMILIES

FIRST = [5 + 7 * i % 40 for i in range(153)]
# The router mixes the tokens that are computed together; or the tiny config has a window, which the
# model's cache heeds and its attention to a whole prompt does not.
DIFFERS = ("doge", "qwen3_vl_moe", "qwen3_omni_moe_thinker")
# Caches of their own.
UNKNOWN = {"deepseek_v4", "minimax", "minimax_m3_vl", "minimax_m3_vl_text", "unlimited_ocr"}


def after(net: Any, ids: list[int], past: Past | None = None) -> tuple[Tensor, list[int]]:
    """Logits [V] after a text, and the text with three tokens more."""
    tokens = torch.tensor([ids])
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    with torch.inference_mode():
        out = net.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=3,
            min_new_tokens=3,
            **options,
            **({} if past is None else past.begin(ids)),
        )
    whole: list[int] = out.sequences[0].tolist()
    if past is not None:
        past.end(whole)
    return out.logits[0][0], whole


@pytest.mark.families
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in DIFFERS])
def test_turns(family: str) -> None:
    net = text_model(make_model(family)).eval()
    for module in net.modules():
        if hasattr(module, "index_topk"):  # in random models the tokens that it chooses are ties
            module.index_topk = 1000
    past = Past(net)
    _, whole = after(net, FIRST, past)
    second = [*whole, 60, 61, *FIRST[:20]]
    third = [*FIRST[:-20], 64, 65, 66]
    for ids in (second, third):
        got, _ = after(net, ids, past)
        assert distance(got, after(net, ids)[0]) < CLOSE
    stepper = Stepper(net)
    assert stepper.begins == (family not in UNKNOWN)
    if not stepper.begins:
        return
    state = stepper.new()
    stepper.prefill(state, FIRST[:128])
    stepper.mark(state)
    stepper.prefill(state, FIRST[128:])
    for ids in (second, third, FIRST[:145]):
        first = stepper.reach(state, ids[:-1])
        assert first >= 128
        state_of_ids = stepper.beginning(state, first)
        got = stepper.prefill(state_of_ids, ids[first:])
        assert distance(got, after(net, ids)[0]) < CLOSE
