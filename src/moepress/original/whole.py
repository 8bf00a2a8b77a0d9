"""A quantized original, dequantized as a whole into memory.

transformers' own loaders do not cover every form that `Source` reads (blocks that do not divide a
matrix; packed integers without the package compressed-tensors).
"""

from __future__ import annotations

from typing import Any

from moepress.original.source import Source


def whole_model(source: Source) -> Any:
    """The causal LM of a source with all of its weights, in the dtype of the computation."""
    whole = Source(source.name, source.device)  # whose skeleton nobody else walks through
    for prefix in (None, *whole.layer_paths):
        whole.load(prefix)
    for experts in whole.experts.values():
        for name in experts.parameters:
            whole.put(name, whole.fused(name))
    return whole.model
