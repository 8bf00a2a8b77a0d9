"""What comes before all parts: whether the kernels run here, and the compilation of all of them."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from functools import partial

import torch

from moepress import kernels
from moepress.format.codec import PackedSpec
from moepress.kernels.cuda import compiler, launch
from on_gpu.card import Card
from on_gpu.case import BACKEND, Case, CheckError, Row
from on_gpu.random_codes import random_packed


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


def programs() -> list[compiler.Program]:
    """Every variant that the end of a file lists; what takes longest to compile first."""
    found: list[compiler.Program] = []
    for source in sorted(launch.SOURCES, key=lambda name: not name.startswith("trellis")):
        text = (compiler.HERE / f"{source}.cu").read_text()
        variants = re.findall(r"^MOEPRESS_\w+\((\d+), (\d)\)$", text, re.MULTILINE)
        names = [f"moepress_{source}_g{g}_p{p}" for g, p in variants] or [f"moepress_{source}"]
        found += [(source, launch.defines_of(name)) for name in names]
    return found


def first_call(card: Card) -> list[Row]:
    started = time.perf_counter()
    spec = PackedSpec((2,), 32, "trellis")
    packed = random_packed(spec, 64, 64, card.generator())
    x = torch.randn(1, 64, device=card.device)
    kernels.linear(x, packed, None, 64, 2, 32, 8, "trellis").sum().item()
    return [{"seconds": time.perf_counter() - started}]
