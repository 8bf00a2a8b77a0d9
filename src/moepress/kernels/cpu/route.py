"""The op `moepress::route` on CPUs: one call of the library (route.cpp) for few tokens.

What it does not take goes to the reference, kernels/router.py.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_float, c_int32, c_int64
from functools import lru_cache

import torch
from torch import Tensor

from moepress.kernels import router
from moepress.kernels.cpu import interface
from moepress.kernels.cpu.interface import NUMBERS
from moepress.kernels.router import SCORES, Formula

# MoepressNumbers of moepress.h.
MOST_TOKENS = 16  # of a step (hf/trying.py); longer prompts are left to the product of torch


class _Formula(Structure):
    """MoepressFormula of moepress.h."""

    _fields_ = (
        ("score", c_int32),
        ("normalise", c_int32),
        ("group_best", c_int32),
        ("product", c_int32),
        ("logits", c_int32),
        ("scores", c_int32),
        ("weights", c_int32),
        ("epsilon", c_float),
        ("scale", c_float),
        ("groups", c_int64),
        ("kept_groups", c_int64),
    )


def takes(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
) -> bool:
    """Whether the library takes such inputs. Others are of float64, many tokens, not contiguous."""
    return len(hidden) <= MOST_TOKENS and all(
        x is None or (x.dtype in NUMBERS and x.is_contiguous())
        for x in (hidden, weight, bias, correction)
    )


def route(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    formula: Formula,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `moepress::route`. Sums are in float32, in the same order on every CPU."""
    settings = _settings(formula)
    if settings is None or not takes(hidden, weight, bias, correction):
        return router.route(hidden, weight, bias, correction, top_k, formula)
    (tokens, cols), experts = hidden.shape, len(weight)
    logits = hidden.new_empty((tokens, experts), dtype=formula.logits_dtype)
    weights = hidden.new_empty((tokens, top_k), dtype=formula.weights_dtype)
    index = hidden.new_empty((tokens, top_k), dtype=torch.int64)
    interface.call(
        "moepress_route",
        hidden.data_ptr(),
        NUMBERS[hidden.dtype],
        tokens,
        cols,
        weight.data_ptr(),
        NUMBERS[weight.dtype],
        experts,
        *_read(bias),
        *_read(correction),
        top_k,
        byref(settings),
        torch.get_num_threads(),
        logits.data_ptr(),
        weights.data_ptr(),
        index.data_ptr(),
    )
    return logits, weights, index


def _read(vector: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if vector is None else (vector.data_ptr(), NUMBERS[vector.dtype])


@lru_cache(maxsize=64)
def _settings(formula: Formula) -> _Formula | None:
    """The formula as the library takes it; None: it does not."""
    dtypes = (
        formula.product_dtype,
        formula.logits_dtype,
        formula.score_dtype,
        formula.weights_dtype,
    )
    if any(dtype not in NUMBERS for dtype in dtypes):
        return None
    return _Formula(
        SCORES.index(formula.score),
        formula.normalise,
        formula.group_best,
        *(NUMBERS[dtype] for dtype in dtypes),
        formula.epsilon,
        formula.scale,
        formula.groups,
        formula.kept_groups,
    )
