"""Folders of shards as an index: mapped, searched, refused where they are mixed; the structure on disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq

from ivl_export.errors import IntegrityError, UsageError
from ivl_export.runtime import shards
from ivl_export.runtime.index import Index
from ivl_export.runtime.shards import (
    Embedding,
    ShardReceipt,
    open_folder,
    open_shard,
    shard_name,
    write_shard,
)
from ivl_export.runtime.zero_shot import l2, rank

pytestmark = pytest.mark.numeric
EMBEDDING = Embedding(
    "a" * 64, "m", "fp32", "onnxruntime", "", 8, "float32", "InternVL-C", True, False, "", 0, 8, False
)


def clustered(count: int, width: int = 8, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(20, width))
    return (centres[rng.integers(0, 20, count)] + 0.3 * rng.normal(size=(count, width))).astype(np.float32)


def shard(
    folder: Path,
    number: int,
    of: int,
    vectors: np.ndarray[Any, Any],
    embedding: Embedding = EMBEDDING,
    plan: str = "b" * 64,
) -> Path:
    """Write a shard of ``vectors`` as they are."""
    embedding = replace(embedding, width=vectors.shape[1])
    receipt = ShardReceipt(embedding, plan, number, of, len(vectors), "c" * 64, len(vectors))
    columns: dict[str, Any] = {
        "vector": vectors.astype(embedding.dtype),
        "key": [f"{number}-{i}" for i in range(len(vectors))],
        "kind": ["image"] * len(vectors),
        "sha256": [bytes(32)] * len(vectors),
    }
    write_shard(folder / shard_name(number), receipt, columns)
    return folder / shard_name(number)


def folder_of(folder: Path, vectors: np.ndarray[Any, Any], parts: int = 3, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(np.array_split(vectors, parts)):
        shard(folder, number, parts, part, replace(EMBEDDING, **changes))
    return folder


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 60), width=st.integers(1, 40), group=st.integers(64, 4096),
    dtype=st.sampled_from(["float32", "float16"]),
)  # fmt: skip
def test_what_is_mapped_is_what_was_written(
    rows: int, width: int, group: int, dtype: Any, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "GROUP_BYTES", group)
        vectors = clustered(rows, width, rows).astype(dtype)
        path = shard(tmp_path, 0, 1, vectors, replace(EMBEDDING, dtype=dtype))
        first = path.read_bytes()
        shard(tmp_path, 0, 1, vectors, replace(EMBEDDING, dtype=dtype))
        assert path.read_bytes() == first
    opened = open_shard(path)
    blocks = [np.zeros((0, width), dtype), *opened.blocks]
    assert np.array_equal(np.concatenate(blocks), vectors)
    assert all(isinstance(b, np.memmap) and b.offset % 64 == 0 for b in opened.blocks)
    table = pq.read_table(path)
    assert table["vector"].to_pylist() == vectors.tolist()
    assert opened.names() == table["key"].to_pylist()


@pytest.mark.parametrize("changes", [{}, {"dtype": "float16"}, {"unit": False}])
def test_a_folder_is_searched_where_it_is(tmp_path: Path, changes: dict[str, Any]) -> None:
    vectors = clustered(200)
    stored = vectors * 3 if changes.get("unit") is False else l2(vectors)
    folder_of(tmp_path / "f", stored, **changes)
    index = Index.open(tmp_path / "f")
    assert (len(index), index.width, index.embedding) == (200, 8, replace(EMBEDDING, **changes))
    queries = clustered(5, seed=1)
    for block in (7, 1000):
        places, scores = index.search(queries, 6, block=block)
        want_places, want_scores = rank(queries, vectors, 6)
        np.testing.assert_allclose(scores, want_scores, atol=2e-3 if changes.get("dtype") else 1e-6)
        if not changes.get("dtype"):
            assert np.array_equal(places, want_places)
    assert [index.names[i] for i in (0, 66, 67, -1)] == ["0-0", "0-66", "1-0", "2-65"]
    assert index.names[65:69] == ["0-65", "0-66", "1-0", "1-1"]
    with pytest.raises(IndexError):
        index.names[200]
    with pytest.raises(UsageError, match="Nothing can be added"):
        index.add(vectors, map(str, range(200)))
    np.testing.assert_allclose(index.vectors(), l2(vectors), atol=1e-3)
    index.save(tmp_path / "one")
    assert Index.load(tmp_path / "one").names == list(index.names)
    if not changes:
        assert all(
            np.shares_memory(piece, index._blocks[i]) for i, (_, piece) in enumerate(index._pieces(999))
        )


def test_mixed_and_missing_shards_are_refused(tmp_path: Path) -> None:
    folder, part = folder_of(tmp_path / "f", clustered(30)), clustered(10)
    middle = folder / shard_name(1)
    kept = middle.read_bytes()
    for change, plan, said in (
        ({"bundle": "d" * 64}, "b" * 64, "differ in bundle: aaaaaaaaaaaaaaaa, dddddddddddddddd"),
        ({"mode": "InternVL-G"}, "b" * 64, "differ in mode: InternVL-C, InternVL-G"),
        ({"unit": False}, "b" * 64, "differ in unit"),
        ({}, "e" * 64, "of two plans"),
    ):
        shard(folder, 1, 3, part, replace(EMBEDDING, **change), plan)
        with pytest.raises(IntegrityError, match=said):
            Index.open(folder)
    middle.unlink()
    with pytest.raises(IntegrityError, match=r"2 of 3 shards. shard-000001.parquet is missing"):
        Index.open(folder)
    for damaged in (kept[:-9], b"", kept[:200], b"PAR1" + bytes(50) + b"PAR1"):
        middle.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"shard-000001.parquet is not a whole shard"):
            Index.open(folder)
    pq.write_table(pa.table({"vector": [1.0]}), middle)
    with pytest.raises(IntegrityError, match="not a whole shard"):
        Index.open(folder)
    middle.write_bytes(kept)
    shutil.copy(middle, folder / shard_name(7))
    with pytest.raises(IntegrityError, match="twice"):
        Index.open(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(IntegrityError, match="no shard in it"):
        Index.open(tmp_path / "none")
    assert open_folder(folder_of(tmp_path / "again", clustered(30))).rows == 30


def test_the_structure_on_disk_finds_what_exact_search_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    from ivl_export.runtime import ivf

    monkeypatch.setattr(ivf, "CHUNK", 300)
    monkeypatch.setattr(ivf, "PART_BYTES", 8 * 900)
    folder = folder_of(tmp_path / "f", l2(clustered(2000)))
    with pytest.raises(UsageError, match="no search structure"):
        Index.open(folder, "faiss")
    with pytest.raises(UsageError, match="3000 lists"):
        Index.build(folder, 3000)
    assert Index.build(folder, 16) == folder / "ivf"
    assert sorted(p.name for p in (folder / "ivf").iterdir()) == [
        "ivf.json", "part-0000.faiss", "part-0001.faiss", "part-0002.faiss"
    ]  # fmt: skip
    moved = tmp_path / "moved"
    folder.rename(moved)
    index, queries = Index.open(moved, "faiss"), clustered(40, seed=3)
    want, scores = Index.open(moved).search(queries, 10)
    for probes, least in ((16, 0.99), (4, 0.8)):
        places, own = index.search(queries, 10, probes=probes)
        found = np.mean([len({*a} & {*b}) / 10 for a, b in zip(places.tolist(), want.tolist(), strict=True)])
        assert found >= least
    np.testing.assert_allclose(own[:, 0], scores[:, 0], atol=0.05)
    assert index.search(queries, 3000)[0].shape == (40, 2000)
    part = moved / "ivf" / "part-0001.faiss"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"part-0001.faiss is damaged"):
        Index.open(moved, "faiss")
    part.unlink()
    with pytest.raises(IntegrityError, match="cannot be opened"):
        Index.open(moved, "faiss")
    Index.build(moved, 16)
    folder_of(moved, l2(clustered(2000, seed=8)), unit=False)
    with pytest.raises(IntegrityError, match="other shards"):
        Index.open(moved, "faiss")
