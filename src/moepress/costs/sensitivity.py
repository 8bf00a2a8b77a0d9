"""Sensitivity: what an error at an output of a token costs, measured by gradients.

Rounding makes an error e_t [n] in an output of token t: the output of a MoE block's routed experts,
or of a linear. The error changes the predictions p of the model. Let g_t be the gradient, at that
output, of the log likelihood of next tokens drawn from p itself (the Fisher information is the mean
of g g^T). To second order

    KL(p || rounded) = 1/2 E (sum_t <g_t, e_t>)^2  ~  1/2 sum_t |g_t|^2 |e_t|^2 / n

The approximation assumes that errors of different tokens are independent, and that the directions
of e and g are. So one number is kept for each token and output,

    s_t = |g_t|^2 / (2 N n)     N calibration tokens, n elements of the output

and sum_t s_t |e_t|^2 is the predicted KL in nats per token. Scores weight errors by s. Hessians
weighted by s gain nothing (docs/log.md#gradient-hessians), and keeping g itself predicts no better
(docs/log.md#gradient-costs).

The forward walk keeps the states before every layer (kept_states.py). The backward walk
(original/backward.py) takes them up again, one layer at a time. A stopped run continues at the
first unfinished layer of either. A card is faster than a disk: there the gradient is written once a
minute, and a stopped run repeats the layers since.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moepress.costs.kept_states import KeptStates, states_file
from moepress.draws import drawn_tokens, gumbel_noise
from moepress.errors import CheckpointError
from moepress.format.checkpoint import Writer
from moepress.format.journal import IDENTITY_FILE, STATES_EVERY, check_identity
from moepress.format.unfinished import load_unfinished, save_unfinished
from moepress.original.backward import BackwardWalk, Gradient, as_leaves, outputs_as_leaves
from moepress.original.batches import position_chunks
from moepress.original.calls import record_calls
from moepress.original.loops import Loop, loop_of
from moepress.original.passes import passes_back
from moepress.original.source import Source
from moepress.original.walk import Walk
from moepress.progress import Progress
from moepress.ranks import here

SENSITIVITY = "sensitivity"  # name of the folder of results, inside the folder of scoring
EXPERTS = "experts"  # key of the routed experts' output; linears have their names as keys
EMBEDDING = "embedding"  # key of the embedding's output


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivities of all outputs of a model, kept in a folder."""

    folder: Path

    def layer(self, layer: int) -> Mapping[str, Tensor]:
        """s [T] float32 by output: EXPERTS, linears by name, and EMBEDDING in the first layer."""
        return load_unfinished(result_file(self.folder, layer))


@torch.inference_mode(False)  # a caller's inference mode would rule autograd out
def measure_sensitivity(
    source: Source, ids: Tensor, folder: Path, identity: Mapping[str, str], seed: int
) -> Sensitivity:
    """Measure the sensitivities of a model by a forward and a backward walk.

    Args:
        ids: [S, L] calibration sequences.
        folder: where states, gradients and results are kept. On a CPU it takes, for each layer, the
            bytes of the states of a walk; the backward walk deletes them as it goes. With a card
            memory takes those that it has room for, and about one a minute is a file too.
        identity: what the result depends on.
        seed: of the next tokens drawn from the model's predictions.

    Raises:
        InputError: `folder` holds work of another identity.
        CheckpointError: the disk is too full.
        NumericalError: the model predicts NaN.
        MoepressError: a layer cannot be differentiated.
    """
    ranks = here()
    count = len(source.layers)
    loop = loop_of(source.text_config, count)
    todo = ranks.agreed(lambda: _unfinished(folder, identity, loop, count))
    if not todo:
        return Sensitivity(folder)
    walk = Walk(source, ids, ahead=True)
    ranks.agreed(lambda: check_space(folder, walk, todo[-1]))
    with Progress("sensitivity", total=count + len(todo)) as progress:
        states = KeptStates(folder, source.device, count)
        writer = Writer(source.device, save_unfinished)
        gradient: Gradient | None = None
        if ranks.agreed(lambda: not _gradient(folder, todo[-1] + 1).is_file()):
            _forward(walk, states, count, progress)
            gradient = head_gradient(walk, seed)  # while the last states are being written
            stored = walk.once.on_first(gradient.tensors())
            ranks.agreed(lambda: writer.save({_gradient(folder, count): stored}))
        else:
            _forward(walk, states, todo[-1], progress)
            progress.skip(count - todo[-1])
        ranks.agreed(states.finish)
        if gradient is None or ranks.count > 1:
            ranks.agreed(writer.finish)
            read = load_unfinished(_gradient(folder, todo[-1] + 1))
            own = {name: walk.once.own(value) for name, value in read.items()}
            gradient = Gradient.of(own, walk.states_like())
        _backward(walk, gradient, states, writer, folder, todo, progress)
    if source.device.type == "cuda":
        torch.cuda.empty_cache()  # of streams that only read experts
    return Sensitivity(folder)


