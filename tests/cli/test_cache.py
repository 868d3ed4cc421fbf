"""``cache ls`` and ``cache prune``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ivl_export.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine used 40 days ago, kernel times used 10 days ago, task scores used now."""
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path))
    for kind, name, days in (
        ("engines", "a/engine", 40),
        ("timing", "h100.timing", 10),
        ("evaluations", "c", 0),
    ):
        path = tmp_path / kind / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 1000)
        entry = path if kind != "engines" else path.parent
        used = entry.stat().st_mtime - 86_400 * days
        os.utime(entry, (used, used))
    return tmp_path


def listed(capsys: pytest.CaptureFixture[str], *args: str) -> list[str]:
    assert main(["doctor", "cache", *args, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    listing = data.get("entries", data.get("deleted"))
    assert data["bytes"] == 1000 * len(listing)
    return [entry["kind"] for entry in listing]


def test_what_is_kept_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, "ls") == ["evaluations", "timing", "engines"]
    assert listed(capsys, "ls", "--kind", "timing") == ["timing"]
    assert main(["doctor", "cache", "ls"]) == 0
    out = capsys.readouterr().out
    assert str(folder) in out
    assert "3 entries" in out
    assert "40.0" in out


def test_old_then_large_then_all_is_deleted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, "prune", "--older-than", "30d") == ["engines"]
    assert listed(capsys, "prune", "--size", "1500") == ["timing"]
    assert listed(capsys, "prune", "--all", "--kind", "engines") == []
    assert listed(capsys, "prune", "--all") == ["evaluations"]
    assert listed(capsys, "ls") == []
    assert not [p for p in folder.rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    "args",
    [
        ["prune"],
        ["prune", "--all", "--size", "5G"],
        ["prune", "--older-than", "soon"],
        ["prune", "--size", "much"],
        ["ls", "--kind", "kernels"],
    ],
)
def test_what_is_not_clear_deletes_nothing(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "cache", *args]) == 2
    assert "error: " in capsys.readouterr().err
    assert len(listed(capsys, "ls")) == 3
