"""``ivl-export doctor``: this installation as it is; other machines from what their tools print."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from ivl_export import cli
from ivl_export.engines import memory
from ivl_export.engines.base import BACKENDS
from ivl_export.engines.tensorrt import library as trt
from ivl_export.errors import CapabilityError
from ivl_export.models.config import InternVLConfig
from ivl_export.models.shipped import nano_folder
from ivl_export.profiles import extras
from ivl_export.profiles.backends import backends_here
from ivl_export.profiles.cost.sizes import plan_of
from ivl_export.profiles.doctor import Request, diagnose, request_problems
from ivl_export.profiles.extras import Extra, extra_packages
from ivl_export.profiles.measure import machine
from ivl_export.profiles.measure.machine import Gpu, parse_gpus
from ivl_export.quantization.recipe import load_recipe

Usage = namedtuple("Usage", "total used free")


def request(precision: str, config: InternVLConfig | None = None) -> Request:
    recipe = load_recipe(precision)
    return Request(recipe, plan_of(recipe, config or InternVLConfig()), config)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' machine may have a GPU that nothing is built for."""
    monkeypatch.setattr(machine, "installed_gpus", lambda: ())


@pytest.fixture
def full(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(InternVLConfig().to_published()))
    return tmp_path


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    assert diagnosis["ok"] is True
    build = next(e for e in diagnosis["extras"] if e["name"] == "quant")
    assert build["packages"]["torch"] == version("torch")
    abilities = {ability["backend"]: ability for ability in diagnosis["abilities"]}
    assert list(abilities) == list(BACKENDS)
    assert abilities["tensorrt-rtx"]["targets"]["fp8"] == ["sm89", "sm120", "sm121"]
    assert "sm80" in abilities["tensorrt-rtx"]["targets"]["int8"]
    assert abilities["onnxruntime"]["products"] == {"int8": ["int8xint8"], "int8-smoothquant": ["int8xint8"]}
    assert abilities["torch"]["products"]["w4a8"] == ["int8xint4"]
    assert "fp8" not in abilities["torch"]["products"]


