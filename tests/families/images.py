"""A prompt with an image for each tiny composite, as its processor would make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tests.families.composites import IMAGE

Prompt = dict[str, Tensor]
ROWS, COLUMNS, MERGED = 4, 4, 4  # patches of an image; those that make one token


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _ids(tokens: int) -> Tensor:
    """Token ids [1, 6 + tokens] of a text with an image of `tokens` tokens."""
    return torch.tensor([[5, 6, 7, *[IMAGE] * tokens, 8, 9, 10]])


def patches(
    patch: int, temporal: int = 1, *, types: bool = False, flat: bool = True, more: int = 0
) -> Prompt:
    """An image as rows of its patches.

    Args:
        patch: pixels along a side of a patch.
        temporal: frames of a patch.
        types: whether the model asks which tokens are of an image.
        flat: whether a patch is a row of numbers.
        more: tokens of the image beside those of its patches.
    """
    ids = _ids(ROWS * COLUMNS // MERGED + more)
    shape = (3 * temporal * patch**2,) if flat else (3, patch, patch)
    found = {
        "input_ids": ids,
        "pixel_values": _random(ROWS * COLUMNS, *shape),
        "image_grid_thw": torch.tensor([[1, ROWS, COLUMNS]]),
    }
    return found | ({"mm_token_type_ids": (ids == IMAGE).int()} if types else {})


def pixels(side: int, tokens: int, **more: Tensor) -> Prompt:
    """An image as `side` x `side` pixels, which takes `tokens` tokens."""
    return {"input_ids": _ids(tokens), "pixel_values": _random(1, 3, side, side), **more}


def _ernie() -> Prompt:
    found = patches(14, types=True)
    return {**found, "moe_mm_token_type_ids": found["mm_token_type_ids"]}


def _inkling2() -> Prompt:
    """Four squares of 2 x 2 patches of 20 x 20 pixels."""
    grid = torch.tensor([[1, ROWS // 2, COLUMNS // 2]])
    return {**patches(20), "pixel_values": _random(4, 40, 40, 3), "image_grid_thw": grid}


def _nemotron() -> Prompt:
    found = patches(16)
    return {
        "input_ids": found["input_ids"],
        "pixel_values": found["pixel_values"],
        "image_grid_hw": torch.tensor([[ROWS, COLUMNS]]),
    }


def _gemma() -> Prompt:
    """36 patches of 16 x 16 pixels; 3 x 3 of them make a token."""
    ids = _ids(4)
    return {
        "input_ids": ids,
        "pixel_values": _random(1, 36, 3 * 16**2),
        "image_position_ids": torch.cartesian_prod(torch.arange(6), torch.arange(6))[None],
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


IMAGES: Mapping[str, Callable[[], Prompt]] = {
    "aria": lambda: pixels(64, 4),
    "deepseek_ocr2": lambda: pixels(64, 145),
    "dots3_note": lambda: patches(14),
    "ernie4_5_vl_moe": _ernie,
    "gemma4": _gemma,
    "glm4v_moe": lambda: patches(14, 2, types=True),
    "glm5_next": lambda: patches(14, 2, types=True),
    "hy_v4_vl": lambda: patches(16, types=True, more=2),  # one for the end of each row
    "inkling2": _inkling2,
    "inkling2_loop": _inkling2,
    "inkling_mm_model": lambda: {"input_ids": _ids(4), "pixel_values": _random(4, 2, 8, 8, 3)},
    "kimi_k25": lambda: patches(14, flat=False),
    "llama4": lambda: pixels(28, 1),
    "minimax_m3_vl": lambda: patches(14, 2),
    "mistral_large4": lambda: pixels(64, 4, image_sizes=torch.tensor([[64, 64]])),
    "muse_spark": lambda: patches(14, 2),
    "nemotron_h_omni": _nemotron,
    "qwen3_5_moe": lambda: patches(16, 2, types=True),
    "qwen3_omni_moe_thinker": lambda: patches(16, 2),
    "qwen3_vl_moe": lambda: patches(16, 2, types=True),
    "qwen4_exp": lambda: patches(16, 2, types=True),
    "step3p7": lambda: pixels(28, 1),
    "unlimited_ocr": lambda: pixels(64, 3),
}


def image_prompt(family: str) -> dict[str, Any]:
    """Inputs of a composite's tiny model: a text with an image in it."""
    return IMAGES[family]()
