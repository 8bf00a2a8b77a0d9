"""KL divergence of small compressed models from their originals, on the card and on the CPU.

    PYTHONPATH=src python benchmarks/on_gpu/kl.py FOLDER [ORIGINAL ...]

compresses the carried model and any others given, evaluates them on the CPU, and writes all that a
machine without compiled parts needs: originals, compressed folders, token ids, and the CPU's
figures. `cases` repeats the evaluation on a card. All run in float32, with packed products at 8 and
at 16 bits of activations.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from torch import Tensor
from torch.nn import functional as F

from on_gpu.card import Card
from on_gpu.case import Case, CheckError, Row

RECIPES = ("default", "fast")
WINDOWS, LENGTH = 12, 256
CLOSE = 0.01  # relative difference of KL divergences
FINER = 0.02  # how much lower it may be where activations are finer than the oracle's


def make(folder: Path, originals: list[Path]) -> None:
    from transformers import AutoTokenizer

    from moepress.compress import compress
    from moepress.demo import MODEL
    from moepress.recipe import Recipe
    from moepress.text.windows import evaluation_tokens

    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for original in (MODEL, *originals):
        name = "carried" if original == MODEL else original.name
        kept = original_of(folder, name)
        if not kept.exists():
            shutil.copytree(original, kept)
        tokenizer = AutoTokenizer.from_pretrained(original)
        ids = evaluation_tokens([("stdlib", 1.0)], tokenizer, LENGTH, WINDOWS).ids
        torch.save(ids, folder / f"{name}.ids.pt")
        exact = log_probabilities(kept, "cpu", ids)
        for recipe in RECIPES:
            out = folder / f"{name}-{recipe}"
            if not (out / "config.json").exists():
                changes = {"bits": 2.5, "calib": (("stdlib", 1.0),), "sequences": 64,
                           "sequence_length": LENGTH}  # fmt: skip
                compress(kept, out, Recipe.load(recipe, **changes))
                for extra in (*out.glob("moepress_*"), *out.glob("*.html")):
                    extra.unlink()
            found = {bits: divergence(out, "cpu", ids, exact, bits) for bits in (8, 16)}
            with oracle():
                rounded = {bits: divergence(out, "cpu", ids, exact, bits) for bits in (8, 16)}
            figures[out.name] = {"original": name, "kl": found, "oracle": rounded}
            print(out.name, figures[out.name], flush=True)
            (folder / "figures.json").write_text(json.dumps(figures))


def original_of(folder: Path, name: str) -> Path:
    from moepress.demo import MODEL

    return MODEL if name == "carried" else folder / name


@contextmanager
def oracle() -> Iterator[None]:
    """Context in which the reference backend rounds activations as kernels do."""
    from moepress import kernels
    from moepress.kernels import reference

    rounding = dataclasses.replace(
        kernels.BACKENDS["reference"],
        name="oracle",
        rank=1000,
        linear=partial(reference.linear, rounded=True),
        experts=partial(reference.experts, rounded=True),
    )
    kernels.register_backend(rounding)
    try:
        with kernels.only("oracle"):
            yield
    finally:
        del kernels.BACKENDS["oracle"]
        kernels.register_backend(kernels.BACKENDS["reference"])


@torch.inference_mode()
def log_probabilities(
    folder: Path, device: str | torch.device, ids: Tensor, activation_bits: int | None = None
) -> Tensor:
    """[windows, L, V] float32, on the device."""
    from transformers import AutoModelForCausalLM

    import moepress  # noqa: F401  # registers the loader
    from moepress.kernels.modules import set_activation_bits

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    if activation_bits is not None:
        set_activation_bits(model, activation_bits)
    chunks = [model(chunk.to(device), use_cache=False).logits for chunk in ids.split(4)]
    return F.log_softmax(torch.cat(chunks).float(), -1)


def divergence(
    folder: Path, device: str | torch.device, ids: Tensor, exact: Tensor, bits: int
) -> float:
    """Mean KL(original || compressed) in nats per token."""
    ours = log_probabilities(folder, device, ids, bits)
    return float((exact.exp() * (exact - ours)).sum(-1).double().mean())


def cases(card: Card, folder: Path) -> Iterator[Case]:
    path = folder / "figures.json"
    if not path.is_file():
        yield Case("start", partial(missing, path), 5)
        return
    for name, about in json.loads(path.read_text()).items():
        yield Case(name, partial(compared, card, folder, name, about), 60)
    yield Case("ways to load", partial(check_loading, card, folder), 60)


@torch.inference_mode()
def check_loading(card: Card, folder: Path) -> list[Row]:
    """Packed modules on the card give the same, however they came there."""
    from transformers import AutoModelForCausalLM

    from moepress.hf import load_model

    path, ids = folder / "carried-default", torch.arange(3, 40)[None]
    moved = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(card.device)
    places = {str(p.device) for p in load_model(path, str(card.device)).parameters()}
    if places != {str(card.device)}:
        raise CheckError(f"parameters are on {places}, expected {card.device}")
    exact = moved(ids.to(card.device)).logits
    layer = {f"model.layers.{n}": card.device if n < 2 else "cpu" for n in range(4)}
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    maps = {
        "one device": {"": card.device},
        "auto": "auto",
        "two layers on the CPU": layer | dict.fromkeys(names, card.device),
    }
    wrong = []
    for label, device_map in maps.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=device_map)
        if not torch.equal(model(ids.to(card.device)).logits, exact):
            wrong.append(label)
    text = moved.generate(ids.to(card.device), max_new_tokens=8, do_sample=False)
    if wrong or text.shape[1] != ids.shape[1] + 8:
        raise CheckError(f"other logits with device_map: {wrong}; generated {text.shape}")
    return [{"ways": len(maps), "parameters_on": str(places)}]


@torch.inference_mode()
def check_static_generate(card: Card, folder: Path) -> list[Row]:
    """transformers' own way to decode fast: a static cache, the forward pass compiled."""
    from transformers import AutoModelForCausalLM

    import moepress  # noqa: F401  # registers the loader
    from moepress.kernels.modules import set_activation_bits

    path = folder / "carried-default"
    if not path.is_dir():
        missing(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(card.device)
    set_activation_bits(model, 16)
    ids = torch.arange(3, 20, device=card.device)[None]
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    plain = model.generate(ids, **options)
    started = time.perf_counter()
    first = model.generate(ids, cache_implementation="static", **options)
    compiled_s = time.perf_counter() - started
    started = time.perf_counter()
    model.generate(ids, cache_implementation="static", **options)
    card.synchronize()
    again = time.perf_counter() - started
    same = float((plain == first).float().mean())
    if same < 0.9:  # sums in another order may choose another token once
        raise CheckError(f"{same:.0%} of the tokens are those without compilation")
    return [{"same_tokens": same, "first_s": compiled_s, "tokens_per_s": 24 / again}]


def missing(path: Path) -> list[Row]:
    raise CheckError(f"{path} is not here: make it with benchmarks/on_gpu/kl.py, and carry it")


def compared(card: Card, folder: Path, name: str, about: Row) -> list[Row]:
    """The divergence on this device beside those on the CPU, from when the folder was made."""
    ids = torch.load(folder / f"{about['original']}.ids.pt")
    exact = log_probabilities(original_of(folder, about["original"]), card.device, ids)
    rows: list[Row] = []
    for bits, rounded in about["oracle"].items():
        here = divergence(folder / name, card.device, ids, exact, int(bits))
        rows.append({"activation_bits": bits, "kl": here, "oracle": rounded,
                     "kl_on_cpu": about["kl"][bits], "difference": here / rounded - 1})  # fmt: skip
    # At 8 bits many tokens are multiplied in bfloat16, which is finer: the KL may be lower.
    if any(not -FINER * (row["activation_bits"] == "8") - CLOSE <= row["difference"] <= CLOSE
           for row in rows):  # fmt: skip
        raise CheckError(f"KL differs by more than {CLOSE:.0%}: {rows}")
    return rows


if __name__ == "__main__":
    make(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