def _unfinished(folder: Path, identity: Mapping[str, str], loop: Loop, count: int) -> list[int]:
    """The layers to do: those without a result, and all up to the nearest gradient on disk.

    What only finished ones needed is deleted.
    """
    check_identity(folder / IDENTITY_FILE, identity)
    todo = loop.whole([n for n in range(count) if not result_file(folder, n).is_file()])
    if todo:
        after = range(todo[-1] + 1, count + 1)
        todo = list(range(next((n for n in after if _gradient(folder, n).is_file()), count)))
    _clear_after(folder, todo[-1] if todo else -1, count)
    return todo


def _clear_after(folder: Path, last: int, count: int) -> None:
    """Delete states and gradients that only layers after `last` needed.

    A run that was stopped may not have deleted them itself.

    Args:
        last: the last unfinished layer; -1: none.
        count: number of layers.
    """
    for layer in range(last + 2, count + 1):
        states_file(folder, layer).unlink(missing_ok=True)
        _gradient(folder, layer).unlink(missing_ok=True)
    if last < 0:
        for path in (states_file(folder, 0), _gradient(folder, 0)):
            path.unlink(missing_ok=True)


def check_space(folder: Path, walk: Walk, last: int) -> None:
    """Raise CheckpointError if the disk cannot hold the states of the walk.

    With a card they are files where memory is short, and nobody knows now whether it will be: the
    disk must have room for all of them.

    Args:
        last: the last layer that the backward walk has not finished.
    """
    stop = last + 1
    missing = 1  # the gradient before a layer is written while the one after it still exists
    if not _gradient(folder, last + 1).is_file():
        stop, missing = last + 2, 2  # that one, from the states after the last layer
    # A run on a card that was stopped on its way back left few states on disk.
    states = (n for n in range(stop) if not states_file(folder, n).is_file())
    missing += sum(walk.loop.runs(layer) for layer in states)
    need = missing * walk.tokens * math.prod(walk.states.shape[2:]) * walk.states.itemsize
    free = shutil.disk_usage(folder).free
    if free < need:
        on_card = walk.source.device.type == "cuda"
        perhaps = " (should memory be too short for them)" if on_card else ""
        raise CheckpointError(
            f"No space left for {folder}: the states of all layers, kept for the backward walk, "
            f"need about {need:,} bytes more{perhaps}, {free:,} are free. Free some and run the "
            "same command again, give fewer --sequences, or use the recipe 'fast'."
        )


