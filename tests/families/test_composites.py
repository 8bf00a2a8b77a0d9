"""Composite models: the language model is compressed, all else is copied, all prompts run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moepress import kernels
from moepress.compress import compress
from moepress.format.checkpoint import load_tensors, packed_specs
from moepress.kernels.reference import dequantize
from moepress.original.composite import language_model
from moepress.original.folder import weight_files
from moepress.original.sizes import COPIED, bytes_by_part
from moepress.original.skeleton import open_folder
from tests.conftest import small_recipe
from tests.families.composites import COMPOSITES
from tests.families.images import IMAGES
from tests.families.models import make_model, save_model

TEXTS = {"input_ids": torch.arange(2, 26)[None]}
# In the default suite: tensors that are transposed on the hub; linear attention and a causal LM of
# its own; experts for images inside the layers; experts in a tower; a language model of another
# family.
USUAL = ("qwen3_vl_moe", "qwen3_5_moe", "ernie4_5_vl_moe", "dots3_note", "kimi_k25")
# Not compressed yet.
REFUSED = {"diffusion_gemma": "writes blocks of text at once", "llama4": "broken in transformers"}


def folder_of(family: str, path: Path, tokenizer: Path) -> Path:
    """A tiny composite as the hub has it."""
    save_model(make_model(family), path, tokenizer)
    if family == "qwen3_vl_moe":  # saved again, transformers does not transpose its experts
        for file in weight_files(path):
            transpose_experts(file)
    return path


def transpose_experts(file: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_tensors(file)
    turned = {n: t.mT.contiguous() if ".experts." in n else t for n, t in tensors.items()}
    save_file(turned, file, metadata={"format": "pt"})


def with_stored_weights(original: Any, compressed: Path) -> Any:
    """The original with the weights that a compressed folder holds, dequantized.

    Also checks that all others are the same.
    """
    specs = packed_specs(compressed)
    state = original.state_dict(keep_vars=True)
    with torch.no_grad():
        for path in weight_files(compressed):
            for name, value in load_tensors(path).items():
                target = state.pop(name)
                if name not in specs:
                    assert torch.equal(value, target), name
                    continue
                matrices = target.data.view(-1, *target.shape[-2:])
                starts = specs[name].offsets(*matrices.shape[1:])
                for index, codec in enumerate(specs[name].codecs):
                    part = value[starts[index] : starts[index + 1]]
                    matrices[index] = dequantize(part, *matrices.shape[1:], codec)
    tied = set(original.all_tied_weights_keys)
    assert not set(state) - tied, "a tensor of the original is not in the compressed folder"
    return original


def check_same(folder: Path, out: Path, image: dict[str, Tensor]) -> None:
    """Check a compressed folder against transformers' class with its dequantized weights."""
    packed = open_folder(out).eval()
    exact = open_folder(folder).eval()
    assert type(packed) is type(exact)
    exact = with_stored_weights(exact, out)
    with torch.inference_mode(), kernels.only("reference"):
        for run, inputs in ((language_model, TEXTS), (lambda model: model, image)):
            expected, logits = run(exact)(**inputs).logits, run(packed)(**inputs).logits
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * expected.std())
        other = packed(**{**image, "pixel_values": image["pixel_values"] + 1}).logits
        assert (other - logits)[:, -1].abs().max() > 1e-3, "the image has no influence"
    new = packed.generate(**image, max_new_tokens=3, do_sample=False)
    assert new.shape[1] in (3, image["input_ids"].shape[1] + 3)


@pytest.mark.parametrize(
    "family",
    [
        *USUAL,
        *(
            pytest.param(family, marks=pytest.mark.families)
            for family in COMPOSITES
            if family not in (*USUAL, *REFUSED)
        ),
    ],
)
def test_a_composite(family: str, text_file: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = folder_of(family, tmp_path / "original", tokenizer_folder)
    out = compress(folder, tmp_path / "out", small_recipe(text_file, bits=2.5))
    check_same(folder, out, IMAGES[family]())
    assert bytes_by_part(out)[COPIED].original == bytes_by_part(folder)[COPIED].stored
