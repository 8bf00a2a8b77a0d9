"""Measure the rows of `quality.py`: each is one method on one model, kept once it is measured."""

from __future__ import annotations

import argparse
import hashlib
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "rivals"))

import torch
from folder import ABOUT as ABOUT
from folder import load, role
from transformers import AutoModelForCausalLM, AutoTokenizer

import moepress
from measuring import LENGTH, Comparison, Evaluator, calibration, layer_weights, opened
from moepress.allocate import allocate
from moepress.allocation.plan import BitAllocation
from moepress.costs.scores import ExpertScores
from moepress.errors import InputError, MoepressError
from moepress.format.checkpoint import load_json, load_tensors, save_json
from moepress.original.folder import weight_files
from moepress.original.source import Source
from moepress.quantize import quantize
from moepress.recipe import FIELDS_AFTER_SCORING, Recipe
from moepress.score import score

WITHIN = 0.01  # of a budget
EMBEDDING_AND_HEAD = {"head_bits": 16, "embedding_bits": 16}  # not counted: alike in every row
UNIFORM_WIDTHS = (1, 2, 3)  # of methods that give all experts the same width


@dataclass(frozen=True)
class Row:
    """One measured model."""

    method: str
    bits: float  # stored bits per weight over the matrices of the decoder layers
    ratio: float
    kl: float
    changed_top: float
    seconds: float  # to round and evaluate
    about: dict[str, Any]  # recipe and plan, or how a rival was made
    texts: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, method: str, bits: float, found: Comparison, since: float, about: Any) -> Row:
        texts = tuple(asdict(text) | {"ratio": text.ratio} for text in found.texts)
        seconds = time.monotonic() - since
        return cls(method, bits, found.ratio, found.kl, found.changed_top, seconds, about, texts)


class Kept:
    """Rows by name. With a file, a stopped run continues from its rows.

    Args:
        path: the file, or None.
        made_of: what rows depend on.

    Raises:
        InputError: the file holds rows that depend on something else.
    """

    def __init__(self, path: Path | None, made_of: dict[str, Any]) -> None:
        self.path = path
        self.made_of = made_of
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            found = load_json(path)
            differs = sorted(k for k, v in made_of.items() if found["made_of"].get(k) != v)
            if differs:
                raise InputError(
                    f"{path} holds rows that differ in: {', '.join(differs)}. Choose another file "
                    "or delete that one."
                )
            self.rows = found["rows"]

    def row(self, name: str, make: Callable[[], Row]) -> Row:
        """The row of that name; measured now unless it is kept."""
        if name not in self.rows:
            self.rows[name] = asdict(make())
            if self.path is not None:
                save_json(
                    self.path, {"made_of": self.made_of, "about": provenance(), "rows": self.rows}
                )
        fields = self.rows[name]
        return Row(**fields | {"texts": tuple(fields["texts"])})


def provenance() -> dict[str, str]:
    """Command, versions and CPU that rows are measured with."""
    import transformers

    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return {
        "command": shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        "commit": commit.stdout.strip() or "unknown",
        "moepress": moepress.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": processor(),
    }


