"""What compress would refuse or fail on, inspect and dry runs refuse with the same words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralModel

from moepress.compress import compress
from moepress.errors import MoepressError
from moepress.estimate import estimate
from moepress.inspect import inspect
from moepress.original.source import Source
from moepress.original.usable import check_usable
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model


def change(folder: Path, ending: str, changed: Callable[[Tensor], Tensor]) -> Path:
    """Change the first tensor of a checkpoint whose name has this ending."""
    for path in sorted(folder.glob("*.safetensors")):
        state = load_file(path)
        for name in state:
            if name.endswith(ending):
                save_file({**state, name: changed(state[name])}, path, {"format": "pt"})
                return folder
    raise KeyError(ending)


def other_norm(folder: Path) -> Path:
    save_model(make_model("mixtral"), folder)
    return change(folder, "input_layernorm.weight", lambda value: value[:32].clone())


def cut_projection(folder: Path) -> Path:
    save_model(make_model("lara_mini"), folder)
    return change(folder, "linear_attn.in_proj.weight", lambda value: value[:-5].clone())


REFUSED = {
    other_norm: "has shape [32]. Its config says [64]",
    cut_projection: "cannot be made of the tensors of",
}


@pytest.mark.parametrize("make", REFUSED)
def test_all_refuse_alike_before_any_work(
    make: Callable[[Path], Path], text_file: Path, tmp_path: Path
) -> None:
    folder, out = make(tmp_path / "model"), tmp_path / "out"
    recipe = small_recipe(text_file, bits=2.5)
    messages = set()
    for ask in (
        lambda: inspect(folder),
        lambda: estimate(folder, out, recipe),
        lambda: compress(folder, out, recipe),
    ):
        with pytest.raises(MoepressError) as refusal:
            ask()
        messages.add(str(refusal.value))
    (message,) = messages
    assert REFUSED[make] in message
    assert not out.exists()


def test_another_default_device_is_refused(tmp_path: Path) -> None:
    source = Source(save_model(make_model("mixtral"), tmp_path / "model"))
    with torch.device("meta"), pytest.raises(MoepressError, match="default device is meta"):
        check_usable(source)
    check_usable(source)


def test_code_that_fails_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(save_model(make_model("mixtral"), tmp_path / "model"))
    check_usable(source)

    def forward(*_: Any, **__: Any) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(MixtralModel, "forward", forward)
    with pytest.raises(MoepressError, match="fails with KeyError: 'no such thing'"):
        check_usable(source)


def test_the_skeleton_stays_as_it_is(tmp_path: Path) -> None:
    source = Source(save_model(make_model("phimoe"), tmp_path / "model"))
    before = dict(source.model.named_buffers())
    check_usable(source)
    assert all(p.is_meta for p in source.model.parameters())
    for name, value in source.model.named_buffers():
        assert value is before[name] or torch.equal(value, before[name])
    assert not any("forward" in vars(layer) for layer in source.layers)
