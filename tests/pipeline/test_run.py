"""The accuracy budget that a build is held to, and the cache of evaluations that builds share."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from ivl_export.errors import AccuracyError
from ivl_export.pipeline.accuracy_steps import HEADLINES, cached
from ivl_export.pipeline.config import ORT, BuildConfig
from ivl_export.pipeline.plan import BuildPlan, plan_build
from ivl_export.pipeline.run import check_accuracy
from ivl_export.pipeline.workspace import Record

TASKS = {"tasks": Record("0" * 64, {"receipts/tasks.json": 1}, 1.0)}


def opened(model: Path, precision: str, allow: bool = False) -> BuildPlan:
    out = model.parent / "out"
    return plan_build(BuildConfig(out, model, precision, backend=(ORT,), allow_accuracy_loss=allow))


def write_scores(root: Path, lost: dict[str, float], precision: str) -> None:
    """Scores of 90% in fp32, less ``lost`` points (figure -> points) in ``precision``."""
    scores: dict[str, dict[str, dict[str, dict[str, float]]]] = {"fp32": {}, precision: {}}
    for figure, (group, task) in HEADLINES.items():
        scores["fp32"].setdefault(group, {})[task] = {"accuracy": 0.9}
        loss = lost.get(figure, 0.0) / 100
        scores[precision].setdefault(group, {})[task] = {"accuracy": 0.9 - loss}
    (root / "receipts").mkdir(exist_ok=True)
    (root / "receipts" / "tasks.json").write_text(json.dumps({"scores": scores}))


@pytest.fixture
def nano_like(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, as one that is evaluated on scenes."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).hardlink_to(file)
    (folder / "evaluation.json").write_text('{"tasks": "scenes"}')
    return folder


@pytest.mark.parametrize(("precision", "budget"), [("fp8", 1.0), ("int8", 1.5), ("bf16", 1.0)])
@pytest.mark.parametrize("figure", list(HEADLINES))
def test_each_figure_has_the_budget_of_its_precision(
    nano_like: Path, tmp_path: Path, precision: str, budget: float, figure: str
) -> None:
    config = opened(nano_like, precision)
    write_scores(tmp_path, {figure: budget}, precision)
    assert check_accuracy(config, tmp_path, TASKS) == ""
    write_scores(tmp_path, {figure: -5.0}, precision)  # a gain is not a loss
    assert check_accuracy(config, tmp_path, TASKS) == ""
    write_scores(tmp_path, {figure: budget + 0.2}, precision)
    with pytest.raises(AccuracyError, match=figure.replace("@", ".")) as caught:
        check_accuracy(config, tmp_path, TASKS)
    assert caught.value.exit_code == 7
    assert "--allow-accuracy-loss" in caught.value.fix
    assert figure in check_accuracy(opened(nano_like, precision, allow=True), tmp_path, TASKS)


def test_without_tasks_there_is_no_budget(nano_like: Path, tmp_path: Path) -> None:
    assert check_accuracy(opened(nano_like, "fp8"), tmp_path, {}) == ""


def test_evaluations_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path / "cache"))
    calls: list[int] = []

    def compute() -> dict[str, int]:
        calls.append(1)
        return {"n": len(calls)}

    assert cached(["a", {"x": 1}], compute) == {"n": 1}
    assert cached(["a", {"x": 1}], compute) == {"n": 1}
    assert cached(["a", {"x": 2}], compute) == {"n": 2}
    (file, _) = sorted((tmp_path / "cache" / "evaluations").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    file.write_text(file.read_text()[:3])  # cut by a crash
    assert cached(["a", {"x": 1}], compute) == {"n": 3}
    assert cached(["a", {"x": 1}], compute) == {"n": 3}


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    assert cached("a", lambda: {"n": 1}) == {"n": 1}
    monkeypatch.setenv("IVL_EXPORT_CACHE", str(tmp_path / "full"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        assert cached("a", lambda: {"n": "x" * 1000}) == {"n": "x" * 1000}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "full" / "evaluations").iterdir())
