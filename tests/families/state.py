"""What the families of transformers do in moepress: the expectation of the tests, and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.families.causal import CAUSAL
from tests.families.composites import COMPOSITES, TEXT_ONLY

# Models of transformers' maps for text that are no such families, and why.
NOT_COMPRESSED = {
    "diffusion_gemma": "writes blocks of text by diffusion",
    "nemo_speechlm": "writes down speech, and cannot be run without sound",
}
# Compressed, with a test of its own: test_composites.py `test_three_models_in_one`.
TESTED_APART = {
    "qwen3_omni_moe": "Qwen3-Omni as it is published: its thinker is compressed, what speaks is "
    "copied",
}
FAMILIES = tuple(f for f in (*CAUSAL, *TEXT_ONLY, *COMPOSITES) if f not in NOT_COMPRESSED)

# One of each kind: (family, recipe). The others run with `pytest -m families`.
FAST = (
    ("mixtral", "default"),
    ("deepseek_v3", "fast"),
    ("qwen3_next", "fast"),
)


@dataclass(frozen=True)
class Failure:
    """A step that fails today."""

    error: str  # pattern of the message
    why: str  # for the page
    last: bool = True  # later steps cannot be run


COMPRESS, PRUNE = "compress", "prune"
ONE = Failure("keeps its first", "a token chooses one expert", last=False)

# By step and family.
_FAILURES: Mapping[tuple[str, Failure], tuple[str, ...]] = {
    (PRUNE, ONE): ("zaya",),
}  # fmt: skip
# By (family, step).
EXPECTED: Mapping[tuple[str, str], Failure] = {
    (family, step): failure
    for (step, failure), families in _FAILURES.items()
    for family in families
}
