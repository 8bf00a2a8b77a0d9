"""Calibration text that the model writes itself (`self`), for users with no data and no network."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from moepress.draws import Noise, drawn_tokens, gumbel_noise
from moepress.errors import InputError, MoepressError
from moepress.generation import following
from moepress.progress import Progress
from moepress.text.beginning import beginning
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
        NumericalError: the model predicts NaN.
        MoepressError: the model wrote less.
    """
    if model is None:
        raise InputError(
            f"'{SELF}' has the model write its calibration text, so the original model must fit in "
            f"memory, and it does not. Give a text file or '{STDLIB}'."
        )
    special = set(tokenizer.all_special_ids)
    writer = model()
    vocabulary = len(writer.get_output_embeddings().weight)  # a tokenizer may have more tokens
    known = (token for token in tokenizer.get_vocab().values() if token < vocabulary)
    plain = sorted(set(known) - special)
    begin = beginning(tokenizer).tolist()
    starts = torch.tensor([[*begin, token] for token in rng.choices(plain, k=count)])
    seed = rng.getrandbits(63)
    device = torch.device(writer.device)
    batches = torch.split(starts[:, :length], BATCH)
    written = []
    noise = gumbel_noise((count, length), vocabulary, seed, device)
    with (
        Progress("sample", total=len(batches)) as progress,
        torch.inference_mode(),
        following(writer, ()),
    ):
        for ids, places in zip(batches, torch.split(noise.starts, BATCH), strict=True):
            greedy = min(GREEDY_TOKENS, length - ids.shape[1])
            ids = _continued(writer, ids.to(device), greedy)
            ids = _continued(writer, ids, length - ids.shape[1], Drawn(noise, places))
            written.append(ids.cpu())
            progress.advance()
    ids = torch.cat(written)
    if ids.shape != (count, length):
        raise MoepressError(
            f"The model wrote {tuple(ids.shape)} tokens of text for calibration. Expected "
            f"{(count, length)}. Give a text file or '{STDLIB}' instead of '{SELF}'."
        )
    return ids


class Drawn(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Leaves only the token that is drawn from the predictions, the same on every device.

    Args:
        starts: [b, L, 2] of the noise, for each token of some sequences.
    """

    def __init__(self, noise: Noise, starts: Tensor) -> None:
        self._noise = noise
        self._starts = starts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = self._noise.at(self._starts[:, input_ids.shape[1]])
        tokens = drawn_tokens(scores.float(), noise)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0)


def _continued(model: Any, ids: Tensor, count: int, drawn: Drawn | None = None) -> Tensor:
    """Sequences [b, t] with `count` more tokens each: the most likely ones, or drawn ones."""
    if count == 0:
        return ids
    out: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        logits_processor=LogitsProcessorList([] if drawn is None else [drawn]),
    )
    return out
