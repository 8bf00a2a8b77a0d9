"""Files of every format version open for ever: these bytes were written once and never change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moepress.codec import GRID_BITS, Codec
from moepress.kernels.reference import dequantize, pack, unpack

GOLDEN = Path(__file__).parent / "golden" / "format-1.safetensors"
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
