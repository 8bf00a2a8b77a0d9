"""Captured steps give the tokens of transformers' plain `generate`, or step aside.

`tape` takes the place of CUDA graphs. Models are in float32 and not packed unless said, so that
tokens can be compared.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from moepress import prune
from moepress.chat import Conversation
from moepress.hf import load_model
from moepress.hf.captured import FAR, PROOFS, CapturedSteps
from moepress.hf.captured_step import Capture
from moepress.hf.cpu_graph import cpu_graph
from moepress.hf.cuda_graph import Graph
from moepress.hf.fixed_cache import FixedCache
from moepress.kernels.modules import set_activation_bits
from moepress.original.remote_code import tokenizer_of
from tests.families.images import image_prompt
from tests.families.models import make_model
from tests.hf.tape import tape

TOKENS = 40
IDS = (torch.arange(12)[None] * 7) % 300 + 5
# With sliding windows, chunks, latent attention, states of linear attention, and states beside
# attention in one layer; windows are 16 tokens.
ATTENTIONS = (
    "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4_text", "llama4_text", "qwen3_next",
    "qwen3_vl_moe", "lfm2_moe", "jamba", "zaya", "inkling_text",
)  # fmt: skip


@pytest.fixture(autouse=True)
def for_inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def mixtral() -> Any:
    return make_model("mixtral", max_position_embeddings=512)


def captured(model: Any, **options: Any) -> CapturedSteps:
    return CapturedSteps(model, **{"capture": tape, "devices": ("cpu",), **options})


def written(model: Any, ids: Tensor = IDS, tokens: int = TOKENS, **options: Any) -> Any:
    """What `generate` gives."""
    given = {"do_sample": False, "eos_token_id": None, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **given)


@pytest.mark.parametrize("capture", [tape, cpu_graph])
def test_every_kind_of_attention_is_captured(capture: Capture) -> None:
    for family in ATTENTIONS:
        model = make_model(family)
        expected = written(model)
        steps = captured(model, capture=capture)
        with steps:
            assert torch.equal(written(model), expected), family
            assert (steps.refused, steps.replayed) == (None, TOKENS - 1 - PROOFS), family
            other = IDS.flip(1)[:, :5]
            found = written(model, other)
        assert torch.equal(found, written(model, other)), family
        assert steps.replayed == 2 * (TOKENS - 1) - PROOFS - 1, family


@pytest.mark.parametrize("family", ["deepseek_v32", "minimax", "dbrx"])
def test_what_cannot_be_captured_is_computed_as_ever(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Layers of another kind, a cache of another class, experts that wait for the card."""
    model = make_model(family)
    expected = written(model)
    steps = captured(model)
    with caplog.at_level(logging.INFO, "moepress"), steps:
        assert torch.equal(written(model), expected)
        assert torch.equal(written(model), expected)
    assert steps.replayed == 0
    assert len(caplog.messages) == (0 if family == "minimax" else 1)


def test_sampling(mixtral: Any) -> None:
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2}
    found = []
    for steps in (captured(mixtral), captured(mixtral, devices=())):
        torch.manual_seed(3)
        with steps:
            found.append(written(mixtral, **options))
    assert torch.equal(*found)
    assert not torch.equal(found[0], written(mixtral))


def test_stopping_early(mixtral: Any, packed: Path) -> None:
    plain = written(mixtral)[0, IDS.shape[1] :].tolist()
    end = plain[10]
    first = plain.index(end)
    steps = captured(mixtral)
    with steps:
        found = written(mixtral, eos_token_id=end)
        assert found[0, IDS.shape[1] :].tolist() == plain[: first + 1]
        tokenizer = tokenizer_of(packed)
        words = tokenizer.decode([end])
        options = {"stop_strings": [words], "tokenizer": tokenizer}
        found = written(mixtral, **options)
    assert torch.equal(found, written(mixtral, **options))
    assert PROOFS + 1 < first < TOKENS - 1  # else this test shows nothing
    assert found.shape[1] < IDS.shape[1] + TOKENS and steps.replayed == 2 * first - PROOFS - 1


