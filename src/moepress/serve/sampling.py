"""Choose the next token of a sequence from its logits."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moepress.generation import STOPS, checked_settings
from moepress.serve.grammar import Matcher

# The settings of a folder that the server follows.
FOLLOWED = (
    *STOPS, "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
)  # fmt: skip
SMALLEST_TEMPERATURE = 1e-3  # below, logits divided by it overflow: the most probable token


@dataclass(frozen=True)
class Settings:
    """How to choose tokens, and which texts of the folder's end an answer.

    The first six have the defaults of the model's folder.
    """

    temperature: float = 0.0  # 0: the most probable token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # texts that end an answer
    frequency_penalty: float = 0.0  # subtracted for each time that a token was generated
    presence_penalty: float = 0.0  # subtracted if a token was generated
    bias: tuple[tuple[int, float], ...] = ()  # added to the logits of tokens
    seed: int | None = None
    logprobs: int | None = None  # most probable tokens to name beside each; None: no logprobs

    @classmethod
    def of_folder(cls, config: Any) -> Settings:
        """The defaults in a model's GenerationConfig. One that does not sample is greedy.

        Raises:
            FileError: one of `FOLLOWED` is of a wrong type or out of range.
        """
        own = checked_settings(config, FOLLOWED)
        stop = own.get("stop_strings", ())
        return cls(
            temperature=float(own.get("temperature", 1.0)) if own.get("do_sample") else 0.0,
            top_p=float(own.get("top_p", 1.0)),
            top_k=own.get("top_k", 0),
            min_p=float(own.get("min_p", 0.0)),
            repetition_penalty=float(own.get("repetition_penalty", 1.0)),
            stop=tuple(text for text in ([stop] if isinstance(stop, str) else stop) if text),
        )


@dataclass(frozen=True)
class Choice:
    """A token, and if asked for its logarithmic probability and those of the most probable.

    Answers keep many: the most probable are two arrays, which take a tenth of as many tuples.
    """

    token: int
    logprob: float | None = None
    tokens: Sequence[int] = ()  # the most probable ones
    logprobs: Sequence[float] = ()

    @property
    def top(self) -> Iterator[tuple[int, float]]:
        """The most probable tokens with their logprobs."""
        return zip(self.tokens, self.logprobs, strict=True)


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        settings: how.
        prompt: token ids, which count for `repetition_penalty`.
        number: of the answer in its request. With a seed, each answer draws other numbers.
        matcher: says which tokens may come next; None: all may.
    """

    def __init__(
        self,
        settings: Settings,
        prompt: Sequence[int],
        number: int = 0,
        matcher: Matcher | None = None,
    ) -> None:
        self.settings = settings
        self.matcher = matcher
        self.prompt = prompt
        self.seen: Tensor | None = None  # [V] bool, in use; a list of each prompt is gigabytes
        self.counts: Counter[int] = Counter()
        self.random = torch.Generator()
        if settings.seed is None:
            self.random.seed()
        else:
            self.random.manual_seed((settings.seed + number) % 2**63)
        self.warpers = _warpers(settings)

    @property
    def complete(self) -> bool:
        """Whether no token may follow."""
        return self.matcher is not None and self.matcher.complete

    def choose(self, logits: Tensor) -> Choice:
        """The next token, from logits [V] float32 of the model. They are left as they are.

        Raises:
            GrammarError: none of them can follow.
        """
        scores = self._adjusted(logits)
        if self.matcher is not None:
            scores = scores.masked_fill(~self.matcher.allowed(len(scores)), -torch.inf)
        if self.settings.temperature < SMALLEST_TEMPERATURE:
            token = int(scores.argmax())
        else:
            row = scores[None]
            for warper in self.warpers:
                row = warper(None, row)
            token = int(torch.multinomial(row[0].softmax(-1), 1, generator=self.random))
        if self.matcher is not None:
            self.matcher.take(token)
        if self.seen is not None:
            self.seen[token] = True
        self.counts[token] += 1
        if self.settings.logprobs is None:
            return Choice(token)
        return described(logits, token, self.settings.logprobs)

    def _adjusted(self, logits: Tensor) -> Tensor:
        settings = self.settings
        if settings.repetition_penalty != 1.0:
            if self.seen is None:
                self.seen = torch.zeros(len(logits), dtype=torch.bool)
                self.seen[torch.tensor(self.prompt, dtype=torch.long)] = True
            penalty = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
            logits = penalty(self.seen.nonzero().T, logits[None].clone())[0]
        change: Counter[int] = Counter()
        if settings.frequency_penalty or settings.presence_penalty:
            for token, count in self.counts.items():
                change[token] -= settings.frequency_penalty * count + settings.presence_penalty  # type: ignore[assignment]
        for token, bias in settings.bias:
            change[token] += bias  # type: ignore[assignment]
        if not change:
            return logits
        index = torch.tensor(list(change))
        return logits.index_add(0, index, torch.tensor(list(change.values()), dtype=logits.dtype))


def described(logits: Tensor, token: int, most: int) -> Choice:
    """A token with its logprob and the `most` most probable tokens, from logits [V]."""
    logprobs = logits.float().log_softmax(-1)
    values, tokens = logprobs.topk(min(most, len(logprobs)))
    return Choice(
        token,
        float(logprobs[token]),
        array("i", tokens.tolist()),
        array("f", values.tolist()),
    )


def _warpers(settings: Settings) -> list[Any]:
    """transformers' processors, in the order of `generate`."""
    found: list[Any] = []
    if settings.temperature not in (0.0, 1.0):
        found.append(TemperatureLogitsWarper(max(settings.temperature, SMALLEST_TEMPERATURE)))
    if settings.top_k:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        found.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        found.append(MinPLogitsWarper(settings.min_p))
    return found
