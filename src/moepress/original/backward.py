"""Backpropagate the gradient of the loss through the layers, one at a time, in bounded memory.

walk.py brings states forward through a layer. This file brings g_out, the gradient of the loss at
the states after a layer, back to the layer's input. The model's own code runs the layer and
autograd differentiates it. Only the routed experts are replaced, as in the forward walk, so that
one expert is in memory at a time. (On a card with room for all experts of a layer, autograd goes
through them too, in one step: resident.py.) Write a layer as y = experts(h, w), out = rest(x, y),
where the experts' input h and the routing weights w are functions of the layer's input x. Then the
gradients of the loss at y, h, w and x are

    1. run the layer with y as a leaf                        g_y = g_out * d(out)/dy
    2. run each expert on its tokens, y = sum_e w_e f_e(h)   g_h = sum_e w_e g_y * df_e/dh
                                                             g_w,e = <g_y, f_e(h)>
       where w scales the input, y = sum_e f_e(x), x = w_e h
                                                             g_x = g_y * df_e/dx
                                                             g_h = sum_e w_e g_x
                                                             g_w,e = <g_x, h>
    3. run the layer again with y as a leaf;                 g_x = g_out * d(out)/dx
       backpropagate from out, h and w                             + g_h * dh/dx + g_w * dw/dx

Step 3 backpropagates to y again, for the gradients at linears between y and out.

Values that layers hand on beside their states (carried.py) are outputs and inputs like `out` and x.
So are arguments that the model computes from the embedding for each layer (gemma4): the gradient at
them is kept until the walk has come back to the embedding.
The choice of experts has no gradient. Some families detach the routing weights on purpose; step 3
then does not use g_w.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moepress.errors import MoepressError
from moepress.original.batches import SHARE_IN_ORDER, chunks, empty
from moepress.original.calls import record_calls, replaced_forward
from moepress.original.carried import Carried
from moepress.original.experts import Routed, expert_gradients
from moepress.original.resident import ExpertsForward
from moepress.original.walk import Walk
from moepress.sending import rows_sent

GRADIENT = "gradient"  # name of the gradient at the states, in files
EMBEDDED = "embedded"  # first part of the names of arguments that depend on the embedding


class _Run(NamedTuple):
    """One batch run through a layer, with its autograd graph.

    y, h and w are None in a layer without experts.
    """

    batch: slice
    tokens: slice
    x: Tensor  # [b, L, ...] states before the layer
    outs: list[Tensor]  # [b, L, ...] states after it, and carried values that have gradients
    at_outs: list[Tensor]  # the gradients at `outs`
    y: Tensor | None  # [t, H] the experts' output
    h: Tensor | None  # [t, H] their input
    w: Tensor | None  # [t, k] routing weights
    carried: Carried  # given to the layer, and its arguments that depend on the embedding


@dataclass
class Gradient:
    """The gradient of the loss at what comes out of a layer. Changed in place."""

    states: Tensor  # [S, L, ...] at its states
    carried: Carried  # [S, ...] at what it hands on beside them; without those whose gradient is 0

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], states: Tensor) -> Gradient:
        """The gradient of stored `tensors`.

        Args:
            states: memory for the gradient at the states.
        """
        start = GRADIENT + "."
        carried = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        return cls(states.copy_(tensors[GRADIENT]), carried)

    def tensors(self) -> dict[str, Tensor]:
        """To store it."""
        return {GRADIENT: self.states} | {f"{GRADIENT}.{k}": v for k, v in self.carried.items()}

    def add_carried(
        self,
        batch: slice,
        leaves: Carried,
        found: Sequence[Tensor | None],
    ) -> None:
        """Add gradients at the carried values of a batch.

        Args:
            leaves: the values; `found` has a gradient, or None, of each that requires one.
        """
        names = [name for name, value in leaves.items() if value.requires_grad]
        for name, at_value in zip(names, found, strict=True):
            if at_value is not None:
                if name not in self.carried:
                    shape, like = (len(self.states), *at_value.shape[1:]), leaves[name]
                    memory = empty(shape, like.dtype, like.device, SHARE_IN_ORDER)
                    self.carried[name] = memory.zero_()
                self.carried[name][batch] += at_value.to(self.carried[name])


def as_leaves(carried: Carried) -> Carried:
    """The same values, those of real numbers as leaves of a new autograd graph."""
    return {
        name: value.detach().requires_grad_() if value.is_floating_point() else value
        for name, value in carried.items()
    }


class BackwardWalk:
    """The gradient of the loss, on its way back through the layers.

    Args:
        walk: a forward walk; its states must be those before the layer that `back` is called for.
        gradient: at what comes out of that layer; changed in place.
    """

    def __init__(self, walk: Walk, gradient: Gradient) -> None:
        self.walk = walk
        self.gradient = gradient
        self.embedded = embedded_arguments(walk)

    def on(self, walk: Walk) -> BackwardWalk:
        """The same backward walk, on other states of the same model: of one pass of a loop."""
        other = copy.copy(self)
        other.walk = walk
        return other

    def back(
        self, layer: int, linears: Mapping[str, nn.Module]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Bring the gradient from the output of a layer to its input.

        Args:
            layer: index of a layer whose weights, except its routed experts, are loaded.
            linears: modules of the layer, by name.

        Returns:
            Squared norms [T] float32 of the gradient at each token's output of the routed experts
            (None: the layer has none), and squared norms of the gradient at the outputs of each
            linear, in the order of its calls.
        """
        if layer not in self.walk.source.experts:
            return None, self._to_input(layer, None, None, linears)
        if (resident := self.walk.resident(layer)) is not None:
            of_batches: list[Tensor] = []
            give = resident.differentiable(of_batches)
            found = self._to_input(layer, None, None, linears, give)
            return on_host(of_batches), found
        routed = self.walk.route(layer)
        output = self.walk.experts_output(layer, routed)
        at_output = self._at_experts_output(layer, output)
        if output.is_cuda:
            output = output.to(at_output.dtype)  # as the layer takes it, which saves room
        squares = [at_output[chunk].float().square().sum(1) for chunk in chunks(at_output)]
        norms = torch.cat([torch.empty(0, device=at_output.device), *squares]).cpu()
        at_output = self.walk.division.everywhere(at_output)
        inside = self._through_experts(layer, routed, at_output)
        del at_output, routed  # large: a card needs the room
        return norms, self._to_input(layer, output, inside, linears)

    def _at_experts_output(self, layer: int, output: Tensor) -> Tensor:
        """Step 1: g_y [T, H] in the dtype that the layer computes in."""
        gradient: Tensor | None = None
        for run in self._runs(layer, output, to_experts=True):
            assert run.y is not None
            (found,) = _gradients(run.outs, [run.y], run.at_outs, layer)
            if gradient is None:
                gradient = empty(tuple(output.shape), found.dtype, output.device)
            gradient[run.tokens] = found
        return output.new_empty(0, output.shape[1]) if gradient is None else gradient

    def _through_experts(
        self, layer: int, routed: Routed, at_output: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Step 2: g_h [T, H] float32 and g_w [T, k] float32, one expert in memory at a time.

        Args:
            at_output: g_y of the tokens of all ranks.
        """
        walk = self.walk
        dtype = torch.float32 if routed.scales_input else routed.hidden.dtype
        at_hidden = walk.token_sums(routed, walk.chosen(layer, routed), dtype=dtype, weighted=False)
        at_weight = torch.zeros_like(routed.weight)
        for expert in walk.experts(layer, at_hidden.own, routed):
            device = expert.weights.down.device
            for chunk in chunks(expert.tokens):
                token, place = expert.tokens[chunk], expert.places[chunk]
                with differentiating(layer):
                    found, along = expert_gradients(
                        expert, chunk, rows_sent(at_output, token, device).float()
                    )
                at_hidden.add(expert, chunk, found)
                at_weight[token, place] = along.cpu()
        walk.ranks.sum_up(at_weight)
        return at_hidden.result(), walk.division.own(at_weight)

    def _to_input(
        self,
        layer: int,
        output: Tensor | None,
        inside: tuple[Tensor, Tensor] | None,
        linears: Mapping[str, nn.Module],
        give: ExpertsForward | None = None,
    ) -> dict[str, Tensor]:
        """Step 3: overwrite the gradient with the one at the layer's input.

        Args:
            output: [T, H] of the experts; None: the layer has none, or `give` is given.
            inside: g_h and g_w; None: the same.
            give: runs the experts, and autograd differentiates it.

        Returns:
            Squared norms of the gradient at the outputs of `linears`.
        """
        kept = {k: v for k, v in self.gradient.carried.items() if k.startswith(EMBEDDED + ".")}
        before = Gradient(self.gradient.states, kept)
        with output_norms(linears) as norms:
            for run in self._runs(layer, output, to_experts=False, differentiable=give):
                outputs, at_outputs = run.outs, run.at_outs
                for tensor, at_tensor in zip((run.h, run.w), inside or (), strict=False):
                    if tensor is not None and tensor.requires_grad:
                        outputs.append(tensor)
                        at_outputs.append(at_tensor[run.tokens].to(tensor).view_as(tensor))
                leaves = [value for value in run.carried.values() if value.requires_grad]
                also = leaves if run.y is None else [*leaves, run.y]
                found, *at_others = _gradients(outputs, [run.x], at_outputs, layer, also)
                self.gradient.states[run.batch] = found
                before.add_carried(run.batch, run.carried, at_others[: len(leaves)])
        self.gradient.carried = before.carried
        return {name: on_host(found) for name, found in norms.items() if found}

    def _runs(
        self,
        layer: int,
        output: Tensor | None,
        to_experts: bool,
        differentiable: ExpertsForward | None = None,
    ) -> Iterator[_Run]:
        """Run a layer batch by batch, with the experts' output in place of the experts.

        Args:
            to_experts: differentiate with respect to the experts' output, or else to the input.
            differentiable: runs the experts, in place of their output.
        """
        walk = self.walk
        replaced = output is not None or differentiable is not None
        experts = walk.experts_module(layer) if replaced else None
        length = walk.ids.shape[1]
        for number, batch in enumerate(walk.batches):
            tokens = slice(batch.start * length, batch.stop * length)
            seen: list[Tensor] = []

            def give(
                h: Tensor, _: Tensor, w: Tensor, tokens: slice = tokens, seen: list[Tensor] = seen
            ) -> Tensor:
                assert output is not None  # replaced only where there are experts
                y = output[tokens].to(h, copy=True).requires_grad_()
                seen.extend((y, h, w))
                return y * 1  # the layer may change it in place, which a leaf does not allow

            x = walk.states_of(batch).requires_grad_(not to_experts)
            carried = walk.carried_of(batch)
            call = walk.call(layer, number)
            places = {} if to_experts else self.embedded[walk.call_number(layer, number)]
            given = as_leaves({name: call.tensors()[place] for name, place in places.items()})
            call = call.replaced({place: given[name] * 1 for name, place in places.items()})
            carried = carried if to_experts else as_leaves(carried)
            with (
                torch.enable_grad(),
                replaced_forward(experts, differentiable or give),
                differentiating(layer),
            ):
                inside = {k: v * 1 if v.requires_grad else v for k, v in carried.items()}
                out, after = walk.run(layer, number, x * 1, inside, call)
            outs, at_outs = [out], [self.gradient.states[batch].to(out)]
            for name, at_value in self.gradient.carried.items():
                if name in after and after[name].requires_grad:
                    outs.append(after[name])
                    at_outs.append(at_value[batch].to(after[name]))
            y, h, w = seen or (None, None, None)
            yield _Run(batch, tokens, x, outs, at_outs, y, h, w, carried | given)


def on_host(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [t] in a row, on the CPU. A card is waited for once, not at each of them."""
    return torch.cat([torch.empty(0), *(part.cpu() for part in parts)])


def _gradients(
    outputs: list[Tensor],
    inputs: list[Tensor],
    at_outputs: list[Tensor],
    layer: int,
    also: Sequence[Tensor] = (),
) -> tuple[Any, ...]:
    """Backpropagate `at_outputs`, the gradients at `outputs`, to `inputs` and `also`.

    Returns:
        The gradients at `inputs`, then at `also`, None at those that `outputs` do not depend on.

    Raises:
        MoepressError: the layer's code cannot be differentiated, or a gradient is NaN or infinite.
    """
    with differentiating(layer):
        found = torch.autograd.grad(outputs, [*inputs, *also], at_outputs, allow_unused=True)
        if any(f is None for f in found[: len(inputs)]):
            raise RuntimeError("its outputs do not depend on its inputs")
    if not all(torch.isfinite(f).all() for f in found if f is not None):
        raise MoepressError(
            f"The gradient of layer {layer} is NaN or infinite on the calibration text. A float16 "
            "model may overflow: try a bfloat16 one, or set sensitivity to 'none'."
        )
    return found


@contextmanager
def differentiating(layer: int) -> Iterator[None]:
    """Inside the `with` statement, turn PyTorch's errors into ones that say what to do.

    Raises:
        MoepressError: the layer's code cannot be differentiated.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except RuntimeError as error:
        raise MoepressError(
            f"Layer {layer} cannot be differentiated ({error}). Use the recipe 'fast', or set "
            "sensitivity to 'none': costs are then measured without gradients."
        ) from error


def embedded_arguments(walk: Walk) -> list[dict[str, int | str]]:
    """By call, the places of arguments beside the states that depend on the embedding's output.

    By the names that the gradients at them have. The model computes these arguments before it runs
    its layers (gemma4: the inputs of each layer).
    """
    source = walk.source
    embedding = source.language_model.get_input_embeddings()
    with source.loaded(None), torch.enable_grad(), outputs_as_leaves(embedding, []):
        calls = record_calls(source, walk.division.all_ids[:1])
    return [
        {
            f"{EMBEDDED}.{number}.{place}": place
            for place, value in call.tensors().items()
            if value.requires_grad
        }
        for number, call in enumerate(calls)
    ]


@contextmanager
def outputs_as_leaves(module: nn.Module, leaves: list[Tensor]) -> Iterator[None]:
    """Inside the `with` statement, each output of a module is a leaf of a new autograd graph.

    Args:
        leaves: gets these outputs, in the order of the calls.
    """

    def cut(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[-1] * 1

    handle = module.register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def output_norms(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside the `with` statement, collect squared norms of the gradients at linears' outputs.

    Returns:
        By name, one tensor [tokens of the call] float32 for each call of the linear, on its device.
    """
    norms: dict[str, list[Tensor]] = {name: [] for name in linears}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            call = len(norms[name])  # autograd may visit the calls in another order
            rows = out.numel() // out.shape[-1]
            norms[name].append(torch.zeros(rows))

            def keep(gradient: Tensor) -> None:
                norms[name][call] = gradient.float().square().sum(-1).flatten()

            if out.requires_grad:
                out.register_hook(keep)  # type: ignore[no-untyped-call]

        return forward

    handles = [m.register_forward_hook(hook(name)) for name, m in linears.items()]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
