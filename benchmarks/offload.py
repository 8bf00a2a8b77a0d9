"""Models bigger than memory: experts from disk, beside mapped files and llama.cpp.

    python benchmarks/offload.py FOLDER --layers 32 --limits 4 8 12      # Mixtral-8x7B, 16 GB
    python benchmarks/offload.py FOLDER --layers 8 --limits 1 2 3        # a quarter of it
    python benchmarks/offload.py FOLDER --shape Qwen3-30B-A3B            # 48 layers, 11 GB

FOLDER keeps the models, of random codes: `ours` at 2.5 bits, `Q2_K.gguf` of about as many bytes.
Each run is a process of its own in a control group whose limit (GB) counts its memory and its page
cache. It needs the right to make one (root). Systems take turns, and a line of JSON has

    tokens_per_s    of decoding, at batch 1
    read_per_token  MB that the drive gave (/proc/self/io)
    drive_share     of the drive's plain read speed, measured at the start

The tokens are given, the same random ones for all: with random weights, a model's own tokens soon
repeat, and with them the experts. Steps of ours are captured, as in `generate`. How often a token's
choice was the last token's too (`repeats`, with --watch, which no captured step allows) is set to
about that of trained routers: on held-out text it is .49 for the reference Mixtral and .47 for the
Qwen3-MoE. Mixtral-8x7B's shape: routers of ours are skewed, their rows have norms from 1.3 down to
0.7 (`random_models.router`), .59; llama.cpp's weights are other random numbers of about the same
spread, its choices, seen through an evaluation callback, repeat in .65 of the cases with a plain
router, and in .73 with the skewed one, so it gets the plain one. Qwen3-30B-A3B's shape: plain
routers, and embeddings times 20 (ours, .43) and 70 (llama.cpp, .43); with embeddings as they are it
is .73 and .83.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import cpu
import random_models
from random_models import MIXTRAL, SHAPES

SKEW = {  # of the routers, and gain of the embedding
    "Mixtral-8x7B": {"ours": (0.3, 1.0), "llama.cpp": (0.0, 1.0)},
    "Qwen3-30B-A3B": {"ours": (0.0, 20.0), "llama.cpp": (0.0, 70.0)},
}
LEFT_FREE = 0.75e9  # of the limit: Python, torch, activations
PROMPT, WARM_TOKENS, TOKENS, SECONDS = 16, 8, 48, 45.0


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A group below this process's own, with that many bytes of memory."""
    line = next(
        text.split(":", 2)
        for text in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        if text.split(":", 2)[1] in ("memory", "")
    )
    root = Path("/sys/fs/cgroup") / line[1]
    group = root / line[2].strip("/") / f"moepress-{os.getpid()}"
    group.mkdir()
    try:
        name = "memory.limit_in_bytes" if line[1] else "memory.max"
        (group / name).write_text(str(limit), encoding="utf-8")
        yield group / "cgroup.procs"
    finally:
        for _ in range(50):
            try:
                group.rmdir()
                break
            except OSError:  # the processes are still ending
                time.sleep(0.1)


