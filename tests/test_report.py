"""The report says what is in the folder, its panels lie on what is drawn, and it is one file."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image as mpl_image
from matplotlib.colors import to_rgb

from moepress import report
from moepress.allocate import allocate
from moepress.allocation.plan import BitAllocation
from moepress.compress import compress
from moepress.costs.drop_costs import NO_EXPERT
from moepress.costs.scores import ExpertScores
from moepress.errors import InputError
from moepress.evaluate import evaluate
from moepress.format.checkpoint import (
    DROP_COSTS,
    EVALUATION,
    PLAN,
    REPORT,
    SCORES,
    folder_bytes,
    load_json,
    save_json,
    tensor_bytes,
)
from moepress.inspect import inspect
from moepress.original.sizes import ROUTED, bytes_by_part
from moepress.page.curves import loss_curve
from moepress.page.maps import BIT_COLOURS, LABELLED, bit_map, heat_map
from moepress.page.picture import Panel, Picture
from moepress.page.sections import SECTIONS, Section, sections
from moepress.page.sections.section import counted
from moepress.page.subject import NUDGE, Subject
from moepress.prune import Pruning, set_pruning
from moepress.pruning.thresholds import cheapest, medians
from moepress.report import plot, read_subject
from tests import synthetic
from tests.conftest import small_recipe

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(model_folder: Folder, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "tiny & small"
    return compress(model_folder(), out, small_recipe(text_file, "default", bits=2))


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(folder, tmp_path_factory.mktemp("page") / "page.html")


class Page(HTMLParser):
    """The addresses, text, panels and script data of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.data: dict[str, object] = {}
        self.current: tuple[str, dict[str, str | None]] = ("", {})
        self.panels: list[dict[str, object]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.current = (tag, found)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if "data-panels" in found:
            self.panels += json.loads(found["data-panels"] or "")

    def handle_data(self, data: str) -> None:
        tag, found = self.current
        if found.get("id") == "experts" and data.strip():
            self.data |= json.loads(data)
        elif tag not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_of_a_folder_says_what_is_in_it(folder: Path, written: Path) -> None:
    page = Page(written.read_text())
    plan, scores = BitAllocation.load(folder / PLAN), ExpertScores.load(folder / SCORES)
    columns = dict(page.data["columns"])
    assert columns["gate_up_proj bits"] == plan.bits[:, :, 0].ravel().tolist()
    assert columns["down_proj bits"] == plan.bits[:, :, 1].ravel().tolist()
    assert columns["tokens"] == scores.tokens.ravel().tolist()
    phi = scores.tokens.ravel() / scores.total_tokens
    np.testing.assert_allclose(columns["frequency"], phi, rtol=6e-3)
    paid = read_subject(folder).paid.sum()  # the rest of the predicted loss is the linears'
    assert sum(columns["cost at these bits"]) == pytest.approx(paid, rel=6e-3)
    for _, heading, _ in SECTIONS:
        assert heading in page.text
    assert "tiny & small" in page.text and f"{plan.average_bits:.2f} bits" in page.text
    assert f"{scores.total_tokens:,} calibration tokens" in page.text
    assert "was not evaluated yet" in page.text
    assert "the cost of every expert at 2 bits" in page.text  # not 2.0, beside halves
    assert {p["label"] for p in page.panels} >= {"gate_up_proj", "frequency", "routing weight"}


def test_nothing_is_fetched_and_equal_folders_give_equal_pages(
    folder: Path, written: Path, tmp_path: Path
) -> None:
    page = written.read_text()
    assert page == report(folder, tmp_path / "page.html").read_text()
    outside = [a[:40] for a in Page(page).addresses if not a.startswith(("data:", "#"))]
    assert not outside
    assert "default-src 'none'" in page
    script = page[page.index("<script>") :]
    assert not re.search(r"fetch\(|XMLHttpRequest|import |url\(|https?:", script)


def test_commands_are_set_apart(written: Path) -> None:
    page = written.read_text()
    assert "<code>moepress prune FOLDER 0.15</code>" in page
    assert "<code>moepress evaluate FOLDER " in page
    assert "`" not in "".join(re.findall(r"<p.*?</p>", page, re.DOTALL))


def test_parts_are_those_of_the_files(folder: Path, model_folder: Folder) -> None:
    parts = bytes_by_part(folder)
    assert sum(p.stored for p in parts.values()) == sum(
        map(tensor_bytes, folder.glob("model-*.safetensors"))
    )
    original = bytes_by_part(model_folder())
    assert sum(p.stored for p in original.values()) == sum(
        map(tensor_bytes, model_folder().glob("*.safetensors"))
    )
    assert {k: p.original for k, p in parts.items()} == {k: p.stored for k, p in original.items()}
    plan = BitAllocation.load(folder / PLAN)
    assert parts[ROUTED].stored == plan.expert_bytes


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_shared_experts_and_dense_layers_are_parts(family: str, model_folder: Folder) -> None:
    parts = bytes_by_part(model_folder(family))
    assert "shared experts" in parts
    assert ("dense MLPs" in parts) == (family == "deepseek_v3")


def test_an_evaluation_is_shown_and_must_be_of_this_model(
    folder: Path, model_folder: Folder, text_file: Path, tmp_path: Path
) -> None:
    result = evaluate(folder, [str(text_file)], against=model_folder(), length=32, limit=4)
    copy, file = tmp_path / "copy", tmp_path / "evaluation.json"
    shutil.copytree(folder, copy)
    before = folder_bytes(copy)
    result.save(copy / EVALUATION)
    assert report(copy) == copy / REPORT
    page = Page((copy / REPORT).read_text())
    assert f"perplexity x {result.ratio:.4f}" in page.text and f"{result.kl:.4f}" in page.text
    assert "not evaluated" not in page.text
    assert folder_bytes(copy) == before  # neither file is a part of the model

    result.save(file)
    assert read_subject(folder, evaluation=file).evaluation == load_json(file)
    other = load_json(file)
    other["provenance"]["made_with_plan"] = "0" * 16
    save_json(file, other)
    with pytest.raises(InputError, match="evaluation of another model"):
        report(folder, tmp_path / "page.html", evaluation=file)
    save_json(file, {"kind": "plan"})
    with pytest.raises(InputError, match="is not an evaluation"):
        report(folder, tmp_path / "page.html", evaluation=file)


def test_files_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder made by moepress"):
        report(tmp_path)
    with pytest.raises(InputError, match="No file"):
        report(folder, tmp_path / "page.html", scores=tmp_path / "missing.safetensors")
    synthetic.scores(2, 4).save(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="the plan was made from those of"):
        report(folder, tmp_path / "page.html", scores=tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="Expected svg or png"):
        plot(folder, tmp_path, form="bmp")
    assert not (tmp_path / "page.html").exists()


def test_without_scores_the_rest_is_shown(folder: Path, written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    scores = (copy / SCORES).rename(tmp_path / "scores.safetensors")
    page = Page(report(copy).read_text())
    assert "give them with --scores FILE" in page.text
    assert {name for name, _ in page.data["columns"]} == {"gate_up_proj bits", "down_proj bits"}
    given = report(copy, tmp_path / "copy.html", scores=scores).read_text()
    assert given == written.read_text().replace("tiny &amp; small", "copy")


@pytest.mark.parametrize("form", ["svg", "png"])
def test_pictures_are_written(folder: Path, tmp_path: Path, form: str) -> None:
    paths = plot(folder, tmp_path / "new", form=form)
    assert {p.stem for p in paths} == {
        "bit-map", "bytes", "loss", "pruning", "frequency", "routing-weight", "cost", "cost-paid",
    }  # fmt: skip
    for path in paths:
        if form == "svg":
            assert ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        else:
            assert min(mpl_image.imread(path).shape[:2]) > 200


def section_of(subject: Subject, wanted: str) -> Section:
    return next(make for key, _, make in SECTIONS if key == wanted)(subject)


def test_experts_that_few_tokens_chose_are_named() -> None:
    subject = synthetic.subject(4, 8)
    tokens = subject.scores.tokens.copy()
    tokens[2, 5] = 3
    few = dataclasses.replace(subject, scores=dataclasses.replace(subject.scores, tokens=tokens))
    coverage = section_of(few, "coverage")
    assert (3, 5, 3) in [row[:3] for row in coverage.tables[0].rows]
    unused = int((tokens == 0).sum())
    assert coverage.warnings and f"{unused} of them by none" in coverage.warnings[0]


@pytest.mark.parametrize("unseen", [0, 1])
def test_experts_that_are_left_out_are_counted(unseen: int) -> None:
    subject = synthetic.subject(4, 8)
    bits, tokens = subject.plan.bits.copy(), np.maximum(subject.scores.tokens, 1)
    bits[1, 2] = bits[3, 0] = 0
    tokens[1, 2] -= unseen * tokens[1, 2]
    recipe = subject.plan.recipe.with_changes(expert_bits=(0, 1, 2, 3))
    plan = dataclasses.replace(subject.plan, bits=bits, recipe=recipe)
    scores = dataclasses.replace(subject.scores, tokens=tokens)
    (warning,) = section_of(dataclasses.replace(subject, plan=plan, scores=scores), "bits").warnings
    assert warning.startswith("2 of 32 experts are left out")
    assert ("No scored token chose 1 of them" in warning) == (unseen == 1)
    assert ("unknown" in warning) == (unseen == 1)


@pytest.mark.parametrize(
    ("mine", "original", "says"),
    [
        (11, 9, None),  # chance
        (14, 3, "3 of the original's"),
        (3, 14, None),
        (0, 0, None),
        (16, 16, None),
        (12, None, "--against the original"),
        (2, None, None),
        (None, None, None),
    ],
)
def test_loops_are_warned_of_beyond_chance(
    mine: int | None, original: int | None, says: str | None
) -> None:
    loops = [None if c is None else {"looping": c, "generations": 16} for c in (mine, original)]
    found = {
        "kind": "evaluation", "model": "m", "original": None, "length": 32, "texts": [],
        "tasks": None, "performance": None, "parts": {},
        "repetition": loops[0], "original_repetition": loops[1],
        "provenance": {}, "pruning": None,
    }  # fmt: skip
    plan = synthetic.subject(2, 4).plan
    warnings = section_of(Subject("m", plan, evaluation=found), "evaluation").warnings
    assert len(warnings) == (says is not None)
    assert says is None or (says in warnings[0] and f"{mine} of 16" in warnings[0])


def test_an_evaluation_says_what_was_dropped(folder: Path, text_file: Path, tmp_path: Path) -> None:
    """It must not pass for one of the folder as it runs now."""
    copy, again = tmp_path / "copy", "evaluate it again as it is"
    shutil.copytree(folder, copy)

    def page(**options: Any) -> str:
        result = evaluate(copy, [str(text_file)], length=32, limit=4, **options)
        result.save(copy / EVALUATION)
        return Page(report(copy).read_text()).text

    whole, pruned = page(), page(pruning=0.4, activation_bits=16)
    assert again not in whole and "chosen experts were dropped" not in whole
    share = load_json(copy / EVALUATION)["pruning"]["share"]
    assert f"{share:.1%} of the chosen experts were dropped" in pruned
    assert f"with experts dropped, and this folder drops none: {again}" in pruned
    assert "Activations were rounded to 16 bits" in pruned and "Activations" not in whole
    page()
    set_pruning(copy, 0.4)
    stale, new = Page(report(copy).read_text()).text, page()
    assert f"without dropping experts, and this folder drops some: {again}" in stale
    assert again not in new and "of the chosen experts were dropped" in new
    set_pruning(copy, 0.2)
    assert f"with another rule of dropping experts than this folder has: {again}" in (
        Page(report(copy).read_text()).text
    )
    assert again not in page()


def test_the_price_of_a_tenth_of_a_bit_is_what_allocate_says() -> None:
    subject = synthetic.subject(4, 8)
    loss = section_of(subject, "loss")
    for step, word in ((NUDGE, "more"), (-NUDGE, "less")):
        other = allocate(subject.scores, bits=subject.plan.average_bits + step)
        change = other.predicted_loss / subject.plan.predicted_loss - 1
        (text,) = (t for t in loss.text if f"bits {word}" in t)
        assert f"predicted loss {change:+.1%}" in text
    texts = [line for _, _, lines in loss.pictures[0].panels[0].points for line in lines]
    assert any("+0.0% against this model" in line for line in texts)


def test_a_uniform_plan_is_compared_with_what_scores_would_choose() -> None:
    subject = synthetic.subject(4, 8)
    plan = allocate(subject.scores, bits=2.0, cost="uniform")
    uniform = Subject("uniform", plan, subject.scores)
    best = [p for p in uniform.frontier if p.average_bits <= 2.0][-1]
    assert best.predicted_loss < plan.predicted_loss
    assert uniform.paid.sum() == pytest.approx(plan.predicted_loss)


# Pictures: at each place of a panel is drawn what the panel says.


def pixels(picture: Picture) -> np.ndarray:
    return mpl_image.imread(io.BytesIO(picture.image("png")))[..., :3]


def colour_at(drawn: np.ndarray, panel: Panel, x: float, y: float) -> np.ndarray:
    """The colour at a share of a panel's width and height."""
    height, width = drawn.shape[:2]
    column = int(width * (panel.left + x * panel.width))
    row = int(height * (panel.top + y * panel.height))
    return drawn[row, column]


@pytest.mark.parametrize(("layers", "experts"), [(4, 8), (3, 40), (48, 256)])
def test_cells_of_the_bit_map_lie_where_their_panel_says(layers: int, experts: int) -> None:
    plan = synthetic.subject(layers, experts).plan
    picture = bit_map(plan)
    drawn = pixels(picture)
    assert [panel.grid for panel in picture.panels] == [(layers, experts)] * 2
    for column, panel in enumerate(picture.panels):
        for (row, expert), bits in np.ndenumerate(plan.bits[:, :, column]):
            # Small maps write the number in the middle.
            aside = 0.25 if layers * experts <= LABELLED else 0.5
            place = (expert + aside) / experts, (row + aside) / layers
            colour = colour_at(drawn, panel, *place)
            np.testing.assert_allclose(colour, to_rgb(BIT_COLOURS[int(bits)]), atol=0.02)


def test_heat_maps_are_lighter_for_more_and_grey_for_unknown() -> None:
    values = np.array([[1.0, 2.0, np.nan], [3.0, 10.0, 19.0]])
    picture = heat_map("x", "X", {"x": values}, (0, 1), "things")
    drawn, (panel,) = pixels(picture), picture.panels
    light = {
        value: colour_at(drawn, panel, (e + 0.15) / 3, (row + 0.2) / 2)
        for (row, e), value in np.ndenumerate(values)
    }
    known = sorted(v for v in light if not np.isnan(v))
    sums = [light[v].sum() for v in known]
    assert sums == sorted(sums) and len(set(sums)) == len(sums)
    grey = next(c for v, c in light.items() if np.isnan(v))
    assert np.ptp(grey) < 0.01 and "from 1 to 19" in picture.about


def test_cells_say_their_value_in_few_characters() -> None:
    values = np.array(
        [[270.4, 27.04, 2.704, 0.2704], [0.02704, 0.0, 3.0, np.nan], [0.3, 0.998, 9.97, 2.7e-5]]
    )
    shown = heat_map("x", "X", {"x": values}, (0, 1, 2), "things")
    texts = [text.get_text() for text in shown.figure.axes[0].texts]
    assert texts == ["270", "27", "2.7", ".27", ".027", "0", "3", ".30", "1.0", "10.0", ".000"]
    small = heat_map("x", "X", {"x": values[:1] * 1e-6}, (0,), "things")
    assert [text.get_text() for text in small.figure.axes[0].texts] == texts[:4]
    assert "10⁻⁶" in small.about


def test_points_of_the_curve_lie_where_their_panel_says() -> None:
    subject = synthetic.subject(4, 8)
    picture = loss_curve(subject.frontier, subject.plan)
    (panel,) = picture.panels
    drawn = pixels(picture)
    assert len(panel.points) == len(subject.frontier)
    for (x, y, lines), plan in zip(panel.points, subject.frontier, strict=True):
        assert colour_at(drawn, panel, x, y).sum() < 2.2  # a mark, on white
        assert f"{plan.average_bits:.2f} code bits" in lines[0]


def test_every_section_is_made_of_known_parts() -> None:
    for _, _, section in sections(synthetic.subject(2, 4)):
        assert isinstance(section, Section)
        for table in section.tables:
            assert all(len(row) == len(table.head) for row in table.rows)


def test_the_cost_of_dropping_experts_is_shown(folder: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder, tmp_path / "mine"))
    subject = read_subject(mine)
    assert subject.drop_costs is not None and subject.pruning is None
    section = section_of(subject, "pruning")
    assert "drops none" in section.text[0]
    (picture,), (table,) = section.pictures, section.tables
    assert [row[0] for row in table.rows] == list(subject.drop_costs.layers)
    assert [row[1:] for row in table.rows] == [
        tuple(row[1:]) for row in medians(subject.drop_costs).round(4).tolist()
    ]
    shown = [lines for panel in picture.panels for *_, lines in panel.points]
    most = cheapest(subject.drop_costs, 0.5, renormalise=False)[1]
    assert ("50% dropped, weights as they are", f"cost {most:.3g}") in shown
    set_pruning(mine, 0.2, 0.05)
    text = section_of(read_subject(mine), "pruning").text[0]
    assert "drops experts in 2 layers, and protects 5.0%" in text
    set_pruning(mine, Pruning({0: (0.0, 0.5), 1: (0.0, 0.0)}, False))
    text = section_of(read_subject(mine), "pruning").text[0]
    assert "drops experts in 1 layer, and" in text
    (mine / DROP_COSTS).unlink()
    assert "was not measured" in section_of(read_subject(mine), "pruning").text[0]


def test_shares_that_cannot_be_dropped_are_not_shown(folder: Path, tmp_path: Path) -> None:
    """In the second layer all experts but one are left out: no token has a second choice there."""
    subject = read_subject(folder)
    costs = subject.drop_costs
    assert costs is not None
    ratio, zero = costs.ratio.copy(), np.zeros_like(costs.cost)
    ratio[1] = NO_EXPERT
    some = dataclasses.replace(costs, ratio=ratio, cost=zero, renormalised_cost=zero)
    section = section_of(dataclasses.replace(subject, drop_costs=some), "pruning")
    (picture,) = section.pictures
    shown = [lines[0] for panel in picture.panels for *_, lines in panel.points]
    assert shown[-1] == "25% dropped, weights scaled up"
    assert "At most 25.0% of all choices can be dropped." in section.text[1]
    some.save(tmp_path / "costs.safetensors")
    shares = inspect(tmp_path / "costs.safetensors")["predicted_cost_by_share_dropped"]
    assert list(shares) == ["0.05", "0.10", "0.15", "0.20", "0.25"]
    ratio[0] = 1
    none = section_of(dataclasses.replace(subject, drop_costs=some), "pruning")
    assert none.text == ("No expert can be dropped: every token keeps its first choice.",)


@pytest.mark.parametrize(
    ("number", "text"), [(1, "1 bit"), (2.5, "2.5 bits"), (1000, "1,000 bits")]
)
def test_one_is_no_plural(number: float, text: str) -> None:
    assert counted(number, "bit") == text


def test_widths_of_other_tensors_are_shown(folder: Path) -> None:
    """Counts by kind as in the plan, and the unit of a predicted loss."""
    subject = read_subject(folder)
    found = [section for _, _, section in sections(subject)]
    (table,) = [t for s in found for t in s.tables if t.head[0] == "other tensors"]
    widths = subject.plan.linear_bits
    assert sum(sum(row[1:]) for row in table.rows) == len(widths)
    (queries,) = [row for row in table.rows if row[0] == "q_proj"]
    assert sum(queries[1:]) == len([name for name in widths if ".q_proj." in name])
    assert any("nats per token" in text for s in found for text in s.text)
    linears = subject.plan.predicted_loss - subject.paid.sum()
    assert 0 < linears < subject.plan.predicted_loss
