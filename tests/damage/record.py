"""What became of each variant, written down for the longer run (`python -m tests.damage`).

With MOEPRESS_OUTCOMES=FILE, each variant adds two lines of JSON to the file: its name before it is
read, and its outcome afterwards. A name without an outcome is one that ended the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path


def recorded(name: str, read: Callable[[], str]) -> str:
    """What `read` returns, written down under the running test and the name of the variant."""
    path = os.environ.get("MOEPRESS_OUTCOMES")
    if path is None:
        return read()
    test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].removesuffix(" (call)")
    _add(Path(path), [test, name, None])
    outcome = read()
    _add(Path(path), [test, name, outcome])
    return outcome


def _add(path: Path, line: list[str | None]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(line)}\n")
