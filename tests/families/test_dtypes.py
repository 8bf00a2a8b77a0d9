"""A compressed folder is loaded in the dtypes of the original: routers stay in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from moepress.compress import compress
from moepress.format.codec import pre_quant_scale_of
from moepress.original.skeleton import open_folder
from moepress.original.source import Source
from moepress.rounding.same_layer import is_norm
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model
from tests.families.state import COMPRESS, EXPECTED, FAMILIES

USUAL = ("deepseek_v3",)  # its routers are kept in float32


def families() -> Iterator[object]:
    for family in FAMILIES:
        if (family, COMPRESS) not in EXPECTED:
            marks = [] if family in USUAL else [pytest.mark.families]
            yield pytest.param(family, marks=marks)


@pytest.mark.parametrize("family", families())
def test_dtypes(family: str, text_file: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Of a model published in bfloat16, but for the routers, which are in float32."""
    model: nn.Module = make_model(family)
    for path, module in model.named_modules():
        if not path.endswith(("gate", "router")):
            for value in module.parameters(recurse=False):
                value.data = value.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    folder = save_model(model, tmp_path / "original", tokenizer_folder)
    original = open_folder(folder, dtype="auto").state_dict()
    source = Source(folder)
    for name in source.names() + [n for path in source.layer_paths for n in source.names(path)]:
        assert source.stored_dtype(name) == original[name].dtype, name
        assert torch.equal(source.tensor(name), original[name]), name
    out = compress(folder, tmp_path / "out", small_recipe(text_file, bits=2.5))
    scales = {pre_quant_scale_of(n) for one in source.experts.values() for n in one.parameters}
    reordered = {name for experts in source.experts.values() for name in experts.biases}
    scaled = {  # what may be scaled against packed linears
        f"{path}.{name}"
        for path, module in model.named_modules()
        if not path.endswith(("gate", "router"))
        for name, value in module.named_parameters(recurse=False)
        # An indexer may multiply states with matrices of no linear.
        if isinstance(module, nn.Linear)
        or is_norm(module)
        or (path.endswith("indexer") and value.dim() == 2)
    }
    for name, value in open_folder(out, dtype="auto").state_dict().items():
        if value.dtype != torch.uint8 and name not in scales:
            assert value.dtype == original[name].dtype, name
            known = name in reordered or name in scaled
            assert known or torch.equal(value, original[name]), name
