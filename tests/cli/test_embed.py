"""``ivl-export embed`` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pyarrow")

import ivl_export
from ivl_export.cli import main
from ivl_export.runtime import Index

pytestmark = pytest.mark.numeric


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def test_embed_verify_search(
    tiny_bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["embed", str(tiny_bundle), str(photos), "--out", str(tmp_path / "out"), "-O", "threads=1"]
    line += ["-O", "shard-items=4"]

    def printed(*more: str) -> Any:
        assert main([*line, "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    planned = printed("--dry-run")
    assert (planned["inputs"], planned["shards"], planned["bytes_of_vectors"]) == (6, 2, 6 * 48 * 4)
    assert not (tmp_path / "out").exists()
    result = printed()
    assert (result["items"], result["rows"], result["quarantined"], result["plan"]) == (
        6,
        5,
        1,
        planned["plan"],
    )
    assert printed()["reused"] == 2
    assert printed("--verify", "50%")["items"] == 3
    index = Index.open(tmp_path / "out")
    with ivl_export.load(tiny_bundle, threads=1) as model:
        places, scores = index.search(model.encode_image([photos / "3.png"]), 1)
    assert (index.names[places[0, 0]], round(float(scores[0, 0]), 4)) == ("3.png", 1.0)
    for more, words in (
        ((), ["in quarantine", "2 of them from before"]),
        (("--verify", "2"), ["right", "2 inputs"]),
        (("--dry-run",), ["float32 [48]"]),
    ):
        assert main([*line, *more]) == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words), out
    for more, code, word in (
        (("--mode", "G"), 2, "other settings"),
        (("--verify", "x"), 2, "--verify"),
        (("--kinds", "sound"), 2, "no kind 'sound'"),
        (("--dtype", "int8"), 2, "Unknown dtype"),
        (("-O", "resize=round"), 2, "resize"),
    ):
        assert main([*line, *more]) == code
        assert word in capsys.readouterr().err
    (tmp_path / "out" / "shard-000001.parquet").unlink()
    assert main([*line, "--verify", "1"]) == 8
    assert "shard-000001" in capsys.readouterr().err


def test_from_python(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    result = ivl_export.embed_folder(tiny_bundle, photos, tmp_path / "out", threads=1, dtype="float16")
    assert (result.rows, result.quarantined, result.shards) == (5, 1, 1)
    embedding = Index.open(tmp_path / "out").embedding
    assert embedding is not None
    assert embedding.dtype == "float16"
    again = ivl_export.embed_folder(tiny_bundle, [photos], tmp_path / "out", threads=1, dtype="float16")
    assert again.embedded == 0
