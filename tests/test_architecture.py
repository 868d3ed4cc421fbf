"""The floors of docs/architecture.md hold, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ivl_export.models.registry import families
from ivl_export.tests.sources import ROOT, sources, tree

MODULES = sources("tests", "benchmarks")
FOLDERS = sorted({file.relative_to(ROOT).parts[0] for file in MODULES if file.parent != ROOT})


def table() -> dict[str, str]:
    """Each place of the table of floors, and its column "may import"."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \| .+ \| (.+?) \|$", text[: text.index("## Components")], re.M)
    return {place: may for places, may in rows for place in re.findall(r"`([^`]+)`", places)}


def imported(file: Path) -> Iterator[str]:
    """The folders that ``file`` imports from, its own left out."""
    here = file.relative_to(ROOT).parent.parts
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.level == len(here) + 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from {name.partition(".")[0] for name in names} & {*FOLDERS} - {*here[:1]}


def module_name(file: Path) -> str:
    """``engines/base.py`` -> ``engines.base``; a folder's ``__init__.py`` has the folder's name."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(file: Path, modules: Collection[str]) -> Iterator[str]:
    """Those of ``modules`` that ``file`` imports, at its top or inside functions."""
    package = file.relative_to(ROOT).parent.parts
    for node in runtime_nodes(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}".strip(".")
                yield inner if inner in modules else source


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below ``node``, those of ``if TYPE_CHECKING:`` left out."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from runtime_nodes(child)


def strongly_connected(graph: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
    """The sets of nodes that reach each other, each sorted; single nodes are left out."""
    reached = {node: reachable(graph, node) for node in graph}
    circles = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    yield from sorted(sorted(circle) for circle in circles if len(circle) > 1)


def reachable(graph: Mapping[str, Collection[str]], start: str) -> set[str]:
    """Nodes reachable from ``start`` in one step or more."""
    nodes: set[str] = set()
    front = {*graph[start]}
    while front:
        nodes |= front
        front = {other for node in front for other in graph.get(node, ())} - nodes
    return nodes


def test_every_place_is_in_the_table() -> None:
    root = {file.name for file in MODULES if file.parent == ROOT}
    folders = {f"{folder}/" for folder in FOLDERS}
    assert {*table()} - {"benchmarks/"} == root | folders


def test_a_folder_imports_only_from_lower_floors() -> None:
    may = {place.rstrip("/"): FOLDERS if "all" in text.split() else text for place, text in table().items()}
    by_name = {
        f"{file.relative_to(ROOT)} imports {folder}"
        for file in MODULES
        for folder in imported(file)
        if folder not in re.findall(r"\w+", str(may[file.relative_to(ROOT).parts[0]]))
    }
    assert not by_name


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Within folders neither. Imports inside functions count; those for the type checker alone do not."""
    modules = {module_name(file): file for file in MODULES}
    imports = {name: {*imported_modules(file, modules)} - {name} for name, file in modules.items()}
    circles = [" -> ".join(circle) for circle in strongly_connected(imports)]
    assert circles == []


def test_circles_are_seen() -> None:
    imports = {"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": set[str]()}
    assert list(strongly_connected(imports)) == [["a", "b", "c"]]


def test_nothing_outside_models_knows_components_by_name() -> None:
    """Folders ask the registry: no comparison with a component's name, no ``isinstance`` of a config."""
    components = {component.name for family in families() for component in family.components}
    configs = {family.config_type.__name__ for family in families()} | {"VisionConfig", "QLlamaConfig"}
    places = [
        f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for file in (*MODULES, *(ROOT / "benchmarks").rglob("*.py"))
        if file.relative_to(ROOT).parts[0] != "models"
        for node in ast.walk(tree(file))
        if compared(node) & components or checked_types(node) & configs
    ]
    assert places == []


def compared(node: ast.AST) -> set[str]:
    """The texts that a comparison, a ``match`` or a ``startswith`` compares with."""
    if isinstance(node, ast.Compare):
        parts: list[ast.AST] = [node.left, *node.comparators]
    elif isinstance(node, ast.match_case):
        parts = [node.pattern]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        parts = list(node.args) if node.func.attr in ("startswith", "endswith") else []
    else:
        return set()
    inner = (child for part in parts for child in ast.walk(part))
    return {str(child.value) for child in inner if isinstance(child, ast.Constant)}


def checked_types(node: ast.AST) -> set[str]:
    """The names of the types in an ``isinstance``."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
        return set()
    return {child.id for child in ast.walk(node.args[1]) if isinstance(child, ast.Name)}
