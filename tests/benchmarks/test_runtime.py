"""The runtime's benchmarks: candidates compute the same, and statements follow from the samples."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ivl_export.benchmarks.runtime import clients, decoding, document, measured, precisions, pytorch
from ivl_export.benchmarks.runtime.measured import Candidate, Comparison, Goal, Timed, side_by_side
from ivl_export.benchmarks.runtime.models import Setting
from ivl_export.benchmarks.runtime.report import PARTS, main, part
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.models.load import load_model
from ivl_export.models.qllama import Visible
from ivl_export.runtime import InternVL
from ivl_export.tests.conftest import TINY

pytestmark = pytest.mark.numeric

SECONDS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=9)


class Given(Setting):
    """A setting whose models are all the tiny golden one, whose bundle is there already."""

    def bundle(self, model: str, precision: str) -> Path:
        return self.work

    def checkpoint(self, model: str) -> Path:
        return TINY


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MORE_SECONDS", 0.0)


@pytest.fixture
def tiny(tiny_bundle: Path) -> Setting:
    return Given(tiny_bundle, threads=1, rounds=3, models=("tiny",), new_tokens=3)


def test_short_calls_have_more_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MORE_SECONDS", 60.0)
    calls = [Candidate("one", lambda: None), Candidate("other", lambda: None)]
    assert [len(t.seconds) for t in side_by_side(calls, rounds=3, least_seconds=0)] == [
        measured.MOST_ROUNDS
    ] * 2


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
@pytest.mark.slow
def test_ratios_and_goals(ours: list[float], theirs: list[float], bound: float) -> None:
    timed = (Timed("ours", "fp32", 2, tuple(ours)), Timed("theirs", "fp32", 2, tuple(theirs)))
    faster, longer = Goal("ours", "theirs", "speed", bound), Goal("ours", "theirs", "time", bound)
    result = Comparison("case", timed, (faster, longer), {"equal": True}, ("a note",))
    assert result.ratio(faster) == pytest.approx(1 / result.ratio(longer))
    assert result.met(longer) == (result.ratio(longer) <= bound)
    low, middle, high = timed[0].quartiles
    assert min(ours) <= low <= middle <= high <= max(ours)
    data = json.loads(json.dumps(result.to_json()))
    assert Comparison.from_json(data) == result
    assert [goal["met"] for goal in data["goals"]] == [result.met(faster), result.met(longer)]
    (first, _) = measured.rows(result)
    assert ("missed" in first[-1]) == (not (result.met(faster) and result.met(longer)))


@pytest.mark.slow
def test_chained_calls_compute_what_bare_sessions_do(tiny: Setting) -> None:
    results = list(part("chained")(tiny))
    assert {c.case for c in results} == {
        f"tiny, {call}, batch {batch}" for call in ("InternVL-C", "InternVL-G", "text") for batch in (1, 8)
    }
    assert all(len(c.timed) == (3 if "text" in c.case else 2) for c in results)


@pytest.mark.slow
def test_prefixes_are_reused_without_another_answer(chat_bundle: Path) -> None:
    result = part("prefix")(Given(chat_bundle, threads=1, rounds=3, models=("tiny",)))
    assert [c.timed[0].precision for c in result] == ["fp32", "int8"]
    for comparison in result:
        assert comparison.facts["equal"]
        assert comparison.facts["image_positions"] < comparison.facts["prompt_positions"]
        assert [(g.of, g.bound) for g in comparison.goals] == [(t.name, 3.0) for t in comparison.timed[1:]]


@pytest.mark.slow
def test_what_is_compared_with_pytorch_computes_the_same(tiny: Setting) -> None:
    model = load_model(TINY)
    with InternVL.load(tiny.work, threads=1) as ours, torch.inference_mode():
        cases = {case: (our(), eager()) for case, our, eager, _ in pytorch.calls(ours, model, 2)}
    assert set(cases) == {"InternVL-C", "InternVL-G", "text"}
    for ours_found, eager_found in cases.values():
        np.testing.assert_allclose(ours_found, eager_found, atol=1e-5)


def test_other_embeddings_are_not_timed(tiny: Setting) -> None:
    ones = np.ones((1, 4), np.float32)
    with pytest.raises(AssertionError, match="not the same embeddings"):
        pytorch.compared("case", {"runtime": lambda: ones, "torch eager": lambda: 2 * ones}, tiny, 1)


@pytest.mark.slow
def test_precisions_say_how_far_they_are_from_fp32(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "BATCHES", (2,))
    for result in part("precisions")(tiny):
        cosines = result.facts["cosine"]
        assert cosines["runtime fp32"] == pytest.approx(1, abs=1e-6)
        assert cosines["runtime int8"] == pytest.approx(1, abs=1e-6)  # the same bundle here
        assert 0.99 < cosines["torch bf16"] < 1
        assert {t.name for t in result.timed} == set(cosines)


@pytest.mark.slow
def test_clients_get_what_a_call_gives(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "REQUESTS", 1)
    for result in part("clients")(tiny):
        assert result.facts["answers"] == clients.CLIENTS
        assert result.facts["apart"] < 1e-5


def test_decoding_is_that_of_the_plain_llama(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the whole sequence, run again for every token."""
    monkeypatch.setattr(decoding, "PROMPT", 5)
    llama = load_model(TINY).qllama
    with ExitStack() as opened:
        generate = next(decoding.generators(tiny, "tiny", 2, opened))[2]
        ids = decoding.prompts(llama.model.config, 2)
        result = generate(4)
    for _ in range(4):
        inputs = torch.from_numpy(ids)
        with torch.inference_mode():
            hidden, _ = llama(llama.embed(inputs), torch.arange(inputs.shape[1])[None], Visible(causal=True))
            new = llama.lm_head(hidden[:, -1]).argmax(-1, keepdim=True)
        ids = np.concatenate([ids, new.numpy()], 1)
    np.testing.assert_array_equal(result, ids[:, 5:])


