"""Generated documentation is up to date; commands and links of the README and the docs exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return script("generate_cli")


def test_the_cli_reference_is_current(generator: ModuleType) -> None:
    written = (ROOT / "docs/cli.md").read_text()
    assert written == generator.reference(), "run: python docs/generate_cli.py"


def test_the_cli_reference_names_every_command_and_option(generator: ModuleType) -> None:
    page = generator.reference()
    for command in generator.app.registered_commands:
        assert f"## moepress {command.callback.__name__}\n" in page
    for option in ("--bits", "--json", "--include-path", "--no-speed", "--raw", "--format", "-q"):
        assert f"`{option}`" in page
    assert "None" not in page and "functools" not in page and "<" not in page.replace("<!--", "")


def test_the_cli_reference_shows_what_may_be_left_out_and_what_not(generator: ModuleType) -> None:
    page = generator.reference()
    for usage in (
        "demo [OUT] [OPTIONS]", "doctor [FOLDER] [OPTIONS]", "report FOLDER [OPTIONS]",
        "evaluate MODEL --text TEXT [OPTIONS]",
    ):  # fmt: skip
        assert f"\n    moepress {usage}\n" in page


def described(name: str, text: str) -> bool:
    """Whether a text names a file, or a pattern of it; X.cpp is described with X.h."""
    named = set(re.findall(r"[\w*]+\.\w+", text))
    both = {name, name.replace(".cpp", ".h")}
    return any(fnmatch(one, pattern) for one in both for pattern in named)


def test_every_file_of_the_kernels_is_described() -> None:
    kernels = ROOT / "src/moepress/kernels"
    cuda = (ROOT / "docs/cuda.md").read_text()
    files = [path for path in (kernels / "cuda").iterdir() if path.is_file()]
    assert len(files) > 40 and not [path for path in files if not described(path.name, cuda)]
    cpu = ast.get_docstring(ast.parse((kernels / "cpu/__init__.py").read_text())) or ""
    files = [
        path
        for path in (kernels / "cpu").iterdir()
        if path.suffix in (".cpp", ".h", ".py") and path.name != "__init__.py"
    ]
    missing = [path for path in files if not described(path.name, cpu)]
    # "avx512.cpp, ...": they make the table of an instruction set, or change another one.
    tables = [path for path in missing if re.search(r"make_isa<|isa\.name = ", path.read_text())]
    assert len(files) > 60 and missing == tables, sorted(set(missing) - set(tables))


def test_the_page_of_families_is_current() -> None:
    """It shows what the tests of the families expect, which `pytest -m families` checks."""
    written = (ROOT / "docs/families.md").read_text()
    assert written == script("generate_families").page(), "run: python docs/generate_families.py"


def test_readme_commands_exist(generator: ModuleType) -> None:
    commands = {command.callback.__name__ for command in generator.app.registered_commands}
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    named = set(re.findall(r"\bmoepress ([a-z]+)", "\n".join(blocks)))
    assert named and named <= commands


PAGES = ("README.md", "CHANGELOG.md", "docs/*.md", "benchmarks/results.md")


def anchors(page: str) -> set[str]:
    """What a link into a page can name: its own marks, and its headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    named = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return named | set(re.findall(r'<a id="([^"]+)">', page))


def test_links_lead_somewhere() -> None:
    pages = {path: path.read_text() for pattern in PAGES for path in ROOT.glob(pattern)}
    lost = []
    for page, text in pages.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", prose):
            file, _, anchor = link.partition("#")
            path = (page.parent / file).resolve() if file else page
            inside = not anchor or anchor in anchors(path.read_text())
            if not path.exists() or not inside:
                lost.append(f"{page.name}: {link}")
    assert len(pages) > 15 and not lost
