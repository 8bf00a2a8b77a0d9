"""A quantized original, dequantized as a whole into memory.

transformers' own loaders do not cover every form that `Source` reads (blocks that do not divide a
matrix; packed integers without the package compressed-tensors).
"""

from __future__ import annotations

from typing import Any

from moepress.original.composite import language_model
from moepress.original.source import Source


def whole_model(source: Source) -> Any:
    """The language model of a source with all of its weights, in the dtype of the computation."""
    whole = Source(
        source.name, source.device, source.trust_remote_code
    )  # whose skeleton nobody else walks through
    for prefix in (None, *whole.layer_paths):
        whole.load(prefix)
    for name in whole.copied:
        value = whole.tensor(name)
        whole.put(name, value.to(whole.compute_dtype) if value.is_floating_point() else value)
    for experts in whole.experts.values():
        for name in experts.matrix_names:
            whole.put(name, whole.fused(name))
    return language_model(whole.model)
