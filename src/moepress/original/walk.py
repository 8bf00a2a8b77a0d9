"""Visit the decoder layers of a model one at a time, in bounded memory, and resume.

The hidden states of all calibration sequences go through one layer before the next is touched. A
layer is run by the model's own code, with the arguments (masks, rotary embeddings, caches) that the
model's own forward gives it; only its routed experts are taken out. For a layer with experts:

    route    run the layer with the experts replaced by a recorder: what reaches them, and the
             router's choice, is kept; the layer's output is thrown away
    (caller) each expert in turn, on its own tokens only: no two experts are in memory together
    advance  run the layer again, the experts replaced by their finished output: attention is
             computed twice, which is cheap beside the experts, and the layer's own way of adding
             residuals, shared experts and scales needs no imitation

journal.py keeps what is finished: a killed walk goes on at the first unfinished layer.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moepress.errors import NumericalError
from moepress.original.source import ExpertWeights, Source
from moepress.progress import Progress

LOGIT_TOKENS = 256  # whose gradients' logits are held at a time, some at once
LOGITS = 1 << 28  # numbers of an evaluation's batch: half a GB, or one in float32
BATCH_TOKENS = 4096  # tokens that go through a layer, or an expert, at a time
IN_MEMORY = 1 << 30  # bytes; larger arrays of states live in a mapped temporary file


@dataclass(frozen=True)
class Routed:
    """What reached the routed experts of one layer. T tokens in all sequences, k chosen each."""

    hidden: Tensor  # [T, H] model dtype, input of the experts
    index: Tensor  # [T, k] int64; an index of E or above means no expert
    weight: Tensor  # [T, k] float32 routing weights
    importance: Tensor | None = None  # [T] float32, sensitivity.py; None: all tokens count alike
    original: Tensor | None = None  # [T, H] what the original model has for `hidden`; if known

    def weighed(self, importance: Tensor | None) -> Routed:
        """The same, with what an error of each token costs."""
        return replace(self, importance=importance)

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Tokens of an expert [T_e] int64, rising, and their routing weights [T_e] float32."""
        token, place = (self.index == expert).nonzero(as_tuple=True)
        return token, self.weight[token, place]


