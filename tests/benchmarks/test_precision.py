"""docs/precision.md agrees with its receipt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivl_export.benchmarks.precision import document
from ivl_export.benchmarks.precision.outliers import measure
from ivl_export.quantization.recipe import Recipe, shipped_recipes

pytestmark = pytest.mark.numeric


def test_the_document_equals_its_receipt() -> None:
    text = document.DOCUMENT.read_text(encoding="utf-8")
    assert document.render(text) == text, "python -m ivl_export.benchmarks.precision.report --document"


def test_a_missing_or_strange_table_is_refused() -> None:
    text = document.DOCUMENT.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no table 'other'"):
        document.render(text.replace("begin: outliers,", "begin: other,"))
    with pytest.raises(ValueError, match="once"):
        document.render("")


def test_every_shipped_recipe_and_a_searched_one_were_measured() -> None:
    receipt = json.loads(document.RECEIPT.read_text(encoding="utf-8"))
    measured = {row["recipe"] for row in receipt["recipes"]}
    assert measured <= {*shipped_recipes(), "mixed"}
    assert measured >= {"bf16", "fp8", "fp8-attention", "int8", "int8-smoothquant", "int4-weight", "mixed"}
    (mixed,) = (row for row in receipt["recipes"] if row["recipe"] == "mixed")
    assert max(100 * (mixed["reference"][t] - mixed["tasks"][t]) for t in mixed["tasks"]) <= 0.3 + 1e-9
    assert Recipe.from_json(mixed["search"]["recipe"]).quantises


def test_receipts_of_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = json.loads(document.RECEIPT.read_text(encoding="utf-8"))
    tasks = {"classify": {"accuracy": 0.5}, "text_to_image": {"accuracy": 0.25}}
    scores = {"InternVL-C": tasks, "InternVL-G": tasks, "caption": {"en": {"accuracy": 0.125}}}
    settings = {"stage": 2, "teacher": True, "steps": 300}
    by_name = {
        "recipe": "w4a8",
        "settings": settings,
        "seconds": 90.0,
        "scores": {"ptq": scores, "qat": scores},
    }
    (tmp_path / "qat-x.json").write_text(json.dumps(by_name))
    monkeypatch.setattr(document, "RECEIPTS", tmp_path)
    _, _, before, after = document.finetuned(receipt)
    assert list(before) == [
        "w4a8", "the fp32 model", "300", "1.5", "before", "50.0%", "25.0%", "50.0%", "25.0%", "12.5%"
    ]  # fmt: skip
    assert list(after)[4] == "after"


@pytest.mark.slow
def test_max_fails_on_outliers_and_the_defaults_do_not(tmp_path: Path) -> None:
    """As in the document, at a fifth of the width."""
    losses = measure(tmp_path, width=640, samples=2)
    db = {(r["scheme"], r["algorithm"], r["smooth"], r["outliers"]): r["sqnr_db"] for r in losses["rows"]}
    assert losses["largest_over_median"]["with"]["vision_model.encoder.layers.0.attn.qkv"] > 40
    assert db["int8", "max", False, True] < db["int8", "max", False, False] - 10
    for scheme, smooth in (("fp8", False), ("int8", True)):
        assert db[scheme, "max", smooth, True] == pytest.approx(db[scheme, "max", smooth, False], abs=1)
        assert db[scheme, "max", smooth, True] > db["int8", "max", False, True] + 8