@pytest.mark.parametrize("columns", ["80", "100"])
def test_a_backend_is_a_line(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "No problems found." in out
    table = out.split("\nBackends\n")[1].split("\n\n")[0].splitlines()
    rows = [line for line in table if line.split()[0] in BACKENDS]
    assert len(rows) == len(BACKENDS)
    assert len(table) <= (len(rows) + 2 if columns == "100" else 12)
    assert "On sm90 (H100, H200, GH200)" in out


@pytest.mark.slow
def test_it_loads_the_backends_libraries_but_not_torch() -> None:
    code = (
        "import sys; from ivl_export.cli import main; main(['doctor', '--precision', 'fp8', '--json']);"
        "print([m for m in ('torch', 'onnx', 'modelopt', 'matplotlib') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"


def test_a_small_model_can_be_built(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", str(nano_folder()), "--precision", "int8"]) == 0
    assert "bundle, one target" in capsys.readouterr().out
    assert cli.main(["doctor", "--model", "nano-chat", "--precision", "int8"]) == 0
    assert "bundle, one target" in capsys.readouterr().out


def test_a_chat_model_of_full_size(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 8 * 10**9)
    assert cli.main(["doctor", "--model", "InternVL-Chat-ViT-6B-Vicuna-7B", "--json"]) == 5
    diagnosis = json.loads(capsys.readouterr().out)
    assert diagnosis["needs"]["largest"] == "decoder"
    # FP8 linears of 45 and 32 blocks, and both tables of 32,000 tokens in bf16
    assert diagnosis["needs"]["weights"] == pytest.approx(12.3e9 + 2 * 32000 * 4096, rel=0.02)


@pytest.mark.slow
def test_room_is_checked(
    full: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 10**12))
    monkeypatch.setattr(memory, "available_memory", lambda: 8 * 10**9)
    assert cli.main(["doctor", "--model", str(full), "--json"]) == 5
    diagnosis = json.loads(capsys.readouterr().out)
    assert diagnosis["ok"] is False
    (problem,) = diagnosis["problems"]
    assert "not enough memory" in problem["what"]
    assert "-O split=2" in problem["fix"]
    assert diagnosis["needs"]["weights"] == pytest.approx(14.4e9, rel=0.02)
    monkeypatch.setattr(memory, "available_memory", lambda: 10**12)
    assert cli.main(["doctor", "--model", str(full), "--json"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**12, 0, 10**10))
    assert cli.main(["doctor", "--model", str(full)]) == 5
    assert "problem: There is not enough disk for the bundle." in capsys.readouterr().out


def test_missing_packages_are_named_with_the_line() -> None:
    extras = diagnose().extras
    assert request_problems(request("fp8"), extras, ()) == []
    without = tuple(
        replace(e, packages={**e.packages, "onnx": None}) if e.name == "quant" else e for e in extras
    )
    (problem,) = request_problems(request("fp8"), without, ())
    assert (problem.why, problem.fix) == ("Not installed: onnx.", "pip install 'ivl-export[quant]'")
    neither = (Extra("cpu", "", {"onnxruntime": None}), Extra("gpu", "", {"onnxruntime-gpu": None}))
    assert [p.fix for p in request_problems(request("fp8"), neither, ())] == ["pip install 'ivl-export[cpu]'"]
    unknown = tuple(replace(e, packages={}) for e in extras)  # a source tree that was never installed
    assert [p.why for p in request_problems(request("fp8"), unknown, ())] == [
        "Not installed: ivl-export itself."
    ] * 2
    assert list(extra_packages("rtx")) == ["tensorrt-rtx"]
    assert extra_packages("nothing") == {}


def test_versions_outside_the_supported_range_are_problems(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "installed_version", lambda package: "1.2" if package == "onnx" else "99.0")
    assert cli.main(["doctor", "--json"]) == 5
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["what"] == "onnx 1.2 is outside the supported range."
    assert problem["fix"] == "pip install 'onnx>=1.18'"


def test_every_backend_is_listed_with_what_hinders_it() -> None:
    here = {status.backend: status for status in backends_here()}
    assert list(here) == list(BACKENDS)
    assert here["onnxruntime"].release == version("onnxruntime")
    assert "CPU" in here["onnxruntime"].note
    assert not here["onnxruntime"].blocked
    assert here["torch"].release == version("torch")
    assert here["torch-tensorrt"].install == "pip install torch-tensorrt"


def test_bindings_without_their_libraries_are_told_from_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise CapabilityError(f"{name} is not installed.", "libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(trt, "installed_release", lambda name: "11.4" if name == "tensorrt" else None)
    monkeypatch.setattr(trt, "library", broken)
    here = {status.backend: status for status in backends_here()}
    assert here["tensorrt"].blocked.startswith("it cannot be loaded: libnvinfer.so.11")
    assert here["tensorrt-rtx"].blocked == "it is not installed"


def test_gpus_of_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = parse_gpus("NVIDIA L40S, 46068, 570.86, 8.9\nTesla T4, 15360, 470.1\nnonsense\n")
    assert gpus == (Gpu("NVIDIA L40S", 46068, "570.86", "sm89"), Gpu("Tesla T4", 15360, "470.1"))
    extras = diagnose().extras
    assert request_problems(request("fp8"), extras, gpus[:1]) == []
    (lacking,) = request_problems(request("fp8"), extras, gpus[1:])  # its generation follows from its name
    assert "Tesla T4 (sm75) cannot run fp8" in lacking.what
    assert lacking.why == "It lacks bf16, fp8."
    assert "fp16" in lacking.fix
    assert "fp8" not in lacking.fix
    hopper = (Gpu("NVIDIA H200", 143771, "580.1", "sm90"),)
    for release, why in ((None, "tensorrt is not installed"), ("10.11.0", "tensorrt 10.11.0 is too old")):
        monkeypatch.setattr(trt, "installed_release", lambda name, release=release: release)
        (without,) = request_problems(request("fp8"), extras, hopper)
        assert "--backend tensorrt" in without.fix
        assert why in without.why
    monkeypatch.setattr(trt, "installed_release", lambda name: "10.16")
    assert request_problems(request("fp8"), extras, hopper) == []
    (unknown,) = request_problems(request("fp16"), extras, (Gpu("NVIDIA X", 1, "1", "sm50"),))
    assert "No engines can be built for NVIDIA X (sm50)" in unknown.what


def test_no_model_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 4
    assert f"No config.json in {tmp_path}." in capsys.readouterr().err
    assert cli.main(["doctor", "--model", str(tmp_path / "no")]) == 4
    assert f"No checkpoint at {tmp_path / 'no'}." in capsys.readouterr().err
    assert cli.main(["doctor", "--precision", "fp3"]) == 2
