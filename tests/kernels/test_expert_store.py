"""The expert store beside a plain oracle: the same bytes, and the same experts in memory."""

from __future__ import annotations

import ctypes
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from moepress.errors import CheckpointError, InputError
from moepress.kernels import cpu

if cpu.missing() is not None or not hasattr(os, "pread"):
    pytest.skip("no store here", allow_module_level=True)

from moepress.kernels.cpu.expert_store import (
    HUGE_FROM,
    HUGE_PAGE,
    PAGE,
    ExpertStore,
    Place,
    _functions,
)
from moepress.kernels.stores import OPEN

HALF_LIFE = 16.0

# A system that gives and takes memory in pages of PAGE, as those of ARM do.
LARGE_PAGES = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
int getpagesize(void) { return PAGE; }
long sysconf(int name) {
    return name == _SC_PAGESIZE ? PAGE : ((long (*)(int))dlsym(RTLD_NEXT, "sysconf"))(name);
}
int madvise(void* at, size_t bytes, int advice) {
    if ((uintptr_t)at % PAGE != 0) return errno = EINVAL, -1;
    return syscall(SYS_madvise, at, (bytes + PAGE - 1) / PAGE * PAGE, advice);
}
"""


@dataclass
class Oracle:
    """Which experts are in memory: frequency with recency, in plain Python."""

    sizes: list[list[int]]  # [L][E] bytes in whole pages
    uses: list[list[float]]
    budget: int
    present: set[tuple[int, int]] = field(default_factory=set)
    seen: dict[int, float] = field(default_factory=dict)
    hits: int = 0

    def __post_init__(self) -> None:
        self.priority = {
            (n, e): math.log2(u) if u else -math.inf
            for n, row in enumerate(self.uses)
            for e, u in enumerate(row)
        }

    def hold(self, layer: int, experts: Sequence[int]) -> None:
        self.seen[layer] = now = self.seen.get(layer, 0.0) + 1
        keys = [(layer, e) for e in sorted(experts) if self.sizes[layer][e]]
        for key in keys:
            self.hits += key in self.present
            kept = 2 ** (self.priority[key] - now / HALF_LIFE)
            self.priority[key] = math.log2(kept + 1) + now / HALF_LIFE
        missing = [key for key in keys if key not in self.present]
        for key in missing:
            while self.used() + self.size(key) > self.budget:
                free = sorted(self.present - set(keys))
                self.present.remove(min(free, key=self.worth))
            self.present.add(key)

    def worth(self, key: tuple[int, int]) -> float:
        return self.priority[key] - self.seen.get(key[0], 0.0) / HALF_LIFE

    def size(self, key: tuple[int, int]) -> int:
        return self.sizes[key[0]][key[1]]

    def used(self) -> int:
        return sum(map(self.size, self.present))


def pages(place: Place) -> int:
    if place.nbytes == 0:
        return 0
    return -(-(place.offset % PAGE + place.nbytes) // PAGE) * PAGE


@dataclass
class Files:
    matrices: list[list[tuple[Place, Place]]]
    content: dict[Path, bytes]

    def sizes(self) -> list[list[int]]:
        return [[pages(a) + pages(b) for a, b in layer] for layer in self.matrices]


def make_files(folder: Path, seed: int, layers: int = 3, experts: int = 5) -> Files:
    """One file per layer: matrices of random sizes, from one cache line to several pieces."""
    draw = random.Random(seed)
    matrices, content = [], {}
    for n in range(layers):
        path, at, row = folder / f"layer-{n}", 8 * draw.randrange(1, 600), []
        for e in range(experts):
            pair = []
            for _ in range(2):
                small = 64 * draw.randrange(1, 300)
                nbytes = 0 if (n, e) == (1, 2) else draw.choice([small] * 7 + [4_200_000])
                pair.append(Place(path, at, nbytes))
                at += nbytes
            row.append((pair[0], pair[1]))
        content[path] = draw.randbytes(at)
        path.write_bytes(content[path])
        matrices.append(row)
    return Files(matrices, content)


def assert_held(store: ExpertStore, files: Files, layer: int, experts: Sequence[int]) -> None:
    for e in experts:
        for which, place in enumerate(files.matrices[layer][e]):
            start = int(store.places[layer][e, which])
            found = bytes(store.region[start : start + place.nbytes].numpy())
            assert found == files.content[place.path][place.offset : place.offset + place.nbytes]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("direct", [True, False])
def test_the_store_keeps_what_the_oracle_keeps(tmp_path: Path, seed: int, direct: bool) -> None:
    files, draw = make_files(tmp_path, seed), random.Random(seed)
    sizes = files.sizes()
    uses = [[draw.choice([0.0, draw.uniform(0, 9)]) for _ in row] for row in sizes]
    most = max(sum(sorted(row)[-2:]) for row in sizes)
    budget = draw.randrange(most, sum(map(sum, sizes)))
    store = ExpertStore(
        files.matrices, uses, HALF_LIFE, budget, readers=draw.randrange(1, 5), direct=direct
    )
    oracle = Oracle(sizes, uses, budget)
    for _ in range(40):
        layer, experts = draw.randrange(3), draw.sample(range(5), 2)
        with store.hold(layer, experts):
            oracle.hold(layer, experts)
            assert_held(store, files, layer, experts)
        for n, row in enumerate(sizes):
            present = [(n, e) in oracle.present or size == 0 for e, size in enumerate(row)]
            assert store.at_hand(n).tolist() == present
    counts = store.counts()
    assert counts.hits == oracle.hits and counts.bytes_held == oracle.used() <= budget
    assert counts.reads == counts.uses - counts.hits
    store.close()


def test_experts_that_are_dropped_read_as_zeros(tmp_path: Path) -> None:
    files = make_files(tmp_path, 1)
    largest = max(max(row) for row in files.sizes())
    store = ExpertStore(files.matrices, [[0.0] * 5] * 3, HALF_LIFE, largest)
    with store.hold(0, [0]):
        assert_held(store, files, 0, [0])
    with store.hold(2, [1]):
        assert_held(store, files, 2, [1])
        start, place = int(store.places[0][0, 0]), files.matrices[0][0][0]
        if largest < files.sizes()[0][0] + files.sizes()[2][1]:
            assert not store.region[start : start + place.nbytes].any()
    with pytest.raises(InputError, match="out of memory"), store.hold(0, [0, 1, 2, 3, 4]):
        pass
    store.close()


def test_warm_reads_the_first_that_fit(tmp_path: Path) -> None:
    files = make_files(tmp_path, 2)
    sizes = files.sizes()
    uses = [[float(5 * n + e + 1) for e in range(5)] for n in range(3)]
    order = sorted(((n, e) for n in range(3) for e in range(5)), key=lambda k: -uses[k[0]][k[1]])
    largest = max(map(max, sizes))
    budget = max(sum(sizes[n][e] for n, e in order[:6]), largest)
    store = ExpertStore(files.matrices, uses, HALF_LIFE, budget)
    store.warm(order)
    here = {(n, e) for n in range(3) for e in range(5) if store.at_hand(n)[e] and sizes[n][e]}
    assert here >= set(order[:6])
    assert sum(sizes[n][e] for n, e in here) <= budget
    with store.hold(*order[0][:1], [order[0][1]]):
        assert_held(store, files, order[0][0], [order[0][1]])
    store.close()


def test_everything_is_read_and_locked(tmp_path: Path) -> None:
    import resource

    files = make_files(tmp_path, 4)
    total = sum(map(sum, files.sizes()))
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    store = ExpertStore(files.matrices, [[0.0] * 5] * 3, HALF_LIFE, total)
    try:
        store.fill()
    except InputError as error:
        assert "ulimit -l" in str(error) and soft < total
    else:
        assert all(bool(store.at_hand(n).all()) for n in range(3))
        for n in range(3):
            assert_held(store, files, n, range(5))
    finally:
        store.close()
    assert (soft, hard) == resource.getrlimit(resource.RLIMIT_MEMLOCK)


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_systems_with_larger_pages(tmp_path: Path) -> None:
    """An expert that goes takes no page of another with it. Apple silicon has pages of 16 KB."""
    (tmp_path / "pages.c").write_text(LARGE_PAGES)
    command = ["cc", "-shared", "-fPIC", "-DPAGE=16384L", "pages.c", "-o", "pages.so", "-ldl"]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", __file__, "-k", "oracle or zeros or warm"],
        env=os.environ | {"LD_PRELOAD": str(tmp_path / "pages.so")},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and "10 passed" in found.stdout, found.stdout


# Failures


def test_files_that_are_too_short_or_missing(tmp_path: Path) -> None:
    files = make_files(tmp_path, 5)
    total = sum(map(sum, files.sizes()))
    uses = [[0.0] * 5] * 3
    path = files.matrices[1][0][0].path
    path.write_bytes(files.content[path][:-1])
    with pytest.raises(CheckpointError, match=f"{path} has .* truncated: copy it again"):
        ExpertStore(files.matrices, uses, HALF_LIFE, total)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path} cannot be opened: No such file"):
        ExpertStore(files.matrices, uses, HALF_LIFE, total)
    path.write_bytes(files.content[path])
    with pytest.raises(InputError, match=r"the largest takes .* Give more memory"):
        ExpertStore(files.matrices, uses, HALF_LIFE, PAGE)


@pytest.mark.parametrize("how", ["truncated", "error"])
def test_a_read_that_fails_in_the_middle(tmp_path: Path, how: str) -> None:
    """The file shrinks, or its descriptor gives errors; both are mended afterwards."""
    files = make_files(tmp_path, 6)
    store = ExpertStore(files.matrices, [[0.0] * 5] * 3, HALF_LIFE, 10**9)
    path = files.matrices[0][0][0].path
    fd = next(fd for fd, at in store._paths.items() if at == path)
    kept = os.dup(fd)
    with store.hold(0, [0]):
        pass
    if how == "truncated":
        os.truncate(path, files.matrices[0][4][1].offset + 1)
    else:
        folder = os.open(tmp_path, os.O_RDONLY)
        os.dup2(folder, fd)
        os.close(folder)
    why = "shorter than it was" if how == "truncated" else "Is a directory"
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"{path}: .*{why}"), store.hold(0, [0, 4]):
            pass
        assert not store.at_hand(0)[4] and store.at_hand(0)[0]
    path.write_bytes(files.content[path])
    os.dup2(kept, fd)
    os.close(kept)
    with store.hold(0, [0, 4]):
        assert_held(store, files, 0, [0, 4])
    store.close()


def test_a_copy_of_the_process_is_refused(tmp_path: Path) -> None:
    files = make_files(tmp_path, 7)
    store = ExpertStore(files.matrices, [[0.0] * 5] * 3, HALF_LIFE, 10**9)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for use in (lambda: store.at_hand(0), lambda: store.hold(0, [0]).__enter__()):
                with pytest.raises(InputError, match="fork"):
                    use()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with store.hold(0, [0]):
        assert_held(store, files, 0, [0])
    with pytest.raises(InputError, match="cannot be saved or copied"):
        pickle.dumps(store)
    store.close()


def test_a_store_that_is_closed_again_closes_no_other(tmp_path: Path) -> None:
    """Its number is an address, which the next store may get."""
    files = make_files(tmp_path, 8)
    first, second = (ExpertStore(files.matrices, [[0.0] * 5] * 3, HALF_LIFE, 10**9) for _ in "ab")
    first.close()
    first.number = second.number
    first.close()
    assert OPEN[second.number] is second
    second.close()
    assert second.number not in OPEN


def test_a_large_matrix_must_begin_in_a_huge_page() -> None:
    """Else to drop it would take the pages of the matrices beside it."""
    functions = _functions()

    def opened(place: int, nbytes: int) -> int:
        ranges = np.array([[-1, 0, nbytes, place], [0, 0, 0, 0]], dtype=np.int64)
        first, uses, store = np.array([0, 1]), np.ones(1), ctypes.c_void_p()
        result = functions.moepress_store_open(
            ranges.ctypes.data, first.ctypes.data, 1, uses.ctypes.data, 1.0, 2 * nbytes, 1,
            ctypes.byref(store),
        )  # fmt: skip
        if store:
            functions.moepress_store_close(store)
        return int(result)

    huge = HUGE_FROM
    assert opened(HUGE_PAGE, huge) == 0
    assert opened(PAGE, huge) != 0
    assert opened(PAGE, huge - 1) == 0
