"""A package appears whole or not at all, from an intact bundle, and replaces nothing but a package."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import ivl_export
from ivl_export.cli import main
from ivl_export.cli import package as cli_package
from ivl_export.errors import BuildError, IntegrityError, IvlError, UsageError
from ivl_export.files.locks import locked
from ivl_export.packages import contract, distribution
from ivl_export.packages.registry import MODULES, find_format, formats
from ivl_export.tests.packages.conftest import Pack


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def damaged(bundle: Path, out: Path) -> Path:
    """A copy of which one byte of a file is another; its size is right."""
    shutil.copytree(bundle, out)
    graph = next(out.glob("onnx/*.onnx"))
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    return out


def older(bundle: Path, out: Path) -> Path:
    shutil.copytree(bundle, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "schema": 2}))
    return out


@pytest.mark.parametrize("name", list(MODULES))
def test_a_dry_run_lists_what_is_made(name: str, pack: Pack, tiny_bundle: Path, tmp_path: Path) -> None:
    if find_format(name).complete is not None:
        pytest.skip("what it downloads is known only then")
    planned = pack(tiny_bundle, name, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    made = pack(tiny_bundle, name)
    assert (planned.made, made.made) == (False, True)
    assert {**planned.files} == {
        path: None if planned.files[path] is None else size for path, size in made.files.items()
    }
    assert {path: len(data) for path, data in contents(made.root).items()} == made.files
    assert [p.name for p in tmp_path.iterdir()] == ["package"]
    ivl_export.Bundle.open(made.root / "bundle", "hash")
    assert json.loads((made.root / "package.json").read_text())["package"] == name
    assert not any(path.startswith("/") or ".." in path for path in made.files)


def test_the_command_says_what_it_made(
    pack: Pack, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["package", str(tiny_bundle), "--format", "python", "--out", str(tmp_path / "p"), "--name", "tiny"]
    assert main([*line, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not planned["made"]
    assert planned["files"]["app.py"] > 0
    assert main([*line, "--device", "cuda"]) == 0
    out = capsys.readouterr().out
    assert f"package: {tmp_path / 'p'} (" in out
    assert 'dependencies = ["ivl-export[gpu]==' in (tmp_path / "p" / "pyproject.toml").read_text()
    assert main(line) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*line, "--force"]) == 0


@pytest.mark.parametrize(
    ("keywords", "kind", "words"),
    [
        ({"format": "rpm"}, UsageError, "Known: python"),
        ({"settings": {"colour": "red"}}, UsageError, "no setting of --format python 'colour'"),
        ({"settings": ["python=2.7"]}, UsageError, "takes 3.11, 3.12"),
        ({"settings": ["device=cpu", "device=cpu"]}, UsageError, "given twice"),
        ({"name": "../up"}, UsageError, "cannot be the name"),
        ({"name": ""}, UsageError, "cannot be the name"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_written(
    keywords: dict[str, Any], kind: type[IvlError], words: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words):
        ivl_export.package(tiny_bundle, tmp_path / "package", **{"format": "python", **keywords})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("spoil", "words"), [(damaged, "has sha256"), (older, "schema 2|ivl-export build")])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_bundle_that_is_not_intact_is_refused(
    spoil: Callable[[Path, Path], Path], words: str, dry_run: bool, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = spoil(tiny_bundle, tmp_path / "bundle")
    with pytest.raises(IntegrityError, match=words):
        ivl_export.package(bundle, tmp_path / "package", format="python", dry_run=dry_run)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_only_a_package_is_replaced_and_only_if_asked(pack: Pack, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "package"
    out.mkdir()
    pack(tiny_bundle, "python")
    before = contents(out)
    with pytest.raises(UsageError, match="Give --force"):
        pack(tiny_bundle, "python")
    pack(tiny_bundle, "python", force=True, name="other")
    assert contents(out) != before
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in (other, tmp_path / "file"):
        with pytest.raises(UsageError, match="is not a package"):
            pack(tiny_bundle, "python", out=place, force=True)
    assert contents(other) == {"notes.txt": b"mine"}


def test_neither_folder_is_inside_the_other(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "a" / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    for place in (bundle, bundle / "package", bundle.parent):
        with pytest.raises(UsageError, match="inside the other"):
            ivl_export.package(bundle, place, format="python", force=True)
    ivl_export.Bundle.open(bundle, "hash")


def test_a_package_that_fails_leaves_nothing_and_the_old_one_as_it_was(
    pack: Pack, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = pack(tiny_bundle, "python").root
    before = contents(out)

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(distribution, "_build", full)
    with pytest.raises(BuildError, match="Free some space"):
        pack(tiny_bundle, "python", force=True)
    with pytest.raises(BuildError, match="Free some space"):
        pack(tiny_bundle, "python", out=tmp_path / "new")
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["package"]


def test_what_a_killed_process_left_is_not_in_the_next_package(
    pack: Pack, tiny_bundle: Path, tmp_path: Path
) -> None:
    left = tmp_path / ".package.package" / "bundle"
    left.mkdir(parents=True)
    (left / "rest").write_text("half")
    with locked(left.parent), pytest.raises(BuildError, match="Another process"):
        pack(tiny_bundle, "python")
    assert not [path for path in pack(tiny_bundle, "python").files if "rest" in path]
    assert [p.name for p in tmp_path.iterdir()] == ["package"]


def test_a_disk_that_is_too_small_is_seen_before(
    pack: Pack, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(BuildError, match="1,000 are free"):
        pack(tiny_bundle, "python")
    assert list(tmp_path.iterdir()) == []


def test_settings_of_one_name_have_one_meaning() -> None:
    seen: dict[str, Any] = {}
    for one in formats():
        assert isinstance(one, contract.Format)
        assert one.name in MODULES
        for key, setting in one.settings.items():
            assert seen.setdefault(key, setting) == setting, key


def test_keywords_are_the_options_of_the_command() -> None:
    command: Any = typer.main.get_command(cli_package.app)
    keywords = dict(inspect.signature(ivl_export.package).parameters)
    assert {*keywords} - {"progress"} == {p.name for p in command.params} - {"as_json"}
    for option in command.params:
        if option.name in ("out", "name", "force", "dry_run"):
            assert keywords[option.name].default == option.default, option.name
    assert all(f"{name}" in (inspect.getdoc(ivl_export.package) or "") for name in keywords)
    assert {*command.settings} == {key for one in formats() for key in one.settings}
