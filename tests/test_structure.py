"""The package has a direction: no module, and no folder, imports what imports it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import moepress

ROOT = Path(moepress.__file__).parent


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(("moepress", *(p for p in parts if p != "__init__")))] = path
    return found


def imports(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports, also inside functions, but not for types only."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module in known:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield full if full in known else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Nodes of a circle of the graph; none if it has none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle_of_imports() -> None:
    known = modules()
    by_module: dict[str, set[str]] = defaultdict(set)
    by_room: dict[str, set[str]] = defaultdict(set)  # a file of the top level, or a folder
    for name, path in known.items():
        for other in imports(path, known):
            by_module[name] |= {other} - {name}
            here, there = (n.split(".")[1] if "." in n else n for n in (name, other))
            by_room[here] |= {there} - {here}
    assert len(known) > 50 and by_room["compress"]
    assert not circle(by_module)
    assert not circle(by_room)


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) and not circle({"a": {"b"}, "b": set()})
