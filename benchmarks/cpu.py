"""Measure the speed of the CPU kernels beside memory bandwidth, llama.cpp and bfloat16.

    python benchmarks/cpu.py kernels                 # bytes per second of the MoE op, by codec
    python benchmarks/cpu.py search                  # weights per second of the trellis search
    python benchmarks/cpu.py models FOLDER           # decode and prefill beside llama.cpp
    python benchmarks/cpu.py models FOLDER --shape Qwen3-30B-A3B --layers 16
    python benchmarks/cpu.py bfloat16 FOLDER         # decode beside transformers' own bfloat16
    python benchmarks/cpu.py whole FOLDER            # 32 layers: first token, then tokens/s

`models` and `bfloat16` write models of Mixtral-8x7B's shape with 4 layers and random weights into
FOLDER (10 and 14 GB), or use those that are there; `whole` writes 31 GB, 16 of them with `--only
fast-2.5`. 16 layers of Qwen3-30B-A3B's shape take 24 GB. `models` needs gguf and llama-cpp-python,
which pip compiles. Each contender runs in a process of its own, and they take turns, so that other
load on the machine affects all alike. Figures are medians over the rounds; ratios compare figures
of the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import mixtral_shape
import random_models
from mixtral_shape import report
from moepress.format.checkpoint import folder_bytes
from random_models import MIXTRAL, SHAPES, Shape

THREADS = len(os.sched_getaffinity(0))
LAYERS = 4
OURS = {  # family and average code bits of the experts
    "fast-1.875": ("int", 1.875),
    "fast-2.0": ("int", 2.0),
    "fast-2.5": ("int", 2.5),
    "default-2.0": ("trellis", 2.0),
    "default-2.5": ("trellis", 2.5),
}
THEIRS = ("IQ2_XXS", "IQ2_XS", "Q2_K")
COPIES = {"Mixtral-8x7B": 2, "Qwen3-30B-A3B": 4}  # layers: more bytes than the caches hold

STREAM = """
#include <cstdint>
extern "C" uint64_t stream(const uint64_t* at, int64_t n) {  // reads n words, on all threads
    uint64_t sum = 0;
    #pragma omp parallel for reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += at[i];
    return sum;
}
"""


# The MoE op, one token


def kernels(rounds: int) -> None:
    """Report packed bytes per second, beside the memory bandwidth measured before and after."""
    from moepress.kernels import cpu

    read = compiled_stream()
    report(instruction_set=cpu.instruction_sets()[0], threads=THREADS)
    for shape in COPIES:
        measure_kernels(shape, read, rounds)


def one_token(
    family: str, bits: float, shape: Shape, copies: int
) -> tuple[Callable[[], None], int]:
    """A function that calls the MoE op with one token, and the bytes that a call reads.

    Successive calls use different experts, of `copies` layers, so that no call finds its bytes in
    the caches.
    """
    import torch

    from moepress.format.codec import PackedSpec
    from moepress.kernels import ExpertsCall, cpu

    hidden, inner, k = shape.hidden, shape.intermediate, shape.chosen
    spec = PackedSpec((bits,) * shape.experts, 128, family)
    sizes = ((2 * inner, hidden), (hidden, inner))
    layers = [
        [random_models.random_packed(spec, *size, torch.Generator()) for _ in range(copies)]
        for size in sizes
    ]
    tables = [torch.tensor(spec.table(*s)) for s in sizes]
    x, weights = torch.randn(1, hidden), torch.full((1, k), 1 / k)
    turn = itertools.count()

    def call() -> None:
        n = next(turn)
        index = (torch.arange(k)[None] + n * k) % shape.experts
        gate_up, down = (side[n % copies] for side in layers)
        routing = x, index, weights
        cpu.experts(
            ExpertsCall(*routing, gate_up, down, *tables, inner, 128, 128, "silu", family=family)
        )

    return call, k * sum(spec.codecs[0].nbytes(*s) for s in sizes)


def measure_kernels(shape: str, read: Callable[[], float], rounds: int) -> None:
    from moepress.format.codec import CODE_BITS

    cases = {
        (family, bits): one_token(family, bits, SHAPES[shape], COPIES[shape])
        for family, widths in CODE_BITS.items()
        for bits in widths
    }
    shares: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    speeds: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    ceilings = []
    for _, (case, (call, size)) in itertools.product(range(rounds), cases.items()):
        calls = max(4, 400_000_000 // size)
        before = read()
        call()
        seconds = timed(lambda call=call, calls=calls: [call() for _ in range(calls)])
        ceilings += [before, read()]
        speeds[case].append(calls * size / seconds)
        shares[case].append(speeds[case][-1] / max(ceilings[-2:]))
    report(shape=shape, ceiling_gb_per_s=max(ceilings) / 1e9, median=median(ceilings) / 1e9)
    for family, bits in cases:
        speed, share = median(speeds[family, bits]), median(shares[family, bits])
        values = {"gb_per_s": speed / 1e9, "of_ceiling": share}
        best = max(speeds[family, bits]) / 1e9
        weights = 8e-9 * speed / bits  # slightly too many: side data count as weights
        report(
            shape=shape,
            codec=family,
            bits=bits,
            **values,
            best_gb_per_s=best,
            gweights_per_s=weights,
        )


# The trellis search


def search(rounds: int) -> None:
    """Weights per second of processor time, one thread, and per second on all threads."""
    import torch

    from moepress.format.codec import TRELLIS_BITS
    from moepress.kernels import cpu
    from moepress.kernels.trellis import deviation

    for name, bits, rows in itertools.product(cpu.instruction_sets(), TRELLIS_BITS, (3584, 16384)):
        if name == "portable" and rows > 3584:
            continue
        cpu.use(name)
        target = torch.randn(8, rows) * deviation(bits)
        call = partial(cpu.trellis_search, target, bits)
        rates = []
        for threads, clock in ((1, time.process_time), (THREADS, time.perf_counter)):
            torch.set_num_threads(threads)
            call()
            rates.append(target.numel() / median(timed(call, clock) for _ in range(rounds)))
        report(
            instruction_set=name,
            bits=bits,
            rows=rows,
            mweights_per_cpu_s=rates[0] / 1e6,
            threads=THREADS,
            mweights_per_s=rates[1] / 1e6,
        )


def compiled_stream() -> Callable[[], float]:
    """A function that reads 2 GB on all cores and returns bytes per second."""
    import numpy as np

    folder = Path(tempfile.mkdtemp())
    source = folder / "stream.cpp"
    source.write_text(STREAM)
    flags = ["-O3", "-march=native", "-funroll-loops", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["c++", *flags, str(source), "-o", str(folder / "stream.so")], check=True)
    stream = ctypes.CDLL(str(folder / "stream.so")).stream
    stream.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    words = np.ones(2**28, np.uint64)
    return lambda: words.nbytes / timed(lambda: stream(words.ctypes.data, words.size))


# Whole models, each in a process of its own


class Contender:
    """A worker process that runs tasks and answers with seconds."""

    def __init__(self, kind: str, path: Path) -> None:
        self.size = folder_bytes(path) if path.is_dir() else path.stat().st_size
        self.process = subprocess.Popen(
            [sys.executable, __file__, "worker", kind, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=default_threading(),
        )  # fmt: skip
        self.answer()

    def ask(self, task: str, count: int) -> float:
        assert self.process.stdin
        print(task, count, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> float:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker died")
        return float(line)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def default_threading() -> dict[str, str]:
    """The environment without settings of how threads wait: each contender uses its defaults."""
    return {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}


def compete(contenders: dict[str, Contender], tasks: dict[str, int], rounds: int) -> None:
    """Let contenders take turns, and report tokens per second."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for task, name in itertools.product(tasks, contenders):  # warm-up
        contenders[name].ask(task, tasks[task])
    for _, task, name in itertools.product(range(rounds), tasks, contenders):
        taken = contenders[name].ask(task, tasks[task])
        seconds.setdefault((name, task), []).append(taken)
    for name, one in contenders.items():
        rates = {
            f"{task}_per_s": count / median(seconds[name, task]) for task, count in tasks.items()
        }
        best = {
            f"best_{task}_per_s": count / min(seconds[name, task]) for task, count in tasks.items()
        }
        report(model=name, gigabytes=one.size / 1e9, **rates, **best)
        one.stop()


