"""The retrieval index: exact search, round trips, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivl_export.errors import CapabilityError, InputError, IntegrityError, UsageError
from ivl_export.runtime.index import Index, Kind
from ivl_export.runtime.zero_shot import rank

pytestmark = pytest.mark.numeric


def embeddings(count: int, width: int = 8, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32) * 3


@settings(max_examples=30, deadline=None)
@given(items=st.integers(0, 40), queries=st.integers(0, 5), top=st.integers(1, 50), block=st.integers(1, 20))
def test_search_ranks_as_all_cosines_do(items: int, queries: int, top: int, block: int) -> None:
    index = Index(8)
    stored = embeddings(items)
    for start in range(0, items, 7):
        part = stored[start : start + 7]
        index.add(part, [f"image {start + i}" for i in range(len(part))])
    places, scores = index.search(embeddings(queries, seed=1), top, block=block)
    want_places, want_scores = rank(embeddings(queries, seed=1), stored, top)
    assert places.shape == scores.shape == (queries, min(top, items))
    assert np.array_equal(places, want_places)
    np.testing.assert_allclose(scores, want_scores, rtol=1e-5, atol=1e-6)
    assert len(index) == items


@pytest.mark.parametrize("kind", ["numpy", "faiss"])
def test_an_index_survives_its_file(tmp_path: Path, kind: Kind) -> None:
    if kind == "faiss":
        pytest.importorskip("faiss")
    index = Index(8, kind)
    index.add(embeddings(20), [f"图 {i}" for i in range(20)])
    index.save(tmp_path / "index.safetensors")
    opened = Index.load(tmp_path / "index.safetensors")
    assert opened.names == index.names
    assert opened.kind == kind
    query = embeddings(3, seed=1)
    result, want = opened.search(query), index.search(query)
    assert np.array_equal(result[0], want[0])
    np.testing.assert_allclose(result[1], want[1], rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["index.safetensors"]


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF4,Flat"])
def test_faiss_finds_what_numpy_finds(factory: str) -> None:
    pytest.importorskip("faiss")
    plain, other = Index(8), Index(8, "faiss", factory)
    for index in (plain, other):
        index.add(embeddings(300), map(str, range(300)))
    places, _ = other.search(embeddings(300), 1)
    assert np.mean(places[:, 0] == np.arange(300)) > 0.95, "each item is its own nearest"
    if factory == "Flat":
        want = plain.search(embeddings(20, seed=1), 5)
        assert np.array_equal(other.search(embeddings(20, seed=1), 5)[0], want[0])


def test_what_does_not_fit_is_refused() -> None:
    index = Index(8)
    with pytest.raises(InputError, match=r"\[2, 9\] with 2 names"):
        index.add(embeddings(2, 9), ["a", "b"])
    with pytest.raises(InputError, match="with 1 names"):
        index.add(embeddings(2), ["a"])
    with pytest.raises(InputError, match="not finite"):
        index.add(np.full((1, 8), np.nan, np.float32), ["a"])
    with pytest.raises(InputError, match="These queries"):
        index.search(embeddings(2, 9))
    with pytest.raises(UsageError, match="top is 0"):
        index.search(embeddings(2), 0)
    with pytest.raises(UsageError, match="Unknown index"):
        Index(8, "annoy")  # type: ignore[arg-type]
    assert len(index) == 0


def test_without_faiss_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(CapabilityError, match=r"ivl-export\[faiss\]"):
        Index(8, "faiss")


@pytest.mark.parametrize("names", ["[]", "7", "not json", '["a", 1]'])
def test_files_that_are_no_index_are_integrity_errors(tmp_path: Path, names: str) -> None:
    from safetensors.numpy import save_file

    about = {"names": names, "kind": "numpy", "factory": "Flat"}
    save_file({"embeddings": embeddings(2)}, tmp_path / "bad", about)
    (tmp_path / "empty").write_bytes(b"")
    for path in (tmp_path / "bad", tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(IntegrityError, match="is not an index"):
            Index.load(path)
