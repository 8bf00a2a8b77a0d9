"""One page that shows what compression did to a model, and whether to trust the result.

`report` writes a single HTML file that works from disk, without network: it contains its pictures
as SVG, and a small script shows the numbers under the pointer or the arrow keys. The template is
`page/report.html`, the content `page/sections`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from moepress.allocation.choices import offered
from moepress.allocation.plan import PROJECTIONS, BitAllocation
from moepress.byte_units import byte_unit
from moepress.costs.drop_costs import DropCosts
from moepress.costs.scores import ExpertScores
from moepress.errors import InputError
from moepress.evaluation.document import load_evaluation
from moepress.format.checkpoint import (
    DROP_COSTS,
    EVALUATION,
    PLAN,
    REPORT,
    SCORES,
)
from moepress.format.codec import width
from moepress.format.quantization import quantization_of
from moepress.original.sizes import bytes_by_part
from moepress.page.picture import Format, Picture
from moepress.page.sections import sections
from moepress.page.subject import Subject
from moepress.pruning.stored import stored_pruning
from moepress.writing.files import check_file, check_place, write_atomically


def report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    scores: str | Path | None = None,
    evaluation: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the report of a compressed folder.

    Args:
        folder: a folder made by moepress.
        out: HTML file to write; None: inside the folder.
        scores: the file of the scores of its plan; None: that in the folder, if any.
        evaluation: a file of `moepress evaluate --out`; None: that in the folder, if any.
        trust_remote_code: run code in the model's folder, where transformers has no class for it.

    Returns:
        The file.

    Raises:
        InputError: not a folder made by moepress, or scores or evaluation of another model.
        CheckpointError: a file is damaged, or cannot be written.
    """
    out = Path(folder) / REPORT if out is None else Path(out)
    subject = read_subject(folder, scores, evaluation, trust_remote_code)
    check_file(out, "a report")
    page = render(subject)
    write_atomically(out, partial(_write, page.encode()))
    return out


def plot(
    folder: str | Path,
    out: str | Path,
    *,
    form: str = "svg",
    scores: str | Path | None = None,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write every picture of the report to a file.

    Args:
        folder: a folder made by moepress.
        out: folder to write to; made if missing.
        form: "svg" or "png".
        scores, trust_remote_code: as for `report`.

    Returns:
        The files.

    Raises:
        InputError: as for `report`, or another format.
        CheckpointError: as for `report`.
    """
    if form not in get_args(Format):
        raise InputError(f"Pictures in format {form!r} are not made. Expected svg or png.")
    check_place(Path(out) / "picture")
    subject = read_subject(folder, scores, trust_remote_code=trust_remote_code)
    written = []
    for picture in (p for _, _, section in sections(subject) for p in section.pictures):
        path = Path(out) / f"{picture.name}.{form}"
        check_file(path, "a picture")
        content = picture.image(form)
        write_atomically(path, partial(_write, content))
        written.append(path)
    return written


def read_subject(
    folder: str | Path,
    scores: str | Path | None = None,
    evaluation: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """Read what a folder tells about its model, and check that it belongs together.

    Arguments and errors are those of `report`.
    """
    folder = Path(folder)
    made = quantization_of(folder)
    plan = BitAllocation.load(folder / PLAN)
    given = _given(scores, folder / SCORES)
    measured = ExpertScores.load(given) if given is not None else None
    if measured is not None:
        check_scores(measured, plan, str(given))
    given = _given(evaluation, folder / EVALUATION)
    evaluated = load_evaluation(given) if given is not None else None
    if evaluated is not None:
        check_evaluation(evaluated, made.provenance, str(given))
    costs = folder / DROP_COSTS
    return Subject(
        folder.resolve().name,
        plan,
        measured,
        bytes_by_part(folder, trust_remote_code),
        evaluated,
        DropCosts.load(costs) if costs.is_file() else None,
        stored_pruning(folder),
    )


def check_scores(scores: ExpertScores, plan: BitAllocation, where: str) -> None:
    """Raise InputError if the plan was not made from these scores."""
    if scores.provenance != plan.provenance or scores.layers != plan.layers:
        raise InputError(
            f"{where} holds scores of {scores.provenance}, the plan was made from those of "
            f"{plan.provenance}. Give the scores that `moepress allocate` was given."
        )


def check_evaluation(evaluation: Mapping[str, Any], made: Mapping[str, Any], where: str) -> None:
    """Raise InputError if this is the evaluation of another model.

    Args:
        made: provenance of the compressed folder.
        where: the file of the evaluation.
    """
    plan = evaluation["provenance"].get("made_with_plan")
    if plan != made.get("plan"):
        raise InputError(
            f"{where} is the evaluation of another model: its plan is {plan}, this folder's is "
            f"{made.get('plan')}. Evaluate this folder, or delete that file."
        )


def render(subject: Subject) -> str:
    """The page as HTML; equal subjects give equal pages."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": _cell, "svg": _data_uri, "panels": _panels, "prose": _prose}
    environment.tests["number"] = lambda value: isinstance(value, int | float)
    template = environment.from_string(
        (files("moepress.page") / "report.html").read_text(encoding="utf-8")
    )
    return template.render(
        name=subject.name,
        facts=headline(subject),
        sections=list(sections(subject)),
        experts=expert_values(subject),
    )