@pytest.mark.slow
def test_decoding_leaves_out_what_is_not_installed(tiny: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PROMPT", 5)
    monkeypatch.setattr(decoding, "find_spec", lambda name: None)
    results = list(part("decoding")(tiny))
    assert {t.name for c in results for t in c.timed} == {"runtime fp32", "runtime int8"}
    assert [c.facts.get("equal_tokens") for c in results if c.facts] == [
        {"runtime fp32": 1.0, "runtime int8": 1.0}  # the same bundle here
    ] * len(decoding.BATCHES)


def test_the_document_is_not_stale() -> None:
    text = document.DOCUMENT.read_text(encoding="utf-8")
    assert document.render(text) == text, "python -m ivl_export.benchmarks.runtime.document"


def test_a_part_without_a_receipt_says_so(tmp_path: Path) -> None:
    text = document.render(document.DOCUMENT.read_text(encoding="utf-8"), tmp_path)
    assert text.count("Not measured yet") == len(document.TABLES)
    timed = (Timed("ours", "fp32", 1, (0.001, 0.002, 0.003)), Timed("theirs", "fp32", 1, (0.004,) * 3))
    result = Comparison("a case", timed, (Goal("ours", "theirs", "speed", 3.0),), {}, ("a note",))
    measured.keep(measured.receipt("chained", 2, [result]), tmp_path)
    text = document.render(text, tmp_path)
    assert text.count("Not measured yet") == len(document.TABLES) - 1
    assert (
        "| a case | ours | fp32 | 2 | 1.5 to 2.5 | 500 | 2.00x the speed of theirs (goal at least 3," in text
    )
    assert "- a case: a note" in text
    assert document.render(text, tmp_path) == text


def test_a_document_with_other_marks_is_refused() -> None:
    text = document.DOCUMENT.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no part 'other'"):
        document.render(text.replace("begin: chained,", "begin: other,"))
    with pytest.raises(ValueError, match="once"):
        document.render("")


@pytest.mark.slow
def test_the_command_keeps_a_receipt(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Setting, "bundle", lambda self, model, precision: tiny_bundle)
    questions = ["--parts", "chained", "--models", "tiny", "--rounds", "1", "--threads", "1"]
    assert main(["--work", str(tmp_path / "work"), "--out", str(tmp_path), *questions]) == 0
    receipt = json.loads(measured.receipt_path("chained", tmp_path).read_text())
    assert (receipt["schema"], receipt["part"], receipt["threads"]) == (measured.SCHEMA, "chained", 1)
    assert receipt["machine"]["cpu"]
    assert "onnxruntime" in receipt["versions"]
    assert "tiny, InternVL-G, batch 8" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--work", str(tmp_path), "--parts", "other"])


def test_every_part_is_there() -> None:
    assert all(callable(part(name)) for name in PARTS)


def test_a_made_checkpoint_is_made_once(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    for model in ("tiny", "tiny-chat"):
        folder = setting.checkpoint(model)
        result = (folder / "config.json").stat()
        assert setting.checkpoint(model) == folder
        assert (folder / "config.json").stat() == result
        assert open_checkpoint(folder).components


@pytest.mark.slow
def test_tiles_choose_the_tokens_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    setting = Setting(tmp_path, threads=1, rounds=1, models=("tiny-tiles",), new_tokens=5)
    first, further = part("tiles")(setting)
    names = [t.name for t in first.timed]
    assert names == ["runtime fp32", "runtime bf16", "runtime int8", "transformers fp32", "transformers bf16"]
    equal = further.facts["equal_tokens"]
    assert equal["runtime fp32"] == equal["transformers fp32"] == 1
