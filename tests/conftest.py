"""Tiny models of several families, made here: tests need nothing from outside."""

from __future__ import annotations

import json
import os
import shutil

# Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # processes share the cores, so threads need not
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moepress import kernels
from moepress.recipe import Recipe

TEXT = "\n".join(
    f"def f{i}(x):\n    return x + {i}  # adds {i} to what it is given\n" for i in range(400)
)
VOCAB = 384

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
# mixtral stores experts one by one. qwen2_moe has a shared expert with a gate, and ties its head to
# its embedding. deepseek_v3 has a dense first layer, latent attention, sigmoid routing with a bias,
# and shared experts.
FAMILIES = {
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
    },
    "deepseek_v3": {
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
}

# Scales the outputs of the embedding and of the head. Not in FAMILIES: few tests need it.
GRANITE = {
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.5,
}

KNOWN = {**FAMILIES, "granitemoe": GRANITE}


def make_model(family: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A causal LM of a family with random weights, large enough to make experts differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **KNOWN.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


SMALL = {"sequences": 6, "sequence_length": 32, "group_size": 32, "token_floor": 16}


def small_recipe(text: Path, name: str = "fast", **changes: object) -> Recipe:
    """A named recipe, cut down to what tiny models need. "fast" of three widths is the fastest."""
    few = {"expert_bits": (1, 2, 3)} if name == "fast" else {}
    return Recipe.load(name, **{"calib": ((str(text), 1.0),), **SMALL, **few, **changes})


def byte_level_bpe(text: str, size: int) -> Tokenizer:
    """Byte-level BPE of `size` entries, trained on a text, with <s> = 0 and </s> = 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer of VOCAB entries."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = byte_level_bpe(TEXT, VOCAB)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Callable[..., Path]:
    """Folder of a tiny model with its tokenizer, as a user would have it; made once each."""
    made: dict[str, Path] = {}

    def folder(family: str = "mixtral", dtype: str = "float32", **save: object) -> Path:
        key = f"{family}-{dtype}-{sorted(save.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp(family)
            model = make_model(family).to(getattr(torch, dtype))
            model.config.dtype = getattr(torch, dtype)
            model.save_pretrained(path, **save)
            for file in tokenizer_folder.iterdir():
                shutil.copy(file, path)
            made[key] = path
        return made[key]

    return folder


def with_context(folder: Path, tokens: int, to: Path) -> Path:
    """A copy of a model that reads so many tokens at most."""
    shutil.copytree(folder, to)
    fields = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": tokens}))
    return to


@pytest.fixture
def reference_backend() -> Iterator[None]:
    """Plain PyTorch: activations are not rounded, so results can be compared closely."""
    with kernels.only("reference"):
        yield
