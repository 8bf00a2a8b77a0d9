"""The report in a real browser, from disk: drawn without errors, usable by mouse and keyboard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moepress.page.subject import Subject
from moepress.report import render
from tests import synthetic

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.webdriver.chrome.service import Service  # noqa: E402  # after the check
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
SWITCHES = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-dev-shm-usage",
    "--window-size=1200,900",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine"
)
# Whether the tooltip covers the marked place.
HIDDEN = """
const mark = arguments[0].querySelector(".cursor").getBoundingClientRect();
const tooltip = document.getElementById("tooltip").getBoundingClientRect();
return mark.bottom > tooltip.top && mark.top < tooltip.bottom;
"""
SIZES = [(4, 8), (48, 256)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def opened(
    request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Subject, Path]:
    """The browser showing the report of a synthetic plan."""
    subject = synthetic.subject(*request.param)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(subject))
    browser.get(path.as_uri())
    return browser, subject, path


def tooltip(browser: Any) -> str:
    return str(browser.find_element(By.ID, "tooltip").text)


def panel(browser: Any, label: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, f'.panel[aria-label^="{label}"]')


def about(subject: Subject, row: int, expert: int) -> list[str]:
    """What the tooltip must say about an expert."""
    scores = subject.scores
    assert scores is not None
    gate_up, down = subject.plan.widths()[row][expert]
    return [
        f"Layer {subject.plan.layers[row]}, expert {expert}",
        f"gate_up_proj bits {gate_up}",
        f"down_proj bits {down}",
        f"tokens {scores.tokens[row, expert]:,}",
    ]


def middle_of(browser: Any, element: Any, row: int, column: int, subject: Subject) -> Any:
    """A move of the mouse to a cell of a panel."""
    rows, columns, _ = subject.plan.bits.shape
    size = element.size
    x = ((column + 0.5) / columns - 0.5) * size["width"]
    y = ((row + 0.5) / rows - 0.5) * size["height"]
    return ActionChains(browser, duration=0).move_to_element_with_offset(element, x, y)


def test_drawn_whole_small_and_without_errors(opened: tuple[Any, Subject, Path]) -> None:
    browser, subject, path = opened
    assert browser.find_element(By.TAG_NAME, "h1").text == subject.name  # "<" in it, escaped
    assert path.stat().st_size < 5e6
    drawn = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt.length])"
    )
    assert len(drawn) == 7 and all(done and width > 100 and alt for done, width, alt in drawn)
    fetched = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert all(name.startswith("data:") for name in fetched)
    assert not browser.get_log("browser")
    assert browser.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )


def test_the_mouse_shows_and_marks_the_expert(opened: tuple[Any, Subject, Path]) -> None:
    browser, subject, _ = opened
    layers, experts, _ = subject.plan.bits.shape
    for label in ("gate_up_proj:", "down_proj:", "frequency", "routing weight", "both"):
        element = panel(browser, label)
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        for row, expert in ((0, 0), (layers - 1, experts - 1), (layers // 2, experts // 3)):
            middle_of(browser, element, row, expert, subject).perform()
            for line in about(subject, row, expert):
                assert line in tooltip(browser)
            mark = element.find_element(By.CLASS_NAME, "cursor").rect
            box = element.rect
            left, top = (
                box["x"] + expert / experts * box["width"],
                box["y"] + row / layers * box["height"],
            )
            assert mark["x"] == pytest.approx(left, abs=1.5)
            assert mark["y"] == pytest.approx(top, abs=1.5)
            assert not browser.execute_script(HIDDEN, element)
    ActionChains(browser, duration=0).move_to_element(
        browser.find_element(By.TAG_NAME, "h1")
    ).perform()
    assert tooltip(browser) == ""


def test_the_keyboard_reaches_every_panel_and_every_expert(
    opened: tuple[Any, Subject, Path],
) -> None:
    browser, subject, path = opened
    layers, experts, _ = subject.plan.bits.shape
    browser.get(path.as_uri())
    labels = [
        element.get_attribute("aria-label")
        for element in browser.find_elements(By.CLASS_NAME, "panel")
    ]
    reached = []
    for _ in range(40):
        ActionChains(browser, duration=0).send_keys(Keys.TAB).perform()
        focus = browser.switch_to.active_element
        if focus.get_attribute("class").startswith("panel"):
            reached.append(focus.get_attribute("aria-label"))
    assert reached[: len(labels)] == labels

    browser.get(path.as_uri())
    while not browser.switch_to.active_element.get_attribute("class").startswith("panel"):
        ActionChains(browser, duration=0).send_keys(Keys.TAB).perform()
    places = [
        ([], (0, 0)),
        ([Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN], (1, 2)),
        ([Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_UP], (0, 1)),  # not past the edge
        ([Keys.END], (0, experts - 1)),
        ([Keys.PAGE_DOWN, Keys.ARROW_RIGHT], (layers - 1, experts - 1)),
        ([Keys.HOME], (layers - 1, 0)),
        ([Keys.PAGE_UP], (0, 0)),
    ]
    for keys, (row, expert) in places:
        ActionChains(browser, duration=0).send_keys(*keys).perform() if keys else None
        for line in about(subject, row, expert):
            assert line in tooltip(browser), keys
    ActionChains(browser, duration=0).send_keys(Keys.ESCAPE).perform()
    assert tooltip(browser) == ""


def test_points_of_the_curve_and_bars_react_too(opened: tuple[Any, Subject, Path]) -> None:
    browser, subject, _ = opened
    curve = panel(browser, "Predicted loss")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", curve)
    curve.click()
    first = tooltip(browser)
    assert "predicted loss" in first
    ActionChains(browser, duration=0).send_keys(Keys.HOME).perform()
    assert f"{subject.frontier[0].average_bits:.2f} code bits" in tooltip(browser)
    bars = panel(browser, "Bytes by part")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", bars)
    bars.click()
    ActionChains(browser, duration=0).send_keys(Keys.HOME).perform()
    assert subject.parts is not None
    assert f"{subject.parts['routed experts'].original:,} bytes" in tooltip(browser)


def test_it_prints_and_fits_a_telephone(opened: tuple[Any, Subject, Path]) -> None:
    browser, _, _ = opened
    assert len(browser.print_page()) > 10_000
    size = browser.get_window_size()
    browser.set_window_size(500, 800)
    wide = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    browser.set_window_size(size["width"], size["height"])
    assert wide[0] <= wide[1], json.dumps(wide)
