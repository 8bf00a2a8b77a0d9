"""What a model keeps of its last text, for the next one that `generate` goes on with.

    past = Past(model)
    model.generate(input_ids, **past.begin(ids), ...)
    past.end(ids_with_the_answer)

The turns of a conversation are such texts: each begins with most of the one before. Only models all
of whose layers attend to single tokens have a past here: those with states of linear attention
cannot always go on with several tokens at once.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

from moepress.hf.prefix import (
    GAIN,
    Mark,
    common,
    divisible,
    forgets,
    marked,
    place_of_mark,
    prefix,
    reach,
)

_OWN_CACHE = {"cache", "past_key_values"} & set(
    inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
CACHE = _OWN_CACHE.pop()  # what this transformers calls a model's cache
UNKNOWN = -1  # no token


@dataclass(frozen=True)
class _Text:
    cache: DynamicCache
    ids: list[int]
    marks: tuple[Mark, ...]


class Past:
    """The cache of one text at a time.

    Args:
        model: of transformers, loaded.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._config = model.config.get_text_config(decoder=True)
        self.forget()

    def forget(self) -> None:
        self._last: _Text | None = None
        self._now: tuple[DynamicCache, tuple[Mark, ...]] | None = None
        self.reused = 0  # tokens of the text that begins, which another one had

    @torch.inference_mode()
    def begin(self, ids: list[int]) -> dict[str, Any]:
        """Options of `generate` for a text. A part of it may be computed here."""
        last = self._last
        self.forget()
        if not self._model._supports_default_dynamic_cache():
            return {}
        cache, marks = DynamicCache(config=self._config), tuple[Mark, ...]()
        if cache.layers and not self._can_go_on(cache):  # some models make layers as they go
            return {}
        if last is not None:
            first = reach(last.cache, len(last.ids), last.marks, common(last.ids, ids[:-1]))
            if first >= GAIN:
                self.reused = first
                cache = prefix(last.cache, len(last.ids), last.marks, first)
                marks = tuple(mark for mark in last.marks if mark.tokens <= first)
        place = place_of_mark(len(ids))
        if forgets(cache) and place > self.reused:
            part = torch.tensor([ids[self.reused : place]], device=self._model.device)
            self._model(input_ids=part, use_cache=True, **{CACHE: cache})
            marks = (marked(cache, place),)
        self._now = cache, marks
        return {CACHE: cache}

    def end(self, ids: list[int], whole: bool = True) -> None:
        """Keep what the cache holds of a text.

        Args:
            ids: of the text, as far as they are known: the cache may hold fewer or more.
            whole: no step was interrupted.
        """
        if self._now is None:
            return
        (cache, marks), self._now = self._now, None
        held = [
            layer.get_seq_length()
            for layer in cache.layers
            if isinstance(layer, DynamicLayer) and layer.is_initialized
        ]
        if held and self._can_go_on(cache):
            known = ids[: min(held)]
            # Of an interrupted step some layers have a token that others lack.
            unknown = max(held) + (0 if whole else 1) - len(known)
            self._last = _Text(cache, known + [UNKNOWN] * unknown, marks)

    def _can_go_on(self, cache: DynamicCache) -> bool:
        """Whether several tokens can be computed behind a part of what a cache holds."""
        states = any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers)
        return divisible(cache, self._config) and not states
