"""Generated documentation is up to date, and the README names commands that exist."""

from __future__ import annotations

import importlib.util
import re
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


def test_the_cli_reference_marks_arguments_that_may_be_left_out(generator: ModuleType) -> None:
    page = generator.reference()
    for usage in ("demo [OUT] [OPTIONS]", "doctor [FOLDER] [OPTIONS]", "report FOLDER [OPTIONS]"):
        assert f"\n    moepress {usage}\n" in page


def test_the_page_of_families_is_current() -> None:
    """It shows what the tests of the families expect, which `pytest -m families` checks."""
    written = (ROOT / "docs/families.md").read_text()
    assert written == script("generate_families").page(), "run: python docs/generate_families.py"


def test_readme_commands_exist(generator: ModuleType) -> None:
    commands = {command.callback.__name__ for command in generator.app.registered_commands}
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    named = set(re.findall(r"\bmoepress ([a-z]+)", "\n".join(blocks)))
    assert named and named <= commands
