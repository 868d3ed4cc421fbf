"""docs/architecture.md says what may import what; this holds the code to it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTSIDE = ("tests", "benchmarks", "build")  # the last is pip's
MODULES = sorted(
    file
    for file in ROOT.rglob("*.py")
    if file.relative_to(ROOT).parts[0] not in OUTSIDE and not file.relative_to(ROOT).parts[0].startswith(".")
)
FOLDERS = sorted({file.relative_to(ROOT).parts[0] for file in MODULES if file.parent != ROOT})


def table() -> dict[str, str]:
    """Each place of the table of floors, and what stands under "may import"."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \| .+ \| (.+?) \|$", text[: text.index("## Components")], re.M)
    return {place: may for places, may in rows for place in re.findall(r"`([^`]+)`", places)}


def imported(file: Path) -> Iterator[str]:
    """The folders that ``file`` imports from, its own left out."""
    here = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == len(here) + 1:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from {name.partition(".")[0] for name in names} & {*FOLDERS} - {*here[:1]}


def test_every_place_is_in_the_table() -> None:
    root = {file.name for file in MODULES if file.parent == ROOT and file.name != "__init__.py"}
    folders = {f"{folder}/" for folder in FOLDERS}
    assert {*table()} - {"benchmarks/"} == root | folders


def test_a_floor_imports_only_what_stands_below_it() -> None:
    may = {place.rstrip("/"): FOLDERS if "all" in text.split() else text for place, text in table().items()}
    found = {
        f"{file.relative_to(ROOT)} imports {folder}"
        for file in MODULES
        for folder in imported(file)
        if folder not in re.findall(r"\w+", str(may[file.relative_to(ROOT).parts[0]]))
    }
    assert not found


def test_modules_stay_short() -> None:
    lengths = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in MODULES}
    assert not {name: length for name, length in lengths.items() if length > 300}
