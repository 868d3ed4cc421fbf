"""The README's command lines and its Python example work unchanged."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

import ivl_export
from ivl_export.cli import main
from ivl_export.cli.app import VERBS, app
from ivl_export.engines.base import BACKENDS
from ivl_export.engines.tensorrt.library import BUILDERS
from ivl_export.quantization.recipe import shipped_recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("ivl-export ")
]
# Lines that take long, or need published weights or data, are parsed, not run.
HEAVY = ("build", "eval", "profile")


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the README's lines name."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg", "photos/b.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "InternVL-14B-224px").mkdir()
    (tmp_path / "BUNDLE").symlink_to(tiny_bundle)
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "internvl-nano-fp8").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(arguments: list[str]) -> None:
    """Resolve verb, options and arguments as the command line would, without running anything."""
    command: Any = typer.main.get_command(app)
    context = None
    while True:
        context = command.make_context(command.name, list(arguments), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        _, command, arguments = command.resolve_command(context, arguments)


def test_the_readme_shows_what_matters_and_where_the_rest_is() -> None:
    assert len(LINES) == 8
    assert {line.split()[1] for line in LINES} <= set(VERBS)
    assert "(docs/cli.md)" in README


@pytest.mark.parametrize("line", LINES)
def test_command_lines(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split(line)[1:]
    if arguments[0] in HEAVY:
        parse(arguments)
    else:
        assert main(arguments) == 0, capsys.readouterr().err


def test_the_status_has_every_backend() -> None:
    assert "(docs/status.md)" in README
    status = (ROOT / "docs" / "status.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)`", status, re.M)) == {*BACKENDS, *BUILDERS}


def test_the_recipes_are_the_shipped_ones_with_their_measured_captions() -> None:
    """``docs/precision.md`` is written from the receipt."""
    precision = (ROOT / "docs" / "precision.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- begin: recipes.*?-->\n(.*?)<!-- end -->", precision, re.S)
    heads, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    captions = {row[0]: row[heads.index("caption")] for row in rows}
    section = README.split("## Recipes")[1].split("\n## ")[0]
    shown: dict[str, str] = {}
    for names, figures in re.findall(r"^\| (`.*?) \|.*\| ([\d.%, ]+) \|$", section, re.M):
        recipes, values = re.findall(r"`([\w-]+)`", names), figures.split(", ")
        shown.update(zip(recipes, values * (len(recipes) // len(values)), strict=True))
    captions["fp32"] = captions.pop("*fp32*")
    assert shown == {name: captions[name] for name in (*shipped_recipes(), "mixed")}
    assert f"(fp32 {captions['fp32']})" in section


def test_a_wrong_line_would_be_seen(folder: Path) -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(shlex.split("build --precisions fp8"))


def test_python_example(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unchanged, except that the bundle exists: a build takes minutes."""
    signature = inspect.signature(ivl_export.build)

    def build(*args: Any, **keywords: Any) -> Path:
        out: str = signature.bind(*args, **keywords).arguments["out"]
        return folder / out

    monkeypatch.setattr(ivl_export, "build", build)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["images"].shape[0] == names["texts"].shape[0] == 1
    assert names["images"].shape == names["texts"].shape
    assert capsys.readouterr().out.startswith("[")
