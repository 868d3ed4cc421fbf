"""The package's own source files: found without the environment next to them, parsed once."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


@cache
def sources(*outside: str) -> tuple[Path, ...]:
    """All ``.py`` files but those of hidden folders, of pip's ``build``, and of the folders ``outside``."""
    apart = ("build", *outside)
    folders = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in apart and p.name[0] != "."]
    return tuple(sorted([*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]))


@cache
def tree(file: Path) -> ast.Module:
    """The file's syntax tree; shared, so it must not be changed."""
    return ast.parse(file.read_text(encoding="utf-8"))
