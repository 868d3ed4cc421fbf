"""Names of the models that ship: every verb that takes a checkpoint takes them, and errors list them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivl_export.bundle.manifest import SHIPPED
from ivl_export.cli import main
from ivl_export.models.shipped import FOLDERS, SHORT, checkpoint_path, shipped_name

NAMES: list[tuple[str | None, str]] = [
    (None, "internvl-nano"),
    *SHORT.items(),
    *zip(FOLDERS, FOLDERS, strict=True),
]


@pytest.mark.parametrize(("name", "full"), NAMES)
def test_every_name_is_a_checkpoint(
    name: str | None, full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for model in (name, name and Path(name)):
        assert shipped_name(model) == full
        assert (checkpoint_path(model) / "config.json").is_file()
    if name is not None:  # the user's folder of that name comes first
        (tmp_path / name).mkdir()
        assert shipped_name(name) is None
        assert checkpoint_path(name) == Path(name)
        assert shipped_name(Path("sub", name)) is None


@pytest.mark.parametrize("name", [*SHORT, *FOLDERS])
@pytest.mark.parametrize(
    "line",
    [
        "build --dry-run --backend onnxruntime --precision bf16",
        "doctor --precision int8",
        "estimate --gpu l40s",
    ],
)
def test_verbs_take_every_name(
    line: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*line.split(), "--model", name, "--json"]) == 0, capsys.readouterr().err
    json.loads(capsys.readouterr().out)


def test_the_sources_of_bundles_build_again() -> None:
    for name in FOLDERS:
        assert shipped_name(f"{name}{SHIPPED}".removesuffix(SHIPPED)) == name


@pytest.mark.parametrize(
    "line",
    ["build --dry-run", "export", "calibrate", "sensitivity", "doctor", "estimate --gpu l40s",
     "train --stage 3", "train qat --dry-run"],
)  # fmt: skip
def test_a_missing_checkpoint_lists_the_names(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*line.split(), "--model", "nana", "--json"]) == 4
    error = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert error["what"] == "No checkpoint at nana."
    assert "nano, nano-chat, nano-tiles" in error["fix"]
    assert list(tmp_path.iterdir()) == []
