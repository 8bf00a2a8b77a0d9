"""Continue a text with a model: the simplest use of a compressed folder."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from moepress.errors import InputError
from moepress.generation import STOPS, context_of, following
from moepress.original.remote_code import tokenizer_of
from moepress.prune import Pruning, Strength
from moepress.store.memory import Memory

logger = logging.getLogger(__name__)


def generate(
    folder: str | Path,
    prompt: str,
    *,
    tokens: int = 64,
    device: str = "cpu",
    activation_bits: int = 8,
    pruning: Strength | Pruning | None = None,
    memory: Memory | None = None,
    gpu_memory: int | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Continue a prompt greedily.

    The text ends at the model's end of text, at one of its stop strings, or at the end of its
    context.

    No other setting of the model's generation_config.json is followed. Steps are captured and
    replayed where the model allows it (hf/captured.py).

    Args:
        folder: a folder made by moepress, or an original model that fits in memory (folder or hub
            id).
        prompt: any text, not empty.
        tokens: most new tokens; fewer, with a warning, where the model does not read as many.
        device: "cpu", or a card such as "cuda" or "cuda:1".
        activation_bits: for a compressed model, see `set_activation_bits`.
        pruning: for a compressed model, see `prune`; None: as stored in the folder.
        memory: for a compressed model, bytes for its weights, "all" or "mapped"
            (store/memory.py); None: mapped if it fits.
        gpu_memory: for a compressed model on a card, bytes of its memory for weights, see
            `hf.load_model`.
        trust_remote_code: run code in the model's folder, where transformers has no class for it.

    Returns:
        The prompt and its continuation.

    Raises:
        InputError: the prompt is empty or longer than what the model reads, `tokens` is below 1, or
            the folder is no model.
    """
    from moepress.hf import load_model, text_model
    from moepress.hf.captured import CapturedSteps
    from moepress.original.folder import resolve
    from moepress.original.skeleton import text_config

    if not prompt or tokens < 1:
        raise InputError("generate needs a prompt that is not empty and at least 1 new token.")
    folder = resolve(folder)
    tokenizer = tokenizer_of(folder, trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False, verbose=False)
    most = context_of(text_config(folder, trust_remote_code))
    room = tokens if most is None else _room(most, inputs["input_ids"].shape[1], tokens)
    model = text_model(
        load_model(folder, device, activation_bits, pruning, trust_remote_code, memory, gpu_memory)
    )
    with torch.inference_mode(), following(model, STOPS), CapturedSteps(model):
        out = model.generate(
            **inputs.to(device), max_new_tokens=room, do_sample=False, tokenizer=tokenizer
        )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def _room(most: int, used: int, tokens: int) -> int:
    """Tokens to write after a prompt of `used` with a model that reads `most`: at most `tokens`.

    Raises:
        InputError: none.
    """
    limit = f"the model reads {most:,} (max_position_embeddings of its config)"
    if used >= most:
        raise InputError(f"The prompt has {used:,} tokens, and {limit}. Give a shorter one.")
    if tokens > most - used:
        logger.warning(
            "%s tokens are too many after a prompt of %s: %s. At most %s are written",
            f"{tokens:,}", f"{used:,}", limit, f"{most - used:,}",
        )  # fmt: skip
    return min(tokens, most - used)
