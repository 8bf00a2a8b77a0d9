"""Processors of images for the tiny composites: what their folders on the hub have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conftest import TEXT, VOCAB, byte_level_bpe
from tests.families.composites import IMAGE, VIDEO

# By family: tokens of the tiny config's ids. The others of the vocabulary's end have no use.
TOKENS: Mapping[str, Mapping[int, str]] = {
    "qwen": {
        IMAGE: "<|image_pad|>",
        VIDEO: "<|video_pad|>",
        372: "<|vision_start|>",
        373: "<|vision_end|>",
    },
    "glm4v_moe": {
        IMAGE: "<|image|>",
        VIDEO: "<|video|>",
        372: "<|begin_of_image|>",
        373: "<|end_of_image|>",
        374: "<|begin_of_video|>",
        375: "<|end_of_video|>",
    },
    "gemma4": {
        IMAGE: "<|image|>",
        VIDEO: "<|video|>",
        382: "<|audio|>",
        370: "<|image>",
        371: "<image|>",
        374: "<|audio>",
        375: "<audio|>",
    },
}
NAMED: Mapping[str, Mapping[str, int]] = {
    "gemma4": {
        "image_token": IMAGE,
        "audio_token": 382,
        "boi_token": 370,
        "eoi_token": 371,
        "boa_token": 374,
        "eoa_token": 375,
    },
}
LEARNED = 360  # entries of the vocabulary that are pieces of text


def save_processor(family: str, folder: Path) -> None:
    """Write the files of a composite's tokenizer and processor to its folder."""
    processor(family).save_pretrained(folder)


def processor(family: str) -> Any:
    """The processor of a tiny composite, for images of 4 x 4 patches or so."""
    import transformers as hf

    if family in {"qwen3_vl_moe", "qwen3_5_moe"}:
        sizes = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
        area = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
        return hf.Qwen3VLProcessor(
            hf.Qwen2VLImageProcessor(**sizes, size=area),
            _tokenizer("qwen"),
            hf.Qwen3VLVideoProcessor(**sizes, size=area),
        )
    if family == "glm4v_moe":
        area = {"shortest_edge": 28 * 28, "longest_edge": 2 * 56 * 56}
        return hf.Glm4vProcessor(
            hf.Glm4vImageProcessor(size=area), _tokenizer(family), hf.Glm4vVideoProcessor(size=area)
        )
    if family == "gemma4":
        from transformers.models.gemma4.feature_extraction_gemma4 import (
            Gemma4AudioFeatureExtractor,
        )

        few = {"max_soft_tokens": 70, "patch_size": 16}
        return hf.Gemma4Processor(
            Gemma4AudioFeatureExtractor(),
            hf.Gemma4ImageProcessor(**few),
            _tokenizer(family),
            hf.Gemma4VideoProcessor(**few),
            image_seq_length=70,
        )
    raise KeyError(family)


def _tokenizer(kind: str) -> Any:
    """A tokenizer whose last entries are a family's tokens, by id."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level_bpe(TEXT, LEARNED)
    names = TOKENS[kind]
    tokenizer.add_special_tokens([names.get(i, f"<{i}>") for i in range(LEARNED, VOCAB)])
    named = {name: names[place] for name, place in NAMED.get(kind, {}).items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=named,
    )
