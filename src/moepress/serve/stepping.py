"""Steps of the model: a part of one prompt, or one new token of several sequences.

Inputs are prepared as `generate` prepares them: with the model's own
`prepare_inputs_for_generation`.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from moepress.hf.captured import CapturedSteps, distance, room_for
from moepress.hf.past import CACHE
from moepress.hf.prefix import Text, divisible, forgets, marked
from moepress.serve.rows import Rows, can_batch, nbytes

logger = logging.getLogger(__name__)

CHUNK = 256  # tokens of a prompt computed at a time: between two chunks the others get a token
SMALL = 8192  # tokens of a group of sequences, with padding, that need not be divided
PROBE = (33, 17)  # tokens of the two sequences that `Stepper` tries at its start
PROBES = 3  # pairs of sequences that it tries at most
CLOSE = 0.03  # of the logits' spread, for other orders of sums: bfloat16 was seen to take 0.008
BESIDE = 8  # a captured step's own cache takes at most this part of the caches' budget: 1 / 8


@dataclass(eq=False)
class State(Text):
    """What the model keeps of one sequence."""

    position: Tensor | None = None  # of the last token, [.., 1, 1]; None: nothing computed yet
    images: bool = False  # the ids do not say all

    @property
    def length(self) -> int:
        return len(self.ids)


class Stepper:
    """Computes logits. It finds out by trial what the model's cache allows.

    Attributes:
        steps: replays the steps of a sequence that is computed alone. Meanwhile the model's
            forward is another: `close` puts it back.
        batches: sequences of different lengths can be computed together.
        chunks: a prompt can be computed in parts.
        begins: a sequence can begin with the first tokens of another.
        forgets: it can do so at marks only.
        token_bytes: memory of a token in the cache; least_bytes: of any sequence beside that.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = model.device
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.batches = self.chunks = self.begins = True
        self.forgets = False
        self.steps = CapturedSteps(model)
        self._alone: int | None = None  # the thread in which steps are captured, if they are now
        self._most = inf  # bytes of the cache of captured steps
        try:
            self._try()
        finally:
            self.close()

    def close(self) -> None:
        """Leave the model as it was. A later `decode` goes on, and captures again."""
        self._capture(False)

    def keep_within(self, budget: int) -> None:
        """Bound the memory of captured steps.

        Their cache is none of a sequence's: it is kept when others join, and for later ones.

        Args:
            budget: bytes that the caches of all sequences may take. A sequence whose step would
                have a cache of more than 1 / `BESIDE` of it is computed without captured steps.
        """
        self.close()
        self._most = budget / BESIDE
        if self._beside(1) > self._most:
            self.steps = CapturedSteps(self.model)  # frees what the trial has captured

    def new(self) -> State:
        if not self.model._supports_default_dynamic_cache():
            return State(None)  # the model makes a cache of its own
        return State(DynamicCache(config=self.model.config.get_text_config(decoder=True)))

    def mark(self, state: State) -> None:
        """Have `reach` find the place that a sequence has come to, in place of an earlier one."""
        state.marks = (marked(state.cache, state.length),)

    def reach(self, state: State, ids: list[int]) -> int:
        """How many first tokens of a text `beginning` can take from a sequence; 0: none."""
        if not self.begins or state.images or not state.length:
            return 0
        return state.reach(ids)

    @torch.inference_mode()
    def beginning(self, state: State, first: int) -> State:
        """A sequence of the first tokens of another one, which stays as it is.

        Args:
            first: tokens; a result of `reach`.
        """
        assert state.position is not None
        text, position = state.beginning(first), state.position - (state.length - first)
        return State(text.cache, text.ids, text.marks, position)

    @torch.inference_mode()
    def prefill(
        self,
        state: State,
        ids: Sequence[int],
        inputs: Mapping[str, Tensor] | None = None,
        *,
        all_logits: bool = False,
    ) -> Tensor:
        """Logits [V] float32 on the CPU after the next tokens of a prompt.

        Args:
            state: of the sequence; changed.
            ids: the next tokens.
            inputs: what a processor made of images beside the ids of the whole prompt; None: text.
            all_logits: return those after each of the tokens, [len(ids), V].
        """
        # A part of one token looks like a step: the sequence that is in the graph would make way.
        self._capture(False)
        tokens = torch.tensor([list(ids)], device=self.device)
        mask = torch.ones((1, state.length + len(ids)), dtype=torch.long, device=self.device)
        given = {name: value.to(self.device) for name, value in (inputs or {}).items()}
        if state.position is None:
            positions = self.model._prepare_position_ids_for_generation(
                tokens, {"attention_mask": mask, **given}
            )
        else:
            more = torch.arange(1, len(ids) + 1, device=self.device)
            positions = state.position + more
        first = state.length == 0
        keep = 0 if all_logits else 1
        logits, state.cache = self._forward(
            tokens, state.cache, mask, positions, keep, first, given
        )
        state.ids += ids
        state.images |= bool(given)
        state.position = positions[..., -1:]
        found = logits[0].float().cpu()
        return found if all_logits else found[-1]

    @torch.inference_mode()
    def decode(self, states: Sequence[State], ids: Sequence[int]) -> Tensor:
        """Logits [B, V] float32 on the CPU after one more token of each of B sequences.

        Args:
            states: changed.
            ids: the tokens.
        """
        self._capture(len(states) == 1 and self._beside(states[0].length) <= self._most)
        groups = grouped([state.length for state in states], self.batches)
        made = [
            self._decode_together([states[row] for row in rows], [ids[row] for row in rows])
            for rows in groups
        ]
        order = torch.tensor([row for rows in groups for row in rows])
        return torch.cat(made)[order.argsort()]

    def _beside(self, tokens: int) -> int:
        """Most bytes of the cache of a step that is captured after so many tokens."""
        return self.least_bytes + room_for(tokens) * self.token_bytes

    def _capture(self, alone: bool) -> None:
        """Have steps of this thread captured while a sequence is alone, and only then.

        Sequences that take turns would be copied to the graph's cache for every token.
        """
        thread = threading.get_ident() if alone else None
        if thread != self._alone:
            self._alone = None
            self.steps.__exit__()
            if alone:
                self.steps.__enter__()
            self._alone = thread

    def _decode_together(self, states: Sequence[State], ids: Sequence[int]) -> Tensor:
        tokens = torch.tensor([[token] for token in ids], device=self.device)
        lengths = [state.length for state in states]
        total = max(lengths) + 1
        mask = torch.zeros((len(states), total), dtype=torch.long)
        for row, length in enumerate(lengths):
            mask[row, total - length - 1 :] = 1
        rows = Rows([state.cache for state in states], lengths) if len(states) > 1 else None
        positions = _joined([state.position + 1 for state in states if state.position is not None])
        cache = states[0].cache if rows is None else rows
        logits, _ = self._forward(tokens, cache, mask.to(self.device), positions, 1, False, {})
        if rows is not None:
            rows.give_back()
        for row, (state, token) in enumerate(zip(states, ids, strict=True)):
            state.ids.append(token)
            state.position = positions[..., row : row + 1, :]
        return logits[:, -1].float().cpu()

    def _forward(
        self,
        tokens: Tensor,
        cache: Any,
        mask: Tensor,
        positions: Tensor,
        keep: int,
        first: bool,
        more: Mapping[str, Tensor],
    ) -> tuple[Tensor, Any]:
        """Logits [B, keep or Q, V], and the cache."""
        options = {CACHE: cache, "logits_to_keep": keep} if self._keeps else {CACHE: cache}
        inputs = self.model.prepare_inputs_for_generation(
            tokens,
            next_sequence_length=tokens.shape[1],
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            is_first_iteration=first,
            **options,
            **more,
        )
        out = self.model(**inputs, return_dict=True)
        return out.logits, out.get(CACHE, cache)

    def _try(self) -> None:
        """Compare two sequences computed in other ways with each computed alone: together, in
        parts, and from the beginning of another sequence.

        Up to `PROBES` pairs of them, until one is close: where an activation is rounded the other
        way, a router may choose another expert, though all is right. What is wrong is far with all.
        """
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        computed = {
            "chunks": self._in_parts,
            "batches": self._together,
            "begins": self._from_another,
        }
        right = dict.fromkeys(computed, False)
        for number in range(PROBES):
            texts = [[(7 * i + n + 31 * number) % vocabulary for i in range(n)] for n in PROBE]
            alone = self._prefilled(texts)
            if number == 0:
                sizes = [nbytes(state.cache) for state in alone]
                self.token_bytes = max(0, (sizes[0] - sizes[1]) // (PROBE[0] - PROBE[1]))
                self.least_bytes = max(0, sizes[1] - self.token_bytes * PROBE[1])
            expected = torch.stack([self.decode([state], [3])[0] for state in alone])
            for name, compute in tuple(computed.items()):
                try:
                    got = compute(texts)
                except Exception as error:  # whatever a model's own cache raises
                    logger.debug("%s: %s", name, error)
                    got = None
                right[name] = got is not None and distance(got, expected) < CLOSE
                if right[name] or got is None:
                    del computed[name]
            if not computed:
                break
        self.chunks, self.batches = right["chunks"], right["batches"]
        self.begins = right["begins"] and self.chunks

    def _prefilled(self, texts: Sequence[Sequence[int]]) -> list[State]:
        states = [self.new() for _ in texts]
        for state, ids in zip(states, texts, strict=True):
            self.prefill(state, ids)
        return states

    def _in_parts(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logits of a step after texts computed in two parts."""
        states = [self.new() for _ in texts]
        for state, ids in zip(states, texts, strict=True):
            self.prefill(state, ids[: len(ids) // 2])
            self.prefill(state, ids[len(ids) // 2 :])
        return torch.stack([self.decode([state], [3])[0] for state in states])

    def _from_another(self, texts: Sequence[Sequence[int]]) -> Tensor | None:
        """Logits of a step after texts that begin as another; None: their caches are unknown."""
        states = []
        for ids in texts:
            half, other = len(ids) // 2, self.new()
            self.prefill(other, ids[:half])
            config = self.model.config.get_text_config(decoder=True)
            if not divisible(other.cache, config):
                return None
            self.forgets = forgets(other.cache)
            self.mark(other)
            self.prefill(other, ids[:half])
            self.decode([other], [3])
            states.append(self.beginning(other, half))
            self.prefill(states[-1], ids[half:])
        return torch.stack([self.decode([state], [3])[0] for state in states])

    def _together(self, texts: Sequence[Sequence[int]]) -> Tensor | None:
        """Logits of one step of all texts; None: their caches cannot be computed together."""
        states = self._prefilled(texts)
        return self.decode(states, [3] * len(states)) if can_batch(states[0].cache) else None


def grouped(lengths: Sequence[int], batches: bool = True) -> list[list[int]]:
    """Rows that are computed together, by their lengths.

    Rows are padded to the longest of their group. It is at most twice as long as the others, or the
    group is small: a long text beside many short ones must not multiply the memory of a layer.
    """
    if not batches:
        return [[row] for row in range(len(lengths))]
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[groups[-1][0]] if groups else 0
        small = bool(groups) and (len(groups[-1]) + 1) * longest <= SMALL
        if small or 2 * lengths[row] >= longest > 0:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _joined(positions: Sequence[Tensor]) -> Tensor:
    """Positions [.., B, 1] of B sequences; some may have one more dimension, with images."""
    most = max(position.dim() for position in positions)
    deep = next(position for position in positions if position.dim() == most)
    return torch.cat(
        [p if p.dim() == most else p.expand(*deep.shape[:-2], *p.shape) for p in positions], dim=-2
    )
