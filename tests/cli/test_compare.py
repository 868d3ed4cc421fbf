"""``ivl-export compare`` on bundles with real manifests and receipts as builds write them."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ivl_export import cli
from ivl_export.bundle import Bundle, seal
from ivl_export.bundle.manifest import EngineFile
from ivl_export.calibration.accuracy import Metrics, Receipt
from ivl_export.synthetic.tasks import Score, TaskScore

SIZES = {"n_classify": 500}


def receipts(correct: int, recipe: str) -> dict[str, Any]:
    metrics = {
        "image_embed": Metrics(0.999, 0.99, 30.0, 0.1, 32),
        "tokens": Metrics(0.99, 0.9, 20.0, 1.0, 32),
    }
    views = {"vision": metrics}
    score = TaskScore(Score(correct, 500), Score(1, 3)).to_json()
    return {
        "accuracy": Receipt(recipe, "onnxruntime", "ab" * 32, 32, True, views, views).to_json(),
        "tasks": {"scores": {recipe: {"InternVL-C": {"classify": score}, "settings": {}}}, "sizes": SIZES},
        "verification": {"onnxruntime-cpu": {"vision": {"precisions": {"int8xint8": 20, "fp32xfp32": 4}}}},
    }


def bundle(tiny: Path, out: Path, data: dict[str, Any], precision: str) -> Path:
    staging = out.with_name(f"{out.name}.staging")
    shutil.copytree(tiny, staging)
    (staging / "manifest.json").unlink()
    (staging / "receipts").mkdir(exist_ok=True)
    for name, receipt in data.items():
        (staging / "receipts" / f"{name}.json").write_text(json.dumps(receipt))
    manifest = Bundle.open(tiny).manifest
    manifest = replace(manifest, recipe=precision, rules={"name": precision}, receipts=tuple(data))
    seal(staging, manifest, out)
    return out


def compare(capsys: pytest.CaptureFixture[str], a: Path, b: Path) -> Any:
    assert cli.main(["compare", str(a), str(b), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_side_by_side(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = bundle(tiny_bundle, tmp_path / "a", receipts(480, "fp8"), "fp8")
    near = bundle(tiny_bundle, tmp_path / "near", receipts(478, "int8"), "int8")
    far = bundle(tiny_bundle, tmp_path / "far", receipts(430, "int4"), "int4")
    comparison = compare(capsys, a, near)
    assert [x["recipe"] for x in comparison["bundles"]] == ["fp8", "int8"]
    assert comparison["bundles"][0]["weights_bytes"] > 0
    (component,) = comparison["components"]
    assert component["a"]["own_cosine"] == 0.99  # the worst output
    assert component["a"]["chained_sqnr_db"] == 20.0
    (task,) = comparison["tasks"]
    assert task["name"] == "InternVL-C classify"
    assert task["difference"] == pytest.approx(-0.004)
    assert task["low"] < -0.004 < task["high"]
    assert task["within"] is True
    assert comparison["verification"][0]["b"] == {"int8xint8": 20, "fp32xfp32": 4}
    assert comparison["notes"] == []
    assert compare(capsys, a, far)["tasks"][0]["within"] is False

    assert cli.main(["compare", str(a), str(near)]) == 0
    out = capsys.readouterr().out
    assert "96.0 (93.9 to 97.4, 500)" in out
    assert "-0.4 within the interval" in out
    assert "20 int8xint8" in out


def test_the_scores_of_a_chat(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As builds write them: every kind of question, not the new combinations among them."""
    sides = []
    for correct, precision in ((480, "fp8"), (478, "int8")):
        data = receipts(correct, precision)
        score = TaskScore(Score(correct, 500), Score(5, 9)).to_json()
        data["tasks"] = {"scores": {precision: {"chat": {"all": score, "color": score}, "settings": {}}},
                         "sizes": {"scenes": 200}}  # fmt: skip
        sides.append(bundle(tiny_bundle, tmp_path / precision, data, precision))
    comparison = compare(capsys, *sides)["tasks"]
    assert [row["name"] for row in comparison] == ["chat all", "chat color"]
    assert comparison[0]["difference"] == pytest.approx(-0.004)
    assert comparison[0]["within"] is True


def test_different_questions_are_not_compared(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = receipts(480, "fp8")
    other = copy.deepcopy(first)
    other["tasks"]["sizes"] = {"n_classify": 400}
    other["accuracy"]["set_hash"] = "cd" * 32
    a = bundle(tiny_bundle, tmp_path / "a", first, "fp8")
    comparison = compare(capsys, a, bundle(tiny_bundle, tmp_path / "b", other, "fp8"))
    assert comparison["tasks"][0]["difference"] is None
    assert any("different sets" in note for note in comparison["notes"])
    assert any("different questions" in note for note in comparison["notes"])
    # without receipts
    comparison = compare(capsys, a, tiny_bundle)
    assert comparison["tasks"][0]["b"] is None
    assert comparison["tasks"][0]["within"] is None
    assert sum("has no" in note for note in comparison["notes"]) == 3


def test_a_strange_receipt_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, (name, content) in enumerate(
        [("tasks", []), ("tasks", {"scores": 3}), ("accuracy", {}), ("verification", {"x": 1})]
    ):
        data = {**receipts(480, "fp8"), name: content}
        path = bundle(tiny_bundle, tmp_path / f"b{i}", data, "fp8")
        assert cli.main(["compare", str(path), str(path)]) == 8, (name, content)
        assert "not as builds write it" in capsys.readouterr().err


def test_engines_are_compared_by_what_they_compute(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of two builds that differ in bytes, with receipts that say what each computes."""
    programs = {"a": "ab" * 32, "same": "ab" * 32, "other": "cd" * 32, "older": None}
    bundles = {}
    for name, program in programs.items():
        staging = tmp_path / f"{name}.staging"
        shutil.copytree(tiny_bundle, staging)
        (staging / "manifest.json").unlink()
        engine = EngineFile("vision", "tensorrt-rtx", "sm89", "1.7", "engines/vision.engine")
        (staging / "engines").mkdir(exist_ok=True)
        (staging / engine.file).write_bytes(name.encode())
        (staging / "receipts").mkdir(exist_ok=True)
        proof = {"precisions": {}, **({"program": program} if program else {})}
        receipt = {"tensorrt-rtx-sm89": {"vision": proof}}
        (staging / "receipts" / "verification.json").write_text(json.dumps(receipt))
        manifest = replace(Bundle.open(tiny_bundle).manifest, receipts=("verification",), engines=(engine,))
        seal(staging, manifest, tmp_path / name)
        bundles[name] = tmp_path / name

    def engines(other: str) -> Any:
        (row,) = compare(capsys, bundles["a"], bundles[other])["engines"]
        assert row["name"] == "tensorrt-rtx-sm89 vision"
        return row["same_bytes"], row["same_program"]

    assert engines("a") == (True, True)
    assert engines("same") == (False, True)
    assert engines("other") == (False, False)
    assert engines("older") == (False, None)
    assert cli.main(["compare", str(bundles["a"]), str(bundles["same"])]) == 0
    assert "programs and weights" in capsys.readouterr().out
