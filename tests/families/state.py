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


COMPRESS, PRUNE = "compress", "prune"
FORM = Failure("Supported: fused gate_up_proj")
NO_EXPERTS = Failure("no routed experts in the form")
NO_LAYERS = Failure("no list of decoder layers")
TUPLES = Failure("too many values to unpack")
SPLIT = Failure("split_sizes")
STREAMS = Failure("expanded size of the tensor")

# By step and family.
_FAILURES: Mapping[tuple[str, Failure], tuple[str, ...]] = {
    (COMPRESS, FORM): (
        "aria", "aria_text", "beam", "deepseek_v4", "glm5_next", "gpt_oss", "hy_v4", "hy_v4_vl",
        "inkling2", "inkling2_loop", "inkling2_loop_text", "inkling2_text", "minimax_m3_vl",
        "minimax_m3_vl_text", "muse_spark", "nemotron_h", "nemotron_h_omni",
    ),
    (COMPRESS, NO_EXPERTS): ("doge", "jetmoe", "longcat_flash", "step3p7"),
    (COMPRESS, NO_LAYERS): ("dbrx", "llama4", "llama4_text"),
    (COMPRESS, TUPLES): ("glm_moe_dsa", "mistral_large4", "zaya"),
    (COMPRESS, SPLIT): ("lara_mini", "sarvam_moe"),
    (COMPRESS, STREAMS): ("qwen4_exp", "qwen4_exp_text"),
    (PRUNE, Failure("", last=False)): ("phimoe",),
}  # fmt: skip
# By (family, step).
EXPECTED: Mapping[tuple[str, str], Failure] = {
    (family, step): failure
    for (step, failure), families in _FAILURES.items()
    for family in families
}
