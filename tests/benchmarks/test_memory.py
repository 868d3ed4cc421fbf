"""Memory and load time: the benchmarks' rows, and a service's memory stays flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ivl_export.benchmarks.runtime import measured
from ivl_export.benchmarks.runtime.memory import SHARING, main
from ivl_export.benchmarks.runtime.soak import Soaked

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux"
)
LEAK = """
import ivl_export.runtime.model as model
read, kept = model.InternVL.pixel_values, []
def leaking(*given):
    pixels = read(*given)
    kept.append(pixels.repeat(4))  # as large as nano's
    return pixels
model.InternVL.pixel_values = leaking
"""
FLAT = 0.08
"""Of so few requests: arenas still grow, and free memory of malloc comes and goes."""


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MORE_SECONDS", 0.0)


def soaked(bundle: Path, out: Path, before: str = "") -> dict[str, Any]:
    """900 mixed requests in a separate process."""
    code = f"""{before}
from ivl_export.benchmarks.runtime.soak import main
asked = ["--requests", "900", "--warm-up", "300", "--every", "50"]
main(["--bundle", {str(bundle)!r}, "--out", {str(out)!r}, *asked])
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    receipt: dict[str, Any] = json.loads(measured.receipt_path("soak", out).read_text())
    return receipt


@pytest.mark.slow
def test_memory_stays_flat_over_mixed_requests(tiny_bundle: Path, tmp_path: Path) -> None:
    result = soaked(tiny_bundle, tmp_path)
    assert result["growth"]["RSS at rest"] < FLAT, result["rss"]
    counts, request = result["counts"], result["asked"]
    assert result["requests"][-1] == sum(request.values()) == 900
    assert counts["failed"] == request["no image"] > 10
    assert counts["expired"] > 0
    assert counts["cancelled"] > 0
    assert counts["running"] == counts["waiting"] == 0


@pytest.mark.slow
def test_a_leak_of_one_image_a_request_is_seen(tiny_bundle: Path, tmp_path: Path) -> None:
    assert soaked(tiny_bundle, tmp_path, LEAK)["growth"]["RSS at rest"] > FLAT


def test_growth_counts_from_the_end_of_warm_up() -> None:
    requests = tuple(range(100, 1001, 100))
    result = Soaked(requests, (9,) * 10, (50, 90, *(100,) * 4, 103, *(110,) * 3), (7,) * 10, {"text": 1000})
    assert result.growth(200) == pytest.approx(0.1)
    assert result.growth(0) == pytest.approx(110 / 70 - 1)
    assert result.growth(200, result.heap) == 0


@pytest.mark.slow
def test_held_memory_has_a_row_for_each_way_to_load(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_bundle), "--rounds", "1", "--out", str(tmp_path)]) == 0
    receipt = json.loads(measured.receipt_path("memory", tmp_path).read_text())
    assert [row["weights"] for row in receipt["held"]] == list(SHARING)
    for row in receipt["held"]:
        assert 0 < row["once"] <= row["held"]
        assert row["load_seconds"] > 0
        assert row["import_seconds"] > 0
    assert all(case["facts"]["equal"] for case in receipt["comparisons"])
    assert "held MB" in capsys.readouterr().out