def worker(kind: str, path: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")  # libraries print to stdout too
    os.dup2(2, 1)
    run = {"transformers": transformers_tasks, "llama.cpp": llama_tasks}[kind](path)
    print(0, file=answers, flush=True)
    for line in sys.stdin:
        task, count = line.split()
        print(run(task, int(count)), file=answers, flush=True)


def transformers_tasks(path: Path) -> Callable[[str, int], float]:
    import torch
    from transformers import AutoModelForCausalLM

    import moepress  # noqa: F401  # registers the loader

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    generator = torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def run(task: str, count: int) -> float:
        ids = torch.randint(
            MIXTRAL.vocab, (1, count if task == "prefill" else 16), generator=generator
        )
        if task == "prefill":
            return timed(lambda: model(ids, use_cache=True, logits_to_keep=1))
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        one = timed(lambda: model.generate(ids, max_new_tokens=1, **options))
        return timed(lambda: model.generate(ids, max_new_tokens=count + 1, **options)) - one

    return run


def llama_tasks(path: Path) -> Callable[[str, int], float]:
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
    params.n_threads = params.n_threads_batch = THREADS
    context = llama_cpp.llama_init_from_model(model, params)
    generator = np.random.default_rng(0)

    def decode(tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (MIXTRAL.vocab,)).argmax())

    def run(task: str, count: int) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        ids = generator.integers(MIXTRAL.vocab, size=count if task == "prefill" else 16).tolist()
        if task == "prefill":
            return timed(lambda: decode(ids))
        token = decode(ids)

        def loop() -> None:
            nonlocal token
            for _ in range(count):
                token = decode([token])

        return timed(loop)

    return run