def _forward(walk: Walk, states: KeptStates, stop: int, progress: Progress) -> None:
    """Keep the states before every layer up to `stop`.

    If `stop` is the number of layers, these are the states after the last one, and the walk is left
    there.
    """
    source = walk.source
    at = 0  # the layer whose input the walk's states are
    done = walk.ranks.agreed(lambda: [states.on_disk(layer) for layer in range(stop + 1)])
    if not done[0]:
        states.keep(0, walk.tensors())
    for layer in range(stop):
        progress.update(layer=layer, note="forward")
        if done[layer + 1]:
            progress.skip(1)
            continue
        if at != layer:
            walk.restore(states.tensors(layer))
        following = next((n for n in range(layer + 1, stop) if not done[n + 1]), stop)
        with source.layer_loaded(layer, following):
            walk.pass_layer(layer)
        at = layer + 1
        states.keep(at, walk.tensors())
        progress.advance()
    if stop == len(source.layers) and at != stop:
        walk.restore(states.tensors(stop))


def head_gradient(walk: Walk, seed: int) -> Gradient:
    """Gradient of the log likelihood of drawn next tokens, at what comes out of the last layer.

    Works on a few positions of one sequence at a time, because with a large vocabulary the logits
    would be the largest array.

    Raises:
        NumericalError: the model predicts NaN.
    """
    source = walk.source
    gradient = Gradient(walk.states_like(), {})
    vocabulary = len(source.language_model.get_output_embeddings().weight)
    noise = gumbel_noise(walk.once.all_ids.shape, vocabulary, seed, source.device)
    starts = walk.once.own(noise.starts)  # the same however many ranks there are
    with source.loaded(None):
        for number in range(len(walk.ids)):
            one = slice(number, number + 1)
            states = walk.states_of(one).requires_grad_()
            carried = as_leaves(walk.carried_of(one))
            leaves = [states, *(value for value in carried.values() if value.requires_grad)]
            for positions in position_chunks(walk.ids.shape[1]):
                with torch.enable_grad():
                    logits = walk.head(one, states, positions, carried).float().log_softmax(-1)
                    with torch.no_grad():
                        drawn = drawn_tokens(logits[0], noise.at(starts[number, positions]))
                    likelihood = logits[0].gather(-1, drawn[:, None]).sum()
                found = torch.autograd.grad(likelihood, leaves, allow_unused=True)
                gradient.states[one, positions] = found[0][:, positions].to(gradient.states)
                gradient.add_carried(one, carried, found[1:])
    return gradient


def _backward(
    walk: Walk,
    gradient: Gradient,
    states: KeptStates,
    writer: Writer,
    folder: Path,
    todo: list[int],
    progress: Progress,
) -> None:
    """Bring the gradient back through the layers of `todo`, and store their sensitivities.

    Args:
        gradient: at what comes out of the last of these layers.
        states: that the forward walk has kept.
        writer: of gradients and results.
    """
    source = walk.source
    walk_back = BackwardWalk(walk, gradient)
    every = STATES_EVERY if source.device.type == "cuda" else 0.0
    due = time.monotonic() + every  # when the next gradient is written
    needed: list[int] = []  # layers that a stopped run would repeat
    for layers in reversed(walk.loop.groups(todo)):
        found: dict[int, list[dict[str, Tensor]]] = {layer: [] for layer in layers}
        for number in passes_back(gradient, walk.loop.runs(layers[0])):
            for layer in reversed(layers):
                progress.update(layer=layer, note="backward")
                walk.restore(states.tensors(layer))
                if len(layers) == 1:
                    states.expect(layer - 1)
                one = walk_back.on(walk.of_pass(number))
                with source.layer_loaded(layer, following=layer - 1):
                    found[layer].append(_of_layer(one, layer))
        files: dict[Path, dict[str, Tensor]] = {}
        for layer in layers:
            states.let_go(layer)
        needed += layers
        forget: list[int] = []
        if walk.ranks.agreed(partial(_has_come, due)) or layers[0] == 0:
            due = time.monotonic() + every
            needed, forget = [], needed
            if layers[0] > 0:
                files[_gradient(folder, layers[0])] = walk.once.on_first(gradient.tensors())
        for layer, passes in found.items():
            result = _of_all_passes(walk, passes)
            if layer == 0:
                norms = embedding_norms(walk_back)
                result[EMBEDDING] = norms / (2 * walk.tokens * source.hidden)
            files[result_file(folder, layer)] = walk.division.on_first(result)
        writer.save(files, partial(_forget, folder, states, forget))
        for _ in layers:
            progress.advance()
    walk.ranks.agreed(lambda: _finish(writer, states))


