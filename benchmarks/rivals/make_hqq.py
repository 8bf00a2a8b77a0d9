"""HQQ: half-quadratic quantization, no calibration.

    pip install hqq==0.2.8.post1 && pip install -e .
    python benchmarks/rivals/make_hqq.py MODEL --out FOLDER

The package's own quantizer in plain PyTorch rounds every linear of the decoder layers, with its
default settings. The two halves of a fused gate and up projection are rounded as separate linears,
as in unfused models. Attention has 4 bits in groups of 64. Scales and zeros are rounded to float16
and count as such. Codes count at their bits, although the package stores 10 codes of 3 bits in 32
bits. Routers stay 16-bit.
"""

from __future__ import annotations

import torch
from folder import ATTENTION_BITS, Stored, given, role, save, unquantized
from torch import Tensor

from measuring import layer_weights, opened

try:
    from hqq.core.quantize import Quantizer, hqq_base_quant_config
except ImportError as error:
    raise SystemExit(f"{error}. Install it: pip install hqq==0.2.8.post1") from error

NAMES = {f"hqq-{bits}-g{group}": (bits, group) for bits in (2, 3) for group in (128, 64)}
ATTENTION_GROUP = 64


def rounded(weight: Tensor, bits: int, group: int) -> Stored:
    """Round one linear [N, K]."""
    settings = hqq_base_quant_config(nbits=bits, group_size=group)["weight_quant_params"]
    codes, meta = Quantizer.quantize(weight, **settings, device="cpu")
    side = {name: meta[name].half() for name in ("scale", "zero")}
    meta |= {name: value.float() for name, value in side.items()} | {"compute_dtype": torch.float32}
    nbytes = weight.numel() * bits // 8 + sum(2 * value.numel() for value in side.values())
    return Stored(Quantizer.dequantize(codes, meta), nbytes)


def quantized(name: str, weight: Tensor, bits: int, group: int) -> Stored:
    """Round one matrix, or the matrices [E, N, K] of all experts, by its role."""
    if role(name) is None:
        return unquantized(weight)
    if weight.dim() == 2:
        return rounded(weight, ATTENTION_BITS, ATTENTION_GROUP)
    halves = 2 if name.endswith("gate_up_proj") else 1
    parts = [rounded(part, bits, group) for one in weight for part in one.chunk(halves)]
    together = torch.cat([part.weight for part in parts]).view_as(weight)
    return Stored(together, sum(part.nbytes for part in parts))


def main() -> None:
    chosen = given(__doc__, NAMES)
    weights = layer_weights(opened(chosen.model))
    for name in chosen.only:
        bits, group = NAMES[name]
        made = {key: quantized(key, weight, bits, group) for key, weight in weights.items()}
        settings = f"{bits} bits, groups of {group}, attention {ATTENTION_BITS} bits, groups of 64"
        save(chosen.out / name, chosen.model, made, settings, "hqq")


if __name__ == "__main__":
    main()
