"""Models whose experts are on disk compute the same bits as models in memory."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moepress import kernels
from moepress.costs.drop_costs import DropCosts
from moepress.errors import CheckpointError, InputError
from moepress.format.checkpoint import CHECKSUMS, PLAN, quantization_config
from moepress.format.codec import PackedSpec
from moepress.hf import load_model
from moepress.hf.captured import PROOFS, CapturedSteps
from moepress.kernels import cpu
from moepress.kernels.modules import PackedExperts
from moepress.prune import Pruning, parse_strength, prune
from moepress.pruning.layer import pruned_layers
from moepress.store import statistics
from moepress.store.memory import VARIABLE, memory_wanted
from moepress.store.statistics import store_of
from tests.conftest import make_model

if cpu.missing() is not None or not hasattr(os, "pread"):
    pytest.skip("no store here", allow_module_level=True)

EXPERTS = 8
WIDTHS = {"int": (2, 3, 0, 4, 1, 2, 8, 3), "trellis": (2, 3, 0, 4, 1, 2.5, 1.5, 3)}
PRUNING = Pruning({0: (0.0, 0.7), 1: (0.0, 0.9)}, renormalise=True, protect=0.2)
IDS = torch.randint(2, 384, (3, 40), generator=torch.Generator().manual_seed(1))


def packed_folder(folder: Path, family: str, codes: str) -> Path:
    """A folder of random codes with experts of many widths, one of them left out."""
    counts = {"num_local_experts": EXPERTS} if family == "mixtral" else {"num_experts": EXPERTS}
    model = make_model(family, **counts)
    widths = WIDTHS[codes]
    specs = {
        f"{path}.{name}": PackedSpec(widths, 32, codes)
        for path, module in model.named_modules()
        if hasattr(module, "has_gate")
        for name in ("gate_up_proj", "down_proj")
    }
    state = {n: t.clone() for n, t in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        del state[name]
    for name, spec in specs.items():
        state[name] = random_bytes(spec, *state[name].shape[1:])
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["quantization_config"] = quantization_config(specs, {})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def random_bytes(spec: PackedSpec, rows: int, cols: int) -> Tensor:
    """Packed matrices of random codes and of scales near 0.1."""
    generator = torch.Generator().manual_seed(rows)
    matrices = []
    for bits in spec.bits:
        if bits == 0:
            continue
        codec = spec._codec(bits)
        matrix = torch.randint(
            256, (codec.nbytes(rows, cols),), generator=generator, dtype=torch.uint8
        )
        scale = torch.tensor([0.1 / codec.levels], dtype=torch.bfloat16).view(torch.uint8)
        if codec.family == "trellis":
            slabs = -(-rows // 64)
            matrix[slabs * codec.slab_bytes(cols) :] = (scale // 1).repeat(64 * slabs)
        else:
            size = codec.block_bytes(cols)
            blocks = matrix[: -(-rows // 16) * size].view(-1, size)
            first, groups = 2 * cols * bits, codec.groups(cols)
            blocks[:, first : first + 32 * groups] = scale.repeat(16 * groups)
        matrices.append(matrix)
    return torch.cat(matrices)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, str], Path] = {}

    def make(family: str = "mixtral", codes: str = "int") -> Path:
        if (family, codes) not in made:
            at = tmp_path_factory.mktemp("store") / f"{family}-{codes}"
            made[family, codes] = packed_folder(at, family, codes)
        return made[family, codes]

    return make


def budgets(path: Path) -> list[int]:
    """Bytes for weights: the largest expert alone, somewhat more, half of them, all of them."""
    with memory_wanted(10**9):
        store = store_of(AutoModelForCausalLM.from_pretrained(path))
    assert store is not None
    size = (path / "model.safetensors").stat().st_size
    rest = size - sum(
        t.nbytes for t in load_file(path / "model.safetensors").values() if t.dtype == torch.uint8
    )
    each = store.nbytes // (EXPERTS - 1) // 2  # two layers
    return [rest + int(share * each) for share in (2.2, 3, EXPERTS - 1, 2 * EXPERTS)]


def in_memory(path: Path, **options: Any) -> Any:
    """The model without a store. Its plain weights are copied as beside a store: bits of torch's
    own products depend on the alignment of their operands."""
    model = load_model(path, memory="mapped", **options)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


@torch.inference_mode()
def run(model: Any) -> list[Tensor]:
    """Logits of a batch of prompts, of one token after another, and generated tokens."""
    out = model(input_ids=IDS, use_cache=True)
    step = model(input_ids=IDS[:1, :1], use_cache=True)
    found = [out.logits, step.logits]
    for at in range(1, 8):
        step = model(input_ids=IDS[:1, at : at + 1], past_key_values=step.past_key_values)
        found.append(step.logits)
    found.append(model.generate(IDS[1:2], max_new_tokens=8, do_sample=False))
    return found


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) and all(map(torch.equal, a, b))
    assert all(bool(t.isfinite().all()) for t in a)


@pytest.mark.parametrize("codes", ["int", "trellis"])
@pytest.mark.parametrize("pruning", [None, PRUNING])
def test_the_same_bits_at_every_budget(
    folder: Callable[..., Path], codes: str, pruning: Pruning | None
) -> None:
    path = folder("mixtral", codes)
    expected = run(in_memory(path, pruning=pruning))
    rates = []
    for memory in budgets(path):
        model = load_model(path, memory=memory, pruning=pruning)
        assert_equal(run(model), expected)
        found = statistics(model)
        assert found is not None and found.hit_rate is not None
        rates.append(found.hit_rate)
        assert found.counts.bytes_held <= memory
        assert found.counts.tokens >= 40 * 3 + 8
    assert rates[0] < rates[-1]
    assert rates == sorted(rates)


@torch.inference_mode()
def call(model: Any, layer: int, tokens: int, *experts: int) -> Tensor:
    """The experts of a layer, on as many random tokens: two given ones, or all."""
    module = [m for m in model.modules() if isinstance(m, PackedExperts)][layer]
    draw = torch.Generator().manual_seed(layer)
    hidden = torch.randn(tokens, module.hidden_size, generator=draw)
    index = torch.randint(EXPERTS, (tokens, 2), generator=draw)
    if experts:
        index[:] = torch.tensor(experts)
    out: Tensor = module(hidden, index, torch.rand(tokens, 2, generator=draw))
    return out


@pytest.mark.parametrize("codes", ["int", "trellis"])
def test_a_prefill_reads_every_expert_once(folder: Callable[..., Path], codes: str) -> None:
    """Also if they do not fit together, and if the op takes the tokens in portions."""
    path = folder("mixtral", codes)
    whole = in_memory(path)
    for memory in budgets(path)[:2]:
        model = load_model(path, memory=memory)
        for layer in range(2):
            assert torch.equal(call(model, layer, 600), call(whole, layer, 600))
        found = statistics(model)
        assert found is not None and found.counts.uses == 2 * (EXPERTS - 1)
        assert found.counts.reads == found.counts.uses


def test_a_prefill_reads_the_next_layer_ahead(folder: Callable[..., Path]) -> None:
    model = load_model(folder(), memory=10**9)
    store = store_of(model)
    assert store is not None
    left_out = 2
    call(model, 0, 1)
    assert store.at_hand(1).nonzero().flatten().tolist() == [left_out]
    call(model, 0, 40)
    assert store.at_hand(1).all()
    call(model, 1, 40)
    assert store.counts().reads == 2 * (EXPERTS - 1)


def test_a_prefill_of_one_layer_does_not_drop_what_others_use_more(
    folder: Callable[..., Path],
) -> None:
    """A layer's clock runs with its tokens, and a prefill reaches one layer after another."""
    path, few = folder(), budgets(folder())[0]
    store = store_of(load_model(path, memory=few))
    assert store is not None
    memory = few - store.budget  # of the other weights
    for room in (10**9, 0):  # with room for all, then for what was held before the last call
        model = load_model(path, memory=memory + room)
        store = store_of(model)
        assert store is not None
        for _ in range(16):
            call(model, 0, 1, 0, 1)
        call(model, 1, 600)
        memory += store.counts().bytes_held
        call(model, 0, 1, 3, 7)
        assert store.at_hand(0)[[0, 1, 3, 7]].all()
    assert store.counts().dropped > 0


