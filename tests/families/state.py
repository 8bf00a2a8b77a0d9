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
    "qwen3_omni_moe": "three models in one folder; the one that writes is qwen3_omni_moe_thinker",
}
FAMILIES = (*CAUSAL, *TEXT_ONLY, *COMPOSITES)

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


COMPRESS, LOAD, PRUNE = "compress", "load", "prune"
NO_EXPERTS = Failure("no routed experts in the form", "experts of another form")
NO_CAUSAL_LM = Failure("has no causal LM for model type", "no class for causal LMs")
TUPLES = Failure("too many values to unpack", "its layers return tuples")
SPLIT = Failure("split_sizes", "its checkpoint fuses tensors of its own")
STREAMS = Failure("expanded size of the tensor", "several residual streams")
CLASS = Failure("has no module model", "opens as a causal LM only")

# By step and family.
_FAILURES: Mapping[tuple[str, Failure], tuple[str, ...]] = {
    (COMPRESS, NO_EXPERTS): ("doge",),
    (COMPRESS, TUPLES): ("glm_moe_dsa", "zaya"),
    (COMPRESS, SPLIT): ("lara_mini", "sarvam_moe"),
    (COMPRESS, STREAMS): ("qwen4_exp", "qwen4_exp_text"),
    (COMPRESS, NO_CAUSAL_LM): (
        "aria", "deepseek_ocr2", "ernie4_5_vl_moe", "glm4v_moe", "glm5_next", "hy_v4_vl",
        "inkling2", "inkling2_loop", "inkling_mm_model", "kimi_k25", "minimax_m3_vl", "mistral4",
        "mistral_large4", "muse_spark", "nemotron_h_omni", "qwen3_omni_moe_thinker",
        "qwen3_vl_moe", "step3p7", "unlimited_ocr",
    ),
    (LOAD, CLASS): ("dots3_note", "qwen3_5_moe"),
    (PRUNE, Failure("", "ratios are equal, so less is dropped", last=False)): ("phimoe",),
}  # fmt: skip
# By (family, step).
EXPECTED: Mapping[tuple[str, str], Failure] = {
    (family, step): failure
    for (step, failure), families in _FAILURES.items()
    for family in families
}
