"""``import ivl_export``: its names, a light import, and a build from Python that the runtime runs."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

import ivl_export
from ivl_export import build, calibrate, errors, load
from ivl_export.engines.tensorrt.options import OPTIONS
from ivl_export.progress import SILENT
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.settings import keyword

LIGHT = """
import sys
before = set(sys.modules)
import ivl_export
print(sorted({name.partition(".")[0] for name in sys.modules} - {name.partition(".")[0] for name in before}))
for name in ivl_export.__all__:
    getattr(ivl_export, name)
print(sorted({"torch", "onnx", "onnxruntime", "tensorrt_rtx", "transformers", "modelopt"} & set(sys.modules)))
"""
ONLY_CLI = {"as_json", "dry_run", "recipes", "recipe", "settings"}
"""Options of the output, that print and build nothing, or have other keywords."""
ENGINE = {keyword(OPTIONS, key) for key in OPTIONS}
"""Settings that are items of the keyword ``engine_options``."""


class Steps:
    """Keeps the names of the steps that ended, and whether each was run."""

    def __init__(self) -> None:
        self.ended: dict[str, bool] = {}

    def started(self, step: str, total: int | None, unit: str = "") -> None: ...

    def advanced(self, done: int, total: int | None = None, detail: str = "") -> None: ...

    def finished(self, step: str, seconds: float, reused: bool = False) -> None:
        self.ended[step] = not reused


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo number {i}")
    return folder


def test_the_import_is_light() -> None:
    said = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True).stdout
    new, heavy = said.splitlines()
    assert "numpy" not in new
    assert "typer" not in new
    assert heavy == "[]"


def test_every_name_is_there() -> None:
    assert {*ivl_export.__all__} <= {*dir(ivl_export)}
    for name in ivl_export.__all__:
        assert getattr(ivl_export, name) is not None
    own = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert own <= {*ivl_export.__all__}, "every error"
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        ivl_export.biuld  # noqa: B018


@pytest.mark.parametrize("verb", ["build", "calibrate"])
def test_keywords_are_the_options_of_the_command(verb: str) -> None:
    """The same names of options and settings, and the same defaults."""
    command: Any = typer.main.get_command(import_module(f"ivl_export.cli.{verb}").app)
    options = {p.name: p for p in command.params if p.name not in ONLY_CLI}
    settings = {name for key in command.settings if (name := keyword(command.settings, key)) not in ENGINE}
    keywords = dict(inspect.signature(getattr(ivl_export, verb)).parameters)
    assert keywords.pop("progress").default is SILENT
    assert {*keywords} - {"engine_options"} == {*options} | settings
    for name, option in options.items():
        dashed = {flag.lstrip("-").replace("-", "_") for flag in option.opts}
        assert {name, name.removesuffix("s")} & dashed
        assert str(keywords[name].default) == str(option.default), name
    assert inspect.getdoc(getattr(ivl_export, verb))
    for name in keywords:
        assert f"{name}" in (inspect.getdoc(getattr(ivl_export, verb)) or "")


def test_built_and_run_from_python(
    tiny_model: Path,
    photos: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = Steps()
    with caplog.at_level(logging.WARNING, "ivl_export"):
        call: dict[str, Any] = {
            "precision": "int8",
            "calib": photos,
            "backend": "onnxruntime",
            "components": ["vision", "qllama_text"],
        }
        bundle = ivl_export.build(str(tiny_model), out=str(tmp_path / "B"), **call, progress=steps)
    assert "The calibration set is small" in caplog.text
    assert isinstance(bundle, ivl_export.Bundle)
    assert bundle.manifest.recipe == "int8"
    assert bundle.root == tmp_path / "B"
    assert steps.ended["calibrate"]
    assert steps.ended["accuracy"]
    again = Steps()
    assert ivl_export.build(tiny_model, tmp_path / "B", **call, progress=again).manifest == bundle.manifest
    assert not any(ran for step, ran in again.ended.items() if step != "open")
    with ivl_export.load(bundle, threads=1) as model:
        assert isinstance(model, ivl_export.InternVL)
        assert model.encode_image([Image.new("RGB", (40, 30))]).shape[0] == 1
        assert np.isfinite(model.encode_text(["a photo"])).all()
    assert capfd.readouterr() == ("", ""), "nothing is printed"


@pytest.mark.slow
def test_ranges_measured_once(
    tiny_model: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    call: dict[str, Any] = {"precision": "int8", "calib": photos, "components": "qllama_text"}
    out = tmp_path / "ranges.json"
    ranges = ivl_export.calibrate(tiny_model, out, algorithm="mse", **call)
    assert ranges == ActivationRanges.load(out)
    assert (ranges.algorithm, ranges.samples, {*ranges.amax}) == ("mse", 9, {"qllama_text"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ranges.json"]
    bundle = ivl_export.build(tiny_model, tmp_path / "B", **call, ranges=out, backend=["onnxruntime"])
    assert (bundle.root / "ranges.json").read_bytes() == out.read_bytes()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda out: build("missing", out), errors.CheckpointError, "missing"),
        (lambda out: build(None, out, precision="fp4"), errors.UsageError, "Unknown precision 'fp4'"),
        (lambda out: build(None, out, engine_options={"tilling": "x"}), errors.UsageError, "Did you mean"),
        (lambda out: build(None, out, cache_size="lots"), errors.UsageError, "cache_size"),
        (lambda out: build(None, out, targets=["sm99"]), errors.UsageError, "sm99"),
        (lambda out: build(None, out, features=99), errors.UsageError, "99"),
        (lambda out: calibrate(None, out, precision="bf16"), errors.UsageError, "rounds no inputs"),
        (lambda out: load(out), errors.IntegrityError, "manifest"),
    ],
)
def test_errors_are_those_of_the_command(
    call: Callable[[Path], object], error: type[errors.IvlError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        call(tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".")]


def test_types_are_shipped() -> None:
    root = Path(ivl_export.__file__).parent
    assert (root / "py.typed").is_file()
    assert json.dumps(["constraints.txt", "py.typed"]) in (root / "pyproject.toml").read_text("utf-8")
