"""What the families of transformers do in moepress: the expectation of the tests, and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.families.causal import CAUSAL
from tests.families.composites import COMPOSITES, TEXT_ONLY

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
    last: bool = True  # later steps cannot be run


COMPRESS, LOAD, PRUNE = "compress", "load", "prune"
FORM = Failure("Supported: fused gate_up_proj")
NO_EXPERTS = Failure("no routed experts in the form")
NO_LAYERS = Failure("no list of decoder layers")
NO_CAUSAL_LM = Failure("has no causal LM for model type")
TUPLES = Failure("too many values to unpack")
SPLIT = Failure("split_sizes")
STREAMS = Failure("expanded size of the tensor")
CLASS = Failure("has no module model")

# By step and family.
_FAILURES: Mapping[tuple[str, Failure], tuple[str, ...]] = {
    (COMPRESS, FORM): (
        "aria_text", "beam", "deepseek_v4", "gpt_oss", "hy_v4", "inkling2_loop_text",
        "inkling2_text", "minimax_m3_vl_text", "nemotron_h",
    ),
    (COMPRESS, NO_EXPERTS): ("doge", "jetmoe", "longcat_flash"),
    (COMPRESS, NO_LAYERS): ("dbrx", "llama4", "llama4_text"),
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
    (PRUNE, Failure("", last=False)): ("phimoe",),
}  # fmt: skip
# By (family, step).
EXPECTED: Mapping[tuple[str, str], Failure] = {
    (family, step): failure
    for (step, failure), families in _FAILURES.items()
    for family in families
}
