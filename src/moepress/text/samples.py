"""Calibration text that the model writes itself (`self`), for users with no data and no network."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moepress.errors import InputError, MoepressError
from moepress.generation import following
from moepress.progress import Progress
from moepress.text.named import SELF, STDLIB

BATCH = 64  # sequences that the model writes side by side
GREEDY_TOKENS = 4  # after the first token: each is the most likely one


def own_samples(
    model: Callable[[], Any] | None, tokenizer: Any, count: int, length: int, rng: random.Random
) -> Tensor:
    """Sequences [count, length] int64 that the model writes, each from a random first token.

    As in LLM-QAT (arXiv:2305.17888): the first token is random, the next few are the most likely
    ones, which makes the beginning plausible, and the rest are sampled at temperature 1. EOS does
    not end a sequence; the text after it is the next document, as in other texts.

    Raises:
        InputError: `model` is None: the original model does not fit in memory.
        MoepressError: the model wrote less.
    """
    if model is None:
        raise InputError(
            f"'{SELF}' has the model write its calibration text, so the original model must fit in "
            f"memory, and it does not. Give a text file or '{STDLIB}'."
        )
    special = set(tokenizer.all_special_ids)
    plain = sorted(set(tokenizer.get_vocab().values()) - special)
    bos = tokenizer.bos_token_id
    begin = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    starts = torch.tensor([[*begin, token] for token in rng.choices(plain, k=count)])
    seed = rng.getrandbits(63)
    writer = model()
    device = torch.device(writer.device)
    accelerators = [device] if device.type != "cpu" else []
    batches = torch.split(starts[:, :length], BATCH)
    written = []
    with (
        Progress("sample", total=len(batches)) as progress,
        torch.random.fork_rng(accelerators, device_type=device.type),
        torch.inference_mode(),
        following(writer, ()),
    ):
        torch.manual_seed(seed)
        for ids in batches:
            greedy = min(GREEDY_TOKENS, length - ids.shape[1])
            ids = _continued(writer, ids.to(device), greedy, sample=False)
            ids = _continued(writer, ids, length - ids.shape[1], sample=True)
            written.append(ids.cpu())
            progress.advance()
    ids = torch.cat(written)
    if ids.shape != (count, length):
        raise MoepressError(
            f"The model wrote {tuple(ids.shape)} tokens of text for calibration. Expected "
            f"{(count, length)}. Give a text file or '{STDLIB}' instead of '{SELF}'."
        )
    return ids


def _continued(model: Any, ids: Tensor, count: int, *, sample: bool) -> Tensor:
    """Sequences [b, t] with `count` more tokens each: greedy, or sampled at temperature 1."""
    if count == 0:
        return ids
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    out: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=sample,
        **sampling,
    )
    return out
