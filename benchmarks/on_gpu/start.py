"""What comes before all parts: whether the kernels run here, and the compilation of all of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import partial

import torch

from moepress import kernels
from moepress.format.codec import PackedSpec
from moepress.kernels.cuda import compiler
from moepress.kernels.random_codes import random_packed
from moepress.self_test import programs
from on_gpu.card import Card
from on_gpu.case import BACKEND, Case, CheckError, Row


def cases(card: Card) -> Iterator[Case]:
    yield Case(BACKEND, partial(check_backend, card), 60)
    yield Case("programs", partial(compile_programs, card), 120)
    yield Case("first call", partial(first_call, card), 150)


def check_backend(card: Card) -> list[Row]:
    status = [dataclasses.asdict(s) for s in kernels.status()]
    found = kernels.backend_for(card.device).name
    if found != card.device.type:
        raise CheckError(f"{card.device} runs '{found}': {status}")
    return [{"backend": found, "status": status}]


def compile_programs(card: Card) -> list[Row]:
    """Every program of the folder, several at a time, so that no check waits for a compiler."""
    if not card.is_cuda:
        return []
    started = time.perf_counter()
    found = programs()
    compiler.compile_all(found, torch.cuda.get_device_capability(card.device))
    return [{"programs": len(found), "seconds": time.perf_counter() - started}]


def first_call(card: Card) -> list[Row]:
    started = time.perf_counter()
    spec = PackedSpec((2,), 32, "trellis")
    packed = random_packed(spec, 64, 64, card.generator())
    x = torch.randn(1, 64, device=card.device)
    kernels.linear(x, packed, None, 64, 2, 32, 8, "trellis").sum().item()
    return [{"seconds": time.perf_counter() - started}]
