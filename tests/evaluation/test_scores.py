"""Ranks, intervals and CIDEr against known values."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest

from ivl_export.errors import CapabilityError
from ivl_export.evaluation.scores import cider, mean, ranks, share
from ivl_export.evaluation.tasks import PUBLISHED
from ivl_export.runtime.zero_shot import l2


def test_ranks_are_those_of_a_full_sort() -> None:
    rng = np.random.default_rng(0)
    images = l2(rng.standard_normal((300, 16)))
    owner = np.sort(rng.integers(0, 300, 900))
    texts = l2(images[owner] + rng.standard_normal((900, 16)))
    present = np.unique(owner)
    own = [np.flatnonzero(owner == i) for i in present]
    for queries, items, right in (
        (images[present], texts, own),
        (texts, images, [np.array([i]) for i in owner]),
    ):
        order = np.argsort(-(queries @ items.T), axis=1)
        want = [np.flatnonzero(np.isin(row, r))[0] for row, r in zip(order, right, strict=True)]
        np.testing.assert_array_equal(ranks(queries, items, right), want)


def test_ties_and_nan_do_not_score() -> None:
    same = np.ones((4, 2), np.float32)
    own = [np.array([i]) for i in range(4)]
    assert (ranks(same, same, own) == 3).all()
    assert (ranks(same * np.nan, same, own) == 3).all()


def test_intervals() -> None:
    right = np.arange(100) < 90
    measure = share("top-1", right)
    assert measure.value == pytest.approx(90)
    # Wilson 1927: 90 of 100
    assert measure.low == pytest.approx(82.56, abs=0.01)
    assert measure.high == pytest.approx(94.48, abs=0.01)
    values = np.random.default_rng(0).normal(1.0, 0.5, 2000)
    got = mean("CIDEr", values)
    assert got.value == pytest.approx(100 * values.mean())
    half = 100 * 1.96 * values.std() / np.sqrt(2000)
    assert got.high - got.value == pytest.approx(half, rel=0.15)
    assert got == mean("CIDEr", values)


def test_published_numbers_of_the_paper_average_as_it_says() -> None:
    def values(task: str, mode: str) -> list[float]:
        return [v for (m, _), row in PUBLISHED[task].numbers.items() if m == mode for v in row.values()]

    for mode, retrieval, xtd in (("InternVL-C", 86.6, 95.1), ("InternVL-G", 88.8, 96.6)):
        both = values("flickr30k", mode) + values("coco-retrieval", mode)
        assert np.mean(both) == pytest.approx(retrieval, abs=0.06)
        assert np.mean(values("xtd", mode)) == pytest.approx(xtd, abs=0.06)
    assert np.mean(values("imagenet", "InternVL-C")) == pytest.approx(64.0, abs=0.06)


@pytest.mark.slow
def test_cider() -> None:
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("no java")
    references = [
        ["A red ring stands left of a blue star."],
        ["Two dogs run\nover green grass!"],
        ["the man rides a wave on top of a surfboard"],
    ]
    same = cider(["a red ring stands left of a blue star", "Two dogs run over green grass", ""], references)
    assert same[:2] == [pytest.approx(10.0), pytest.approx(10.0)]  # 10 is the maximum
    assert same[2] == 0
    other = cider(["two dogs sleep", "a red ring", "a man rides a wave"], references)
    assert other[0] < 1 < other[2] < 10


def test_cider_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(CapabilityError, match=r"ivl-export\[eval\]"):
        cider(["a"], [["a"]])