class Heard(BaseStreamer):
    """Keeps what it gets; stops like Ctrl-C."""

    def __init__(self, most: int = 1000) -> None:
        self.tokens: list[int] = []
        self.most = most

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()
        if len(self.tokens) == self.most:
            raise KeyboardInterrupt

    def end(self) -> None: ...


def test_streamers_and_interruptions(mixtral: Any) -> None:
    expected = written(mixtral)
    steps = captured(mixtral)
    for most in (IDS.shape[1] + 3, IDS.shape[1] + 20):  # in a step that is compared, and later
        with steps, pytest.raises(KeyboardInterrupt):
            written(mixtral, streamer=Heard(most))
        assert "forward" not in vars(mixtral)
    heard = Heard()
    with steps:
        written(mixtral, streamer=heard)
    assert heard.tokens == expected[0].tolist() and steps.refused is None


def test_more_tokens_than_room(mixtral: Any) -> None:
    """Room for 256 tokens, then for 512: the second graph goes on with what the first wrote."""
    count = 0

    def counted(work: Any, device: torch.device) -> Graph:
        nonlocal count
        count += 1
        return tape(work, device)

    steps = captured(mixtral, capture=counted, room=16)
    long = torch.arange(300)[None] % 250 + 5
    with steps:
        assert torch.equal(written(mixtral, tokens=300), written_plainly(mixtral, tokens=300))
        assert count == 2
        assert torch.equal(written(mixtral, long), written_plainly(mixtral, long))
        assert torch.equal(written(mixtral), written_plainly(mixtral))
    assert count == 2 and steps.refused is None


def written_plainly(model: Any, ids: Tensor = IDS, **options: Any) -> Any:
    """`written`, inside of a `with` statement of captured steps."""
    forward = vars(model).pop("forward")
    try:
        return written(model, ids, **options)
    finally:
        model.forward = forward


def test_a_prompt_of_one_token(mixtral: Any) -> None:
    with captured(mixtral) as steps:
        found = written(mixtral, IDS[:, :1])
    assert torch.equal(found, written(mixtral, IDS[:, :1])) and steps.replayed


def test_scores_are_not_overwritten(mixtral: Any) -> None:
    options = {"return_dict_in_generate": True, "output_logits": True}
    expected = written(mixtral, **options).logits
    with captured(mixtral):
        found = written(mixtral, **options).logits
    assert (torch.cat(found) - torch.cat(expected)).abs().max() < 1e-3


def test_a_cache_that_is_kept_stays_whole(mixtral: Any) -> None:
    """Another text uses the tensors that it showed; and any other call goes on with it."""
    options = {"return_dict_in_generate": True}
    with captured(mixtral) as steps:
        kept = cache_of(written(mixtral, **options))
        again = cache_of(written(mixtral, **options))
        written(mixtral, IDS + 1)
        assert steps.refused is None
    expected = cache_of(written(mixtral, **options))
    for cache in (kept, again):
        assert len(cache.layers) == len(expected.layers)
        for found, plain in zip(cache.layers, expected.layers, strict=True):
            assert torch.allclose(found.keys, plain.keys, atol=1e-4)
            assert torch.allclose(found.values, plain.values, atol=1e-4)
    name = next(n for n in ("cache", "past_key_values") if n in written(mixtral, **options))
    rest = [mixtral(IDS[:, :3], **{name: cache}).logits for cache in (kept, expected)]
    assert torch.allclose(*rest, atol=1e-3)


def cache_of(output: Any) -> DynamicCache:
    return next(value for value in output.values() if isinstance(value, DynamicCache))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next", "gpt_oss", "zaya"])
