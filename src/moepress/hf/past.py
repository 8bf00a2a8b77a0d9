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
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

from moepress.hf.prefix import GAIN, Text, divisible, forgets, marked, place_of_mark

_OWN_CACHE = {"cache", "past_key_values"} & set(
    inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
CACHE = _OWN_CACHE.pop()  # what this transformers calls a model's cache
UNKNOWN = -1  # no token


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
        self._last: Text | None = None
        self._now: Text | None = None
        self.reused = 0  # tokens of the text that begins, which another one had

    @torch.inference_mode()
    def begin(self, ids: list[int]) -> dict[str, Any]:
        """Options of `generate` for a text. A part of it may be computed here."""
        last = self._last
        self.forget()
        if not self._model._supports_default_dynamic_cache():
            return {}
        now = Text(DynamicCache(config=self._config))
        if now.cache.layers and not self._can_go_on(now.cache):  # some models make layers later
            return {}
        first = 0 if last is None else last.reach(ids[:-1])
        if last is not None and first >= GAIN:
            now, self.reused = last.beginning(first), first
        place = place_of_mark(len(ids))
        if forgets(now.cache) and place > self.reused:
            part = torch.tensor([ids[self.reused : place]], device=self._model.device)
            self._model(input_ids=part, use_cache=True, **{CACHE: now.cache})
            now.marks = (marked(now.cache, place),)
        self._now = now
        return {CACHE: now.cache}

    def end(self, ids: list[int], whole: bool = True) -> None:
        """Keep what the cache holds of a text.

        Args:
            ids: of the text, as far as they are known: the cache may hold fewer or more.
            whole: no step was interrupted.
        """
        if self._now is None:
            return
        now, self._now = self._now, None
        held = [
            layer.get_seq_length()
            for layer in now.cache.layers
            if isinstance(layer, DynamicLayer) and layer.is_initialized
        ]
        if held and self._can_go_on(now.cache):
            known = ids[: min(held)]
            # Of an interrupted step some layers have a token that others lack.
            unknown = max(held) + (0 if whole else 1) - len(known)
            self._last = Text(now.cache, known + [UNKNOWN] * unknown, now.marks)

    def _can_go_on(self, cache: DynamicCache) -> bool:
        """Whether several tokens can be computed behind a part of what a cache holds."""
        states = any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers)
        return divisible(cache, self._config) and not states