def headline(subject: Subject) -> list[tuple[str, str, str]]:
    """(number, unit, label) of the figures on top of the page."""
    plan, parts = subject.plan, subject.parts
    facts = [
        (f"{plan.average_bits:.2f}", "bits", "code bits per expert weight"),
        (f"{plan.expert_bits_per_weight:.2f}", "bits", "stored per expert weight"),
        (f"{plan.bits_per_weight:.2f}", "bits", "stored per weight, whole model"),
    ]
    if parts is not None:
        before, after = (sum(getattr(p, k) for p in parts.values()) for k in ("original", "stored"))
        unit, name = byte_unit(after)
        facts.insert(0, (f"{after / unit:.3g}", name, f"of {before / unit:,.3g} {name} before"))
    if subject.evaluation is not None and subject.evaluation.get("ratio") is not None:
        facts += [
            (f"{subject.evaluation['ratio']:.3f}", "x", "the original's perplexity"),
            (f"{subject.evaluation['kl']:.3f}", "nats", "KL from the original"),
        ]
    return facts


def expert_values(subject: Subject) -> dict[str, Any]:
    """The numbers that the page shows for an expert: named columns of L x E values."""
    plan, scores = subject.plan, subject.scores
    columns: list[tuple[str, list[Any]]] = [
        (f"{name}_proj bits", [width(b) for b in plan.bits[:, :, projection].flat])
        for projection, name in enumerate(PROJECTIONS)
    ]
    if scores is not None:
        columns += [
            ("tokens", scores.reached.ravel().tolist()),
            ("frequency", _rounded(scores.frequency)),
            ("routing weight", _rounded(scores.mean_weight)),
            ("cost at these bits", _rounded(subject.paid)),
        ]
        columns += [
            (f"cost at {bits} bits", _rounded(subject.cost_of(np.full_like(plan.bits, bits))))
            for bits in offered(plan.recipe)
        ]
    return {"layers": plan.layers, "experts": plan.bits.shape[1], "columns": columns}


def _rounded(values: npt.NDArray[np.float64]) -> list[float]:
    """Values with three digits: enough for a reader, and a quarter of the bytes."""
    return [float(f"{value:.3g}") for value in values.ravel().tolist()]


def _prose(sentence: str) -> Markup:
    """A sentence as HTML, with its `commands` as code."""
    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(sentence))))


def _panels(picture: Picture) -> list[dict[str, Any]]:
    return [asdict(panel) for panel in picture.panels]


def _data_uri(picture: Picture) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(picture.image("svg")).decode()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _given(asked: str | Path | None, usual: Path) -> Path | None:
    """The file asked for, or the usual one if it exists."""
    if asked is not None:
        if not Path(asked).is_file():
            raise InputError(f"No file {asked}. Expected one that moepress wrote.")
        return Path(asked)
    return usual if usual.is_file() else None


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)