def test_other_calls_between_steps(family: str) -> None:
    """Three tokens at once, in the steps that are compared and after them."""
    model = make_model(family)
    name = next(n for n in ("cache", "past_key_values") if n in written_whole(model))

    def run() -> Tensor:
        cache, at, found = DynamicCache(config=model.config), 0, []
        for count in (9, 1, 3, 1, 1, 1, 1, 1, 3, 1, 1):
            position = torch.arange(at, at + count)[None]
            ids = position * 5 % 300 + 7
            given = {"position_ids": position, "use_cache": True, name: cache}
            found.append(model(input_ids=ids, **given).logits)
            at += count
        return torch.cat(found, 1)

    expected = run()
    with captured(model) as steps:
        assert torch.allclose(run(), expected, atol=1e-3)
    assert steps.refused is None and steps.replayed == 4


def test_a_mask_that_begins_to_hide_tokens(mixtral: Any) -> None:
    """A caller may have the model forget a part of a text."""

    def run() -> Tensor:
        cache, found = DynamicCache(config=mixtral.config), []
        for at in range(16):
            mask = torch.ones(1, at + 1, dtype=torch.int64)
            mask[:, 2:8] = at < 12
            position = torch.tensor([[at]])
            given = {"position_ids": position, "attention_mask": mask, "past_key_values": cache}
            found.append(mixtral(input_ids=position * 5 + 7, **given).logits)
        return torch.cat(found, 1)

    expected = run()
    with captured(mixtral) as steps:
        assert torch.allclose(run(), expected, atol=1e-3)
    assert steps.replayed > 0


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "glm4v_moe", "qwen3_5_moe", "gemma4"])
def test_texts_about_images(family: str) -> None:
    model, prompt = make_model(family), image_prompt(family)
    given = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 12}
    expected = model.generate(**prompt, **given)
    with captured(model) as steps:
        for _ in range(2):
            assert torch.equal(model.generate(**prompt, **given), expected)
    assert steps.refused is None and steps.replayed == 2 * (12 - 1) - PROOFS - 1


def written_whole(model: Any) -> Any:
    return written(model, tokens=2, return_dict_in_generate=True)


def test_calls_of_other_kinds(mixtral: Any) -> None:
    """Several sequences, padding, beams, hidden states, another thread, gradients."""
    two = torch.cat([IDS, IDS.flip(1)])
    padded = torch.ones_like(IDS)
    padded[:, :3] = 0
    for ids, options in (
        (two, {}),
        (IDS, {"num_beams": 2}),
        (IDS, {"output_hidden_states": True, "return_dict_in_generate": True}),
        (IDS, {"use_cache": False}),
    ):
        expected = written(mixtral, ids, tokens=8, **options)
        with captured(mixtral) as steps:
            found = written(mixtral, ids, tokens=8, **options)
        assert steps.replayed == 0 and steps.refused is None
        assert torch.equal(
            getattr(found, "sequences", found), getattr(expected, "sequences", expected)
        )
    given = {"attention_mask": padded, "max_new_tokens": 8, "do_sample": False}
    expected = mixtral.generate(IDS, **given)
    with captured(mixtral) as steps:
        assert torch.equal(mixtral.generate(IDS, **given), expected)
        assert steps.replayed == 0 and steps.refused is None
    found = []
    with captured(mixtral) as steps:
        other = threading.Thread(target=lambda: found.append(written(mixtral, tokens=8)))
        other.start()
        other.join()
    assert steps.replayed == 0 and torch.equal(found[0], written(mixtral, tokens=8))


def test_models_that_are_left_alone(mixtral: Any, packed: Path) -> None:
    with CapturedSteps(mixtral, devices=("cuda",)):
        assert "forward" not in vars(mixtral)
    counted = load_model(packed)
    with prune(counted, 0.3, count=True) as pruned:
        with captured(counted):
            assert "forward" not in vars(counted)
            written(counted, tokens=4)
        assert pruned.statistics().share > 0
    with captured(counted):
        assert "forward" in vars(counted)