def processor() -> str:
    names = [line for line in cpuinfo() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def made_of(given: argparse.Namespace) -> dict[str, Any]:
    """What every row depends on."""
    package = Path(moepress.__file__).parent
    files = sorted(f for f in package.rglob("*") if f.suffix in (".py", ".cpp", ".h"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return {
        "model": Path(given.model).name,
        "fingerprint": Source(given.model).fingerprint,
        "calib": [Path(text).name for text in given.calib],
        "valid": [Path(text).name for text in given.valid],
        "sequences": given.sequences,
        "windows": given.windows,
        "length": LENGTH,
        "code": code,
    }


def in_float32(model: Path, folder: Path) -> Path:
    """Copy the original to float32, into a folder of the same name."""
    out = folder / Path(model).resolve().name
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return out


class Bench:
    """Measures methods on one model, and keeps the rows.

    Args:
        original: folder of the original in float32.
        given: options.
        kept: rows of an earlier run, and the file they are kept in.
    """

    def __init__(self, original: Path, given: argparse.Namespace, kept: Kept) -> None:
        self.original = original
        self.given = given
        self.kept = kept
        self.source = Source(original)
        model = opened(original)
        self.weights = {name: weight.numel() for name, weight in layer_weights(model).items()}
        self.other_weights = sum(p.numel() for p in model.parameters()) - self.layer_weights
        self._scores: dict[str, ExpertScores] = {}
        self._evaluator: Evaluator | None = None

    @property
    def layer_weights(self) -> int:
        return sum(self.weights.values())

    @property
    def evaluator(self) -> Evaluator:
        if self._evaluator is None:
            self._evaluator = Evaluator(self.original, self.given.valid, self.given.windows)
        return self._evaluator

    def budgeted(self, method: str, recipe: Recipe, bits: float) -> Row:
        """A method at a budget of stored bits per weight.

        Raises:
            BudgetError: the method has no plan this small.
        """

        def make() -> Row:
            plan = self._plan(recipe, bits)
            row = self._measured(method, plan)
            if row.bits > bits * (1 + WITHIN):
                raise MoepressError(f"{method} took {row.bits:.4f} bits, expected {bits:.4f}.")
            return row

        return self.kept.row(f"{method} at {bits:.4f}", make)

    def uniform(self, method: str, recipe: Recipe, width: int) -> Row:
        """A method that gives all experts the same width."""
        name = f"{method}, {width}-bit"

        def make() -> Row:
            whole = recipe.with_changes(
                **calibration(self.given), **EMBEDDING_AND_HEAD, expert_bits=UNIFORM_WIDTHS
            )
            return self._measured(name, allocate(self._scored(whole), whole, bits=width))

        return self.kept.row(name, make)

    def rival(self, folder: Path) -> Row:
        """A rival, from the folder that its script in benchmarks/rivals made."""
        about, weights = load(folder)

        def make() -> Row:
            since = time.monotonic()
            if set(weights) != set(self.weights):
                raise InputError(f"{folder} is no rival of {self.original.name}: other weights.")
            model = opened(self.original)
            model.load_state_dict(weights, strict=False)
            bits = 8 * sum(about["stored_bytes"].values()) / self.layer_weights
            return Row.of(about["name"], bits, self.evaluator(model), since, about)

        return self.kept.row(f"rival {about['name']}", make)

    def _measured(self, method: str, plan: BitAllocation) -> Row:
        since = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            out = quantize(self.source, plan, Path(folder) / "out")
            stored, planned = self._stored(out), plan.total_bytes - self._other_bytes()
            if stored != planned:
                raise MoepressError(f"{method}: {stored:,} bytes are stored, {planned:,} planned.")
            found = self.evaluator(opened(out))
        about = {
            "recipe": plan.recipe.to_dict(),
            "average_bits": plan.average_bits,
            "expert_bits_per_weight": plan.expert_bits_per_weight,
        }
        return Row.of(method, 8 * stored / self.layer_weights, found, since, about)

    def _stored(self, folder: Path) -> int:
        """Stored bytes of the decoder layers' matrices in a compressed folder.

        Matrices that are not packed count as 16-bit. Tensors that the original does not have (side
        data of packed ones) count too.
        """
        layers = tuple(f"{self.source.layer_paths[i]}." for i in range(len(self.source.layers)))
        vectors = {name for name in self.source.all_names if name not in self.weights}
        return sum(
            tensor.numel() * (2 if tensor.is_floating_point() else tensor.itemsize)
            for path in weight_files(folder)
            for name, tensor in load_tensors(path).items()
            if name.startswith(layers) and name not in vectors
        )

    def _other_bytes(self) -> int:
        """Bytes of a compressed folder's tensors that do not count: alike in every row.

        These are the tensors of embedding, head and norms. Routers count as 16-bit, but are stored
        in float32 here like the copy of the original; the excess does not count either.
        """
        total = 0
        for name in self.source.all_names:
            size = self.source.shape(name).numel() * self.source.stored_dtype(name).itemsize
            if name not in self.weights:
                total += size
            elif role(name) is None:
                total += size - 2 * self.weights[name]
        return total

    def _plan(self, recipe: Recipe, bits: float) -> BitAllocation:
        """The plan of at most `bits` stored bits per weight."""
        recipe = recipe.with_changes(**calibration(self.given), **EMBEDDING_AND_HEAD)
        scores = self._scored(recipe)
        other = self._other_bytes() + scores.file_bytes
        size = int(bits * self.layer_weights / 8) + other
        return allocate(scores, recipe.with_changes(bits=None, bpw=None, size=size))

    def _scored(self, recipe: Recipe) -> ExpertScores:
        """Scores for a recipe, measured once for all that differ in allocation fields only."""
        key = recipe.digest(*FIELDS_AFTER_SCORING)
        if key not in self._scores:
            self._scores[key] = score(self.source, recipe)
        return self._scores[key]
