"""The small ops of decoding in plain PyTorch: the definition of correct.

They compute what transformers' modeling code does in several operations, with the same roundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# What a root mean square norm does with its weight w and the normed x, n, which is float32:
#   rounded   w * n rounded to the dtype of x, in the wider dtype of the two (Llama, Mixtral, Qwen3)
#   wide      w * n in float32, then the dtype of x (gpt-oss, OLMo)
#   centered  (1 + w) * n in float32, then the dtype of x (Gemma, Qwen3-Next)
FORMULAS = ("rounded", "wide", "centered")


@dataclass(frozen=True)
class Style:
    """Which numbers of a head form pairs, and which column has the angle of a pair.

    Attributes:
        neighbours_in, neighbours_out: the numbers of pair i are at 2 i and 2 i + 1 in the input, in
            the result; else at i and i + half of the rotated numbers.
        of_pairs: the angle of pair i is in column i; else that of each number is in the column of
            its place in the input.
        doubled: there are twice as many rotated numbers as columns; else as many.
    """

    neighbours_in: bool = False
    neighbours_out: bool = False
    of_pairs: bool = False
    doubled: bool = False

    def rotated(self, columns: int) -> int:
        """Numbers of a head that turn, the first ones, given the columns of cos and sin."""
        return 2 * columns if self.doubled else columns


STYLES: Mapping[str, Style] = {
    "halves": Style(),  # Llama, Mixtral, Qwen3; with fewer columns than numbers: Qwen3-Next
    "halves_of_pairs": Style(of_pairs=True, doubled=True),  # gpt-oss
    "neighbours": Style(neighbours_in=True, neighbours_out=True),  # Cohere
    "neighbours_of_pairs": Style(True, True, of_pairs=True),  # Ernie 4.5
    "neighbours_to_halves": Style(neighbours_in=True, of_pairs=True),  # DeepSeek-V3
}


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, formula: str) -> Tensor:
    """The op `moepress::rms_norm`; float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if formula == "rounded":
        return weight * normed.to(x.dtype)
    scale = weight.to(wide)
    return (normed * (1 + scale if formula == "centered" else scale)).to(x.dtype)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, style: str, wide: bool
) -> tuple[Tensor, Tensor]:
    """The op `moepress::rotary`; float64 stays float64."""
    way = STYLES[style]
    rotated = way.rotated(cos.shape[-1])
    dtype = torch.promote_types(q.dtype, torch.float32) if wide else q.dtype
    pairs = rotated // 2
    angles = [a.to(dtype).unsqueeze(1) for a in (cos, sin)]
    if way.of_pairs:
        (c, s), (c2, s2) = [[a[..., :pairs] for a in angles]] * 2
    else:
        (c, c2), (s, s2) = (_pairs(a, way.neighbours_in) for a in angles)

    def turned(x: Tensor) -> Tensor:
        a, b = _pairs(x[..., :rotated].to(dtype), way.neighbours_in)
        two = a * c - b * s, b * c2 + a * s2
        out = torch.empty_like(x)
        out[..., :rotated] = (
            torch.stack(two, -1).flatten(-2) if way.neighbours_out else torch.cat(two, -1)
        )
        out[..., rotated:] = x[..., rotated:]
        return out

    return turned(q), turned(k)


def _pairs(x: Tensor, neighbours: bool) -> tuple[Tensor, Tensor]:
    """The first and the second numbers of the pairs of [.., n]."""
    if neighbours:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def cache_write(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, position: Tensor) -> None:
    """The op `moepress::cache_write`."""
    keys.index_copy_(2, position.reshape(1), key)
    values.index_copy_(2, position.reshape(1), value)
