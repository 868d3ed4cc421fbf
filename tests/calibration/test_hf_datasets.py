"""Hugging Face data sets on disk as calibration sets, in the layouts that the datasets library writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivl_export.calibration.sources import open_calibration
from ivl_export.errors import InputError, UsageError
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.tests.calibration.test_webdataset import picture

pa = pytest.importorskip("pyarrow")
COUNT = 11


def table(column: str = "image", caption: str = "caption", **more: Any) -> Any:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(COUNT)]
    texts = [f"a photo number {i}" if i % 2 else None for i in range(COUNT)]
    return pa.table({column: pa.array(rows, image), caption: pa.array(texts, pa.string()), **more})


def saved(folder: Path, data: Any) -> Path:
    """As ``Dataset.save_to_disk`` does."""
    folder.mkdir(parents=True)
    half = data.num_rows // 2
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for name, part in zip(names, (data.slice(0, half), data.slice(half)), strict=True):
        with pa.ipc.new_stream(str(folder / name), data.schema) as writer:
            writer.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def snapshot(folder: Path, data: Any) -> Path:
    """A hub data set as a downloaded folder."""
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    pq.write_table(data, folder / "data" / "train-00000-of-00001.parquet", row_group_size=4)
    (folder / "README.md").write_text("a data set")
    return folder


@pytest.mark.parametrize("write", [saved, snapshot])
def test_rows_are_samples(write: Any, tmp_path: Path, settings: ImageSettings) -> None:
    chosen = open_calibration(write(tmp_path / "set", table()))
    assert (len(chosen), chosen.without_caption) == (COUNT, 6)
    by_digest = {s.digest: s for s in chosen.samples}
    (tmp_path / "photos").mkdir()
    for i in range(COUNT):
        (tmp_path / "photos" / f"{i}.png").write_bytes(picture(i))
    for photo in open_calibration(tmp_path / "photos").samples:
        row = by_digest[photo.digest]
        number = int(photo.name.removesuffix(".png"))
        assert row.caption == (f"a photo number {number}" if number % 2 else None)
        np.testing.assert_array_equal(row.pixels(settings), photo.pixels(settings))
    few = [open_calibration(tmp_path / "set", 4, seed).hash for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_several_splits_must_be_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        saved(tmp_path / "set" / split, table())
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match="They are test, train"):
        open_calibration(tmp_path / "set")
    assert len(open_calibration(tmp_path / "set" / "test")) == COUNT


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    lists = pa.array([[f"first {i}", "second"] for i in range(COUNT)], pa.list_(pa.string()))
    result = open_calibration(snapshot(tmp_path / "a", table("jpg", "note", captions=lists)))
    assert all(s.caption is not None and s.caption.startswith("first") for s in result.samples)
    odd = snapshot(tmp_path / "b", table("shown", "said"))
    with pytest.raises(InputError, match=r"no image column\. It has shown \(struct.*-O calib-columns"):
        open_calibration(odd)
    named = open_calibration(odd, columns=("shown", "said"))
    assert {s.caption for s in named.samples} == {None, *(f"a photo number {i}" for i in range(1, COUNT, 2))}
    with pytest.raises(InputError, match="no column 'x'"):
        open_calibration(odd, columns=("shown", "x"))
    with pytest.raises(InputError, match="no image column 'said'"):
        open_calibration(odd, columns=("said",))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.png").write_bytes(picture(0))
    with pytest.raises(UsageError, match="has no columns"):
        open_calibration(tmp_path / "c", columns=("image",))


def test_images_by_path_stay_inside(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (tmp_path / "outside.png").write_bytes(picture(1))

    def named(folder: str, path: str) -> Path:
        rows = [{"bytes": None, "path": path}]
        return snapshot(tmp_path / folder, pa.table({"image": pa.array(rows, image)}))

    inner = named("in", "0.png")
    (inner / "0.png").write_bytes(picture(0))
    assert len(open_calibration(inner)) == 1
    with pytest.raises(InputError, match="is not below"):
        open_calibration(named("out", "../outside.png"))


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "set", table())
    file = next(folder.rglob("*.parquet"))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match="train-00000-of-00001.parquet cannot be read".replace(".", r"\.")):
        open_calibration(folder)
    arrow = saved(tmp_path / "arrow", table())
    (arrow / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}')
    with pytest.raises(InputError, match="outside the data folder"):
        open_calibration(arrow)
    (arrow / "state.json").write_text("[]")
    with pytest.raises(InputError, match="lists no data files"):
        open_calibration(arrow)
