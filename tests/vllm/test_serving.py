"""A folder that vLLM serves: many requests, shared prefixes, pruning, ranks, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress.compress import compress
from moepress.format.quantization import packed_specs
from moepress.prune import Pruning, set_pruning
from tests.conftest import small_recipe
from tests.families.models import make_model, save_model
from tests.uneven import with_uneven_norms
from tests.vllm.serving import Written, differences, engine, written

pytestmark = pytest.mark.vllm

ONE_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
NEAR = 0.001  # of log-probabilities, all of them float32, with fine activations
PARALLEL = """
import json, sys
from moepress.kernels.modules import PackedExperts, PackedLinear
from tests.vllm.serving import FINE, engine, written
PackedLinear.activation_bits = PackedExperts.activation_bits = FINE  # in ranks too
def main():
    folder, prompts, options = map(json.loads, sys.argv[1:])
    with engine(folder, **options) as llm:
        print("WRITTEN", json.dumps(written(llm, prompts, 8)))
if __name__ == "__main__":  # ranks import this file
    main()
"""


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, text_file: Path
) -> Path:
    """A compressed Mixtral with trellis codes, all of whose parts are packed.

    Inputs of its experts are scaled.
    """
    work = tmp_path_factory.mktemp("served")
    model = make_model("mixtral", head_dim=32, num_local_experts=6, intermediate_size=64)
    original = with_uneven_norms(
        save_model(model, work / "even", tokenizer_folder), work / "original"
    )
    recipe = small_recipe(text_file, "default", bits=2.5)
    packed = compress(original, work / "packed", recipe)
    assert any(spec.pre_quant_scale for spec in packed_specs(packed).values())
    return packed


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    with engine(folder, max_num_seqs=64, enable_prefix_caching=True, block_size=32) as running:
        yield running


def prompts(count: int, prefix: int = 0) -> list[list[int]]:
    """Random prompts of 5 to 60 tokens, the first `prefix` of them the same in all."""
    chance = torch.Generator().manual_seed(count)
    shared = torch.randint(2, 384, (prefix,), generator=chance).tolist()
    lengths = torch.randint(5, 61 - prefix, (count,), generator=chance).tolist()
    return [shared + torch.randint(2, 384, (n,), generator=chance).tolist() for n in lengths]


@pytest.mark.parametrize("requests", [1, 16, 64])
def test_requests_at_once(requests: int, llm: Any, folder: Path) -> None:
    some = prompts(requests)
    distance, gap = differences(folder, some, written(llm, some, 8))
    assert distance < NEAR and gap < NEAR


def test_a_shared_prefix_is_read_from_the_cache(llm: Any, folder: Path) -> None:
    some = prompts(16, prefix=40)
    written(llm, some[:1], 1)
    texts = written(llm, some, 8)
    distance, gap = differences(folder, some, texts)
    assert distance < NEAR and gap < NEAR
    found = llm.generate([{"prompt_token_ids": some[1]}], use_tqdm=False)
    assert found[0].num_cached_tokens >= 32


def test_pruning_of_the_folder_applies(folder: Path, llm: Any) -> None:
    some = prompts(4)
    before = written(llm, some, 8)
    set_pruning(folder, 0.25, protect=0)
    try:
        with engine(folder) as pruned:
            texts = written(pruned, some, 8)
        distance, gap = differences(folder, some, texts)
    finally:
        set_pruning(folder, 0)
    assert distance < NEAR and gap < NEAR
    assert [one.logprobs for one in texts] != [one.logprobs for one in before]


def test_activations_as_they_are_served(folder: Path) -> None:
    some = prompts(16)
    with engine(folder, bits=8) as served:
        texts = written(served, some, 8)
    distance, _ = differences(folder, some, texts, bits=8)
    assert NEAR < distance < 0.02


@pytest.mark.parametrize("whole", [False, True], ids=["tensor", "expert"])
def test_two_ranks(whole: bool, folder: Path, tmp_path: Path) -> None:
    some = prompts(5)  # of 4 others, a token has two experts that are nearly tied
    options = {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": whole,
        "distributed_executor_backend": "mp",
    }
    script = tmp_path / "ranks.py"
    script.write_text(PARALLEL)
    done = subprocess.run(
        [sys.executable, str(script), *map(json.dumps, (str(folder), some, options))],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ONE_CORE_EACH | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("WRITTEN ")]
    assert lines, done.stdout + done.stderr
    texts = [Written(*one) for one in json.loads(lines[0].removeprefix("WRITTEN "))]
    distance, gap = differences(folder, some, texts)
    assert distance < NEAR and gap < NEAR


def test_another_version_of_vllm_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moepress.vllm.versions.TESTED", ("0.1", "0.2"))
    with (
        pytest.raises(Exception, match=r"with 0\.1 up to"),
        engine(folder),
    ):
        pass


def test_pruning_for_other_layers_is_refused(folder: Path) -> None:
    config = folder / "config.json"
    before = config.read_text()
    fields = json.loads(before)
    fields["quantization_config"]["pruning"] = Pruning({7: (0.0, 0.5)}, False, 0).to_json()
    config.write_text(json.dumps(fields))
    try:
        with pytest.raises(Exception, match=r"layers \[7\].*another model"), engine(folder):
            pass
    finally:
        config.write_text(before)


def test_a_folder_without_a_file_is_refused(folder: Path) -> None:
    layer = folder / "model-layer-0001.safetensors"
    layer.rename(folder / "kept")
    try:
        with pytest.raises(Exception, match="is not in the model's files"), engine(folder):
            pass
    finally:
        (folder / "kept").rename(layer)


def test_weights_that_the_folder_has_not_are_refused(
    tokenizer_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """vLLM's class of Phi-MoE has biases always. Without a value they would be any numbers."""
    model = make_model("phimoe", hidden_size=128)
    original = save_model(model, tmp_path / "original", tokenizer_folder)
    config = original / "config.json"
    fields = json.loads(config.read_text()) | {"architectures": ["PhiMoEForCausalLM"]}
    config.write_text(json.dumps(fields))
    packed = compress(original, tmp_path / "packed", small_recipe(text_file, "fast", bits=2.5))
    with pytest.raises(Exception, match="wants weights that the folder has not"), engine(packed):
        pass
