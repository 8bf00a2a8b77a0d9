"""A captured step: the calls that it can stand for, the text in its cache, and its replay."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from moepress.hf.cuda_graph import Graph, numbers_made_there
from moepress.hf.fixed_cache import FixedCache

PASSED_ON = {"use_cache", "return_dict", "logits_to_keep"}  # options of a step that may be set
# `generate` passes them on to models, which do not use them: the kind of the token (image or text)
# only says where it stands, and a call has that already.
UNUSED = {"tokenizer", "mm_token_type_ids"}

Capture = Callable[[Callable[[], Tensor], torch.device], Graph]


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a model with one token of one sequence."""

    ids: Tensor  # [1, 1] int64
    positions: Tensor  # [.., 1] int64
    mask: Tensor | None  # [1, tokens with this one]
    name: str  # of the argument that is the cache
    cache: DynamicCache
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> Call | None:
        """The call with these arguments; None: it is of another kind."""
        given = {
            name: value
            for name, value in kwargs.items()
            if value is not None and value is not False and name not in UNUSED
        }
        ids, positions = given.pop("input_ids", None), given.pop("position_ids", None)
        mask = given.pop("attention_mask", None)
        names = [n for n, v in given.items() if isinstance(v, Cache)]
        if (
            torch.is_grad_enabled()
            or len(names) != 1
            or not isinstance(ids, Tensor)
            or ids.shape != (1, 1)
            or not isinstance(positions, Tensor)
            or positions.shape[-1] != 1
            or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        ):
            return None
        cache = given.pop(names[0])
        if type(cache) is not DynamicCache or cache.offloading or _keeps_past(cache):
            return None
        if not given.keys() <= PASSED_ON:
            return None
        return cls(ids, positions, mask, names[0], cache, tuple(sorted(given.items())))

    @property
    def form(self) -> Any:
        """What is constant in a graph."""
        positions = self.positions
        return self.name, self.options, positions.shape, positions.dtype, self.ids.dtype


def _keeps_past(cache: DynamicCache) -> bool:
    """Whether layers keep more than they need, to be cropped: for prompt lookup or an assistant."""
    return any(getattr(layer, "record_past", False) for layer in cache.layers)


class Text:
    """The sequence that is in a step's cache.

    Attributes:
        proofs: steps that are still to be compared.
    """

    def __init__(self, call: Call, proofs: int) -> None:
        self.cache = weakref.ref(call.cache)
        self.proofs = proofs
        self._tokens: int | None = None

    def goes_on(self, call: Call) -> bool:
        """Whether a call is the next of this text."""
        masked = None if call.mask is None else call.mask.shape[-1] - 1
        return self.cache() is call.cache and masked == self._tokens

    def is_in(self, arguments: Sequence[Any]) -> bool:
        """Whether the text's cache is among the arguments of a call."""
        cache = self.cache()
        return any(cache is argument for argument in arguments if argument is not None)

    def count(self, call: Call) -> None:
        self._tokens = None if call.mask is None else call.mask.shape[-1]


class Step:
    """A captured step, its cache and its inputs.

    Args:
        forward: of the model.
        call: the first step; its cache is copied.
        room: tokens of the cache.
        proofs: see below.
        capture: captures.

    Attributes:
        proofs: steps that must still be close to the plain way, whatever the text.
        far: steps that were not close: in all until the graph is proved, then in a row.
    """

    def __init__(self, forward: Any, call: Call, room: int, proofs: int, capture: Capture) -> None:
        self.cache = FixedCache(call.cache, room)
        self.form = call.form
        self.proofs = proofs
        self.far = 0
        with torch.inference_mode(False), torch.no_grad():
            self._ids, self._positions = torch.clone(call.ids), torch.clone(call.positions)
        self.cache.load(call.cache)
        inputs = {
            "input_ids": self._ids,
            "position_ids": self._positions,
            call.name: self.cache,
            **dict(call.options),
        }
        made: list[Any] = []

        def work() -> Tensor:
            with numbers_made_there():
                made[:] = [forward(**inputs)]
            self.cache.position.move_on()
            logits: Tensor = made[0].logits
            return logits

        self._graph = capture(work, call.ids.device)
        self._kind = type(made[0])
        self._names = [n for n, v in made[0].items() if v is self.cache]
        self.cache.load(call.cache)  # the capture ran the step

    def fits(self, call: Call, tokens: int) -> bool:
        """Whether a step after so many tokens is a replay of this one."""
        return self.form == call.form and tokens < self.cache.room and self.cache.alike(call.cache)

    def goes_on(self, call: Call) -> bool:
        """Whether a step of the text that is loaded is a replay of this one."""
        cache = self.cache
        room_left = cache.position.tokens < cache.room
        return self.form == call.form and room_left and cache.shows(call.cache)

    def run(self, call: Call) -> Tensor:
        """Logits [1, 1, V] of a call; overwritten by the next."""
        self._ids.copy_(call.ids)
        self._positions.copy_(call.positions)
        self._graph.replay()
        return self._graph.result

    def output(self, logits: Tensor, cache: DynamicCache) -> Any:
        """What the model returns."""
        return self._kind(logits=logits, **dict.fromkeys(self._names, cache))
