"""Train the small Mixtral that ships with moepress, on two CPU cores, in about an hour.

    python benchmarks/carried_model/train_model.py OUT_FOLDER --tokens 12000000
    python benchmarks/carried_model/train_model.py OUT_FOLDER --minutes 60

Only a model that has learned something shows what compression costs: an under-trained one loses
nothing when it is rounded to two bits. So this is a real, if small, training run. Everything beyond
plain PyTorch raises the tokens per second or lowers the loss per token:

* **Text** (`moepress/text/corpus.py`): the standard library's sources and the language reference. A
  byte-level BPE of 2048 entries is trained on the train split. Documents, `<s> text </s>`, are
  concatenated and cut into windows of 256 tokens, at a new offset every epoch.
* **Model**: Mixtral with the config and the parameter names of `transformers`, written as one
  function of a dictionary of tensors. Tokens are sorted by expert, so each expert is three dense
  matrix products.
* **Arithmetic**: float32 master weights, cast to bfloat16 once per step; all products in bfloat16.
* **Optimizer**: Muon for the matrices. Newton-Schulz iterations turn the momentum of a matrix into
  the nearest orthogonal matrix, so that all directions learn at the same rate. All matrices of one
  shape are one batch; an expert's gate and up projections are separate matrices. AdamW trains the
  embedding, the norms and the routers.
* **Balance**: Mixtral's auxiliary loss, at 0.01: all experts are used, but not equally.
* **Schedule**: a short warm-up, then linear decay to zero at the end of the budget.

With glibc's allocator half of the time goes to page faults, because it returns large blocks to the
system at once. tcmalloc keeps them (Debian: `apt-get install libgoogle-perftools4`):

    LD_PRELOAD=libtcmalloc_minimal.so.4 OMP_WAIT_POLICY=PASSIVE \\
        python benchmarks/carried_model/train_model.py OUT_FOLDER ...

OMP_WAIT_POLICY helps on a machine that is also busy with other work: a thread that waits by
spinning would take the core from the thread it waits for.

With `--tokens` a run is repeatable up to the order in which threads add numbers; with `--minutes`
it depends on the speed of the machine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moepress.text.corpus import DOMAINS, Document, corpus

CONFIG: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LENGTH = 256  # tokens of a window
BATCH = 16  # windows of a step
DOCS_REPEATED = 4  # the language reference is 2% of the text; each epoch has it four times
MUON_LR, MUON_MOMENTUM, MUON_DECAY = 0.02, 0.95, 0.05
ADAM_LR, ADAM_BETAS = 3e-3, (0.9, 0.95)
WARMUP = 0.02  # share of the budget

Params = dict[str, Tensor]


# -- text --


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE. It puts `<s>` in front of a text, as Mixtral's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=CONFIG["vocab_size"],
            special_tokens=["<s>", "</s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[Tensor]:
    texts = [document.text for document in documents]
    return [torch.tensor([*ids, 1]) for ids in tokenizer(texts, verbose=False)["input_ids"]]


def batches(documents: list[Tensor], seed: int) -> Iterator[Tensor]:
    """Yield [BATCH, LENGTH + 1] forever. Each epoch shuffles the documents and moves the cuts."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[i] for i in order])
        stream = stream[int(torch.randint(LENGTH, (1,), generator=generator)) :]
        windows = stream.unfold(0, LENGTH + 1, LENGTH)
        shuffled = torch.randperm(len(windows), generator=generator)
        for picked in torch.split(shuffled, BATCH)[:-1]:  # the last may be short
            yield windows[picked]


# -- model --


