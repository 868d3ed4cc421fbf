"""Benchmarks of bulk embedding and of searches in shards, small; the scaling table follows from receipts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("skimage")

from ivl_export.benchmarks.runtime import measured
from ivl_export.benchmarks.serve import bulk, index, scale

pytestmark = pytest.mark.numeric


def test_both_ways_are_timed(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MORE_SECONDS", 0.0)
    arguments = [
        "--work",
        tmp_path,
        "--bundle",
        tiny_bundle,
        "--images",
        "3",
        "--rounds",
        "2",
        "--threads",
        "1",
    ]
    assert bulk.main([*map(str, arguments), "--out", str(tmp_path)]) == 0
    (comparison,) = json.loads((tmp_path / "serve-bulk.json").read_text())["comparisons"]
    assert [timed["name"] for timed in comparison["timed"]] == [bulk.LOOP, bulk.BULK]
    assert comparison["goals"][0]["bound"] == 0.95
    assert comparison["facts"]["images"] == 6
    assert all(seconds > 0 for seconds in comparison["facts"]["cpu_seconds_an_image"].values())


def test_searches_are_measured(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    arguments = [
        "--work",
        str(tmp_path),
        "--out",
        str(tmp_path),
        "--vectors",
        "2000",
        "--width",
        "16",
        "--delete",
    ]
    assert index.main(arguments) == 0
    data = json.loads((tmp_path / "serve-index-2000.json").read_text())
    recalls = [search["recall"] for search in data["searches"]]
    assert recalls[0] == 1
    assert recalls[1] <= recalls[2] <= recalls[3]
    assert recalls[3] > 0.9
    assert not (tmp_path / "vectors-2000-16").exists()


def test_the_scaling_table_is_fresh() -> None:
    assert scale.main(["--check"]) == 0


def test_the_scaling_table_follows_its_formulas() -> None:
    rows = list(scale.table())[2:]
    speeds = list(scale.speeds())
    assert len(rows) == len(speeds) == len(scale.GPUS) + 1
    for speed in speeds:
        assert speed.hours * 3600 * speed.images_per_second == pytest.approx(1e9)
        assert (speed.machines - 1) * 24 < speed.hours <= speed.machines * 24
    assert scale.storage(768, 4) == 1_000_000_000 * (3072 + 72) + 15259 * (4096 + 128)