def forget(path: Path) -> None:
    """Drop a model's files from the page cache."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def given_tokens() -> Iterator[list[int]]:
    """A prompt of 16 random tokens, then random tokens one at a time."""
    draw = random.Random(0)
    yield [draw.randrange(MIXTRAL.vocab) for _ in range(PROMPT)]
    while True:
        yield [draw.randrange(MIXTRAL.vocab)]


def stepper(
    system: str, path: Path, memory: int, watched: bool
) -> tuple[Callable[[], None], Callable[[], Any]]:
    """A function that decodes one token, and one that tells what else there is to say."""
    if system == "llama.cpp":
        return llama_stepper(path), lambda: {}
    import torch
    from transformers import DynamicCache

    from moepress.hf import load_model
    from moepress.hf.captured import CapturedSteps
    from moepress.prune import parse_strength
    from moepress.store import statistics

    torch.set_num_threads(cpu.THREADS)
    kind, _, strength = system.partition(" ")
    pruning = parse_strength(strength) if strength else None
    model = load_model(path, memory=memory if kind == "store" else "mapped", pruning=pruning)
    chosen: list[list[Any]] = []

    def watch(module: Any, args: tuple[Any, ...]) -> None:
        chosen[-1].append(set(args[1][-1].tolist()))

    from moepress.kernels.modules import PackedExperts

    for module in model.modules():
        if watched and isinstance(module, PackedExperts):
            module.register_forward_pre_hook(watch)
    tokens, cache = given_tokens(), DynamicCache(config=model.config)
    steps = CapturedSteps(model, devices=() if watched else ("cpu",))

    @torch.inference_mode()
    def step() -> None:
        chosen.append([])
        ids, past = torch.tensor([next(tokens)]), cache.get_seq_length()
        positions = torch.arange(past, past + ids.shape[1])[None]
        with steps:
            model(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip

    def about() -> dict[str, Any]:
        pairs = [
            len(a & b) / len(b)
            for before, after in pairwise(chosen[1:])
            for a, b in zip(before, after, strict=True)
            if b
        ]
        found = statistics(model)
        return {
            **({"repeats": sum(pairs) / max(len(pairs), 1)} if watched else {}),
            "replayed": steps.replayed,
            **({} if found is None else {"hit_rate": found.hit_rate}),
        }

    return step, about


def llama_stepper(path: Path) -> Callable[[], None]:
    import llama_cpp

    llama_cpp.llama_backend_init()
    mapped = llama_cpp.llama_model_default_params()
    mapped.use_extra_bufts = False  # repacked weights are copies, which the limit does not hold
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), mapped)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 128
    params.n_threads = params.n_threads_batch = cpu.THREADS
    context = llama_cpp.llama_init_from_model(model, params)
    tokens = given_tokens()

    def step() -> None:
        ids = next(tokens)
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama_decode failed")

    return step


def read_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def child(system: str, path: Path, memory: int, watched: bool) -> None:
    """Decode in this process, and print what was measured."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout too
    step, about = stepper(system, path, memory, watched)
    ends = time.monotonic() + SECONDS
    for _ in range(WARM_TOKENS):
        step()
        if time.monotonic() > ends:
            break
    seconds, before, ends = [], read_bytes(), time.monotonic() + SECONDS
    while len(seconds) < TOKENS and time.monotonic() < ends:
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    read = (read_bytes() - before) / len(seconds)
    result = {
        "tokens": len(seconds),
        "tokens_per_s": len(seconds) / sum(seconds),
        "median_tokens_per_s": 1 / median(seconds),
        "read_per_token": read / 1e6,
        "read_per_s": read * len(seconds) / sum(seconds) / 1e6,
        **about(),
    }
    print(json.dumps(result), file=answers, flush=True)


def run(system: str, path: Path, limit: float, memory: int | None, watched: bool) -> dict[str, Any]:
    """One system under one limit, in GB."""
    forget(path)
    with control_group(int(limit * 1e9)) as procs:
        command = [sys.executable, __file__, "child", system, str(path)]
        given = memory if memory is not None else int(limit * 1e9 - LEFT_FREE)
        done = subprocess.run(
            [*command, "--memory", str(given), *(["--watch"] if watched else [])],
            preexec_fn=lambda: procs.write_text(str(os.getpid()), encoding="utf-8"),
            env=cpu.default_threading(),
            capture_output=True,
            text=True,
        )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:], "code": done.returncode}
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--shape", choices=SHAPES, default="Mixtral-8x7B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--limits", type=float, nargs="+", default=[4, 8, 12])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--systems", nargs="+", default=["store", "mapped", "llama.cpp"])
    parser.add_argument("--memory", type=int, help="bytes for the store's weights")
    parser.add_argument("--watch", action="store_true", help="count how often choices repeat")
    given = parser.parse_args()
    if given.folder == "child":
        child(given.rest[0], Path(given.rest[1]), given.memory, given.watch)
        return
    folder, shape = Path(given.folder), SHAPES[given.shape]
    layers = given.layers or shape.layers
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"ours": folder / "ours", "llama.cpp": folder / "Q2_K.gguf"}
    if not paths["ours"].exists():
        skew, gain = SKEW[given.shape]["ours"]
        random_models.packed(paths["ours"], layers, 2.5, skew=skew, shape=shape, gain=gain)
    if "llama.cpp" in given.systems and not paths["llama.cpp"].exists():
        skew, gain = SKEW[given.shape]["llama.cpp"]
        random_models.write_gguf(paths["llama.cpp"], "Q2_K", layers, skew, shape, gain)
    from moepress.store.forecast import read_speed

    for _ in range(given.rounds):
        for limit in given.limits:
            drive = read_speed(max(paths["ours"].glob("*.safetensors"), key=os.path.getsize))
            for system in given.systems:
                path = paths.get(system, paths["ours"])
                found = run(system, path, limit, given.memory, given.watch)
                if "read_per_s" in found:
                    found["drive_share"] = found["read_per_s"] * 1e6 / drive
                print(json.dumps({
                    "limit_gb": limit, "system": system, "drive_mb_per_s": drive / 1e6,
                    "model_gb": size_of(path) / 1e9, **found,
                }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