@pytest.mark.parametrize("fault", ["raises", "wrong", "later"])
def test_a_capture_that_fails(mixtral: Any, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    """It raises; its numbers are wrong from the start; it never advances."""

    def capture(work: Any, device: torch.device) -> Graph:
        if fault == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        graph = tape(work, device)
        if fault == "wrong":
            return Graph(graph.result.flip(-1), lambda: None)
        seen = []

        def replay() -> None:
            if not seen:
                graph.replay()
            seen.append(0)

        return Graph(graph.result, replay)

    expected = written(mixtral)
    steps = captured(mixtral, capture=capture)
    with steps:
        assert torch.equal(written(mixtral), expected)
        assert torch.equal(written(mixtral), expected)
    assert steps.refused is not None and steps.replayed == 0
    *others, last = caplog.messages
    assert "not captured" in last
    wrong = fault in ("wrong", "later")  # is tried without fused kernels, too
    assert len(others) == wrong and all("without fused kernels" in other for other in others)


@pytest.mark.parametrize("far", [(0, 2), (1, TOKENS - 1)])
def test_a_few_steps_that_are_far(mixtral: Any, far: Sequence[int]) -> None:
    """As where an activation is rounded the other way: the graph is kept, results are plain."""
    replays = itertools.count()

    def capture(work: Any, device: torch.device) -> Graph:
        graph = tape(work, device)

        def replay() -> None:
            graph.replay()
            if next(replays) in far:
                graph.result.copy_(graph.result.flip(-1))

        return Graph(graph.result, replay)

    expected = written(mixtral)
    steps = captured(mixtral, capture=capture)
    with steps:
        for _ in range(2):
            assert torch.equal(written(mixtral), expected)
    assert (steps.refused, steps.fused) == (None, True) and len(far) < FAR
    assert steps.replayed == 2 * (TOKENS - 1) - PROOFS - 1 - len(far)


@pytest.mark.parametrize("before", [1, 2])
def test_a_graph_that_is_right_only_at_first(mixtral: Any, before: int) -> None:
    """For one step or two after a text was loaded: steps must be right one after another."""
    since = [0]

    def load(self: FixedCache, cache: Any) -> None:
        loaded(self, cache)
        since[0] = 0

    def capture(work: Any, device: torch.device) -> Graph:
        graph = tape(work, device)

        def replay() -> None:
            graph.replay()
            since[0] += 1
            if since[0] > before:
                graph.result.copy_(graph.result.flip(-1))

        return Graph(graph.result, replay)

    loaded = FixedCache.load
    expected = written(mixtral)
    steps = captured(mixtral, capture=capture)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FixedCache, "load", load)
        with steps:
            assert torch.equal(written(mixtral), expected)
    assert steps.refused is not None and steps.replayed == 0


