"""Commands on a folder whose experts stay on disk: killed, beside each other, on broken files.

They write the text of the model in memory, or no text and one line that says why.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from moepress.compress import compress
from moepress.demo import MODEL
from moepress.hf import load_model
from moepress.kernels import cpu
from moepress.store.forecast import card_fits
from moepress.store.statistics import store_of
from tests.conftest import small_recipe

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(cpu.missing() is not None, reason="no kernels"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD"),
]

# From the read number AT on, of whole pages, which only stores read: "error" as of a bad drive,
# "truncate" the file THE_FILE, or "kill" this process.
BAD_DRIVE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>
static atomic_long reads;
typedef ssize_t (*Pread)(int, void*, size_t, off_t);
static ssize_t bad(const char* name, int fd, void* to, size_t n, off_t at) {
    if (n % 4096 == 0 && atomic_fetch_add(&reads, 1) >= atol(getenv("AT"))) {
        const char what = getenv("WHAT")[0];
        if (what == 'k') kill(getpid(), SIGKILL);
        if (what == 't' && truncate(getenv("THE_FILE"), 100000) != 0) abort();
        if (what == 'e') return errno = EIO, -1;
    }
    return ((Pread)dlsym(RTLD_NEXT, name))(fd, to, n, at);
}
ssize_t pread(int fd, void* to, size_t n, off_t at) { return bad("pread", fd, to, n, at); }
ssize_t pread64(int fd, void* to, size_t n, off_t at) { return bad("pread64", fd, to, n, at); }
"""


@dataclass(frozen=True)
class Folder:
    """A compressed folder."""

    path: Path
    rest: int  # bytes outside the experts
    experts: int
    one: int  # memory for the largest expert, and little more
    drive: Path  # the library of BAD_DRIVE

    @property
    def weights(self) -> Path:
        """The file of the largest bytes."""
        return max(self.path.glob("*.safetensors"), key=lambda file: file.stat().st_size)

    def start(self, memory: int | str, what: str = "", at: int = 0) -> subprocess.Popen[str]:
        """Begin to generate, on a drive that does `what` at its read `at`."""
        words = ["generate", self.path, "def main(", "--memory", memory, "--tokens", 100]
        command = [sys.executable, "-m", "moepress", *map(str, words)]
        bad = {
            "LD_PRELOAD": str(self.drive), "WHAT": what, "AT": str(at), "THE_FILE": self.weights,
        }  # fmt: skip
        return subprocess.Popen(
            command,
            env=os.environ | (bad if what else {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, text, and the one line of an error."""
    out, err = process.communicate()
    lines = [line for line in err.splitlines() if not line.startswith("device: ")]
    assert len(lines) == (process.returncode > 0), err
    return process.returncode, out, "".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Folder:
    at = tmp_path_factory.mktemp("processes")
    (at / "drive.c").write_text(BAD_DRIVE)
    command = ["cc", "-shared", "-fPIC", "-o", at / "drive.so", at / "drive.c", "-ldl"]
    subprocess.run(command, check=True)
    path = compress(MODEL, at / "carried", small_recipe(text_file, bits=2, group_size=64))
    (fit,) = card_fits(path, 0).values()
    store = store_of(load_model(path, memory=10**9))
    assert store is not None
    one = int(1.8 * store.nbytes / sum(map(len, store.places)))
    return Folder(path, fit.other_bytes, store.nbytes, fit.other_bytes + one, at / "drive.so")


@pytest.fixture(scope="module")
def text(folder: Folder) -> str:
    """What the model in memory writes."""
    code, out, _ = end(folder.start("mapped"))
    assert code == 0 and len(out) > 100
    return out


@pytest.fixture
def copy(folder: Folder, tmp_path: Path) -> Folder:
    """A copy that a test may break."""
    return replace(folder, path=Path(shutil.copytree(folder.path, tmp_path / "copy")))


def test_memory_for_one_expert_and_for_less(folder: Folder, text: str) -> None:
    """Two experts of a layer are chosen at a time."""
    assert end(folder.start(folder.one))[:2] == (0, text)
    for memory in (folder.rest + 5000, 1000):
        code, out, err = end(folder.start(memory))
        assert (code, out) == (2, "") and "Give more" in err


def test_a_killed_process_leaves_nothing_behind(folder: Folder, text: str) -> None:
    files = {file: file.stat().st_mtime_ns for file in folder.path.iterdir()}
    other = folder.start(folder.rest + folder.experts // 2)
    killed = folder.start(folder.one, "kill", at=300)
    assert end(killed)[:2] == (-signal.SIGKILL, "")
    again = folder.start(folder.one)
    assert end(again)[:2] == end(other)[:2] == (0, text)
    assert files == {file: file.stat().st_mtime_ns for file in folder.path.iterdir()}


def test_a_file_that_is_truncated_while_it_is_read(copy: Folder, text: str) -> None:
    content, weights = copy.weights.read_bytes(), copy.weights
    code, out, err = end(copy.start(copy.one, "truncate", at=300))
    assert (code, out) == (1, "")
    assert f"cannot be read from {weights}: it is shorter than it was" in err
    code, out, err = end(copy.start(copy.one))
    assert (code, out) == (1, "") and str(weights) in err
    weights.write_bytes(content)
    assert end(copy.start(copy.one))[:2] == (0, text)


@pytest.mark.parametrize("at", [0, 5, 300])
def test_a_drive_that_fails_in_the_middle(folder: Folder, at: int) -> None:
    code, out, err = end(folder.start(folder.one, "error", at))
    assert (code, out) == (1, "")
    assert f"cannot be read from {folder.weights}: Input/output error" in err
