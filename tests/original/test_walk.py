"""The walk against the forward of the model; interrupted runs resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moepress.errors import InputError
from moepress.format import journal as journals
from moepress.format.journal import Journal
from moepress.original import batches as batch_sizes
from moepress.original.batches import chunks, empty
from moepress.original.experts import Routed
from moepress.original.source import Source
from moepress.original.walk import Walk, batch_energy
from moepress.progress import Progress
from tests.conftest import FAMILIES, VOCAB, make_model

Folder = Callable[..., Path]


def some_ids(sequences: int = 5, length: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (sequences, length), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [48, 4096])  # uneven last batch, and all in one
def test_a_walk_is_the_models_forward(
    model_folder: Folder, family: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_sizes, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(batch_sizes, "LOGITS", VOCAB * batch_tokens // 2)
    folder = model_folder(family)
    ids = some_ids()
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    walk = Walk(Source(folder), ids)
    with Progress("test", total=2) as progress:
        walk.finish(progress)
    seen = 0
    for batch, logits in walk.logits():
        # Batches change the order of float32 sums only: about 1e-6 of logits of size 1 to 10.
        torch.testing.assert_close(logits, expected[batch], rtol=1e-4, atol=1e-4)
        assert len(logits) == (1 if batch_tokens == 48 else len(ids))
        seen += len(logits)
    assert seen == len(ids)


def test_routing_is_the_models_own(model_folder: Folder) -> None:
    folder = model_folder("mixtral")
    ids = some_ids()
    model = AutoModelForCausalLM.from_pretrained(folder)
    seen = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.inference_mode():
        model(ids)
    source = Source(folder)
    walk = Walk(source, ids)
    with source.loaded(source.layer_paths[0]):
        routed = walk.route(0)
    ((hidden, index, weight),) = seen
    torch.testing.assert_close(routed.hidden, hidden)
    assert torch.equal(routed.index, index)
    torch.testing.assert_close(routed.weight, weight)
    for expert in range(4):
        tokens, places = routed.of(expert)
        assert tokens.tolist() == [t for t in range(ids.numel()) if expert in index[t]]
        assert torch.equal(routed.weight[tokens, places], routed.weight[routed.index == expert])


@pytest.mark.parametrize("largest", [7, 1 << 17])
def test_tokens_of_each_expert(largest: int) -> None:
    """Rising tokens, then places; also of tokens that chose an expert twice, or none."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-1, 8, (50, 3), generator=generator)
    index[::7] = largest
    index[3] = 2
    routed = Routed(torch.zeros(50, 4), index, torch.ones(50, 3))
    for expert in range(10):
        expected = (index == expert).nonzero(as_tuple=True)
        assert all(map(torch.equal, routed.of(expert), expected))
    assert torch.equal(routed.of(2)[0][routed.of(2)[0] == 3], torch.tensor([3, 3, 3]))


def test_journal_resumes_after_the_last_finished_layer(
    model_folder: Folder, tmp_path: Path
) -> None:
    source = Source(model_folder())
    ids = some_ids()
    whole = Walk(source, ids)
    assert _run(Journal(tmp_path / "a", {"work": "1"}, 2), whole) == [0, 1]
    journal = Journal(tmp_path / "b", {"work": "1"}, 2)
    first = Walk(source, ids)
    _step(journal, first, next(journal.remaining(first.restore)))
    second = Walk(source, ids)
    assert _run(journal, second) == [1]
    assert torch.equal(second.states, whole.states)
    assert journal.result(0)["x"] == 0 and journal.result(1)["x"] == 1


def _run(journal: Journal, walk: Walk) -> list[int]:
    done = []
    for layer in journal.remaining(walk.restore):
        _step(journal, walk, layer)
        done.append(layer)
    return done


def _step(journal: Journal, walk: Walk, layer: int) -> None:
    with walk.source.layer_loaded(layer):
        walk.advance(layer, walk.experts_output(layer, walk.route(layer)))
    journal.commit(layer, {"x": torch.ones(1) * layer}, walk.tensors)


def test_journal_refuses_other_work(tmp_path: Path) -> None:
    Journal(tmp_path, {"model": "a", "recipe": "r"}, 2)
    Journal(tmp_path, {"model": "a", "recipe": "r"}, 2)
    with pytest.raises(InputError, match="differs in: model"):
        Journal(tmp_path, {"model": "b", "recipe": "r"}, 2)


def test_journal_goes_on_from_the_last_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card leaves states now and then; layers since are repeated."""
    make_model("mixtral", num_hidden_layers=5).save_pretrained(tmp_path / "model")
    source = Source(tmp_path / "model")
    ids, now = some_ids(), [100.0]
    whole = Walk(source, ids)
    _run(Journal(tmp_path / "a", {"work": "1"}, 5), whole)
    monkeypatch.setattr(journals.time, "monotonic", lambda: now[0])

    def begun() -> Journal:
        journal = Journal(tmp_path / "b", {"work": "1"}, 5)
        monkeypatch.setattr(journal, "_every", 60.0)
        return journal

    def stored() -> list[str]:
        return sorted(path.stem for path in (tmp_path / "b").glob("states-*"))

    journal, walk = begun(), Walk(source, ids)
    layers = journal.remaining(walk.restore)
    for layer, seconds, kept in ((0, 10, []), (1, 70, ["states-0002"]), (2, 50, ["states-0002"])):
        assert next(layers) == layer
        now[0] += seconds
        _step(journal, walk, layer)
        assert stored() == kept
    assert journal.todo == [3, 4]
    other = begun()
    assert other.first == 2
    again = Walk(source, ids)
    assert _run(other, again) == [2, 3, 4]
    assert torch.equal(again.states, whole.states)
    assert stored() == [] and other.todo == []
    assert [int(other.result(layer)["x"]) for layer in range(5)] == list(range(5))


def test_journal_without_states_begins_anew(model_folder: Folder, tmp_path: Path) -> None:
    source = Source(model_folder())
    journal = Journal(tmp_path, {"work": "1"}, 2)
    walk = Walk(source, some_ids())
    journal.commit(0, {"x": torch.ones(1)}, walk.tensors)
    next(tmp_path.glob("states-*")).unlink()
    assert journal.first == 0 and _run(journal, walk) == [0, 1]


def test_large_arrays_are_mapped_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sizes, "IN_MEMORY", 100)
    mapped = empty((7, 11), torch.bfloat16)
    mapped.copy_(torch.arange(77).view(7, 11))
    assert mapped.float().sum() == sum(range(77))


def test_chunks_cover_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sizes, "BATCH_TOKENS", 4)
    rows = torch.arange(10)
    assert torch.equal(torch.cat([rows[part] for part in chunks(rows)]), rows)
    assert list(chunks(rows[:0])) == []


def test_massive_activations_do_not_decide_the_energy() -> None:
    states = torch.randn(4, 50, 2, 8, generator=torch.Generator().manual_seed(0))
    plain = batch_energy(states)
    assert plain == pytest.approx(200 * states.square().sum((2, 3)).median().item())
    states[:, 0] *= 1000
    assert plain <= batch_energy(states) < 1.05 * plain
