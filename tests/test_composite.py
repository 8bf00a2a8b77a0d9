"""Composite models: the language model is compressed, all else is copied, all prompts run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress import kernels
from moepress.compress import compress
from moepress.format.checkpoint import load_tensors, packed_specs
from moepress.kernels.reference import dequantize
from moepress.original.composite import language_model
from moepress.original.folder import weight_files
from moepress.original.skeleton import open_folder
from tests.composites import COMPOSITES, make
from tests.conftest import small_recipe

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def composite_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Folder:
    """Folder of a tiny composite with its tokenizer, made once each."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = path = tmp_path_factory.mktemp(family)
            make(family).save_pretrained(path)
            for file in tokenizer_folder.iterdir():
                shutil.copy(file, path)
        return made[family]

    return folder


def unpacked(original: Any, compressed: Path) -> Any:
    """The original with the weights that a compressed folder holds, dequantized."""
    specs = packed_specs(compressed)
    with torch.no_grad():
        for path in weight_files(compressed):
            for name, value in load_tensors(path).items():
                target = original.state_dict(keep_vars=True)[name]
                if name not in specs:
                    assert torch.equal(value, target), name
                    continue
                spec, matrices = specs[name], target.data.view(-1, *target.shape[-2:])
                starts = spec.offsets(*matrices.shape[1:])
                for index, (codec, matrix) in enumerate(zip(spec.codecs, matrices, strict=True)):
                    part = value[starts[index] : starts[index + 1]]
                    matrix.copy_(dequantize(part, *matrix.shape, codec))
    return original


@pytest.mark.parametrize("family", COMPOSITES)
def test_a_composite(
    composite_folder: Folder, text_file: Path, tmp_path: Path, family: str
) -> None:
    folder = composite_folder(family)
    out = compress(folder, tmp_path / "out", small_recipe(text_file, bits=2.5))
    original = open_folder(folder).eval()
    packed = open_folder(out).eval()
    assert type(packed) is type(original)
    exact = unpacked(original, out)
    prompt = COMPOSITES[family].image()
    texts = {"input_ids": torch.arange(2, 26)[None]}
    with torch.inference_mode(), kernels.only("reference"):
        for inputs in (texts, prompt):
            expected = language_model(exact)(**inputs).logits
            logits = language_model(packed)(**inputs).logits
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * expected.std())
    new = language_model(packed).generate(**prompt, max_new_tokens=4, do_sample=False)
    assert new.shape[1] == prompt["input_ids"].shape[1] + 4
