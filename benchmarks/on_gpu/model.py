"""Decode with a model of Mixtral-8x7B's shape: packed at 2.5 bits, and transformers in bfloat16.

Weights are random and made on the card. The forward pass of one token is captured as a CUDA graph,
with a cache of fixed size, for both models alike: token, position and cache are read and advanced
on the card, so a replay is one step of greedy decoding. What transformers computes in many small
kernels (norms, rotary embedding, router) is compiled into one each in the bfloat16 model. The
packed one is captured as `moepress.hf.captured` does it: with kernels of ours for these, for
attention and for the cache.

bfloat16 has 93 GB: where that does not fit, both models are also measured with the first 4 and 8
layers, and the time of 32 is extrapolated: t(8) + 24 (t(8) - t(4)) / 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moepress.format.codec import PackedSpec
from moepress.hf.fixed_cache import FixedCache
from moepress.hf.fused import fused
from moepress.hf.own_attention import attend_on_card
from moepress.hf.packing import pack_modules
from moepress.kernels.modules import PackedEmbedding, PackedExperts, PackedLinear
from moepress.kernels.random_codes import fill_packed
from on_gpu.card import Card
from on_gpu.case import Case, CheckError, Row

LAYERS = 32
CACHE = 512  # tokens
PROMPT = 16
STEPS = 64
MIXES = {  # family and widths of the experts, family of attention
    "default 2.5 bits": ("trellis", (2, 3, 2, 3, 2, 3, 2, 3)),
    "fast 2.5 bits": ("int", (2, 3, 2, 3, 2, 3, 2, 3)),
    "default 2 bits": ("trellis", (2,) * 8),
}


def cases(card: Card) -> Iterator[Case]:
    for mix in MIXES:
        yield Case(mix, partial(packed_decode, card, mix), 100)
        if mix == "default 2.5 bits":
            yield Case("bfloat16", partial(bfloat16_decode, card), 150)


def config_of(card: Card, layers: int) -> Any:
    from transformers import MixtralConfig

    small: dict[str, Any] = {
        "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512,
    }  # fmt: skip
    config = MixtralConfig(
        num_hidden_layers=layers, sliding_window=None, **(small if card.tiny else {})
    )
    config.dtype = torch.bfloat16
    config._attn_implementation = "sdpa"
    return config


@contextmanager
def shapes_only() -> Iterator[None]:
    """Context in which modules are made in bfloat16 without memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def on_meta(card: Card, layers: int) -> Any:
    from transformers import MixtralForCausalLM

    with shapes_only():
        return MixtralForCausalLM(config_of(card, layers)).eval()


def specs_of(model: Any, mix: str) -> dict[str, PackedSpec]:
    """What `moepress compress` would pack, with experts of 2.5 bits and the rest at 4."""
    family, widths = MIXES[mix]
    specs: dict[str, PackedSpec] = {}
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj"):
            for side in ("gate_up_proj", "down_proj"):
                specs[f"{name}.{side}"] = PackedSpec(widths, 128, family)
        elif isinstance(module, nn.Embedding) or name == "lm_head":
            specs[f"{name}.weight"] = PackedSpec((4,), 128)
        elif isinstance(module, nn.Linear):
            specs[f"{name}.weight"] = PackedSpec((4,), 128, family)
    return specs


def packed_model(card: Card, mix: str, layers: int) -> Any:
    model = on_meta(card, layers)
    with shapes_only():
        pack_modules(model, specs_of(model, mix))
    packed = filled(card, model)
    attend_on_card(packed)
    return packed


def filled(card: Card, model: Any) -> Any:
    """Put the model on the device, with random weights."""
    model.to_empty(device=card.device)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(card.device)
    generator = card.generator(5)
    done = set()
    for module in model.modules():
        if isinstance(module, PackedExperts):
            up = 2 * module.intermediate_size, module.hidden_size
            down = module.hidden_size, module.intermediate_size
            fill_packed(module.gate_up_proj.data, module.gate_up, *up, generator)
            fill_packed(module.down_proj.data, module.down, *down, generator)
            done |= {id(module.gate_up_proj), id(module.down_proj)}
        elif isinstance(module, PackedLinear | PackedEmbedding):
            codec = module.codec
            spec = PackedSpec((codec.bits,), codec.group_size, codec.family)
            sizes = (
                (module.out_features, module.in_features)
                if isinstance(module, PackedLinear)
                else (module.num_embeddings, module.embedding_dim)
            )
            fill_packed(module.weight.data, spec, *sizes, generator)
            done.add(id(module.weight))
    for parameter in model.parameters():
        if id(parameter) not in done:
            if parameter.dim() == 1:
                parameter.data.fill_(1)
            else:
                parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model.requires_grad_(False)


