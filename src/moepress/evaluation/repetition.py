"""Count the generations of a model that end in a loop.

Perplexity is measured on human text and hides loops: a model with too few bits may predict such
text well and still generate the same line for ever. Greedy continuations of held-out text show it.
Original models loop too, small ones often, so compare with the original.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moepress.generation import ENDS, checked_settings, following

PROMPT_TOKENS = 32
NEW_TOKENS = 128
CYCLES = 4  # least number of repetitions that make a loop
LOOP_TOKENS = 24  # least length of a loop: four blank lines are none


@dataclass(frozen=True)
class Repetition:
    """Number of greedy generations that end in a loop."""

    generations: int
    looping: int
    prompt_tokens: int
    new_tokens: int  # most new tokens of a generation

    @property
    def share(self) -> float:
        return self.looping / self.generations


@torch.inference_mode()
def measure_repetition(model: Any, prompts: Tensor) -> Repetition:
    """Continue each prompt greedily, and count the continuations that end in a loop.

    Args:
        model: a loaded causal LM of transformers.
        prompts: [N, L] int64, without padding.
    """
    prompts = prompts.to(model.device)
    given = checked_settings(model.generation_config, ENDS).get("eos_token_id")
    ends = set(given) if isinstance(given, list) else {given}
    with following(model):
        written = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,  # of texts that have ended; the model's own may be no token (-1)
        )[:, prompts.shape[1] :]
    looping = sum(ends_in_loop(row) for row in written.tolist() if not ends & set(row))
    return Repetition(len(prompts), looping, prompts.shape[1], NEW_TOKENS)


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the last max(`CYCLES` * period, `LOOP_TOKENS`) tokens have some period."""
    for period in range(1, len(tokens) // CYCLES + 1):
        length = max(CYCLES * period, LOOP_TOKENS)
        tail = tokens[len(tokens) - length :]
        if length <= len(tokens) and tail[period:] == tail[: length - period]:
            return True
    return False


def prompts_of(ids: Tensor, count: int) -> Tensor:
    """The beginnings of `count` of the sequences [S, L], evenly spread; of all if S is smaller.

    Returns:
        [N, P] int64, P at most `PROMPT_TOKENS`.
    """
    rows = torch.linspace(0, len(ids) - 1, min(count, len(ids))).round().long()
    return ids[rows, :PROMPT_TOKENS]