def _has_come(due: float) -> bool:
    return time.monotonic() >= due


def _of_all_passes(walk: Walk, passes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sensitivities [passes * T] of a layer's outputs, from those [T] of each pass.

    Those that do not have one for each token of each pass are as in `_of_all_tokens`.
    """
    names = dict.fromkeys(name for one_pass in passes for name in one_pass)
    return {
        name: torch.cat([one_pass[name] for one_pass in passes if name in one_pass])
        for name in names
        if walk.ranks.count == 1 or all(name in one_pass for one_pass in passes)
    }


def _of_all_tokens(walk: Walk, norms: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without outputs that do not have one norm for each token; `score_linears` cannot use them.

    One process keeps them.
    """
    if walk.ranks.count == 1:
        return norms
    fit = {name for name, norm in norms.items() if len(norm) == walk.ids.numel()}
    found = walk.ranks.everyones(fit if walk.batches else None)  # None: any
    everywhere = set.intersection(*(names for names in found if names is not None))
    return {name: norm for name, norm in norms.items() if name in everywhere}


def _finish(writer: Writer, states: KeptStates) -> None:
    """Wait for the last result, and delete what only it needed."""
    writer.finish()
    states.forget(0)


def _of_layer(walk_back: BackwardWalk, layer: int) -> dict[str, Tensor]:
    """The sensitivities of a loaded layer's outputs, from bringing the gradient to its input."""
    source, tokens = walk_back.walk.source, walk_back.walk.tokens
    modules = source.packable[layer]
    at_experts, norms = walk_back.back(layer, modules)
    found = {
        name: norm / (2 * tokens * modules[name].out_features)
        for name, norm in _of_all_tokens(walk_back.walk, norms).items()
    }
    if at_experts is not None:
        found[EXPERTS] = at_experts / (2 * tokens * source.experts[layer].hidden)
    return found


def _forget(folder: Path, states: KeptStates, layers: list[int]) -> None:
    """Delete the states and the gradients after layers."""
    for layer in layers:
        _gradient(folder, layer + 1).unlink(missing_ok=True)
        states.forget(layer + 1)


def embedding_norms(walk_back: BackwardWalk) -> Tensor:
    """Squared norms [T] float32 of the gradient at the output of the embedding module.

    That output is not always the first layer's input: some families scale it or add to it, or
    compute other arguments of all layers from it.

    Args:
        walk_back: at the first layer's input.
    """
    walk, gradient = walk_back.walk, walk_back.gradient
    source = walk.source
    norms = []
    with source.loaded(None), torch.enable_grad():
        for batch in walk.batches:
            leaves: list[Tensor] = []
            embedding = source.language_model.get_input_embeddings()
            with outputs_as_leaves(embedding, leaves):
                calls = record_calls(source, walk.ids[batch])
            outputs, at_outputs = [calls[0].hidden], [gradient.states[batch]]
            for call, places in zip(calls, walk_back.embedded, strict=True):
                for name, place in places.items():
                    if name in gradient.carried:
                        outputs.append(call.tensors()[place])
                        at_outputs.append(gradient.carried[name][batch])
            at_outputs = [g.to(out) for g, out in zip(at_outputs, outputs, strict=True)]
            (found,) = torch.autograd.grad(outputs, leaves, at_outputs)
            norms.append(found.float().square().sum(-1).flatten().cpu())
    return torch.cat([torch.empty(0), *norms])


def _gradient(folder: Path, layer: int) -> Path:
    return folder / f"gradient-{layer:04d}.safetensors"


def result_file(folder: Path, layer: int) -> Path:
    """File of the sensitivities of a finished layer."""
    return folder / f"sensitivity-{layer:04d}.safetensors"
