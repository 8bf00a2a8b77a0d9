"""Files of every format version open for ever: these bytes were written once and never change.

There are none of version 2: its trellis codes were rotated in other runs, and are refused
(test_checkpoint.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moepress.format.codec import GRID_BITS, HALF_WIDTHS, TRELLIS_BITS, Codec
from moepress.kernels import trellis
from moepress.kernels.reference import dequantize
from moepress.kernels.scalar import pack, unpack

FOLDER = Path(__file__).parent / "golden"
GOLDEN = FOLDER / "format-1.safetensors"
ROWS, COLS = 17, 64


@pytest.mark.parametrize("bits", GRID_BITS)
def test_format_1(bits: int) -> None:
    stored = load_file(GOLDEN)
    packed, codes, scales = (stored[f"{bits}.{n}"] for n in ("packed", "codes", "scales"))
    zeros = stored.get(f"{bits}.zeros")
    codec = Codec(bits, 32)
    found = unpack(packed, ROWS, COLS, codec)
    assert torch.equal(found[0], codes) and torch.equal(found[1], scales)
    zero = torch.full((ROWS, 2), codec.levels / 2)
    if zeros is not None:
        assert found[2] is not None and torch.equal(found[2], zeros)
        zero = zeros.float() * codec.levels / 255
    expected = scales.float().repeat_interleave(32, 1) * (codes - zero.repeat_interleave(32, 1))
    assert torch.equal(dequantize(packed, ROWS, COLS, codec), expected)
    assert torch.equal(pack(codes, scales, zeros, codec), packed)


@pytest.mark.parametrize("bits", TRELLIS_BITS)
def test_formats_4_and_6(bits: float) -> None:
    """The trellis family, 6: its half widths; `weights` [70, 64] are the rotated ones."""
    stored = load_file(FOLDER / f"format-{6 if bits in HALF_WIDTHS else 4}.safetensors")
    packed, weights = stored[f"{bits}.packed"], stored[f"{bits}.weights"]
    codec = Codec(bits, 32, "trellis")
    found = torch.cat([part for _, part in trellis.strips(packed, *weights.shape, codec)])
    assert torch.equal(found, weights)
    assert torch.equal(trellis.pack(*trellis.unpack(packed, *weights.shape, codec), codec), packed)
    back = dequantize(packed, *weights.shape, codec, torch.float64)
    torch.testing.assert_close(trellis.rotate(back), weights.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cols", [96, 768])
def test_rotation_of_format_4(cols: int) -> None:
    stored = load_file(FOLDER / "format-4.safetensors")
    x, rotated = stored[f"rotation.{cols}.x"], stored[f"rotation.{cols}.qx"]
    torch.testing.assert_close(trellis.rotate(x.double()), rotated.double(), rtol=0, atol=1e-6)
