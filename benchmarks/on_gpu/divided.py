"""Experts divided between the card and the CPU: half of them on each, and models that are.

The CPU's half runs whatever backend is there: without compiled parts the reference, slowly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moepress import kernels
from moepress.format.checkpoint import is_compressed
from moepress.format.codec import PackedSpec
from moepress.kernels import cpu
from moepress.kernels.divided import DividedExperts, packed_experts, start_crossing
from moepress.kernels.expert_shards import keep_experts
from moepress.kernels.gate import Gate
from moepress.kernels.modules import PackedExperts
from moepress.kernels.random_codes import fill_packed
from on_gpu.card import Card
from on_gpu.case import Case, CheckError, Row

SHAPE, TINY = (4096, 14336, 8, 2), (128, 256, 8, 2)  # hidden, intermediate, experts, chosen
WIDTHS = (2, 3)  # in turn
FAR = 0.02  # of the norm: bfloat16 sums in another order


def cases(card: Card, models: Path) -> Iterator[Case]:
    yield Case("half of a layer's experts on the card", partial(halves, card), 120)
    folders = {path.parent for path in models.rglob("config.json")} if models.is_dir() else set()
    for folder in sorted(folders):
        if is_compressed(folder) and cpu.missing() is None:
            yield Case(f"{folder.name}, half on the card", partial(model, card, folder), 120)


def layer(card: Card) -> PackedExperts:
    hidden, inner, experts, _ = TINY if card.tiny else SHAPE
    bits = tuple(WIDTHS[e % len(WIDTHS)] for e in range(experts))
    spec = PackedSpec(bits, 128, "trellis")
    with torch.device(card.device):
        module = PackedExperts(experts, hidden, inner, spec, spec, Gate("silu"))
    names = (module.first_proj, module.down_proj)
    for parameter, size in zip(names, module.shapes, strict=True):
        fill_packed(parameter.data, spec, *size, card.generator(5))
    return module


@torch.inference_mode()
def halves(card: Card) -> list[Row]:
    """Check the sum of both halves, and time them together and apart."""
    whole = layer(card)
    hidden, _, experts, chosen = TINY if card.tiny else SHAPE
    host = copy.deepcopy(whole).to("cpu")
    on_card = copy.deepcopy(whole)
    keep_experts(on_card, range(experts // 2))
    keep_experts(host, range(experts // 2, experts))
    both = DividedExperts(on_card, host)
    rows: list[Row] = []
    for tokens in (1, 16):
        x = torch.randn(tokens, hidden, device=card.device, generator=card.generator(tokens))
        scores = torch.rand(tokens, experts, device=card.device, generator=card.generator(tokens))
        index = scores.argsort(1)[:, :chosen]
        index[0, :2] = torch.tensor([0, experts - 1], device=card.device)  # one of each half
        given = x.bfloat16(), index, torch.full_like(index, 1 / chosen, dtype=torch.bfloat16)
        exact = whole(*given)
        far = float((both(*given) - exact).norm() / exact.norm())
        if not far < FAR:
            raise CheckError(f"{tokens} tokens: {far:.2g} of the norm away from the undivided")
        on_cpu = [one.cpu() for one in given]
        work = {
            "whole_us": partial(whole, *given),
            "divided_us": partial(both, *given),
            "card_half_us": partial(on_card, *given),
            "crossing_us": partial(crossed, given),
        }
        times = {name: 1e6 * card.seconds(run, rounds=3) for name, run in work.items()}
        alone = Card("cpu", card.tiny).seconds(partial(host, *on_cpu), rounds=3)
        backend = kernels.backends.backend_for(torch.device("cpu")).name
        row = {"tokens": tokens, "host_backend": backend, "far": far, "host_half_us": 1e6 * alone}
        rows.append(row | times)
    return rows


def crossed(given: tuple[Tensor, ...]) -> None:
    """Activations to the CPU, and no more."""
    start_crossing(given)()


@torch.inference_mode()
def model(card: Card, folder: Path) -> list[Row]:
    """A folder with room for half of its experts on the card, beside the whole on the CPU."""
    from moepress.hf import load_model
    from moepress.store.forecast import card_fits
    from moepress.store.memory import memory_wanted

    (fit,) = card_fits(folder, 0).values()
    room = fit.other_bytes + fit.expert_bytes // 2
    if card.is_cuda:
        divided = load_model(folder, str(card.device), gpu_memory=room)
    else:
        from transformers import AutoModelForCausalLM

        with memory_wanted("fit", room):
            divided = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    ids = torch.arange(32)[None] % 300 + 2
    exact = load_model(folder)(ids).logits.float()
    found = divided(ids.to(card.device)).logits.float().cpu()
    far = float((found - exact).norm() / exact.norm())
    if not far < 2 * FAR:
        raise CheckError(f"logits are {far:.2g} of the norm away from those on the CPU")
    kinds = [isinstance(one, DividedExperts) for one in packed_experts(divided).values()]
    return [{"folder": folder.name, "divided_layers": sum(kinds), "layers": len(kinds), "far": far}]
