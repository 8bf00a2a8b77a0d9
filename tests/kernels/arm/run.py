"""Cross compile the CPU kernels for ARM and check them (checks.py) under emulation.

    python -m tests.kernels.arm.run [ARGUMENT FOR PYTEST ...]

Needs a cross compiler, CMake and QEMU: Debian's g++-aarch64-linux-gnu and qemu-user. Where they are
missing it says so and ends. Takes about a minute of processor time, of which compiling is half.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
SYSROOT = Path("/usr/aarch64-linux-gnu")
BUILD = "MOEPRESS_ARM_BUILD"  # environment variable: the folder with the library, for checks.py


def emulator(model: str) -> tuple[str, ...]:
    """The command that runs a program on a CPU of a model of QEMU."""
    found = next((path for name in EMULATORS if (path := shutil.which(name))), None)
    return (found or EMULATORS[0], "-cpu", model, "-L", str(SYSROOT))


def missing() -> list[str]:
    """The programs that are not installed."""
    lacking = [name for name in (COMPILER, "cmake", "ninja") if not shutil.which(name)]
    if not any(shutil.which(name) for name in EMULATORS):
        lacking.append(EMULATORS[0])
    return lacking


def build(folder: Path) -> None:
    """Compile the library, the fuzzer and driver.cpp into a folder."""
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_CXX_FLAGS": "-Werror",
        "MOEPRESS_FUZZ": HERE.parent / "fuzz_cpu.cpp",
    }
    sources = ROOT / "src/moepress/kernels/cpu"
    defined = [f"-D{name}={value}" for name, value in options.items()]
    cmake = "cmake", "-GNinja", "-S", sources, "-B", folder, *defined
    subprocess.run(cmake, check=True, stdout=subprocess.DEVNULL)
    jobs = str(os.cpu_count() or 1)
    for target in ("all", "headers"):
        command = "cmake", "--build", folder, "-j", jobs, "--target", target
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    flags = "-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror"
    driver = COMPILER, *flags, HERE / "driver.cpp", "-ldl", "-o", folder / "driver"
    subprocess.run(driver, check=True)


def main() -> None:
    if lacking := missing():
        print(f"{', '.join(lacking)} not found: the kernels for ARM are not checked.")
        return
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        pytest = sys.executable, "-m", "pytest", HERE / "checks.py", *sys.argv[1:]
        done = subprocess.run(pytest, cwd=ROOT, env={**os.environ, BUILD: folder})
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