class Rows(torch.autograd.Function):
    """x[index], in which each row of x occurs `times` times.

    `inverse` lists the places of a row's copies one after another. The gradient is a gather with
    it; that of plain indexing is a slower scatter-add.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.times = times
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return pairwise_sum(grads[0].index_select(0, inverse), ctx.times), None, None, None


def pairwise_sum(x: Tensor, times: int) -> Tensor:
    """Sums of `times` successive rows each. In bfloat16 this is faster than `sum`."""
    parts = x.view(-1, times, x.shape[-1]).unbind(1)
    return sum(parts[1:], parts[0])


rows = cast(Callable[[Tensor, Tensor, Tensor, int], Tensor], Rows.apply)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def rotary(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    dim = CONFIG["head_dim"]
    theta = CONFIG["rope_parameters"]["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(length).float(), theta).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def attention(x: Tensor, p: Params, name: str, rope: tuple[Tensor, Tensor]) -> Tensor:
    B, L, _ = x.shape
    heads, kv_heads, dim = (
        CONFIG[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    qkv = F.linear(x, torch.cat([p[f"{name}.{part}_proj.weight"] for part in "qkv"]))
    qk, v = (
        qkv.view(B, L, -1, dim).transpose(1, 2).split_with_sizes([heads + kv_heads, kv_heads], 1)
    )
    cos, sin = rope
    qk = qk * cos + torch.cat([-qk[..., dim // 2 :], qk[..., : dim // 2]], -1) * sin
    q, k = qk.split_with_sizes([heads, kv_heads], 1)
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    # At this size three plain products are faster than the fused kernel.
    future = torch.full((L, L), -torch.inf, dtype=x.dtype).triu(1)
    scores = torch.baddbmm(future, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=dim**-0.5)
    out = (scores.softmax(-1) @ v.flatten(0, 1)).view(B, heads, L, dim)
    return F.linear(out.transpose(1, 2).reshape(B, L, -1), p[f"{name}.o_proj.weight"])


def moe(x: Tensor, p: Params, name: str) -> tuple[Tensor, Tensor]:
    """Output [T, H] of the experts for x [T, H], and the balance loss (1: all are used alike)."""
    E, top_k = CONFIG["num_local_experts"], CONFIG["num_experts_per_tok"]
    T = len(x)
    probs = F.linear(x, p[f"{name}.gate.weight"]).float().softmax(-1)
    weights, chosen = probs.topk(top_k, -1)  # [T, top_k]
    order = chosen.flatten().argsort(stable=True)
    inverse = order.argsort()
    counts = chosen.flatten().bincount(minlength=E)

    mine = torch.split(rows(x, order // top_k, inverse, top_k), counts.tolist())
    gate_ups, downs = (p[f"{name}.experts.{part}_proj"].unbind() for part in ("gate_up", "down"))
    outputs = []
    for tokens, gate_up, down in zip(mine, gate_ups, downs, strict=True):
        gate, up = F.linear(tokens, gate_up).chunk(2, -1)
        outputs.append(F.linear(F.silu(gate) * up, down))
    y = rows(torch.cat(outputs), inverse, order, 1)
    weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
    balance = E * (counts / (T * top_k) * probs.mean(0)).sum()
    return pairwise_sum(y * weights.view(-1, 1), top_k), balance


def forward(p: Params, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of predicting ids[:, 1:], and the mean balance loss of the layers."""
    x = F.embedding(ids[:, :-1], p["model.embed_tokens.weight"])
    B, L, H = x.shape
    rope = rotary(L, x.dtype)
    layers = CONFIG["num_hidden_layers"]
    total = torch.zeros(())
    for i in range(layers):
        name = f"model.layers.{i}"
        normed = rms_norm(x, p[f"{name}.input_layernorm.weight"])
        x = x + attention(normed, p, f"{name}.self_attn", rope)
        normed = rms_norm(x, p[f"{name}.post_attention_layernorm.weight"])
        out, balance = moe(normed.view(-1, H), p, f"{name}.mlp")
        x = x + out.view(B, L, H)
        total = total + balance
    logits = F.linear(rms_norm(x, p["model.norm.weight"]), p["model.embed_tokens.weight"])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()), total / layers


