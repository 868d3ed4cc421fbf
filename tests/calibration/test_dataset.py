from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ivl_export.calibration.dataset import FALLBACK_CAPTIONS, CalibrationSet, prompt_for
from ivl_export.calibration.sources import open_calibration, scenes_calibration
from ivl_export.errors import InputError
from ivl_export.inputs.preprocess import ImageSettings, preprocess_images
from ivl_export.inputs.tokenizer import Tokenizer
from ivl_export.models.calls import LONGEST_STEP


def names(chosen: CalibrationSet) -> list[str]:
    return [sample.name for sample in chosen.samples]


def test_folder_with_sidecar_captions(photos: Path) -> None:
    chosen = open_calibration(photos)
    assert sorted(names(chosen)) == sorted([f"{i}.jpg" for i in range(11)] + ["more/11.png"])
    texts = {s.name: s.text for s in chosen.samples}
    assert texts["0.jpg"] == "a red circle"
    assert texts["more/11.png"] == "一个红色的小圆形"
    assert texts["1.jpg"] in FALLBACK_CAPTIONS
    assert chosen.without_caption == 10
    assert not chosen.synthetic
    assert any("10 of 12 images have no caption" in notice for notice in chosen.notices)
    assert any("small: 12 samples" in notice for notice in chosen.notices)
    assert any("512 samples were requested, the set has 12" in notice for notice in chosen.notices)


def test_a_small_set_says_what_it_is_split_into(photos: Path) -> None:
    first, held_out = open_calibration(photos, 20).split(32)
    assert (len(first), len(held_out)) == (9, 3)
    said = replace(first, requested=20).notices
    assert any("20 samples were requested, the set has 12: 9 to calibrate on, 3 held out." in n for n in said)


def test_the_choice_depends_on_names_and_seed_only(photos: Path, tmp_path: Path) -> None:
    chosen = open_calibration(photos, 6)
    assert open_calibration(photos, 6) == chosen
    assert len(chosen) == 6
    assert names(open_calibration(photos, 12))[:6] == names(chosen)
    assert names(open_calibration(photos, 6, seed=1)) != names(chosen)
    moved = photos.rename(tmp_path / "elsewhere")
    assert open_calibration(moved, 6).hash == chosen.hash


def test_the_hash_is_of_the_content(photos: Path) -> None:
    before = open_calibration(photos)
    (photos / "1.txt").write_text("another caption")
    captioned = open_calibration(photos)
    (photos / "1.jpg").write_bytes((photos / "2.jpg").read_bytes())
    changed = open_calibration(photos)
    assert names(before) == names(captioned) == names(changed)
    assert len({before.hash, captioned.hash, changed.hash}) == 3