class Walk:
    """Hidden states of calibration sequences, and how to bring them through the next layer.

    Args:
        source: the model.
        ids: [S, L] int64 token ids.
    """

    def __init__(self, source: Source, ids: Tensor) -> None:
        self.source = source
        self.ids = ids
        self.batches = batches(ids, BATCH_TOKENS)
        shape = (*ids.shape, source.hidden)
        self.states = empty(shape, source.compute_dtype)  # [S, L, H] input of the next layer
        self._calls: list[list[Call]] = []  # [batch][layer]
        self._begin()

    @torch.no_grad()  # not inference mode: a backward walk goes through these arguments
    def _begin(self) -> None:
        """Embed the tokens, and record how the model calls each of its layers."""
        with self.source.loaded(None):
            for batch in self.batches:
                calls = record_calls(self.source, self.ids[batch])
                self.states[batch] = calls[0].hidden.to("cpu")
                first = self._calls[0] if self._calls else calls
                self._calls.append([c.without_hidden(f) for c, f in zip(calls, first, strict=True)])

    def twin(self) -> Walk:
        """Another walk of the same text, from where this one is; they share all but the states."""
        other = copy.copy(self)
        other.states = empty(tuple(self.states.shape), self.states.dtype).copy_(self.states)
        return other

    @torch.inference_mode()
    def route(self, layer: int) -> Routed:
        """What reaches the experts of a layer whose other weights are loaded; states stay."""
        tokens = self.ids.numel()
        hidden = empty((tokens, self.source.hidden), self.source.compute_dtype)
        index, weight = [], []
        done = 0

        def record(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            nonlocal done
            hidden[done : done + len(x)] = x.to("cpu")
            done += len(x)
            index.append(top_k_index.to("cpu"))
            weight.append(top_k_weights.to("cpu", torch.float32))
            return torch.zeros_like(x)

        with replaced_forward(self.experts_module(layer), record):
            for number in range(len(self.batches)):
                self.run_batch(layer, number)
        return Routed(hidden, torch.cat(index), torch.cat(weight))

    @torch.inference_mode()
    def run_only(self, layer: int, before: Callable[[int], None] | None = None) -> None:
        """Run a layer for its hooks alone: experts give zeros, states stay as they are.

        Args:
            before: called with the number of each batch before it runs.
        """
        with self._without_experts(layer):
            for number in range(len(self.batches)):
                if before is not None:
                    before(number)
                self.run_batch(layer, number)

    @torch.inference_mode()
    def advance(self, layer: int, experts_output: Tensor | None) -> float:
        """Bring the states through a layer.

        Args:
            layer: index of a layer whose weights, experts left out, are loaded.
            experts_output: [T, H] sum of the experts' weighted outputs; None: has no experts.

        Returns:
            The sum of squares of the new states: the energy of the residual stream.
        """
        done = 0
        energy = 0.0

        def finished(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            nonlocal done
            assert experts_output is not None  # replaced only where there are experts
            rows = experts_output[done : done + len(x)]
            done += len(x)
            return rows.to(x)

        experts = self.experts_module(layer) if experts_output is not None else None
        with replaced_forward(experts, finished):
            for number, batch in enumerate(self.batches):
                out = self.run_batch(layer, number)
                if not torch.isfinite(out).all():
                    raise NumericalError(
                        f"Layer {layer} gives NaN or infinite states on the calibration text. "
                        "Expected finite numbers: a float16 model may overflow; try a bfloat16 one."
                    )
                energy += out.float().square().sum().item()
                self.states[batch] = out.to("cpu")
        return energy

    @torch.inference_mode()
    def experts_output(
        self,
        layer: int,
        routed: Routed,
        also: Callable[[nn.Module, ExpertWeights, int], None] | None = None,
    ) -> Tensor:
        """The original experts' weighted output [T, H] float32, one expert in memory at a time.

        Args:
            also: called with the experts' module, the weights and the number of each expert.
        """
        experts = self.source.experts[layer]
        module = self.experts_module(layer)
        output = empty(tuple(routed.hidden.shape), torch.float32).zero_()
        for expert in range(experts.experts):
            if len(routed.of(expert)[0]):
                weights = self.source.expert(layer, expert)
                add_expert_output(output, module, weights, routed, expert)
                if also is not None:
                    also(module, weights, expert)
        return output

    def pass_layer(self, layer: int) -> Routed | None:
        """Bring the states through a loaded layer of the original model.

        Returns:
            What reached its routed experts; None if it has none.
        """
        if layer not in self.source.experts:
            self.advance(layer, None)
            return None
        routed = self.route(layer)
        self.advance(layer, self.experts_output(layer, routed))
        return routed

    def finish(self, progress: Progress) -> None:
        """Bring the states through all layers of the original model."""
        for layer in range(len(self.source.layers)):
            progress.update(layer=layer)
            with self.source.loaded(self.source.layer_path(layer)):
                self.pass_layer(layer)
            progress.advance()

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """After the last layer: (batch, logits [b, L, V]) by the model's own norm and head."""
        vocabulary = int(self.source.config.get_text_config().vocab_size)
        with self.source.loaded(None):
            for batch in batches(self.ids, logit_tokens(vocabulary)):
                # The mode is left before yielding: generators that take turns would leave it on.
                with torch.inference_mode():
                    logits = self.head(batch, self.states[batch].to(self.source.device))
                yield batch, logits

    def head(self, part: slice, states: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [b, L, V] of sequences whose last layer gave `states`; what is outside the layers
        is loaded.

        Args:
            positions: [P] int64, to have logits [b, P, V] of these alone; None: of all.
        """
        last = len(self.source.layers) - 1

        def give(number: int) -> Callable[[Call], Tensor]:
            return lambda call: states if number == last else call.hidden

        with replaced_forwards(self.source.layers, give):
            ids = self.ids[part].to(self.source.device)
            kept = {} if positions is None else {"logits_to_keep": positions.to(ids.device)}
            logits: Tensor = self.source.model(input_ids=ids, use_cache=False, **kept).logits
        return logits

    def positions(self) -> Iterator[Tensor]:
        """The positions of a sequence, some at a time: as many as `head` should take at once."""
        length = self.ids.shape[1]
        for start in range(0, length, LOGIT_TOKENS):
            yield torch.arange(start, min(start + LOGIT_TOKENS, length))

    def run(self, layer: int, number: int, states: Tensor) -> Tensor:
        """Bring states [b, L, H] of a batch through a loaded layer, as the model calls it."""
        call = self._calls[number][layer]
        out = self.source.layers[layer](states, *call.args, **call.kwargs)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden

    def run_batch(self, layer: int, number: int) -> Tensor:
        """Run a batch's own states through a loaded layer; they stay as they are."""
        return self.run(layer, number, self.states[self.batches[number]].to(self.source.device))

    def experts_module(self, layer: int) -> nn.Module:
        """The skeleton's experts module of a layer."""
        module: nn.Module = self.source.model.get_submodule(self.source.experts[layer].path)
        return module

    @contextmanager
    def _without_experts(self, layer: int) -> Iterator[None]:
        experts = self.experts_module(layer) if layer in self.source.experts else None
        with replaced_forward(experts, lambda x, *_: torch.zeros_like(x)):
            yield


@dataclass(frozen=True)
class Call:
    """How the model called a decoder layer."""

    hidden: Tensor  # [b, L, H]; dropped once recorded
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def without_hidden(self, like: Call) -> Call:
        """The call less its states, sharing whatever equals the same argument of `like`."""
        args = tuple(_shared(a, b) for a, b in zip(self.args, like.args, strict=True))
        kwargs = {k: _shared(v, like.kwargs.get(k)) for k, v in self.kwargs.items()}
        return Call(self.hidden[:0], args, kwargs)


def _shared(value: Any, like: Any) -> Any:
    """`like` if it equals `value`, so that equal masks of many batches are kept once."""
    if isinstance(value, Tensor) and isinstance(like, Tensor):
        return like if value.shape == like.shape and torch.equal(value, like) else value
    if isinstance(value, tuple) and isinstance(like, tuple) and len(value) == len(like):
        return tuple(_shared(v, k) for v, k in zip(value, like, strict=True))
    return value


def record_calls(source: Source, ids: Tensor) -> list[Call]:
    """How the model calls each of its layers on a batch of sequences [b, L]."""
    calls: list[Call] = []
    with replaced_forwards(source.layers, lambda _: calls.append):
        source.model.get_decoder()(input_ids=ids.to(source.device), use_cache=False)
    return calls


@contextmanager
def replaced_forward(module: nn.Module | None, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block, calling `module` calls `forward`; its attributes stay."""
    if module is None:
        yield
        return
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own is seen again


@contextmanager
def replaced_forwards(
    layers: nn.ModuleList, make: Callable[[int], Callable[[Call], Tensor | None]]
) -> Iterator[None]:
    """Within the block, layer i hands its call to `make(i)`; None returned means pass through."""

    def stand_in(handle: Callable[[Call], Tensor | None]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = handle(Call(hidden_states, args, kwargs))
            return hidden_states if out is None else out

        return forward

    for number, layer in enumerate(layers):
        layer.forward = stand_in(make(number))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def expert_hidden(module: Any, gate_up: Tensor, x: Tensor) -> Tensor:
    """What the down projection of an expert receives: act(gate x) * up x  # [T, I]."""
    hidden: Tensor = module._apply_gate(F.linear(x, gate_up))
    return hidden


def expert_forward(module: Any, weights: ExpertWeights, x: Tensor) -> Tensor:
    """One expert on tokens [T, H] -> [T, H], not yet weighted."""
    return F.linear(expert_hidden(module, weights.gate_up, x), weights.down)


@torch.inference_mode()
def add_expert_output(
    output: Tensor, module: Any, weights: ExpertWeights, routed: Routed, expert: int
) -> None:
    """Add an expert's weighted output on its tokens to `output` [T, H] float32."""
    tokens, gate = routed.of(expert)
    for part in chunks(tokens):
        x = routed.hidden[tokens[part]].to(weights.down.device)
        y = expert_forward(module, weights, x).float().cpu() * gate[part, None]
        output.index_add_(0, tokens[part], y)


def batches(ids: Tensor, tokens: int) -> list[slice]:
    """Slices of sequences [S, L] of at most so many tokens, or of one sequence."""
    sequences, length = ids.shape
    step = max(1, tokens // length)
    return [slice(i, min(i + step, sequences)) for i in range(0, sequences, step)]


def logit_tokens(vocabulary: int) -> int:
    """How many tokens' logits are held at a time."""
    return min(BATCH_TOKENS, LOGITS // vocabulary)


def chunks(tokens: Tensor) -> Iterator[slice]:
    """Slices of at most BATCH_TOKENS tokens; none for no tokens."""
    for start in range(0, len(tokens), BATCH_TOKENS):
        yield slice(start, min(start + BATCH_TOKENS, len(tokens)))


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor; a large one is mapped from an unnamed temporary file."""
    count = torch.Size(shape).numel()
    if count * dtype.itemsize <= IN_MEMORY:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="moepress-") as file:
        flat = torch.from_file(file.name, shared=True, size=count, dtype=dtype)
    return flat.view(shape)  # the mapping outlives the name
