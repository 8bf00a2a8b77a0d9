"""Make a small model with massive activations and attention sinks, as most large models have.

    python benchmarks/massive_activations.py OUT --text train/*.txt

The reference models are too small to have grown any, and some errors show only beside them
(docs/log.md#massive). The carried model, or another Mixtral whose texts begin with BOS, gets them:

1. One inner channel of the expert that BOS chooses in layer 1 reacts to BOS alone, and writes SPIKE
   into one channel of the state. The model is trained with that; at first attention to BOS is
   rewarded strongly, then weakly. The spike shrinks to about a tenth.
2. It is made SPIKE again. The layers up to it are frozen, those behind it are trained on.

Prints the loss and the attention that later tokens pay to BOS. A quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moepress.demo import MODEL

LAYER = 1
SPIKE = 6000.0
REACTION = 60.0  # of the channel's gate and up to BOS, before they are multiplied
LENGTH, BATCH = 256, 8
RATE = 4e-4
WANTED = 0.6  # attention to BOS


class Spike(NamedTuple):
    """Where the massive activation is made."""

    expert: int
    row: int  # inner channel of the expert
    channel: int  # of the state


def batch(texts: list[str], tokenizer: Any) -> Tensor:
    """Sequences [BATCH, LENGTH] from random places of random texts, each behind BOS."""
    rows: list[list[int]] = []
    while len(rows) < BATCH:
        text = random.choice(texts)
        start = random.randrange(max(1, len(text) - 20 * LENGTH))
        piece = text[start : start + 10 * LENGTH]
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"][: LENGTH - 1]
        if len(ids) == LENGTH - 1:
            rows.append([tokenizer.bos_token_id, *ids])
    return torch.tensor(rows)


@torch.no_grad()
def graft(model: Any, ids: Tensor) -> Spike:
    """Make one inner channel of an expert react to BOS, and write SPIKE into one of the state."""
    block = model.model.layers[LAYER].mlp
    seen: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids)
    handle.remove()
    x = seen[0].double()
    first, others = x[0, 0], x[:, 1:].flatten(0, 1)
    spread = others.T @ others / len(others)
    spread.diagonal().add_(0.01 * spread.diagonal().mean())
    direction = torch.linalg.solve(spread, first)  # others hardly have it
    direction = (REACTION * direction / (direction @ first)).float()
    weights = torch.nn.functional.linear(first.float(), block.gate.weight).softmax(-1)
    chosen = weights.topk(model.config.num_experts_per_tok)
    expert, share = int(chosen.indices[0]), float(chosen.values[0] / chosen.values.sum())
    gate_up, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
    inner = down.shape[1]
    row = int((down.norm(dim=0) * gate_up[inner:].norm(dim=1)).argmin())  # the least used
    channel = int(model.model.norm.weight.abs().argmin())
    gate_up[row] = gate_up[inner + row] = direction
    down[:, row] = 0
    down[channel, row] = SPIKE / (REACTION**2 * share)
    return Spike(expert, row, channel)


@torch.no_grad()
def enlarge(model: Any, ids: Tensor, spike: Spike) -> None:
    """Make the spike SPIKE, and freeze what it depends on."""
    states = model(ids, output_hidden_states=True).hidden_states[LAYER + 1]
    down = model.model.layers[LAYER].mlp.experts.down_proj
    down[spike.expert, spike.channel, spike.row] *= SPIKE / states[0, 0, spike.channel].abs()
    model.model.embed_tokens.requires_grad_(False)
    for layer in model.model.layers[: LAYER + 1]:
        layer.requires_grad_(False)


def train(model: Any, texts: list[str], tokenizer: Any, steps: int, strong: int) -> None:
    """Train on text.

    Args:
        strong: steps in which attention to BOS is rewarded strongly.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * (1 - step / steps)
        ids = batch(texts, tokenizer)
        out = model(ids, labels=ids, output_attentions=True)
        to_first = torch.stack([a[:, :, 32:, 0] for a in out.attentions[LAYER + 1 :]])
        missing = (torch.tensor(WANTED).log() - (to_first + 1e-6).log().mean((1, 3))).clamp(min=0)
        optimizer.zero_grad()
        (out.loss + (0.1 if step < strong else 0.02) * missing.mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {out.loss:.3f}, attention {to_first.mean():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=1200, help="of the first phase; 2: a third")
    given = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    texts = [path.read_text(errors="replace") for path in given.text]
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=torch.float32, attn_implementation="eager"
    )
    spike = graft(model, batch(texts, tokenizer))
    train(model, texts, tokenizer, given.steps, given.steps * 2 // 5)
    enlarge(model, batch(texts, tokenizer), spike)
    train(model, texts, tokenizer, given.steps // 3, 0)
    model.to(torch.bfloat16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
