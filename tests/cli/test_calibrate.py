"""``ivl-export calibrate``, and builds that take its ranges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivl_export.bundle import Bundle
from ivl_export.cli import main
from ivl_export.errors import InputError, UsageError
from ivl_export.pipeline.config import ORT, BuildConfig
from ivl_export.pipeline.plan import BuildPlan, plan_build
from ivl_export.pipeline.run import build_steps
from ivl_export.quantization.ranges import ActivationRanges


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo number {i}")
    return folder


def options(model: Path, photos: Path, *more: object) -> tuple[object, ...]:
    return ("--model", model, "--calib", photos, "--components", "qllama_text", *more)


def test_measured_once_and_built_from(
    tiny_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bundle = tmp_path / "ranges.json", tmp_path / "bundle"
    measure = options(tiny_model, photos, "--precision", "int8", "--algorithm", "mse", "--out", out)
    assert run("calibrate", *measure, "--json") == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert (summary["algorithm"], summary["samples"], summary["synthetic"]) == ("mse", 9, False)
    assert "warning: The calibration set is small: 9 samples" in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ranges.json"], "nothing else is left"
    ranges = ActivationRanges.load(out)
    operands = set(ranges.kinds) - set(ranges.shapes)
    assert {kind for name, kind in ranges.kinds.items() if name not in operands} == {"int8"}
    assert {ranges.kinds[name] for name in operands} == {"fp8"}, "attention is quantised to nothing else"

    build = options(tiny_model, photos, "--precision", "int8", "--backend", ORT, "--out", bundle)
    assert run("build", *build, "--ranges", out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert any("small: 9 samples" in notice for notice in report["notices"])
    result = Bundle.open(bundle)
    assert (bundle / "ranges.json").read_bytes() == out.read_bytes()
    recorded = result.manifest.calibration
    assert recorded is not None
    assert (recorded.sha256, recorded.algorithm, recorded.small) == (ranges.set_hash, "mse", True)
    # The same set, cut in the same way: what accuracy is measured on was not calibrated on.
    assert result.receipt("accuracy")["held_out"]
    # A bundle's own ranges do as well, and are the same build.
    assert run("build", *build, "--ranges", bundle / "ranges.json", "--json") == 0
    assert all(step["reused"] for step in json.loads(capsys.readouterr().out)["steps"])


def test_smoothing_travels_with_the_scales(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranges.json"
    measure = options(tiny_model, photos, "--precision", "int8-smoothquant", "--out", out)
    assert run("calibrate", *measure) == 0
    factors = tmp_path / "smoothing.safetensors"
    assert ActivationRanges.load(out).folded

    def opened(precision: str) -> BuildPlan:
        arguments = {"components": ("qllama_text",), "backend": (ORT,), "ranges": out}
        return plan_build(BuildConfig(tmp_path / "b", tiny_model, precision, calib=photos, **arguments))  # type: ignore[arg-type]

    ranges_file = opened("int8-smoothquant").ranges_file
    assert ranges_file is not None
    assert ranges_file.factors == factors.read_bytes()
    with pytest.raises(InputError, match="measured on weights with folded factors"):
        opened("int8")
    factors.write_bytes(factors.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"does not belong to ranges\.json"):
        opened("int8-smoothquant")
    factors.unlink()
    with pytest.raises(InputError, match="factors in it"):
        opened("int8-smoothquant")


@pytest.mark.slow
def test_scales_are_checked_before_anything_runs(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranges.json"
    measure = options(tiny_model, photos, "--precision", "fp8", "--algorithm", "mse", "--out", out)
    assert run("calibrate", *measure) == 0

    def opened(**arguments: object) -> BuildPlan:
        common = {"components": ("qllama_text",), "backend": (ORT,), "ranges": out, "calib": photos}
        return plan_build(BuildConfig(tmp_path / "b", tiny_model, **{**common, **arguments}))  # type: ignore[arg-type]

    assert [s.name for s in build_steps(opened(precision="int8-weight", ranges=None))].count("calibrate") == 0
    with pytest.raises(UsageError, match="both given"):
        opened(algorithm="max")
    with pytest.raises(UsageError, match="int8-weight takes no ranges"):
        opened(precision="int8-weight")
    with pytest.raises(InputError, match="nothing about qllama_query"):
        opened(components=())
    with pytest.raises(InputError, match="picked for other types"):
        opened(precision="int8")
    data = json.loads(out.read_text())
    for change, message in (
        ({"model": "0" * 64}, "other weights"),
        ({"amax": {"qllama_text": {"x": 1.0}}}, "does not have, for example x"),
    ):
        out.write_text(json.dumps({**data, **change}))
        with pytest.raises(InputError, match=message):
            opened()
    for broken in ("{", "[]", json.dumps({**data, "extra": 1})):
        out.write_text(broken)
        assert run("build", *options(tiny_model, photos, "--ranges", out, "--out", tmp_path / "b")) == 3
    assert not (tmp_path / "b").exists()


def test_nothing_to_measure(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranges.json"
    assert run("calibrate", *options(tiny_model, photos, "--precision", "int4-weight", "--out", out)) == 2
    assert run("calibrate", *options(tiny_model, photos, "--algorithm", "best", "--out", out)) == 2
    assert not out.exists()


@pytest.mark.parametrize("precision", ["int8-weight", "int4-weight"])
def test_weights_alone_need_no_calibration_data(precision: str, tiny_model: Path, tmp_path: Path) -> None:
    plan = plan_build(
        BuildConfig(tmp_path / "b", tiny_model, precision, backend=(ORT,), components=("vision",))
    )
    assert plan.notices == tuple(n for n in plan.notices if "stays bf16" in n)
    names = [step.name for step in build_steps(plan)]
    assert "calibrate" not in names
    assert "quantise" in names
