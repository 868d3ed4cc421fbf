"""The README's performance table agrees with the receipts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ivl_export.benchmarks import readme
from ivl_export.profiles.measure.chat_latency import ANSWER, FIRST, NEXT, OTHER
from ivl_export.profiles.measure.receipt import write
from ivl_export.tests.profiles.made_profiles import made_case, made_profile

TEXT = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"


def test_the_readme_is_not_stale() -> None:
    assert readme.receipts()
    assert readme.main(["--check"]) == 0, "run python -m ivl_export.benchmarks.readme"


def test_the_table_is_written_from_the_receipts(tmp_path: Path) -> None:
    case = made_case(readme.CALLS[0], [4.0] * 20, kind="chained")
    write(made_profile([case]).to_json(), tmp_path / "one.json")
    (tmp_path / "other.json").write_text(json.dumps({"title": "a receipt of something else"}))
    new = readme.render(TEXT, readme.receipts(tmp_path))
    assert new.startswith(f"before\n{readme.BEGIN}\n| bundle |")
    assert new.endswith(f"{readme.END}\nafter\n")
    assert "| made-up | onnxruntime fp8 | 1 | 4 |  |  |  | 250 | 12% |  |" in new  # a floor of 0.5 ms
    assert "~" not in new
    assert readme.render(new, readme.receipts(tmp_path)) == new
    unsteady = replace(case, measurement=replace(case.measurement, ended="time limit"))
    assert "| ~4 |" in readme.render(TEXT, [made_profile([unsteady])])


def test_chats_have_a_table_of_their_own() -> None:
    times = {FIRST: 8.0, NEXT: 2.0, OTHER: 3.0, ANSWER: 60.0}
    cases = [made_case(name, [ms] * 20, kind="chained") for name, ms in times.items()]
    cases[-1] = replace(cases[-1], items=30, unit="tokens")
    new = readme.render(TEXT, [made_profile(cases)])
    assert "| chat bundle | on | first token ms |" in new
    assert "| made-up | onnxruntime fp8 | 8 | 2 | 3 | 2 | 500 |" in new
    assert "(30 tokens)" in new
    assert "| chat bundle |" not in readme.render(
        TEXT, [made_profile([made_case(readme.CALLS[0], [4.0] * 20)])]
    )


def test_marks_must_occur_once() -> None:
    for text in ("nothing", readme.BEGIN, TEXT + TEXT):
        with pytest.raises(ValueError, match="must each occur once"):
            readme.render(text, [])


def test_a_changed_receipt_makes_it_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text(TEXT)
    monkeypatch.setattr(readme, "README", page)
    assert readme.main(["--check"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert page.read_text() == TEXT
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