def models(folder: Path, rounds: int, shape: Shape, layers: int, only: Collection[str]) -> None:
    contenders = {}
    for name, (family, bits) in OURS.items():
        if name not in only:
            continue
        path = folder / name
        if not path.exists():
            random_models.packed(path, layers, bits, family, shape=shape)
        contenders[name] = Contender("transformers", path)
    for name in THEIRS:
        if name not in only:
            continue
        path = folder / f"{name}.gguf"
        if not path.exists():
            random_models.write_gguf(path, name, layers, shape=shape)
        contenders[name] = Contender("llama.cpp", path)
    compete(contenders, {"decode": 64, "prefill": 512}, rounds)


def bfloat16(folder: Path, rounds: int) -> None:
    original, ours = folder / "bfloat16", folder / "fast-2.5"
    if not original.exists():
        mixtral_shape.make(original, LAYERS)
    if not ours.exists():
        random_models.packed(ours, LAYERS, 2.5)
    pair = {"fast-2.5": ours, "bfloat16": original}
    contenders = {name: Contender("transformers", path) for name, path in pair.items()}
    compete(contenders, {"decode": 16, "prefill": 512}, rounds)


# All 32 layers


def whole(folder: Path, only: Collection[str]) -> None:
    """Open and generate in a fresh process: first with no file in memory, then with all."""
    for name in only:
        path = folder / f"{name}-32-layers"
        if not path.exists():
            family, bits = OURS[name]
            random_models.packed(path, 32, bits, family)
        _whole(name, path)


def _whole(name: str, path: Path) -> None:
    for cached in (False, True):
        if not cached:
            for file in path.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
                    os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        command = [sys.executable, __file__, "generate", str(path)]
        settings = default_threading()
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
        report(
            name=name,
            files_in_memory=cached,
            gigabytes=folder_bytes(path) / 1e9,
            **json.loads(done.stdout),
        )


def generate(path: Path) -> None:
    started = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM

    import moepress  # noqa: F401  # registers the loader

    imported = time.perf_counter()
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    opened = time.perf_counter()
    ids = torch.arange(16)[None]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    times = []

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None: ...

    with torch.inference_mode():
        model.generate(ids, max_new_tokens=64, streamer=Clock(), **options)
    tokens = times[1:]  # the streamer's first call is for the prompt
    values = {
        "import_s": imported - started,
        "open_s": opened - imported,
        "first_token_s": tokens[0] - imported,
        "tokens_per_s": (len(tokens) - 33) / (tokens[-1] - tokens[32]),
        "tokens_per_s_of_the_first_32": 31 / (tokens[31] - tokens[0]),
        "peak_rss_gb": mixtral_shape.peak_rss() / 1e9,
    }
    print(json.dumps(values))


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    work()
    return clock() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", choices=["kernels", "search", "models", "bfloat16", "whole", "worker", "generate"]
    )
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="Mixtral-8x7B", help="of `models`")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of `models`")
    parser.add_argument("--only", nargs="*", help="contenders of `models` and `whole`")
    given = parser.parse_args()
    if given.what in ("kernels", "search"):
        {"kernels": kernels, "search": search}[given.what](given.rounds)
    elif given.what == "worker":
        worker(given.arguments[0], Path(given.arguments[1]))
    elif given.what == "whole":
        whole(Path(given.arguments[0]), given.only or ("fast-2.5", "default-2.5"))
    elif given.what == "generate":
        generate(Path(given.arguments[0]))
    elif given.what == "models":
        shape, only = SHAPES[given.shape], given.only or (*OURS, *THEIRS)
        models(Path(given.arguments[0]), given.rounds, shape, given.layers, only)
    else:
        bfloat16(Path(given.arguments[0]), given.rounds)