def test_a_text_for_which_there_is_no_memory(mixtral: Any) -> None:
    """It is computed as ever; the next one is captured."""
    full = [True]

    def capture(work: Any, device: torch.device) -> Graph:
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tape(work, device)

    expected = written(mixtral)
    steps = captured(mixtral, capture=capture)
    with steps:
        assert torch.equal(written(mixtral), expected) and not steps.replayed
        full.clear()
        assert torch.equal(written(mixtral), expected)
    assert (steps.refused, steps.fused, steps.replayed) == (None, True, TOKENS - 1 - PROOFS)


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_fusion_that_fails(mixtral: Any, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    """Steps are captured without it."""

    @contextmanager
    def fusion(model: Any, devices: Sequence[str]) -> Iterator[None]:
        if fault == "raises":
            raise RuntimeError("no such kernel")
        model.model.norm.forward = torch.zeros_like
        try:
            yield
        finally:
            del model.model.norm.forward

    expected = written(mixtral)
    steps = captured(mixtral, fusion=fusion)
    with steps:
        for _ in range(2):
            assert torch.equal(written(mixtral), expected)
    assert (steps.refused, steps.fused) == (None, False) and steps.replayed > TOKENS
    assert len(caplog.messages) == 1 and "without fused kernels" in caplog.messages[0]


def test_packed_and_pruned_models(packed: Path) -> None:
    """What a graph has taken from a model changes: it is captured anew, and drops as it should."""
    model = load_model(packed)
    steps = captured(model)
    texts = []
    for bits, share in ((8, 0.0), (8, 0.4), (16, 0.4)):
        set_activation_bits(model, bits)
        with prune(model, share):
            expected = written(model, tokens=12, return_dict_in_generate=True, output_logits=True)
            with steps:
                found = written(model, tokens=12, return_dict_in_generate=True, output_logits=True)
        assert steps.refused is None
        assert torch.equal(found.sequences, expected.sequences)
        texts.append(torch.cat(expected.logits))
        far = torch.cat(found.logits) - texts[-1]
        assert far.norm() < 0.02 * texts[-1].norm()
    assert steps.replayed == 3 * (12 - 1 - PROOFS)
    assert (texts[1] - texts[0]).norm() > 0.02 * texts[0].norm()  # pruning bites


def test_weights_that_move(mixtral: Any) -> None:
    model = make_model("mixtral", seed=1)
    steps = captured(model)
    with steps:
        written(model)
    other = make_model("mixtral", seed=2)
    for name, parameter in model.named_parameters():
        parameter.data = other.get_parameter(name).data.clone()
    with steps:
        found = written(model)
    assert torch.equal(found, written(other)) and steps.refused is None


@pytest.mark.parametrize(
    "name", ["self_attn.scaling", "mlp.top_k", "self_attn.config.name_or_path"]
)
def test_a_setting_that_changes_is_captured_anew(name: str) -> None:
    """However little it changes: the step would be close to the plain one."""
    model = make_model("mixtral")
    steps = captured(model)
    with steps:
        written(model)
    for layer in model.model.layers:
        owner, _, attribute = name.rpartition(".")
        owner = attrgetter(owner)(layer)
        changed = {"scaling": 0.98, "top_k": 1, "name_or_path": "x"}[attribute]
        setattr(owner, attribute, changed)
    step = steps._step
    with steps:
        found = written(model)
    assert steps._step is not step and torch.equal(found, written(model))
    assert steps.refused is None and steps.replayed == 2 * (TOKENS - 1 - PROOFS)


def test_code_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells it: the first steps of the next text do."""
    model = make_model("mixtral")
    steps = captured(model)
    with steps:
        before = written(model)
    norm = type(model.model.norm)
    plain = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: plain(self, x) + x)
    with steps:
        found = written(model)
    assert torch.equal(found, written(model)) and not torch.equal(found, before)
    assert steps.refused is None and steps.replayed == 2 * (TOKENS - 1) - 2 * PROOFS - FAR


def test_chat_keeps_the_graph(packed: Path) -> None:
    model, tokenizer = load_model(packed), tokenizer_of(packed)
    answers = []
    captures = 0

    def counted(work: Any, device: torch.device) -> Graph:
        nonlocal captures
        captures += 1
        return tape(work, device)

    for devices in (("cpu",), ()):
        talk = Conversation(model, tokenizer, raw=True, tokens=12, temperature=0)
        talk.steps = captured(model, capture=counted, devices=devices)
        said = [talk.say(text, lambda piece: None).text for text in ("def f1(x):", " and", " or")]
        talk.reset()
        said.append(talk.say("def f1(x):", lambda piece: None).text)
        answers.append(said)
        if devices:
            assert talk.steps.refused is None
            assert talk.steps.replayed == 4 * 11 - PROOFS - 3
    assert answers[0] == answers[1] and answers[0][3] == answers[0][0]
    assert captures == 1
