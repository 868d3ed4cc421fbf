"""This package's wheel, from a source tree and from an installation, and the versions of what it needs."""

from __future__ import annotations

import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ivl_export.errors import BuildError
from ivl_export.packages import distribution
from ivl_export.tests.sources import ROOT


def test_the_wheel_of_the_source_tree_has_what_a_package_needs(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "ivl_export/constraints.txt", "ivl_export/packages/app_chat.py", "ivl_export/serve/page.html"
    } <= {*names}  # fmt: skip
    assert not [name for name in names if "/tests/" in name or "/benchmarks/" in name]
    assert not (ROOT / "build").exists()


def test_an_installation_gives_its_wheel_again(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, out = tmp_path / "site", tmp_path / distribution.WHEEL
    original = zipfile.ZipFile(wheel)
    original.extractall(site)
    info = next(site.glob("*.dist-info"))
    (info / "direct_url.json").write_text("{}")
    with (info / "RECORD").open("a") as record:
        record.write("../../bin/ivl-export,,\nivl_export/__pycache__/api.cpython-311.pyc,,\n")
        record.write(f"{info.name}/direct_url.json,,\n")
    monkeypatch.setattr(distribution, "SOURCE", site / "ivl_export")
    monkeypatch.setattr(distribution, "installed", lambda: Distribution.at(info))
    distribution.write_wheel(out)
    again = zipfile.ZipFile(out)
    assert {*again.namelist()} == {*original.namelist()}
    for name in original.namelist():
        if not name.endswith("/RECORD"):
            assert again.read(name) == original.read(name), name
    own = f"{info.name}/RECORD"
    assert {*again.read(own).decode().split()} == {*original.read(own).decode().split()}


def test_a_tree_that_does_not_build_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 3\n")
    monkeypatch.setattr(distribution, "SOURCE", tmp_path)
    with pytest.raises(BuildError, match="does not build"):
        distribution.write_wheel(tmp_path / "out.whl")
    assert not (tmp_path / "out.whl").exists()


def test_requirements_are_those_of_the_extras_in_their_tested_versions() -> None:
    target = distribution.environment("3.11")
    lines = distribution.requirement_lines(["cpu", "serve"], target)
    pins = distribution.constraints(target)
    assert f"onnxruntime=={pins['onnxruntime']}" in lines
    assert f"fastapi=={pins['fastapi']}" in lines
    assert "uvloop" in " ".join(lines)
    assert not [line for line in lines if "torch" in line or "pytest" in line]
    assert all(Requirement(line).marker is None for line in lines)
    windows = distribution.environment("3.11", "win32", "AMD64")
    assert "uvloop" not in " ".join(distribution.requirement_lines(["serve"], windows))


def test_a_python_without_the_tested_release_gets_the_range() -> None:
    lines = distribution.requirement_lines([], distribution.environment("3.10"))
    (numpy,) = [line for line in lines if line.startswith("numpy")]
    assert "==" not in numpy
    assert Requirement(numpy).specifier.contains("1.26")
