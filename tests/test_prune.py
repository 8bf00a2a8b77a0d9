"""Online pruning: which choices are dropped and not computed, and that all else is unchanged."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import moepress as mp
from moepress import kernels
from moepress.calibrate import calibrate
from moepress.compress import compress
from moepress.costs.drop_costs import DropCosts
from moepress.errors import InputError
from moepress.evaluate import evaluate
from moepress.generate import generate
from moepress.kernels import cpu, reference
from moepress.prune import ACTIVE, Pruning, parse_strength, prune, set_pruning
from moepress.pruning.layer import IGNORES_NO_EXPERT
from moepress.report import read_subject
from tests.conftest import VOCAB, make_model, small_recipe
from tests.families.models import make_model as family_model
from tests.kernels.test_kernels import make_case

Folder = Callable[..., Path]
IDS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
BACKENDS = ["reference", *([] if cpu.missing() else ["cpu"])]


@torch.inference_mode()
def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    out: Tensor = model(ids, **more).logits
    return out


def everything(layers: int = 2, top_k: int = 2, **more: Any) -> Pruning:
    """Pruning that leaves a token only its first expert."""
    ratios = (0.0, *[1.0] * (top_k - 1))
    return Pruning(
        dict.fromkeys(range(layers), ratios), **{"renormalise": True, "protect": 0.0} | more
    )


@pytest.fixture(scope="module")
def folder(model_folder: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "model"
    return compress(model_folder(), out, small_recipe(text_file, bits=2.5))


@pytest.fixture
def mine(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "mine"))


# The rule


def slow_drop(
    index: list[int], weights: list[float], thresholds: list[float], renormalise: bool, keep: bool,
    experts: int,
) -> tuple[list[int], list[float], list[bool]]:  # fmt: skip
    """The rule for one token, by loops."""
    pairs = [(w if 0 <= e < experts else 0.0, e) for e, w in zip(index, weights, strict=True)]
    pairs.sort(key=lambda pair: -pair[0])
    largest = pairs[0][0]
    dropped = [
        0 <= e < experts and not keep and np.float32(w) < np.float32(t) * np.float32(largest)
        for (w, e), t in zip(pairs, thresholds, strict=True)
    ]
    left = sum(w for (w, _), d in zip(pairs, dropped, strict=True) if not d)
    scale = sum(w for w, _ in pairs) / left if renormalise and left > 0 else 1.0
    return (
        [experts if d else e for (_, e), d in zip(pairs, dropped, strict=True)],
        [0.0 if d else w * scale for (w, _), d in zip(pairs, dropped, strict=True)],
        dropped,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_rule_against_loops(backend: str, data: st.DataObject) -> None:
    k, tokens = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 5))
    few = st.integers(0, 4).map(lambda n: n / 4)  # ties, and ratios on a threshold
    weights = data.draw(
        st.lists(st.lists(few, min_size=k, max_size=k), min_size=tokens, max_size=tokens)
    )
    index = [data.draw(st.lists(st.integers(-1, 8), min_size=k, max_size=k)) for _ in weights]
    thresholds = [0.0, *data.draw(st.lists(few, min_size=k - 1, max_size=k - 1))]
    keep = data.draw(st.none() | st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    renormalise = data.draw(st.booleans())
    with kernels.only(backend):
        got = kernels.drop(
            torch.tensor(index, dtype=torch.int64).view(tokens, k),
            torch.tensor(weights).view(tokens, k),
            torch.tensor(thresholds),
            renormalise,
            None if keep is None else torch.tensor(keep, dtype=torch.bool),
            8,
        )
    for t in range(tokens):
        expected = slow_drop(
            index[t], weights[t], thresholds, renormalise, keep is not None and keep[t], 8
        )
        assert got[0][t].tolist() == expected[0]
        assert got[1][t].tolist() == pytest.approx(expected[1], rel=1e-6)
        assert got[2][t].tolist() == expected[2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_not_dropped_is_untouched(backend: str, dtype: torch.dtype) -> None:
    weights = torch.rand(50, 4).to(dtype)
    index = torch.stack([torch.randperm(9)[:4] for _ in range(50)])
    with kernels.only(backend):
        ranked, kept, dropped = kernels.drop(index, weights, torch.zeros(4), True, None, 9)
    order = weights.argsort(dim=1, descending=True, stable=True)
    assert not dropped.any() and kept.dtype == dtype
    assert torch.equal(kept, weights.gather(1, order))
    assert torch.equal(ranked, index.gather(1, order))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_few_digits_are_scaled_in_float32(backend: str) -> None:
    weights = torch.rand(200, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    index, thresholds = torch.arange(8).expand(200, 8), torch.tensor([0.0, *[0.5] * 7])
    with kernels.only(backend):
        got = kernels.drop(index, weights, thresholds, True, None, 8)[1]
        exact = kernels.drop(index, weights.float(), thresholds, True, None, 8)[1]
    torch.testing.assert_close(got.float(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_whose_routing_weights_are_all_0_has_gradients(backend: str) -> None:
    weights = torch.tensor([[0.0, 0.0], [0.6, 0.4]], requires_grad=True)
    index = torch.tensor([[2, 3], [0, 1]])
    with kernels.only(backend):
        kernels.drop(index, weights, torch.tensor([0.0, 0.9]), True, None, 4)[1].sum().backward()
    assert weights.grad is not None and weights.grad.tolist() == [[1, 1], [1, 1]]


def test_the_op_passes_torchs_checks() -> None:
    index, weights = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    for keep in (None, torch.tensor([True, False])):
        args = (index, weights, torch.tensor([0.0, 0.3]), True, keep, 4)
        torch.library.opcheck(torch.ops.moepress.drop.default, args)


def test_the_op_refuses_what_does_not_fit() -> None:
    index, weights = torch.tensor([[0, 3]]), torch.tensor([[0.9, 0.1]])
    with pytest.raises(
        InputError, match=r"thresholds \[k\] float32; got \[1, 2\], \[1, 2\] and \[3\]"
    ):
        kernels.drop(index, weights, torch.zeros(3), True, None, 4)
    with pytest.raises(InputError, match=r"keep must be \[1\] bool"):
        kernels.drop(index, weights, torch.zeros(2), True, torch.ones(2, dtype=torch.bool), 4)


# Dropped choices are not computed


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_experts_are_not_computed_by_packed_kernels(backend: str) -> None:
    """All bytes of every expert but the first are 255: their scales are NaN, also times 0."""
    case = make_case()
    args = list(case.args)
    for place in (3, 4):  # gate_up and down; each one's table is two places behind it
        args[place] = args[place].clone()
        args[place][int(args[place + 2][1, 0]) :] = 255
    index = torch.full_like(case.index, 5)
    index[:, 0] = 0
    with kernels.only(backend):
        args[1] = index
        assert kernels.experts(*args).isfinite().all()
        args[1] = index.clone()
        args[1][:, 1] = 1
        args[2] = torch.zeros_like(case.weights)
        assert not kernels.experts(*args).isfinite().all()


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_dropped_experts_are_not_computed_by_transformers(implementation: str) -> None:
    model = make_model("mixtral")
    model.set_experts_implementation(implementation)
    chosen: list[Tensor] = []
    experts = model.model.layers[0].mlp.experts
    with prune(model, everything()):
        experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
        logits(model, IDS[:1, :3])
        others = set(range(4)) - set(chosen[0].flatten().tolist())
        with torch.no_grad():
            for expert in others:
                experts.gate_up_proj[expert] = torch.nan
        no_expert = torch.full((3,), 4)
        # Without the attribute the loop is given the first choice again, with weight 0.
        loop = implementation == "eager" and not hasattr(experts, IGNORES_NO_EXPERT)
        assert others and torch.equal(chosen[0][:, 1], chosen[0][:, 0] if loop else no_expert)
        assert logits(model, IDS[:1, :3]).isfinite().all()


def test_dropped_experts_of_a_loop_that_knows_no_such_choice() -> None:
    """gpt-oss: its loop counts the experts alone."""
    found = []
    for implementation in ("grouped_mm", "eager"):
        model = family_model("gpt_oss")
        model.set_experts_implementation(implementation)
        with prune(model, Pruning(dict.fromkeys(range(2), (0.0, 1.0)), True, 0.0)):
            found.append(logits(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


# Whole models


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_no_pruning_is_bit_identical(model_folder: Folder, text_file: Path, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder(family))
    costs = calibrate(model_folder(family), small_recipe(text_file)).drop_costs
    before = logits(model)
    for nothing in (0, 0.0, Pruning.of(costs, 0.0)):
        with prune(model, nothing) as pruned:
            assert torch.equal(logits(model), before)
            assert not pruned.pruning.drops
    with prune(model, 0.2, costs=costs):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_pruned_model_is_the_model_with_its_routing_cut(
    model_folder: Folder, text_file: Path, family: str
) -> None:
    """Oracle: hooks that set the weights of the same choices to zero, by loops."""
    model = AutoModelForCausalLM.from_pretrained(model_folder(family))
    costs = calibrate(model_folder(family), small_recipe(text_file)).drop_costs
    pruning = Pruning.of(costs, 0.25, protect=0.0)

    def cut(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, index, weights = args
            new = weights.clone()
            for t in range(len(weights)):
                order = sorted(range(weights.shape[1]), key=lambda i: -float(weights[t, i]))
                for rank, place in enumerate(order):
                    ratio = weights[t, place] / weights[t].max()
                    if ratio < pruning.thresholds[layer][rank]:
                        new[t, place] = 0
            if pruning.renormalise:
                new *= weights.sum(1, keepdim=True) / new.sum(1, keepdim=True)
            return hidden, index, new

        return hook

    with prune(model, pruning, count=True) as pruned:
        got = logits(model)
        statistics = pruned.statistics()
    handles = [
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(cut(layer))
        for layer in costs.layers
    ]
    expected = logits(model)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert statistics.layers == costs.layers
    assert statistics.tokens == (48,) * len(costs.layers)
    assert 0.15 < statistics.share < 0.35
    assert all(row[0] == 0 for row in statistics.dropped)


@pytest.mark.parametrize("renormalise", [True, False])
def test_batched_and_padded_is_one_by_one(renormalise: bool) -> None:
    model = make_model("mixtral")
    short = IDS[1:, 7:]
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    plain = logits(model, IDS, attention_mask=mask)
    with prune(model, everything(renormalise=renormalise, protect=0.3), count=True) as pruned:
        together = logits(model, IDS, attention_mask=mask)
        assert pruned.statistics().protected == (7 + 5,) * 2  # of 24 and 17 tokens, rounded down
        alone = logits(model, IDS[:1]), logits(model, short)
    torch.testing.assert_close(together[0], alone[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1, 7:], alone[1][0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], plain[0], atol=1e-2)


def test_protection_of_all_is_no_pruning_while_reading_a_prompt() -> None:
    model = make_model("mixtral")
    plain = logits(model)
    with prune(model, everything(protect=1.0)):
        assert torch.allclose(logits(model), plain, atol=1e-5)
        first = logits(model, IDS[:, :1])  # one token, as in decoding: nothing protects it
    assert not torch.allclose(first, plain[:, :1], atol=1e-2)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_one_by_one_and_batched(folder: Path, cache: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    options["cache_implementation"] = cache
    with kernels.only("reference"), prune(model, 0.3, protect=0.1):
        together = model.generate(IDS, attention_mask=mask, **options)
        alone = model.generate(IDS[1:, 7:], **options)
    assert together[1, 7:].tolist() == alone[0].tolist()


def test_pruned_decoding_compiles_to_one_graph(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with prune(model, 0.3):
        block = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
        x = torch.randn(1, 1, 64)
        with torch.inference_mode():
            torch.testing.assert_close(block(x), model.model.layers[0].mlp(x))
    torch._dynamo.reset()


def test_the_innermost_pruning_counts_and_all_end() -> None:
    model = make_model("mixtral")
    plain = logits(model)
    outer = prune(model, everything())
    hard = logits(model)
    with prune(model, 0):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), hard)
    with pytest.raises(RuntimeError), prune(model, everything(renormalise=False)):
        raise RuntimeError
    assert torch.equal(logits(model), hard)
    with prune(model, everything(renormalise=False)):
        soft = logits(model)
        outer.remove()  # before the inner one, which stays and must not restore it
        outer.remove()
        assert torch.equal(logits(model), soft)
    assert torch.equal(logits(model), plain)
    assert getattr(model.get_decoder(), ACTIVE) is None
    experts = model.model.layers[0].mlp.experts
    assert not experts._forward_pre_hooks and not getattr(experts, IGNORES_NO_EXPERT, False)


# What to drop


def test_paper_and_share(folder: Path) -> None:
    from moepress.prune import stored_costs

    costs = stored_costs(folder)
    paper = Pruning.of(costs, "paper")
    assert paper.renormalise and paper.protect == 0.02
    for row, layer in enumerate(costs.layers):
        assert paper.thresholds[layer] == pytest.approx((0, costs.ratio[row, 0, 16]))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for strength, share in (("paper", 0.25), (0.1, 0.1), (0.4, 0.4)):
        with prune(model, strength, protect=0, count=True) as pruned:
            logits(model, torch.randint(0, VOCAB, (8, 60)))
            assert pruned.statistics().share == pytest.approx(share, abs=0.1)


def test_the_cheaper_way_with_weights_is_taken() -> None:
    ratio = np.linspace(0, 1, 5, dtype=np.float32)[None, None]
    low, high = np.full((1, 1, 4), 1, np.float32), np.full((1, 1, 4), 2, np.float32)
    assert not Pruning.of(DropCosts((0,), ratio, low, high, True, {}), 0.2).renormalise
    assert Pruning.of(DropCosts((0,), ratio, high, low, True, {}), 0.2).renormalise


def test_pruning_round_trips_and_refuses_nonsense(tmp_path: Path) -> None:
    pruning = Pruning({1: (0.0, 0.25), 3: (0.0, 1.0)}, False, 0.1)
    text = json.dumps(pruning.to_json())
    assert Pruning.from_json(json.loads(text)) == pruning
    (tmp_path / "p.json").write_text(text)
    assert parse_strength(str(tmp_path / "p.json")) == pruning
    assert parse_strength("paper") == "paper" and parse_strength("0.15") == 0.15
    for wrong in (
        {}, [], {"thresholds": {"x": [0]}, "renormalise": True},
        {"thresholds": {}, "renormalise": True, "strength": 1},
        {"thresholds": {}, "renormalise": "false"},
        {"thresholds": {"0": "01"}, "renormalise": True},
        {"thresholds": {"-1": [0, 1]}, "renormalise": True},
        {"thresholds": {"0": 0.5}, "renormalise": True},
        {"thresholds": {}, "renormalise": True, "protect": True},
    ):  # fmt: skip
        with pytest.raises(InputError, match="Expected"):
            Pruning.from_json(wrong)
    for ratios in ((), (0.1, 0.5), (0.0, 1.5), (0.0, -1.0), (0.0, float("nan")), [0.0], (0, "a")):
        with pytest.raises(InputError, match="a token's first expert is never dropped"):
            Pruning({0: ratios}, True)
    with pytest.raises(InputError, match=r"protect is 2. Expected a share of tokens, 0 to 1"):
        Pruning({}, True, 2)


@pytest.mark.parametrize("text", ["hard", "15%", "", "nan", "-1", "0.9"])
def test_unknown_strengths_are_refused(folder: Path, text: str) -> None:
    with pytest.raises(InputError, match="share"):
        set_pruning(folder, parse_strength(text))


def test_what_depends_on_the_machine_is_not_stored(mine: Path) -> None:
    before = (mine / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"'disk:0\.1' cannot be stored .* or store .* 0\.1\."):
        set_pruning(mine, parse_strength("disk:0.1"))
    assert (mine / "config.json").read_bytes() == before


@pytest.mark.parametrize("share", ["nan", "inf", "-0.1", "1", "some", ""])
def test_a_share_of_reads_that_is_none_is_refused(folder: Path, share: str) -> None:
    text, says = f"disk:{share}", rf"'disk:{share}' names no share. Expected one from 0 to below 1"
    model = AutoModelForCausalLM.from_pretrained(folder)
    for refused in (
        lambda: parse_strength(text),
        lambda: set_pruning(folder, text),
        lambda: prune(model, text),
    ):
        with pytest.raises(InputError, match=says):
            refused()


@pytest.mark.parametrize(
    ("model", "strength", "options", "says"),
    [
        ("mixtral", None, {}, "strength is None"),
        ("mixtral", True, {}, "strength is True"),
        ("mixtral", {0: (0, 1)}, {}, "strength is {0: "),
        ("mixtral", 0, {"protect": 7}, "protect is 7"),
        ("mixtral", 0.1, {}, "The model has no moepress_drop_costs"),
        (None, 0, {}, "Cannot prune a Linear. Expected a transformers model"),
    ],
)
def test_nonsense_is_refused(
    model: str | None, strength: Any, options: dict[str, Any], says: str
) -> None:
    subject = torch.nn.Linear(2, 2) if model is None else make_model(model)
    with pytest.raises(InputError, match=says):
        prune(subject, strength, **options)


def test_thresholds_that_do_not_fit_are_not_written(mine: Path) -> None:
    before = (mine / "config.json").read_bytes()
    for thresholds in ({7: (0.0, 0.5)}, {0: (0.0, 0.5, 0.5)}):
        with pytest.raises(InputError, match=r"routed experts in layers \[0, 1\], and a token"):
            set_pruning(mine, Pruning(thresholds, True))
    assert (mine / "config.json").read_bytes() == before


def test_a_copy_is_pruned_for_itself() -> None:
    model = make_model("mixtral")
    prune(model, everything(protect=0.3))
    ids, others = IDS[:, :20], IDS[:, :11]
    twin = copy.deepcopy(model)
    logits(twin, others)
    expected = logits(model, ids)
    assert torch.equal(logits(twin, ids), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False), ids), expected)


def test_a_model_and_its_decoder_are_pruned_as_one() -> None:
    model = make_model("mixtral")
    plain = logits(model)
    with prune(model, everything(), count=True) as outer:
        hard = logits(model)
        with prune(model.model, everything(), count=True) as inner:
            assert torch.equal(logits(model), hard)
            assert inner.statistics().share == outer.statistics().share == 0.5
    assert torch.equal(logits(model), plain)


def test_speculated_tokens_are_verified_as_if_decoded() -> None:
    """Assisted decoding runs a few tokens per call: none of them may be protected."""
    model = make_model("mixtral")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    prompt = IDS[:1, :6].repeat(1, 4)
    with prune(model, everything(protect=0.02)):
        greedy = model.generate(prompt, **options)
        guessed = model.generate(prompt, prompt_lookup_num_tokens=5, **options)
    assert greedy.tolist() == guessed.tolist()


def test_thresholds_of_another_model_are_refused() -> None:
    model = make_model("deepseek_v3")  # experts in layer 1 only
    with pytest.raises(InputError, match=r"thresholds for layers \[0\]"):
        prune(model, everything())
    pruned = prune(model, Pruning({1: (0.0, 0.5, 0.5)}, True))
    with pytest.raises(InputError, match="chooses 2 experts for a token, but"):
        logits(model)
    pruned.remove()


def test_what_is_missing_is_named(model_folder: Folder, folder: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(model_folder())
    with pytest.raises(InputError, match=r"has no moepress_drop_costs.safetensors"):
        prune(original, 0.15)
    with pytest.raises(InputError, match="not a folder made by moepress"):
        set_pruning(model_folder(), 0.15)
    with pytest.raises(InputError, match="Nothing was counted"):
        prune(original, everything()).statistics()
    with pytest.raises(InputError, match="is an original model: it is streamed, and not pruned"):
        evaluate(model_folder(), ["x"], pruning=0.1)


# Folders, functions and commands


def test_a_folder_says_how_it_is_pruned(mine: Path, tmp_path: Path) -> None:
    plain = logits(AutoModelForCausalLM.from_pretrained(mine))
    before = (mine / "config.json").read_bytes()
    set_pruning(mine, 0.3, 0.0)
    model = AutoModelForCausalLM.from_pretrained(mine)
    pruned = logits(model)
    assert not torch.equal(pruned, plain)
    with prune(model, 0):
        assert torch.equal(logits(model), plain)
    with prune(model, 0.3, protect=0.0):
        assert torch.equal(logits(model), pruned)
    model.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")), pruned)
    set_pruning(mine, 0)
    assert (mine / "config.json").read_bytes() == before
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(mine)), plain)


def test_a_damaged_field_is_refused(mine: Path) -> None:
    config = json.loads((mine / "config.json").read_text())
    config["quantization_config"]["pruning"] = {"share": 0.15}
    (mine / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"The pruning .*renormalise"):
        AutoModelForCausalLM.from_pretrained(mine)


@pytest.mark.parametrize(
    "describe", [mp.inspect, read_subject, AutoModelForCausalLM.from_pretrained]
)
@pytest.mark.parametrize(
    ("thresholds", "says"),
    [
        ({"0": [0.0, -3.0]}, "thresholds.0.1 = -3"),
        ({"0": [0.5, 0.5]}, "first expert is never dropped"),
        ({"7": [0.0, 0.5]}, r"for layers \[7\]"),
        ({"0": [0.0, 0.5, 0.5]}, r"\[3\] of each"),
        ({"0": [0.0]}, r"\[1\] of each"),
    ],
)
def test_damaged_thresholds_are_neither_described_nor_used(
    mine: Path, describe: Callable[[Path], Any], thresholds: dict[str, list[float]], says: str
) -> None:
    config = json.loads((mine / "config.json").read_text())
    pruning = {"thresholds": thresholds, "renormalise": False}
    config["quantization_config"]["pruning"] = pruning
    (mine / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=says):
        describe(mine)
    set_pruning(mine, 0)
    describe(mine)


def test_layers_without_thresholds_count(mine: Path, text_file: Path) -> None:
    """A share is one of all choices of the model."""
    pruning = Pruning({1: (0.0, 1.0)}, renormalise=True, protect=0.0)
    model = AutoModelForCausalLM.from_pretrained(mine)
    with prune(model, pruning, count=True) as pruned:
        logits(model)
        statistics = pruned.statistics()
    assert statistics.layers == (0, 1) and statistics.tokens == (48, 48)
    assert statistics.dropped == ((0, 0), (0, 48)) and statistics.share == 0.25
    found = evaluate(mine, [str(text_file)], length=32, limit=1, pruning=pruning)
    assert found.pruning is not None and found.pruning["share"] == 0.25


def test_evaluate_and_generate_prune(mine: Path, text_file: Path) -> None:
    run = {"length": 32, "limit": 4}
    plain = evaluate(mine, [str(text_file)], **run)
    hard = evaluate(mine, [str(text_file)], pruning=0.4, **run)
    assert plain.pruning is None and hard.pruning is not None
    assert hard.pruning["share"] == pytest.approx(0.4, abs=0.1)
    assert hard.texts[0].perplexity != plain.texts[0].perplexity
    set_pruning(mine, 0.4)
    assert evaluate(mine, [str(text_file)], **run).texts == hard.texts
    assert evaluate(mine, [str(text_file)], pruning=0, **run).texts == plain.texts
    texts = {p: generate(mine, "def f1(x):", tokens=8, pruning=p) for p in (None, 0.4, 0)}
    assert texts[None] == texts[0.4]


def test_public_names() -> None:
    assert mp.prune is prune and mp.Pruning is Pruning
    assert reference.drop is kernels.BACKENDS["reference"].drop