def test_other_families_threads_and_backends(folder: Callable[..., Path]) -> None:
    path = folder("qwen2_moe")
    before = torch.get_num_threads()
    memory = budgets(path)[1]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            expected = run(in_memory(path))  # torch's own products depend on the threads
            assert_equal(run(load_model(path, memory=memory)), expected)
    finally:
        torch.set_num_threads(before)
    with kernels.only("reference"):
        assert_equal(run(load_model(path, memory=memory)), run(in_memory(path)))


def test_all_in_locked_memory(folder: Callable[..., Path]) -> None:
    path = folder()
    try:
        model = load_model(path, memory="all")
    except InputError as error:
        assert "ulimit -l" in str(error)  # this user may not lock memory
        return
    before = statistics(model)
    assert_equal(run(model), run(in_memory(path)))
    after = statistics(model)
    assert before is not None and after is not None
    assert after.since(before).counts.reads == 0 and after.since(before).hit_rate == 1


def test_opened_with_transformers(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder()
    monkeypatch.setenv(VARIABLE, "1GB")
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    assert store_of(model) is not None and "on disk" in repr(model)
    assert not any(p.dtype == torch.uint8 for p in model.parameters())
    bare = AutoModelForCausalLM.from_pretrained(path).get_decoder()
    assert isinstance(bare, nn.Module) and store_of(bare) is not None
    monkeypatch.setenv(VARIABLE, "1XB")
    with pytest.raises(InputError, match="'1XB'"):
        AutoModelForCausalLM.from_pretrained(path)
    monkeypatch.delenv(VARIABLE)
    assert store_of(AutoModelForCausalLM.from_pretrained(path)) is None


def test_nothing_is_saved_or_copied_without_its_experts(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_model(folder(), memory=10**9)
    for attempt in (
        lambda: model.state_dict(),
        lambda: copy.deepcopy(model),
        lambda: torch.save(model, tmp_path / "model.pt"),
        lambda: model.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(InputError, match="on disk, so it cannot be"):
            attempt()
    assert not (tmp_path / "saved").exists()


def test_a_refused_copy_leaves_the_folder_there_as_it_was(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Its own plan, scores and costs of dropping belong to its weights, and so do checksums."""
    path = shutil.copytree(folder(), tmp_path / "model")
    model = load_model(path, memory=10**9)
    other = shutil.copytree(path, tmp_path / "other")
    (path / CHECKSUMS).write_text("of this model")
    (other / PLAN).write_text("of another model")
    before = contents(path), contents(other)
    for place in (path, other):
        with pytest.raises(InputError, match="on disk, so it cannot be saved"):
            model.save_pretrained(place)
    assert (contents(path), contents(other)) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_that_breaks(folder: Callable[..., Path], tmp_path: Path) -> None:
    intact = folder()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((intact / name).read_bytes())
    file = tmp_path / "model.safetensors"
    memory = budgets(intact)[0]
    model = load_model(tmp_path, memory=memory)
    expected = run(in_memory(intact))
    assert_equal(run(model), expected)
    os.truncate(file, file.stat().st_size // 4)
    with pytest.raises(CheckpointError, match=r"cannot be read from .*model.safetensors"):
        run(model)
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        load_model(tmp_path, memory=memory)
    file.write_bytes((intact / file.name).read_bytes())
    assert_equal(run(model), expected)


def test_captured_steps_read_experts(folder: Callable[..., Path], tmp_path: Path) -> None:
    """`generate` repeats the calls that read; an expert that cannot be read is an error."""
    intact = folder()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((intact / name).read_bytes())
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    expected = in_memory(intact).generate(IDS[1:2], **options)
    model = load_model(tmp_path, memory=budgets(intact)[0])
    assert torch.equal(model.generate(IDS[1:2], **options), expected)
    before = statistics(model)
    assert before is not None
    with CapturedSteps(model) as steps:
        assert torch.equal(model.generate(IDS[1:2], **options), expected)
        os.truncate(tmp_path / "model.safetensors", 2000)
        replayed = steps.replayed
        with pytest.raises(CheckpointError, match="cannot be read"):
            for step in range(100):  # until an expert is needed that is not in memory
                ids = (IDS[1:2] + step) % 384
                model.generate(ids, **options)
    after = statistics(model)
    assert after is not None and after.since(before).counts.reads > 0
    assert replayed == 40 - 1 - PROOFS


def test_memory_that_does_not_do(
    folder: Callable[..., Path], model_folder: Callable[..., Path]
) -> None:
    path = folder()
    each = int(2 * (budgets(path)[1] - budgets(path)[0]))
    with pytest.raises(InputError, match=r"Give more than [0-9,]+ bytes"):
        load_model(path, memory=1000)
    with pytest.raises(InputError, match="Give more memory"):
        load_model(path, memory=budgets(path)[0] - each)
    with pytest.raises(InputError, match="original model"):
        load_model(model_folder(), memory=10**9)


# Pruning


READS = Pruning(
    {0: (0.0, 0.0), 1: (0.0, 0.0)}, False, 0.0, absent={0: (0.0, 1.0), 1: (0.0, 1.0)}, most=0.2
)


@torch.inference_mode()
def pruned(model: Any, pruning: Pruning) -> tuple[Tensor, Any, Any]:
    """Logits of one token after another, and the counts of pruning and of the store."""
    with prune(model, pruning, count=True) as active:
        step = model(input_ids=IDS[:1, :1], use_cache=True)
        found = [step.logits]
        for at in range(1, 30):
            step = model(input_ids=IDS[:1, at : at + 1], past_key_values=step.past_key_values)
            found.append(step.logits)
        return torch.cat(found), active.statistics(), statistics(model)


def test_only_choices_that_need_a_read_are_dropped_and_no_more_than_asked(
    folder: Callable[..., Path],
) -> None:
    path = folder()
    memory = budgets(path)[1]
    plain, none, read = pruned(load_model(path, memory=memory), replace(READS, absent={}))
    got, counts, fewer = pruned(load_model(path, memory=memory), READS)
    again, same, _ = pruned(load_model(path, memory=memory), READS)
    assert torch.equal(got, again) and counts == same  # deterministic
    assert none.share == 0 and 0.1 < counts.share <= 0.2
    assert counts.absent == counts.dropped
    assert not torch.equal(got, plain)
    assert read.counts.uses - fewer.counts.uses == sum(map(sum, counts.dropped))
    assert fewer.counts.reads < read.counts.reads
    free, unasked, _ = pruned(load_model(path, memory=budgets(path)[3]), READS)
    whole, _, _ = pruned(in_memory(path), READS)
    assert torch.equal(whole, plain)  # nothing to read: nothing is dropped
    assert unasked.share < counts.share and free.shape == plain.shape


def test_a_token_whose_weights_are_all_0_keeps_them_beside_dropped_reads(
    folder: Callable[..., Path],
) -> None:
    model = load_model(folder(), memory=budgets(folder())[0])
    layer = pruned_layers(model, replace(READS, most=1.0, renormalise=True), count=False)[0]
    weights = torch.tensor([[0.9, 0.1], [0.0, 0.0]])
    index, dropped = torch.tensor([[0, 1], [3, 4]]), torch.zeros(2, 2, dtype=torch.bool)
    _, kept, unread = layer._drop_reads(index, weights, dropped, None)
    assert unread.tolist() == [[False, True], [False, False]]
    assert kept.tolist() == [[1, 0], [0, 0]]


def test_reads_are_dropped_alike_whether_they_are_counted_or_not(
    folder: Callable[..., Path],
) -> None:
    """Thresholds for reads alone prune a layer too."""
    found = []
    for count in (True, False):
        model = load_model(folder(), memory=budgets(folder())[1])
        with prune(model, replace(READS, most=1.0), count=count), torch.inference_mode():
            found.append(
                torch.cat([model(input_ids=IDS[:1, at : at + 1]).logits for at in range(30)])
            )
    assert torch.equal(*found)


def test_a_read_that_another_token_needs_is_no_reason_to_drop(
    folder: Callable[..., Path],
) -> None:
    """In a batch an expert is left unread only if no token needs it."""
    model = load_model(folder(), memory=budgets(folder())[0])
    everything = replace(READS, most=1.0)
    with prune(model, everything, count=True) as active, torch.inference_mode():
        model(input_ids=IDS)
        dropped = active.statistics()
    assert dropped.share < 0.1


def test_strengths_of_pruning_reads(folder: Callable[..., Path]) -> None:
    assert parse_strength("disk:0.15") == "disk:0.15"
    with pytest.raises(InputError, match=r"disk:0\.15"):
        parse_strength("disk:some")
    ratio = np.linspace(0, 1, 9, dtype=np.float32)[None, None].repeat(2, 0)
    cost = np.linspace(0, 1, 8, dtype=np.float32)[None, None].repeat(2, 0)
    costs = DropCosts((0, 1), ratio, cost, cost * 2, True, {})
    with pytest.raises(InputError, match="Open it with less memory"):
        prune(in_memory(folder()), "disk:0.15", costs=costs)
    model = load_model(folder(), memory=budgets(folder())[1])
    with prune(model, "disk:0.15", costs=costs) as active:
        rule = active.pruning
    assert rule.most == 0.15 and not rule.renormalise
    assert all(rule.absent[n][1] > rule.thresholds[n][1] for n in (0, 1))


def test_the_server_shows_what_the_store_did(folder: Callable[..., Path]) -> None:
    pytest.importorskip("prometheus_client")
    from types import SimpleNamespace as Is

    from moepress.serve.metrics import Metrics

    def shown(model: nn.Module) -> dict[str, float]:
        engine: Any = Is(
            stepper=Is(model=model), running=0, waiting=0, prefilled=0, reused=0, generated=0,
            trouble=lambda: None,
        )  # fmt: skip
        lines = Metrics(engine).text().decode().splitlines()
        figures = (line.split() for line in lines if line.startswith("moepress_expert_"))
        return {name: float(value) for name, value in figures}

    path = folder()
    assert shown(in_memory(path)) == {}
    model = load_model(path, memory=10**9)
    run(model)
    found = statistics(model)
    assert found is not None and found.counts.uses > 0
    assert shown(model) == {
        "moepress_expert_uses_total": found.counts.uses,
        "moepress_expert_hits_total": found.counts.hits,
        "moepress_expert_read_bytes_total": found.counts.bytes_read,
        "moepress_expert_wait_seconds_total": found.counts.seconds_waited,
        "moepress_expert_held_bytes": found.counts.bytes_held,
    }


@pytest.mark.parametrize("codes", ["int", "trellis"])
def test_gradients_pass_experts_on_disk(folder: Callable[..., Path], codes: str) -> None:
    path = folder(codes=codes)

    def gradient(model: nn.Module) -> Tensor:
        states = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=states, use_cache=False).logits.square().mean().backward()
        assert states.grad is not None and states.grad.abs().sum() > 0
        return states.grad

    small = budgets(path)[0]
    model = load_model(path, memory=small)
    assert torch.equal(gradient(model), gradient(in_memory(path)))
    found = statistics(model)
    assert found is not None and found.counts.dropped > 0


@pytest.mark.parametrize("codes", ["int", "trellis"])
def test_with_memory_for_all_experts_each_is_read_once(
    folder: Callable[..., Path], codes: str
) -> None:
    """Memory is counted in whole pages, of which an expert fills a part."""
    model = load_model(folder(codes=codes), memory=10**9)
    store = store_of(model)
    assert store is not None and store.budget == store.nbytes
    for _ in range(3):
        run(model)
    found = statistics(model)
    assert found is not None and found.counts.dropped == 0
    assert found.counts.reads <= 2 * (EXPERTS - 1)