def test_batches_are_the_models_inputs(photos: Path, settings: ImageSettings, tokenizer: Tokenizer) -> None:
    chosen = open_calibration(photos)
    batches = list(chosen.batches(settings, tokenizer, 5))
    assert [len(b.pixel_values) for b in batches] == [5, 5, 2]
    assert chosen.steps(5) == 3
    images = [s.image for s in chosen.samples]
    assert all(isinstance(image, Path) for image in images)
    want = preprocess_images([image for image in images if isinstance(image, Path)], settings)
    np.testing.assert_array_equal(np.concatenate([b.pixel_values for b in batches]), want)
    index = names(chosen).index("0.jpg")
    batch, row = batches[index // 5], index % 5
    ids, lengths = tokenizer.encode_contrastive(["a red circle"])
    assert batch.texts.lengths[row] == lengths[0]
    np.testing.assert_array_equal(batch.texts.input_ids[row, : lengths[0]], ids[0, : lengths[0]])
    assert batch.texts.caption_ids[row] == tuple(tokenizer.encode_prompt("English caption:a red circle"))
    assert all(len(ids) <= LONGEST_STEP for b in batches for ids in b.texts.caption_ids)


def test_prompt_follows_the_language() -> None:
    assert prompt_for("a cat") == "English caption:"
    assert prompt_for("一只猫") == "中文描述:"


def test_corrupt_images_are_skipped_counted_and_listed(photos: Path) -> None:
    (photos / "3.jpg").write_bytes(b"no image")
    chosen = open_calibration(photos)
    assert len(chosen) == 11
    assert [s.name for s in chosen.skipped] == ["3.jpg"]
    assert any("1 files were skipped, the first: 3.jpg" in notice for notice in chosen.notices)
    assert chosen.to_json()["skipped"][0]["name"] == "3.jpg"


def test_over_ten_percent_corrupt_fails(photos: Path) -> None:
    for i in (3, 4):
        data = (photos / f"{i}.jpg").read_bytes()
        (photos / f"{i}.jpg").write_bytes(data[: len(data) // 3])
    with pytest.raises(InputError, match=r"2 of 12 calibration images.*over 10%") as error:
        open_calibration(photos)
    assert "3.jpg" in str(error.value)
    assert error.value.exit_code == 3


def test_unreadable_sidecar_is_a_skip(photos: Path) -> None:
    (photos / "0.txt").write_bytes(b"\xff\xfe\x00")
    assert [s.name for s in open_calibration(photos).skipped] == ["0.jpg"]


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "file"])
def test_no_data(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind in ("empty", "text"):
        path.mkdir()
    if kind == "text":
        (path / "readme.md").write_text("no images here")
    if kind == "file":
        path.write_text("x")
    with pytest.raises(InputError, match="No calibration data"):
        open_calibration(path)


def manifest(folder: Path, rows: Sequence[object]) -> Path:
    path = folder / "set.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_jsonl(photos: Path) -> None:
    rows = [{"image": f"{i}.jpg", "caption": f"caption {i}"} for i in range(3)]
    chosen = open_calibration(manifest(photos, [*rows, {"image": "more/11.png"}, rows[0]]))
    assert {s.name: s.text for s in chosen.samples} == {
        "0.jpg": "caption 0",
        "1.jpg": "caption 1",
        "2.jpg": "caption 2",
        "more/11.png": "一个红色的小圆形",
    }


def test_jsonl_names_a_missing_image(photos: Path) -> None:
    rows = [{"image": f"{i}.jpg", "caption": "c"} for i in range(11)] + [
        {"image": "none.jpg", "caption": "c"}
    ]
    chosen = open_calibration(manifest(photos, rows))
    assert [(s.name, s.reason) for s in chosen.skipped] == [("none.jpg", "There is no such file.")]


@pytest.mark.parametrize(
    "escape", ["../outside.jpg", "more/../../outside.jpg", "/etc/passwd", "link/outside.jpg"]
)
def test_jsonl_cannot_leave_its_folder(escape: str, photos: Path) -> None:
    outside = photos.parent / "outside.jpg"
    outside.write_bytes((photos / "0.jpg").read_bytes())
    (photos / "link").symlink_to(photos.parent)
    with pytest.raises(InputError, match=r"line 2 (points outside|names a link out of) the data folder"):
        open_calibration(manifest(photos, [{"image": "0.jpg"}, {"image": escape}]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ("3", "no usable image"),
        ('{"caption": "x"}', "no usable image"),
        ('{"image": "0.jpg", "caption": 3}', "no usable image"),
        ('{"image": "a\\u0000.jpg"}', "impossible path"),
        ('{"image": "0.jpg", "caption": "\\ud800"}', "impossible text"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_bad_manifests(line: str, message: str, photos: Path) -> None:
    path = photos / "set.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        open_calibration(path)


def test_linked_folders_are_not_entered(photos: Path, tmp_path: Path) -> None:
    (photos / "loop").symlink_to(photos)
    assert len(open_calibration(photos)) == 12


def test_names_that_are_no_utf8(photos: Path) -> None:
    os.rename(photos / "5.jpg", os.fsencode(photos) + b"/\xff.jpg")  # noqa: PTH104
    chosen = open_calibration(photos)
    assert "\\udcff.jpg" in names(chosen)
    json.dumps(chosen.to_json(), ensure_ascii=False).encode()
    assert len(chosen.hash) == 64


def test_a_file_that_changes_in_use_is_noticed(photos: Path, settings: ImageSettings) -> None:
    sample = open_calibration(photos).samples[0]
    assert isinstance(sample.image, Path)
    sample.image.write_bytes((photos / "0.jpg").read_bytes() + b" ")
    with pytest.raises(InputError, match="changed while it was in use"):
        sample.pixels(settings)


def test_split_is_disjoint_and_covers(photos: Path) -> None:
    whole = open_calibration(photos)
    first, contents = whole.split(64)
    assert names(first) + names(contents) == names(whole)
    assert len(contents) == 3
    assert len(whole.split(2)[1]) == 2
    assert first.hash != whole.hash
    one = open_calibration(photos, 1)
    assert one.split(64) == (one, one)


def test_progress(photos: Path) -> None:
    seen: list[tuple[int, int]] = []
    open_calibration(photos, 4, progress=lambda count, total: seen.append((count, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_scenes_are_seeded_and_say_that_they_are_drawn(settings: ImageSettings, tokenizer: Tokenizer) -> None:
    chosen = scenes_calibration(40)
    assert chosen.synthetic
    assert any("synthetic" in notice for notice in chosen.notices)
    assert chosen == scenes_calibration(40)
    assert chosen.hash != scenes_calibration(40, seed=1).hash
    assert chosen.without_caption == 0
    batch = next(chosen.batches(settings, tokenizer, 4))
    assert batch.pixel_values.shape == (4, 3, 28, 28)
    assert np.ptp(batch.pixel_values) > 1


def test_zero_samples(photos: Path) -> None:
    with pytest.raises(InputError, match="at least 1"):
        open_calibration(photos, 0)