# -- optimizer --


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest (semi-)orthogonal matrix of each of G [n, rows <= columns]."""
    X: Tensor = (G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return X.float()


class Muon:
    """Momentum, orthogonalized matrix by matrix; each projection of an expert is one matrix."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.momenta = {name: torch.zeros_like(p) for name, p in params.items()}

    @staticmethod
    def matrices(name: str, t: Tensor) -> Tensor:
        """A view of a parameter as matrices [n, rows, columns], rows <= columns."""
        if name.endswith("gate_up_proj"):
            t = t.view(-1, t.shape[1] // 2, t.shape[2])
        elif t.dim() == 2:
            t = t.unsqueeze(0)
        return t.mT if t.shape[1] > t.shape[2] else t

    def step(self, grads: Params, lr: float) -> None:
        by_shape: dict[torch.Size, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, momentum in self.momenta.items():
            momentum.lerp_(grads[name], 1 - MUON_MOMENTUM)
            update = self.matrices(name, grads[name].lerp(momentum, MUON_MOMENTUM))
            by_shape[update.shape[1:]].append((name, update))
        for group in by_shape.values():
            updates = orthogonalize(torch.cat([update for _, update in group]))
            parts = torch.split(updates, [len(update) for _, update in group])
            for (name, _), update in zip(group, parts, strict=True):
                p = self.params[name]
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - lr * MUON_DECAY)
                self.matrices(name, p).add_(update, alpha=-lr * scale)


# -- training --


@torch.no_grad()
def perplexity(p: Params, tokenizer: PreTrainedTokenizerFast, limit: int = 64) -> dict[str, float]:
    """Held-out perplexity by domain, over at most `limit` windows."""
    half = {name: t.bfloat16() for name, t in p.items()}
    result: dict[str, float] = {}
    for domain in DOMAINS:
        documents = [d for d in corpus("valid") if d.domain == domain]
        windows = torch.cat(encode(tokenizer, documents)).unfold(0, LENGTH + 1, LENGTH)
        picked = windows[torch.linspace(0, len(windows) - 1, min(limit, len(windows))).long()]
        losses = [float(forward(half, row.unsqueeze(0))[0]) for row in picked]
        result[domain] = math.exp(sum(losses) / len(losses))
    return result


def save(p: Params, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    config = MixtralConfig(**CONFIG)
    model = MixtralForCausalLM(config).bfloat16()
    model.load_state_dict({**p, "lm_head.weight": p["model.embed_tokens.weight"]})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(folder: Path, tokens: int | None, minutes: float, seed: int) -> None:
    torch.manual_seed(seed)
    documents = corpus("train")
    tokenizer = train_tokenizer(document.text for document in documents)
    documents += [d for d in documents if d.domain == "docs"] * (DOCS_REPEATED - 1)
    encoded = encode(tokenizer, documents)
    print(f"{len(documents)} documents, {sum(map(len, encoded)):,} tokens an epoch")

    model = MixtralForCausalLM(MixtralConfig(**CONFIG))
    p = {name: t.detach().clone().float() for name, t in model.named_parameters()}
    for name, t in p.items():  # matrices that add to the residual stream start small
        if name.endswith(("o_proj.weight", "down_proj")):
            t.mul_(0.5)
    print(f"{sum(t.numel() for t in p.values()):,} parameters")
    by_muon = {name: t for name, t in p.items() if "_proj" in name}
    by_adam = {name: t for name, t in p.items() if name not in by_muon}
    muon = Muon(by_muon)
    adam = torch.optim.AdamW(by_adam.values(), ADAM_LR, ADAM_BETAS, weight_decay=0.0)

    step, start, saved, mean = 0, time.monotonic(), time.monotonic(), 0.0
    for ids in batches(encoded, seed):
        seen = step * BATCH * LENGTH
        elapsed = time.monotonic() - start
        done = seen / tokens if tokens else elapsed / (60 * minutes)
        if done >= 1:
            break
        rate = min(1.0, (done + 1e-3) / WARMUP, (1 - done) / (1 - WARMUP))

        half = {name: t.bfloat16().requires_grad_() for name, t in p.items()}
        loss, balance = forward(half, ids)
        (loss + CONFIG["router_aux_loss_coef"] * balance).backward()
        grads = {name: t.grad.float() for name, t in half.items() if t.grad is not None}
        with torch.no_grad():
            muon.step(grads, MUON_LR * rate)
        for name, t in by_adam.items():
            t.grad = grads[name]
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * rate
        adam.step()

        step += 1
        mean += (loss.item() - mean) / min(step, 20)
        if step % 50 == 0:
            speed = (seen + BATCH * LENGTH) / (time.monotonic() - start)
            print(
                f"step {step} tokens {seen + BATCH * LENGTH:,} loss {mean:.3f} "
                f"balance {balance.item():.3f} rate {rate:.3f} {speed:,.0f} tokens/s",
                flush=True,
            )
        if time.monotonic() - saved > 300:
            save(p, tokenizer, folder)
            print("saved; held-out perplexity", perplexity(p, tokenizer), flush=True)
            saved = time.monotonic()
    save(p, tokenizer, folder)
    print(f"{step * BATCH * LENGTH:,} tokens in {time.monotonic() - start:.0f} s")
    print("held-out perplexity", perplexity(p, tokenizer, limit=10_000), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, help="budget in tokens: repeatable")
    parser.add_argument("--minutes", type=float, default=45.0, help="budget in time (45)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.folder, arguments.tokens, arguments.minutes, arguments.seed)


if __name__ == "__main__":
    main()
