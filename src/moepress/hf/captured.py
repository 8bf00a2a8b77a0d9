"""Decode by replaying a captured step: what Python decided for it is not decided again.

    steps = CapturedSteps(model)
    with steps:                        # the forward of the model is replaced meanwhile
        model.generate(...)            # as ever: streamers, stop strings, sampling

transformers' `generate` stays as it is, with its cache of growing length. A prompt is computed as
ever. For a call with one token the prompt's cache is copied to a `FixedCache` (fixed_cache.py), and
the forward pass on that is captured: on a card as a CUDA graph (cuda_graph.py), on a CPU as a list
of calls (cpu_graph.py). From then on a call copies its token and its position, replays, and lets
the growing cache show what was written (shown_layers.py). On a card `generate` learns one step late
that a text has ended (late_stops.py).

While a step is captured, small functions of the model are computed by kernels of ours (fused.py).

Which models can do that is found by trying: the first steps are also computed the plain way, and
compared. A model whose cache, capture or numbers do not allow it is computed as without this file,
from the same cache, and one message says why. Every further text is compared for one step: a model
may have changed in a way that `state_of` does not see. Then it is captured again. Results are those
of the captured step, compared or not: so a text does not depend on which steps were. A step that is
far from the plain one gives the plain result. It need not be wrong: where an activation is rounded
the other way, a router may choose another expert. So a few may be far (`FAR`).
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from moepress.hf.capturable import state_of, suits
from moepress.hf.captured_step import Call, Capture, Step, Text
from moepress.hf.cpu_graph import cpu_graph
from moepress.hf.cuda_graph import Graph, cuda_graph
from moepress.hf.fixed_cache import UnfitError, begun, bytes_of, tokens_in
from moepress.hf.fused import Fusion, fused
from moepress.hf.late_stops import late_stops
from moepress.hf.replaced_forward import Plain, ReplacedForward
from moepress.memory import free_memory

logger = logging.getLogger(__name__)

ROOM = 1024  # tokens beyond those of a prompt; a quarter of the prompt's, if that is more
STEP = 256  # room is a multiple of it
PROOFS = 3  # steps of a new graph that must be close to the plain way
CLOSE = 0.1  # of the logits' spread: other sums choose other experts, and round otherwise
FAR = 3  # steps that are not close end a graph: in all until it is proved, then in a row

CAPTURES: Mapping[str, Capture] = {"cuda": cuda_graph, "cpu": cpu_graph}  # by type of device


class CapturedSteps:
    """While it is entered, a model's steps of one token are captured, and replayed.

    Only calls of the thread that entered. What cannot be captured is computed as ever. A graph and
    its memory are kept for the next time.

    Args:
        model: of transformers, loaded.
        capture: takes the work and its device; None: that of CAPTURES. Tests have others.
        devices: types of devices on which steps are captured.
        room: see ROOM.
        fusion: entered while a step is captured, with the model and `devices`.

    Attributes:
        replayed: steps that were computed by a replay alone.
        fused: whether steps are captured inside of `fusion`: until one fails or is not right so.
        refused: why steps are not captured; None: they are, or nothing was tried.
    """

    def __init__(
        self,
        model: Any,
        *,
        capture: Capture | None = None,
        devices: Sequence[str] = tuple(CAPTURES),
        room: int = ROOM,
        fusion: Fusion = fused,
    ) -> None:
        self._model = weakref.ref(model)  # who keeps steps need not keep the model
        self.replayed = 0
        self.fused = True
        self.refused: str | None = None
        self._capture = capture or _capture
        self._devices = devices
        self._room = room
        self._fusion = fusion
        self._state: Any = None  # of the model, with which the graph was captured
        self._step: Step | None = None
        self._text: Text | None = None
        self._padded: weakref.ref[DynamicCache] | None = None  # the last text with padding
        self._unroomy: weakref.ref[DynamicCache] | None = None  # the last that had no room
        self._plain: Any = None  # the model's own forward, while it is replaced
        self._thread = 0
        self._late: AbstractContextManager[None] = nullcontext()

    @property
    def model(self) -> Any:
        """The model, which must be alive."""
        return self._model()

    def __enter__(self) -> CapturedSteps:
        if suits(self.model, self._devices):
            state = state_of(self.model)
            if state != self._state:
                self._state, self._step, self._text, self.refused = state, None, None, None
                self.fused = True
            self._plain, self._thread = self.model.forward, threading.get_ident()
            self.model.forward = ReplacedForward(self.model, self._forward)
            # Not where each step is computed as ever: a text would end with a whole one too many.
            self._late = late_stops(self.model.device.type, lambda: self.refused is None)
            self._late.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._plain is not None:
            self._late.__exit__(None, None, None)
            del self.model.forward
            self._plain = None

    def _forward(self, plain: Plain, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or not self._entered_here():
            return plain(*args, **kwargs)
        call = Call.of(kwargs) if self.refused is None and not args else None
        if call is None or not self._whole(call):
            if self._text is not None and self._text.is_in((*args, *kwargs.values())):
                self._text = None  # its cache changes
            return self._plain(*args, **kwargs)
        ready: tuple[Step, Text] | None = None
        try:
            ready = self._ready(call)
        except torch.OutOfMemoryError:  # others may take less when the next text comes
            self._step, self._unroomy = None, weakref.ref(call.cache)
            logger.info("Steps of this text are not captured: there is no memory for a graph")
        except Exception as error:  # of the capture, of anything that a model does
            self._refuse(f"{type(error).__name__}: {error}", isinstance(error, UnfitError))
        if ready is None:  # here the error, which holds the memory of the capture, is gone
            return self._plain(**kwargs)
        step, text = ready
        if text.proofs:
            return self._compared(step, text, call, kwargs)
        logits = step.run(call)
        step.cache.advance()
        step.cache.show(call.cache)
        self.replayed += 1
        self._text = text
        return step.output(logits.clone(), call.cache)

    def _entered_here(self) -> bool:
        """Whether this thread is inside of the `with` statement."""
        return self._plain is not None and threading.get_ident() == self._thread

    def _whole(self, call: Call) -> bool:
        """Whether a call's text is without padding. Asks a card once for each text."""
        waits = call.mask is not None and not call.mask.is_cpu
        if self._text is not None and self._text.goes_on(call) and (waits or call.mask is None):
            return True
        if not begun(call.cache):
            return False
        if any(left is not None and left() is call.cache for left in (self._padded, self._unroomy)):
            return False
        whole = call.mask is None or bool((call.mask == 1).all())
        if not whole:
            self._padded = weakref.ref(call.cache)
        return whole

    def _ready(self, call: Call) -> tuple[Step, Text]:
        """A step that can be replayed for a call, and the call's text, which is loaded.

        The text is forgotten until the step is done: if it is interrupted, the counters on the card
        are not known.
        """
        step, text, self._text = self._step, self._text, None
        if step is None or text is None or not (text.goes_on(call) and step.goes_on(call)):
            step, text = self._loaded(call)
        text.count(call)
        return step, text

    def _loaded(self, call: Call) -> tuple[Step, Text]:
        """The step, or a new one if it does not fit, and a call's text, whose cache is copied."""
        tokens = tokens_in(call.cache)
        if self._step is not None and self._step.fits(call, tokens):
            self._step.cache.load(call.cache)
            return self._step, Text(call, max(1, self._step.proofs))
        self._step = None  # frees its memory, but for what the cache shows
        room = room_for(tokens, self._room)
        device = call.ids.device
        if device.type == "cpu" and bytes_of(call.cache, room) > free_memory(device) // 2:
            raise torch.OutOfMemoryError  # a CPU has none that could be waited for
        self._step = self._new_step(call, room)
        return self._step, Text(call, self._step.proofs)

    def _new_step(self, call: Call, room: int) -> Step:
        """A captured step, with fused kernels if it can be captured so."""
        if not self.fused:
            return Step(self._plain, call, room, PROOFS, self._capture)
        try:
            with self._fusion(self.model, self._devices):
                return Step(self._plain, call, room, PROOFS, self._capture)
        except (UnfitError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        step = Step(self._plain, call, room, PROOFS, self._capture)
        self._unfuse(reason)
        return step

    def _compared(self, step: Step, text: Text, call: Call, kwargs: dict[str, Any]) -> Any:
        """Compute a step both ways."""
        got = step.run(call).clone()
        out = self._plain(**kwargs)
        error = distance(got, out.logits)
        close = error < CLOSE
        if not close:
            step.far += 1
            if step.far == FAR:
                self._step = None
                reason = f"its logits differ by {error:.2g} of their spread"
                if step.proofs and self.fused:
                    self._unfuse(reason)
                elif step.proofs:  # else it was right before: the model has changed
                    self._refuse(reason)
                return out
        # Its own cache goes on, far or not: else steps would only be seen just after a copy.
        step.cache.advance()
        if close:
            text.proofs -= 1
            step.proofs = max(0, step.proofs - 1)
            if not step.proofs:
                step.far = 0
            if not text.proofs:
                step.cache.show(call.cache)
        self._text = text
        return step.output(got, call.cache) if close else out

    def _refuse(self, reason: str, expected: bool = False) -> None:
        self._step = self._text = None
        name = type(self.model).__name__
        self.refused = reason
        level = logging.INFO if expected else logging.WARNING
        logger.log(level, "Steps of %s are not captured: %s", name, reason)

    def _unfuse(self, reason: str) -> None:
        self.fused = False
        name = type(self.model).__name__
        logger.warning("Steps of %s are captured without fused kernels: %s", name, reason)


def room_for(tokens: int, more: int = ROOM) -> int:
    """Tokens that the cache of a step has room for if it is captured after so many.

    Args:
        more: see ROOM.
    """
    return -(-(tokens + max(more, tokens // 4)) // STEP) * STEP


def _capture(work: Callable[[], Tensor], device: torch.device) -> Graph:
    return CAPTURES[device.type](work, device)


def distance(got: Tensor, expected: Tensor) -> float:
    """|got - expected| over the spread of expected logits [.., V]."""
    got, expected = got.float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return float((got - expected).norm() / spread)
