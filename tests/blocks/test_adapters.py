"""Adapted blocks compute what the model's own do, and keep its parameters and their names."""

from __future__ import annotations

import copy

import pytest
import torch

from moepress.blocks import adapt
from moepress.original.architectures import find_experts
from tests.families.models import make_model

ADAPTED = ("dbrx", "doge", "jetmoe", "llama4_text", "longcat_flash")


@pytest.mark.parametrize("family", ADAPTED)
def test_an_adapted_model_is_the_same_model(family: str) -> None:
    original = make_model(family)
    names = list(original.state_dict())
    ids = torch.randint(2, 380, (2, 12), generator=torch.Generator().manual_seed(0))
    adapted = copy.deepcopy(original)
    adapt(adapted)
    adapt(adapted)  # safe to repeat
    seen: list[torch.Tensor] = []
    for experts in find_experts(adapted).values():
        module = adapted.get_submodule(experts.path)
        module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.inference_mode():
        wanted = original(input_ids=ids, use_cache=False).logits
        found = adapted(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert list(adapted.state_dict()) == names
    assert len(seen) == len(find_experts(adapted))
    assert all(index.shape == (24, 4 if family == "doge" else 2) for index in seen)


def test_routers_of_longcat_flash_without_logits() -> None:
    """transformers before 5.19: weights and indices alone."""
    model = make_model("longcat_flash")
    adapt(model)
    ids = torch.randint(2, 380, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(input_ids=ids, use_cache=False).logits
        for module in model.modules():
            if type(module).__name__ == "LongcatFlashTopkRouter":
                module.register_forward_hook(lambda _, args, output: output[-2:])
        found = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", ADAPTED)
def test_matrices_are_those_of_the_form(family: str) -> None:
    model = make_model(family)
    state = model.state_dict()
    for experts in find_experts(model).values():
        form, module = experts.form, model.get_submodule(experts.path)
        for number in range(form.experts):
            for part, matrix in zip(
                (form.gate_up, form.down), module.matrices(number), strict=True
            ):
                rows = slice(number * part.rows, (number + 1) * part.rows)
                assert torch.equal(part.matrix([state[n][rows] for n in part.names]), matrix)
