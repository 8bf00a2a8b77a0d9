"""Greedy text and log-probabilities of vLLM and of transformers for the same folder."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moepress.hf import load_model
from moepress.kernels.modules import PackedExperts, PackedLinear

# Bits of activations in packed products, in vLLM and in transformers. At 8, as models are served, a
# last bit of attention can change a code: then both are right and .01 apart, .05 at near ties.
FINE = 16
SMALL: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,  # compiling takes minutes
    "dtype": "float32",
}
Prompts = Sequence[Sequence[int]]
Inputs = Mapping[str, Tensor]  # of transformers' class, one sequence


class Written(NamedTuple):
    """What was written after a prompt: token ids, and the log-probability of each."""

    ids: list[int]
    logprobs: list[float]


@contextmanager
def activations_of(bits: int) -> Iterator[None]:
    """Packed layers that are made and run inside round their activations to `bits`."""
    kinds = PackedLinear, PackedExperts
    before = [kind.activation_bits for kind in kinds]
    for kind in kinds:
        kind.activation_bits = bits
    try:
        yield
    finally:
        for kind, own in zip(kinds, before, strict=True):
            kind.activation_bits = own


@contextmanager
def engine(folder: Path, bits: int = FINE, **options: Any) -> Iterator[Any]:
    """vLLM in this process, in float32: texts are compared, and bfloat16 decides near ties."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    with activations_of(bits):
        llm = LLM(str(folder), **{**SMALL, "distributed_executor_backend": "uni", **options})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def written(llm: Any, prompts: Prompts | Sequence[dict[str, Any]], new: int) -> list[Written]:
    """Greedy continuations by vLLM of token ids, or of prompts as vLLM takes them."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=new, logprobs=1, ignore_eos=True)
    inputs = [p if isinstance(p, dict) else {"prompt_token_ids": list(p)} for p in prompts]
    found = [one.outputs[0] for one in llm.generate(inputs, greedy, use_tqdm=False)]
    return [
        Written(
            list(one.token_ids),
            [p[t].logprob for t, p in zip(one.token_ids, one.logprobs, strict=True)],
        )
        for one in found
    ]


def differences(
    folder: Path,
    prompts: Prompts | Sequence[Inputs],
    texts: Sequence[Written],
    bits: int = FINE,
) -> tuple[float, float]:
    """How far transformers with our kernels is from what vLLM wrote, both in float32.

    Returns:
        Root mean square difference of the log-probabilities of the tokens; and how far a token
        that vLLM chose is, at most, below the best one of transformers: 0 if texts are equal.
    """
    model = load_model(folder, activation_bits=bits)
    torch.nn.Module.float(model)
    squares, gaps = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        inputs = _continued(prompt, text.ids[:-1])
        with torch.inference_mode():
            logits = model(**inputs).logits[0, -len(text.ids) :].float()
        own = logits.log_softmax(-1)
        chosen = own.gather(1, torch.tensor(text.ids)[:, None])[:, 0]
        squares += (chosen - torch.tensor(text.logprobs)).square().tolist()
        gaps.append(float((own.amax(-1) - chosen).max()))
    return (sum(squares) / len(squares)) ** 0.5, max(gaps)


def _continued(prompt: Sequence[int] | Inputs, more: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of a prompt and the token ids that follow it."""
    if not isinstance(prompt, Mapping):
        return {"input_ids": torch.tensor([[*prompt, *more]])}
    inputs = {name: value for name, value in prompt.items() if name != "attention_mask"}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([more])], dim=1)
    if "mm_token_type_ids" in inputs:  # 0: text
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, len(more)))
    return inputs
