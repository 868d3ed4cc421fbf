"""The runtime's benchmarks: what they time computes the same, and what they say follows from the samples."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.benchmarks.runtime import measured
from ivl_export.benchmarks.runtime.measured import Candidate, Comparison, Goal, Timed, side_by_side
from ivl_export.benchmarks.runtime.models import Setting
from ivl_export.benchmarks.runtime.report import PARTS, main, part
from ivl_export.models.checkpoint import open_checkpoint

SECONDS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9)


class Given(Setting):
    """A setting whose models are all one bundle that is there already."""

    def bundle(self, model: str, precision: str) -> Path:
        return self.work


@pytest.fixture
def tiny(tiny_bundle: Path) -> Setting:
    return Given(tiny_bundle, threads=1, rounds=3, models=("tiny",), new_tokens=3)


def test_candidates_take_turns() -> None:
    heard: list[str] = []
    calls = [Candidate(name, partial(heard.append, name), items=2) for name in "ab"]
    timed = side_by_side(calls, rounds=3, least_seconds=0)
    assert "".join(heard) == "aabb" + "ab" + "ba" + "ab"
    assert [(t.name, len(t.seconds), t.items) for t in timed] == [("a", 3, 2), ("b", 3, 2)]


def test_a_sample_of_a_short_call_is_the_mean_of_many() -> None:
    heard: list[int] = []
    (timed,) = side_by_side([Candidate("short", lambda: heard.append(1))], rounds=2, least_seconds=0.001)
    assert len(heard) > 20
    assert 0 < timed.median < 0.001


@given(SECONDS, SECONDS, st.floats(0.5, 2))
def test_ratios_and_goals(ours: list[float], theirs: list[float], bound: float) -> None:
    timed = (Timed("ours", "fp32", 2, tuple(ours)), Timed("theirs", "fp32", 2, tuple(theirs)))
    faster, longer = Goal("ours", "theirs", "speed", bound), Goal("ours", "theirs", "time", bound)
    found = Comparison("case", timed, (faster, longer), {"equal": True}, ("a note",))
    assert found.ratio(faster) == pytest.approx(1 / found.ratio(longer))
    assert found.met(longer) == (found.ratio(longer) <= bound)
    low, middle, high = timed[0].quartiles
    assert min(ours) <= low <= middle <= high <= max(ours)
    data = json.loads(json.dumps(found.to_json()))
    assert Comparison.from_json(data) == found
    assert [goal["met"] for goal in data["goals"]] == [found.met(faster), found.met(longer)]
    (first, _) = measured.rows(found)
    assert ("missed" in first[-1]) == (not (found.met(faster) and found.met(longer)))


def test_chained_calls_compute_what_bare_sessions_do(tiny: Setting) -> None:
    found = part("chained")(tiny)
    assert {c.case for c in found} == {
        f"tiny, {call}, batch {batch}" for call in ("InternVL-C", "InternVL-G", "text") for batch in (1, 8)
    }
    assert all(c.facts["equal"] and len(c.timed) == 2 for c in found)


def test_prefixes_are_reused_without_another_answer(chat_bundle: Path) -> None:
    found = part("prefix")(Given(chat_bundle, threads=1, rounds=3, models=("tiny",)))
    assert [c.timed[0].precision for c in found] == ["fp32", "int8"]
    for comparison in found:
        assert comparison.facts["equal"]
        assert comparison.facts["image_positions"] < comparison.facts["prompt_positions"]
        assert [(g.of, g.bound) for g in comparison.goals] == [(t.name, 3.0) for t in comparison.timed[1:]]


def test_the_command_keeps_a_receipt(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Setting, "bundle", lambda self, model, precision: tiny_bundle)
    asked = ["--parts", "chained", "--models", "tiny", "--rounds", "1", "--threads", "1"]
    assert main(["--work", str(tmp_path / "work"), "--out", str(tmp_path), *asked]) == 0
    found = json.loads(measured.receipt_path("chained", tmp_path).read_text())
    assert (found["schema"], found["part"], found["threads"]) == (measured.SCHEMA, "chained", 1)
    assert found["machine"]["cpu"]
    assert "onnxruntime" in found["versions"]
    assert "tiny, InternVL-G, batch 8" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--work", str(tmp_path), "--parts", "other"])


def test_every_part_is_there() -> None:
    assert all(callable(part(name)) for name in PARTS)


def test_a_made_checkpoint_is_made_once(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    for model in ("tiny", "tiny-chat"):
        folder = setting.checkpoint(model)
        made = (folder / "config.json").stat()
        assert setting.checkpoint(model) == folder
        assert (folder / "config.json").stat() == made
        assert open_checkpoint(folder).components