# Small kernels, compiled for both models alike


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat([-x[..., half:], x[..., :half]], -1)

    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def routed(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, index = torch.softmax(logits.float(), -1).topk(k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), index


@contextmanager
def compiled_parts() -> Iterator[str]:
    """While it is entered, small functions of the model class are compiled. Gives what was done."""
    from transformers.models.mixtral import modeling_mixtral as mixtral

    try:
        norm, turn, route = (
            torch.compile(f, dynamic=False, fullgraph=True) for f in (rms_norm, rotary, routed)
        )
        device = torch.device("cuda")
        x = torch.ones(1, 1, 64, device=device, dtype=torch.bfloat16)
        norm(x, x[0, 0], 1e-5)
    except Exception as error:  # the rest of the benchmark goes without
        yield f"no: {type(error).__name__}: {str(error)[:200]}"
        return

    # Prompts take the plain functions: other shapes would be compiled anew.
    def norm_forward(self: Any, x: Tensor) -> Tensor:
        function = norm if x.shape[-2] == 1 else rms_norm
        y: Tensor = function(x, self.weight, self.variance_epsilon)
        return y

    def router_forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
        return logits, *(route if len(logits) == 1 else routed)(logits, self.top_k)

    def turned(q: Tensor, k: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        return (turn if q.shape[-2] == 1 else rotary)(q, k, *given, **named)

    with (
        patch.object(mixtral.MixtralRMSNorm, "forward", norm_forward),
        patch.object(mixtral.MixtralTopKRouter, "forward", router_forward),
        patch.object(mixtral, "apply_rotary_pos_emb", turned),
    ):
        yield "yes"


# Decoding


class Decoder:
    """One step of greedy decoding, captured, with the static cache of transformers."""

    def __init__(self, card: Card, model: Any) -> None:
        self.card, self.model = card, model
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=card.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=card.device)
        ids = torch.arange(PROMPT, device=card.device)[None] + 3
        logits = self._prompt(ids, torch.arange(PROMPT, device=card.device))
        self.finite = bool(logits.isfinite().all())
        self.token.copy_(logits[:, -1:].argmax(-1))
        self._restart()
        self.replay = self._captured()

    def _prompt(self, ids: Tensor, positions: Tensor) -> Tensor:
        from transformers import StaticCache

        self.cache = StaticCache(config=self.model.config, max_cache_len=CACHE)
        self.places = torch.arange(CACHE, device=self.card.device)
        return self._forward(ids, positions)

    def _captured(self) -> Callable[[], None]:
        return self.card.captured(self._step)[0]

    def _restart(self) -> None:
        self.position.fill_(PROMPT)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        mask = (self.places[None, :] <= positions[:, None])[None, None]
        logits: Tensor = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions[None],
            past_key_values=self.cache, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        return logits

    def _step(self) -> Tensor:
        logits = self._forward(self.token, self.position)
        self.token.copy_(logits.argmax(-1))
        self.position.add_(1)
        return logits

    def seconds(self) -> float:
        """Median time of a step over several runs of `STEPS` tokens."""
        times = []
        for _ in range(2 if self.card.tiny else 5):
            self._restart()
            self.card.synchronize()
            started = time.perf_counter()
            for _ in range(4 if self.card.tiny else STEPS):
                self.replay()
            self.card.synchronize()
            times.append((time.perf_counter() - started) / (4 if self.card.tiny else STEPS))
        return sorted(times)[len(times) // 2]


class FusedDecoder(Decoder):
    """The same as captured steps compute it: their cache, and small functions by our kernels."""

    def _prompt(self, ids: Tensor, positions: Tensor) -> Tensor:
        from transformers import DynamicCache

        growing = DynamicCache(config=self.model.config)
        logits: Tensor = self.model(
            input_ids=ids, past_key_values=growing, use_cache=True, logits_to_keep=1
        ).logits
        self.cache = FixedCache(growing, CACHE)
        self.cache.load(growing)
        return logits

    def _captured(self) -> Callable[[], None]:
        with fused(self.model, (self.card.device.type,)):
            return super()._captured()

    def _restart(self) -> None:
        self.position.fill_(PROMPT)
        self.cache.position.move_to(PROMPT)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=ids, position_ids=positions[None], past_key_values=self.cache,
            use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        self.cache.position.move_on()
        return logits


@torch.inference_mode()
def decoded(
    card: Card,
    model: Any,
    layers: int,
    kind: type[Decoder] = Decoder,
    rows: list[Row] | None = None,
) -> tuple[float, bool]:
    """Seconds per token with the first `layers` layers, and whether logits are finite.

    Args:
        rows: gets the kernels of a token and their times; None: not measured.
    """
    before = model.config.num_hidden_layers
    model.config.num_hidden_layers = layers
    try:
        decoder = kind(card, model)
        if rows is not None:
            rows += card.profiled(decoder.replay)
        return decoder.seconds(), decoder.finite
    finally:
        model.config.num_hidden_layers = before


@torch.inference_mode()
def prefilled(card: Card, model: Any, tokens: int) -> float:
    ids = torch.arange(tokens, device=card.device)[None] % 500
    run: Callable[[], Any] = lambda: model(ids, use_cache=False, logits_to_keep=1)  # noqa: E731
    return card.seconds(run, rounds=3)


def gigabytes(model: Any) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9


def packed_decode(card: Card, mix: str) -> list[Row]:
    layers = 2 if card.tiny else LAYERS
    started = time.perf_counter()
    model = packed_model(card, mix, layers)
    card.synchronize()
    made = time.perf_counter() - started
    rows = measured(card, model, mix, depths(layers), "fused", FusedDecoder)
    tokens = 40 if card.tiny else 512
    rows[0] |= {"made_s": made, "gb": gigabytes(model)}
    rows.append({"model": mix, "prefill_tokens": tokens,
                 "prefill_tokens_per_s": tokens / prefilled(card, model, tokens)})  # fmt: skip
    return rows


def depths(layers: int) -> tuple[int, ...]:
    return (layers, 8, 4) if layers >= 8 else (layers, 1)


def measured(
    card: Card,
    model: Any,
    name: str,
    numbers: tuple[int, ...],
    small: str,
    kind: type[Decoder] = Decoder,
) -> list[Row]:
    """Args: small: what was done about small kernels."""
    rows: list[Row] = []
    profiled: list[Row] = []
    for number in numbers:
        kernels = profiled if number == numbers[0] else None
        seconds, finite = decoded(card, model, number, kind, kernels)
        if not finite:
            raise CheckError(f"{name}: logits of {number} layers are not finite")
        rows.append({"model": name, "layers": number, "ms_per_token": 1e3 * seconds,
                     "tokens_per_s": 1 / seconds, "small_kernels": small})  # fmt: skip
    return rows + profiled


def bfloat16_decode(card: Card) -> list[Row]:
    """The fastest of transformers' implementations of experts that a graph can capture."""
    with compiled_parts() if card.is_cuda else nullcontext("no") as compiled:
        return bfloat16_measured(card, f"compiled: {compiled}")


def bfloat16_measured(card: Card, small: str) -> list[Row]:
    per_layer = 3.0e9
    layers = 2 if card.tiny else (LAYERS if card.memory > LAYERS * per_layer + 4e9 else 8)
    model = filled(card, on_meta(card, layers))
    times: dict[str, float] = {}
    rows: list[Row] = []
    failed = {}
    for name in ("grouped_mm", "batched_mm"):
        try:
            model.set_experts_implementation(name)
            found = measured(card, model, f"bfloat16 {name}", depths(layers), small)
            times[name] = found[0]["ms_per_token"]
            rows += found
        except Exception as error:
            card.synchronize()
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    if not times:
        raise CheckError(f"no implementation of experts can be captured: {failed}")
    best = min(times, key=lambda name: times[name])
    model.set_experts_implementation(best)
    if layers < LAYERS and not card.tiny:
        deep, shallow = (
            next(r for r in rows if r["model"] == f"bfloat16 {best}" and r["layers"] == n)
            for n in (8, 4)
        )
        step = (deep["ms_per_token"] - shallow["ms_per_token"]) / 4
        whole = deep["ms_per_token"] + 24 * step
        rows.append(deep | {"model": f"bfloat16 {best}, extrapolated", "layers": LAYERS,
                            "ms_per_token": whole, "tokens_per_s": 1e3 / whole})  # fmt: skip
    rows[0] |= {"gb": gigabytes(model), "failed": str(failed)}
    tokens = 40 if card.tiny else 512
    rows.append({"model": f"bfloat16 {best}, {layers} layers", "prefill_tokens": tokens,
                 "prefill_tokens_per_s": tokens / prefilled(card, model, tokens)})  # fmt: skip
    return rows
