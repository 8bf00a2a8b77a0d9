"""AutoRound: rounding and ranges learnt by signed gradient descent, block by block.

    pip install auto-round==0.16.1 && pip install -e .
    python benchmarks/rivals/make_autoround.py MODEL --calib calib/*.txt --out FOLDER

Settings: 200 iterations (the package's default), batches of 8, symmetric, groups of 128, on the
calibration sequences that moepress draws. The package splits fused experts itself. Attention has 4
bits, routers stay 16-bit. Each group counts one float16 scale and no zero. "ext" is the package's
`enable_alg_ext`, an experimental variant that it recommends at 2 bits (with more iterations).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from folder import ATTENTION_BITS, Stored, given, role, save, text, unquantized
from torch import Tensor
from transformers import AutoTokenizer

from measuring import LENGTH, layer_weights, opened

try:
    from auto_round import AutoRound
except ImportError as error:
    raise SystemExit(f"{error}. Install it: pip install auto-round==0.16.1") from error

NAMES = {
    f"autoround-{bits}{'-ext' * extended}": (bits, extended)
    for bits, extended in ((2, False), (3, False), (2, True))
}
GROUP, ITERATIONS = 128, 200


def tuned(model: Any, folder: str, ids: Tensor, bits: int, extended: bool) -> dict[str, Tensor]:
    """Quantize a model; return its dequantized linears by name, each expert's apart."""
    attention = {
        name: {"bits": ATTENTION_BITS}
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".self_attn." in name
    }
    rounding = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        scheme=f"W{bits}A16",
        bits=bits,
        group_size=GROUP,
        sym=True,
        iters=ITERATIONS,
        layer_config=attention,
        dataset=list(ids.split(8)),
        nsamples=len(ids),
        seqlen=LENGTH,
        batch_size=8,
        device_map="cpu",
        amp=False,
        enable_alg_ext=extended,
        low_cpu_mem_usage=False,
        enable_torch_compile=False,
    )
    result, _ = rounding.quantize()
    return {name: p.data.float() for name, p in result.named_parameters() if p.dim() > 1}


def gathered(name: str, original: Tensor, tuned: dict[str, Tensor], bits: int) -> Stored:
    """The matrix with a name of transformers; the experts' linears are fused again."""
    if role(name) is None:
        return unquantized(original)
    if original.dim() == 2:
        return stored(tuned[name], ATTENTION_BITS)
    path, _, last = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    experts = [
        torch.cat([tuned[f"{path}.{expert}.{part}.weight"] for part in parts])
        for expert in range(len(original))
    ]
    return stored(torch.stack(experts), bits)


def stored(weight: Tensor, bits: int) -> Stored:
    return Stored(weight, weight.numel() * bits // 8 + 2 * weight.numel() // GROUP)


def check(weight: Tensor, bits: int) -> None:
    """Stop unless every group holds at most 2^bits different values, as quantized weights do."""
    for group in weight.reshape(-1, GROUP)[:64]:
        if len(group.unique()) > 2**bits:
            raise SystemExit(f"{len(group.unique())} values in a group of {bits} bits")


def main() -> None:
    chosen = given(__doc__, NAMES)
    ids = text(chosen)
    originals = layer_weights(opened(chosen.model))
    for name in chosen.only:
        bits, extended = NAMES[name]
        weights = tuned(opened(chosen.model), str(chosen.model), ids, bits, extended)
        made = {key: gathered(key, value, weights, bits) for key, value in originals.items()}
        for key, one in made.items():
            if role(key) is not None:
                check(one.weight, bits if re.search(r"\.experts\.", key) else ATTENTION_BITS)
        settings = (
            f"{bits} bits symmetric, groups of {GROUP}, {ITERATIONS} iterations, attention "
            f"{ATTENTION_BITS} bits, {len(ids)} x {LENGTH} calibration tokens"
        )
        save(chosen.out / name, chosen.model, made, settings, "auto-round")


if __name__ == "__main__":
    main()
