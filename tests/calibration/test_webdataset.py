"""WebDataset shards as calibration sets: pairs found, the rest refused by name."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ivl_export.calibration.sources import open_calibration
from ivl_export.errors import InputError
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.webdataset import braced


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def shard(path: Path, files: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for n in range(3):
        files: dict[str, bytes | tarfile.TarInfo] = {}
        for i in range(4):
            files[f"{n}-{i}.png"] = picture(10 * n + i)
            if i == 0:
                files[f"{n}-{i}.txt"] = f"caption {n} in text\n".encode()
            if i == 1:
                texts = {"caption": f"caption {n} in json", "alt": "other"}
                files[f"{n}-{i}.json"] = json.dumps(texts).encode()
        shard(folder / f"train-{n:04d}.tar", files)
    return folder


@pytest.mark.parametrize("named", ["", "train-{0000..0002}.tar", "train-000{0,1,2}.tar"])
def test_images_and_captions_under_one_key(named: str, shards: Path, tmp_path: Path) -> None:
    chosen = open_calibration(shards / named)
    assert len(chosen) == 12
    captions = {s.name: s.caption for s in chosen.samples}
    assert captions["train-0001.tar/1-0.png"] == "caption 1 in text"
    assert captions["train-0001.tar/1-1.png"] == "caption 1 in json"
    assert chosen.without_caption == 6
    assert chosen.hash == open_calibration(shards).hash
    assert list(tmp_path.iterdir()) == [shards], "nothing is unpacked"


def test_the_sample_is_the_same_and_seeded(shards: Path) -> None:
    few = [open_calibration(shards, 5, seed) for seed in (0, 0, 1)]
    assert [s.name for s in few[0].samples] == [s.name for s in few[1].samples]
    assert few[0].hash == few[1].hash != few[2].hash
    one = open_calibration(shards / "train-0000.tar")
    assert {s.name for s in one.samples} == {f"train-0000.tar/0-{i}.png" for i in range(4)}


def test_pixels_are_those_of_the_member(shards: Path, settings: ImageSettings) -> None:
    sample = next(s for s in open_calibration(shards).samples if s.name.endswith("2-3.png"))
    (shards / "alone.png").write_bytes(picture(23))
    alone = open_calibration(_jsonl(shards / "alone.png"))
    np.testing.assert_array_equal(sample.pixels(settings), alone.samples[0].pixels(settings))
    shard(shards / "train-0002.tar", {"2-3.png": picture(99)})
    with pytest.raises(InputError, match=r"changed while it was in use|cut off"):
        sample.pixels(settings)


def _jsonl(image: Path) -> Path:
    path = image.with_suffix(".jsonl")
    path.write_text(json.dumps({"image": image.name}))
    return path


def test_the_captions_key_can_be_named(shards: Path) -> None:
    named = open_calibration(shards, columns=("alt",))
    assert {s.caption for s in named.samples} == {"other", None}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "/etc/passwd"
    shard(tmp_path / "a.tar", {"0.png": picture(0), "a.png": info})
    with pytest.raises(InputError, match=r"'a\.png' is refused\. It is not a regular file"):
        open_calibration(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png"])
def test_names_that_leave_the_archive_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leaves the archive"):
        open_calibration(shard(tmp_path / "a.tar", {name: picture(0)}))


def test_what_is_broken_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for content in (b"no tar at all" * 100, b"\x1f\x8b" + b"0" * 600):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read as a shard.*gunzip"):
            open_calibration(path)
    with pytest.raises(InputError, match="cannot be read as a shard"):
        open_calibration(tmp_path / "none-{0..3}.tar")
    with pytest.raises(InputError, match=r"No calibration data .* WebDataset shards"):
        open_calibration(shard(path, {"a.txt": b"alone"}))
    files = {f"{i}.png": picture(i) for i in range(12)}
    chosen = open_calibration(shard(path, {**files, "bad.png": b"no image"}))
    assert [s.name for s in chosen.skipped] == ["a.tar/bad.png"]
    chosen = open_calibration(shard(path, {**files, "3.json": b"{"}))
    assert [s.reason for s in chosen.skipped] != []
    # Its last members are gone.
    shard(path, files)
    path.write_bytes(path.read_bytes()[:12_000])
    with pytest.raises(InputError, match=r"cannot be read as a shard|cut off"):
        open_calibration(path)


@given(st.integers(0, 300), st.integers(0, 40), st.integers(1, 5))
def test_ranges_in_braces(first: int, count: int, width: int) -> None:
    last = first + count
    names = braced(f"s/a-{{{first:0{width}d}..{last}}}.tar")
    assert names == [f"s/a-{n:0{len(f'{first:0{width}d}')}d}.tar" for n in range(first, last + 1)]


def test_braces() -> None:
    assert braced("a.tar") == ["a.tar"]
    assert braced("{a,b}-{0..1}.tar") == ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]
    for bomb in ("{0..9999999999}.tar", "{0..9999}{0..9999}{0..9999}.tar"):
        with pytest.raises(InputError, match="over 100,000 shards"):
            braced(bomb)
