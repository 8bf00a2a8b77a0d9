"""Visit the decoder layers of a model one at a time, in bounded memory.

The hidden states of all calibration sequences go through one layer before the next layer is read.
The model's own code runs each layer, with the arguments (masks, rotary embeddings, caches) that the
model's own forward passes to it. Only the routed experts are replaced. For a layer with experts:

    route    run the layer with a recorder in place of the experts; keep their inputs and the
             router's choices; discard the layer's output
    (caller) run each expert in turn on its own tokens: one expert is in memory at a time
    advance  run the layer again with the finished output in place of the experts. Attention is
             computed twice, which takes little time compared with the experts. In return the
             layer's own code adds residuals, shared experts and scales

Where the original's experts only have to be run, and all of a layer fit on the card, the layer runs
once (resident.py).

The calls of all layers are recorded once, while the tokens are embedded (calls.py). What some
layers hand to later ones beside their states is carried along (carried.py). Layers that the model
runs several times have the states of all these passes, as more sequences (loops.py).

A job of several ranks divides the sequences (division.py) and the experts of each layer
(token_sums.py). Each rank walks with its own sequences; the inputs of a layer's routed experts are
exchanged, so that an expert is run on all its tokens at once, as by one process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from moepress.errors import NumericalError
from moepress.original.batches import (
    SHARE_IN_ORDER,
    batch_tokens,
    batches,
    empty,
    logit_tokens,
)
from moepress.original.calls import Call, record_calls, replaced_forward, replaced_forwards
from moepress.original.carried import (
    BEFORE_LAYERS,
    PREVIOUS,
    Carried,
    CarriedCall,
    Gathered,
    states_between,
)
from moepress.original.experts import ExpertWeights, Routed, RoutedExpert
from moepress.original.loops import loop_of
from moepress.original.passes import enter_loop, leave_loop
from moepress.original.record import Record
from moepress.original.resident import ComingExperts, ExpertsForward, ResidentExperts
from moepress.original.sequences import Sequences
from moepress.original.source import Source
from moepress.original.token_sums import TokenSums
from moepress.progress import Progress
from moepress.ranks import here
from moepress.sending import sent

STATES = "states"  # name of the states of a walk in files


class Walk(Sequences):
    """Hidden states of calibration sequences on their way through the layers of a model.

    Args:
        source: the model.
        ids: [S of all ranks, L] int64 token ids.
        share: of a card's free memory, that the states may take; else they are on the host.
        ahead: read the experts of the next layer while those of a layer run, where a card has room.
    """

    def __init__(
        self, source: Source, ids: Tensor, share: float = SHARE_IN_ORDER, ahead: bool = False
    ) -> None:
        self.source = source
        self._share = share
        loop = loop_of(source.text_config, len(source.layers))
        super().__init__(ids, here(source.device), loop, batch_tokens(source.device))
        self._ahead = ahead and loop.passes == 1
        self._coming = ComingExperts()
        self._calls: list[list[Call]] = []  # [batch][call]
        # [passes * S, L, H] input of the next layer; of several residual streams [.., L, ...]
        self.states = self._begin()
        self.carried: Carried = {}  # [passes * S, ...] what earlier layers hand on too

    @torch.no_grad()  # not inference mode: a backward walk differentiates through these arguments
    def _begin(self) -> Tensor:
        """Record how the model calls each of its layers. Returns the embedded tokens."""
        states: Tensor | None = None
        with self.source.loaded(None):
            if not self.of_ids:  # more ranks than batches: this one has experts only
                hidden = record_calls(self.source, self.division.all_ids[:1])[0].hidden
                return hidden.new_empty((0, *hidden.shape[1:]))
            for batch in self.of_ids:
                calls = record_calls(self.source, self.ids[batch])
                hidden = calls[0].hidden
                if states is None:
                    shape = (len(self.ids), *hidden.shape[1:])
                    states = empty(shape, hidden.dtype, self.source.device, self._share)
                states[batch] = hidden
                first = self._calls[0] if self._calls else calls
                self._calls.append([c.without_hidden(f) for c, f in zip(calls, first, strict=True)])
        assert states is not None
        return states

    def tensors(self, name: str = STATES) -> dict[str, Tensor]:
        """Everything that walks need to go on at this layer, of all ranks: for rank 0 to store it.

        Args:
            name: of the states; of carried values it is the first part.
        """
        carried = {f"{name}.{key}": v for key, v in self.carried.items()}
        return self.division.on_first({name: self.states} | carried)

    def restore(self, tensors: Mapping[str, Tensor], name: str = STATES) -> None:
        """Go on from stored `tensors` of all sequences; they may have others among them."""
        together = len(tensors[name]) > len(self.once.all_ids)
        self.set_passes(self.loop.together if together else (0,))
        states = self.division.own(tensors[name])
        if len(states) != len(self.states):
            self.states = self.states_like(len(states))
        self.states.copy_(states)
        start = f"{name}."
        self.carried = {
            k.removeprefix(start): self.division.own(v)
            for k, v in tensors.items()
            if k.startswith(start)
        }

    def fork(self) -> Walk:
        """A second walk that starts at the same layer. The two share everything but the states."""
        other = copy.copy(self)  # carried values are never changed in place
        other.states = self.states_like().copy_(self.states)
        return other

    def states_like(self, sequences: int | None = None) -> Tensor:
        """An uninitialised tensor of the shape and dtype of the states.

        Args:
            sequences: None: as many as the states have.
        """
        shape = (len(self.states) if sequences is None else sequences, *self.states.shape[1:])
        return empty(shape, self.states.dtype, self.source.device, self._share)

    def of_pass(self, number: int) -> Walk:
        """A walk with the states of one pass alone, which are not copied."""
        rows = self.rows_of(number)
        other = copy.copy(self)
        other.set_passes((number,))
        other.states = self.states[rows]
        names = self.carried.keys() - ({PREVIOUS} if number == 0 else set())
        other.carried = {name: self.carried[name][rows] for name in names}
        return other

    @torch.inference_mode()
    def route(self, layer: int) -> Routed:
        """The inputs and choices of a layer's routed experts, for the tokens of all ranks.

        The states stay as they are.

        Args:
            layer: index of a layer whose weights, except its routed experts, are loaded.
        """
        shape = self.division.all_ids.numel(), self.source.experts[layer].hidden
        record = Record(empty(shape, self.source.compute_dtype, self.source.device))

        def give(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            record(x, index, weight)
            return torch.zeros_like(x)

        with replaced_forward(self.experts_module(layer), give):
            for number, batch in enumerate(self.division.own_batches):
                record.done = self.division.tokens(batch).start
                self.run_batch(layer, number)
        return record.routed(self.source.experts[layer].form, self.division)

    @torch.inference_mode()
    def run_for_hooks(
        self,
        layer: int,
        before: Callable[[int], None] | None = None,
        after: Callable[[], None] | None = None,
        experts_output: Tensor | None = None,
    ) -> None:
        """Run a layer only to trigger hooks: states stay as they are.

        Args:
            before: called with the number of each batch before that batch runs.
            after: called as often on all ranks, after each batch or in its place.
            experts_output: [T, H] what the experts return; None: zeros.
        """
        experts = self.experts_module(layer) if layer in self.source.experts else None
        give = _zeros if experts_output is None else _in_turn(experts_output)
        with replaced_forward(experts, give):
            numbers = iter(range(len(self.batches)))
            for together in self.division.rounds:
                if self.ranks.rank < len(together):
                    number = next(numbers)
                    if before is not None:
                        before(number)
                    self.run_batch(layer, number)
                if after is not None:
                    after()

    @torch.inference_mode()
    def advance(self, layer: int, experts_output: Tensor | None) -> float:
        """Bring the states through a layer.

        Args:
            layer: index of a layer whose weights, except its routed experts, are loaded.
            experts_output: [T, H] sum of the experts' weighted outputs; None: it has no experts.

        Returns:
            Energy of the residual stream, of all ranks (`batch_energy`); of a loop's passes the
            mean.
        """
        return self._advance(layer, None if experts_output is None else _in_turn(experts_output))

    def _advance(self, layer: int, give: ExpertsForward | None) -> float:
        """`advance`, with what stands in place of the experts; None: the layer has none."""
        energies, finite = [], []
        experts = self.experts_module(layer) if give is not None else None
        aside = self.states.is_cuda or self.states.is_pinned()  # copies need not be waited for
        after = Gathered(self.carried, len(self.states), self.source.device)
        with replaced_forward(experts, give):
            for number, batch in enumerate(self.batches):
                given = self.carried_of(batch)
                out, handed_on = self.run(layer, number, self.states_of(batch), given)
                after.add(batch, given, handed_on)
                finite.append(torch.isfinite(out).all())
                energies.append(batch_energy(out))
                self.states[batch].copy_(out, non_blocking=aside)
        self.carried = after.values
        if not all(finite):  # a card is waited for here, once
            raise NumericalError(
                f"Layer {layer} gives NaN or infinite states on the calibration text. Expected "
                "finite numbers: a float16 model may overflow; try a bfloat16 one."
            )
        sums = [energy.item() for energy in energies]
        energy = self.division.total(sums) / len(self.passes)
        if self.loop.passes > 1 and layer + 1 == self.loop.start:
            enter_loop(self)
        elif self.loop.passes > 1 and layer + 1 == self.loop.stop:
            leave_loop(self)
        return energy

    def expert(self, layer: int, number: int, routed: Routed) -> RoutedExpert:
        """Read one expert of the original model, and pair it with its tokens."""
        (expert,) = self.experts(layer, [number], routed)
        return expert

    def experts(self, layer: int, numbers: Sequence[int], routed: Routed) -> Iterator[RoutedExpert]:
        """Read experts of the original model one by one, and pair them with their tokens."""
        module = self.experts_module(layer)

        def paired(weights: ExpertWeights, number: int) -> RoutedExpert:
            return RoutedExpert(layer, number, module, weights, routed)

        # A map, unlike a loop, does not hold an expert while it is used.
        return map(paired, self.source.experts_in_turn(layer, numbers), numbers)

    def chosen(self, layer: int, routed: Routed) -> list[int]:
        """Numbers of the experts of a layer that some token chose."""
        tokens, _ = routed.statistics(self.source.experts[layer].experts)
        return [int(number) for number in tokens.nonzero().flatten()]

    def token_sums(
        self,
        routed: Routed,
        numbers: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        weighted: bool = True,
    ) -> TokenSums:
        """To divide experts over ranks, and to sum what they give for each token.

        Args:
            numbers: of the experts, rising.
            dtype: of what they give; None: the outputs' dtype.
            weighted: by the routing weights.
        """
        dtype = self.source.compute_dtype if dtype is None else dtype
        return TokenSums(self.division, routed, numbers, self.source.device, dtype, weighted)

    @torch.inference_mode()
    def experts_output(
        self, layer: int, routed: Routed, also: Callable[[RoutedExpert], None] | None = None
    ) -> Tensor:
        """Weighted output [T, H] float32 of the original experts, one in memory at a time.

        Args:
            also: called with each expert of this rank that some token chose.
        """
        sums = self.token_sums(routed, self.chosen(layer, routed))
        for expert in self.experts(layer, sums.own, routed):
            sums.add_output(expert)
            if also is not None:
                also(expert)
        return sums.result()

    def pass_layer(self, layer: int) -> Routed | None:
        """Bring the states through a loaded layer of the original model.

        Returns:
            The inputs and choices of its routed experts; None if it has none.
        """
        if layer not in self.source.experts:
            self.advance(layer, None)
            return None
        if (resident := self.resident(layer)) is not None:
            return self._pass_with(layer, resident)
        routed = self.route(layer)
        self.advance(layer, self.experts_output(layer, routed))
        return routed

    def expect(self, layer: int) -> None:
        """Begin to read the experts of the layer at work to the card, for `pass_layer` to take."""
        if self.ranks.count == 1:
            self._coming.begin(self.source, layer)

    def resident(self, layer: int) -> ResidentExperts | None:
        """The routed experts of a layer, read to the card; None: one of them at a time is read."""
        if self.ranks.count > 1:
            return None
        found = self._coming.take(self.source, layer, self.experts_module(layer))
        if self._ahead and found is not None:
            self._coming.begin(self.source, self.source.upcoming.following)
        return found

    @torch.inference_mode()
    def _pass_with(self, layer: int, resident: ResidentExperts) -> Routed:
        """`pass_layer` with the experts in memory: the layer runs once."""
        shape = self.division.all_ids.numel(), self.source.experts[layer].hidden
        record = Record(empty(shape, self.source.compute_dtype, self.source.device))
        division = self.division  # of the passes that go in

        def give(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            record(x, index, weight)
            return resident.output(x, index, weight)

        self._advance(layer, give)
        return record.routed(resident.form, division)

    @torch.inference_mode()
    def advance_with(self, resident: ResidentExperts) -> float:
        """`advance` through the layer of some experts, which run as the model runs them."""
        return self._advance(resident.layer, resident.output)

    def finish(self, progress: Progress) -> None:
        """Bring the states through all layers of the original model."""
        for layer in range(len(self.source.layers)):
            progress.update(layer=layer)
            with self.source.layer_loaded(layer):
                self.pass_layer(layer)
            progress.advance()

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """(batch, logits [b, L, V]) of the model's own norm and head, after the last layer."""
        vocabulary = int(self.source.text_config.vocab_size)
        with self.source.loaded(None):
            for batch in batches(self.ids, logit_tokens(vocabulary)):
                # Leave inference mode before `yield`: two generators used in turns would leave it
                # on.
                with torch.inference_mode():
                    logits = self.head(batch, self.states_of(batch))
                yield batch, logits

    def head(
        self,
        batch: slice,
        states: Tensor,
        positions: Tensor | None = None,
        carried: Carried | None = None,
    ) -> Tensor:
        """Logits [b, L, V] of a batch of sequences, from the states after the last layer.

        The tensors outside the layers must be loaded.

        Args:
            batch: of `ids`.
            states: [b, L, ...] after the last layer.
            positions: [P] int64, to compute only their logits [b, P, V]; None: all.
            carried: of the batch; None: the walk's own.
        """
        carried = self.carried_of(batch) if carried is None else carried
        known = states_between(self.source.layers, carried)
        known[len(self.source.layers) - 1] = states

        def give(number: int) -> Callable[[Call], Tensor | None]:
            return lambda _: known.get(number)

        with replaced_forwards(self.source.layers, give):
            given = {"input_ids": sent(self.ids[batch], self.source.device)}
            if BEFORE_LAYERS in known:  # the model uses them again after the last layer
                given = {"inputs_embeds": known[BEFORE_LAYERS]}
            if positions is not None:
                given["logits_to_keep"] = sent(positions, self.source.device)
            logits: Tensor = self.source.language_model(**given, use_cache=False).logits
        return logits

    def run(
        self, layer: int, number: int, states: Tensor, carried: Carried, call: Call | None = None
    ) -> tuple[Tensor, Carried]:
        """Bring states of batch `number` through a loaded layer as the model calls it.

        Args:
            states: [b, L, ...] before the layer.
            carried: of the batch.
            call: the model's, with other arguments; None: as it is.

        Returns:
            The states after the layer, and the values that are carried on.
        """
        call = self.call(layer, number) if call is None else call
        return CarriedCall(call.args, call.kwargs, states, carried).run(self.source.layers[layer])

    def call(self, layer: int, number: int) -> Call:
        """How the model calls a layer for batch `number`."""
        return self._calls[number % len(self.of_ids)][self.call_number(layer, number)]

    def run_batch(self, layer: int, number: int) -> Tensor:
        """Run a batch's own states through a loaded layer. The walk's states stay as they are."""
        batch = self.batches[number]
        return self.run(layer, number, self.states_of(batch), self.carried_of(batch))[0]

    def states_of(self, batch: slice) -> Tensor:
        """The states of a batch, on the device."""
        return sent(self.states[batch], self.source.device)

    def carried_of(self, batch: slice) -> Carried:
        """The carried values of a batch, on the device."""
        return {name: sent(v[batch], self.source.device) for name, v in self.carried.items()}

    def experts_module(self, layer: int) -> nn.Module:
        """The skeleton's experts module of a layer."""
        module: nn.Module = self.source.model.get_submodule(self.source.experts[layer].path)
        return module


def batch_energy(states: Tensor) -> Tensor:
    """Energy of the states [b, L, ...] of a batch: b L times the median of a token's squared norm.

    Most models give a few tokens, the first above all, states a hundred times as large as the
    others (massive activations, arXiv:2402.17762), in the layers between the expert that makes them
    and the one that takes them back. A sum of squares would be theirs alone, and errors between
    these layers would look small beside errors in others.
    """
    squares = states.float().square().flatten(2).sum(-1)
    return squares.median() * squares.numel()


def _in_turn(output: Tensor) -> ExpertsForward:
    """Experts whose outputs are known: the rows [T, H], one call after the other."""
    done = 0

    def give(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        nonlocal done
        rows = output[done : done + len(x)]
        done += len(x)
        return rows.to(x)

    return give


def _zeros(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts that return zeros."""
    return torch.zeros_like(x)
