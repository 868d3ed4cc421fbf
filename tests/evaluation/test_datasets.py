"""Data sets in their published layouts, and messages for other layouts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ivl_export.errors import InputError
from ivl_export.evaluation import datasets
from ivl_export.evaluation.files import Reader, choose, fingerprint
from ivl_export.inputs.preprocess import ImageSettings, preprocess_images, read_images

SETTINGS = ImageSettings(16)
READ = partial(read_images, settings=SETTINGS)


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")


def karpathy(root: Path, *entries: dict[str, Any]) -> None:
    write(root / "dataset_flickr30k.json", {"images": list(entries)})


def entry(name: str, *captions: str, split: str = "test") -> dict[str, Any]:
    return {"filename": name, "split": split, "sentences": [{"raw": text} for text in captions]}


def test_imagenet(tmp_path: Path) -> None:
    for i, folder in enumerate(("n02", "n01")):
        picture(tmp_path / "val" / folder / f"ILSVRC2012_val_{i}.JPEG")
    write(tmp_path / "cn_classnames.json", {"imagenet1k": ["丁鲷", "金鱼"]})
    with pytest.raises(InputError, match=r"cn_zeroshot_classification_templates\.json is missing"):
        datasets.imagenet(tmp_path, "zh")
    write(tmp_path / "cn_zeroshot_classification_templates.json", {"imagenet1k": ["{c}的照片。"]})
    result = datasets.imagenet(tmp_path, "zh")
    assert result.names == ("丁鲷", "金鱼")
    assert result.templates == ("{}的照片。",)
    assert [(i.name, i.label) for i in result.items] == [
        ("n01/ILSVRC2012_val_1.JPEG", 0),
        ("n02/ILSVRC2012_val_0.JPEG", 1),
    ]
    write(tmp_path / "cn_classnames.json", {"imagenet1k": ["一"]})
    with pytest.raises(InputError, match="2 class folders"):
        datasets.imagenet(tmp_path, "zh")


def test_karpathy_takes_the_test_split_with_all_captions(tmp_path: Path) -> None:
    (tmp_path / "flickr30k-images").mkdir()
    karpathy(tmp_path, entry("1.jpg", "a  dog", "two"), entry("2.jpg", "x", split="train"))
    (item,) = datasets.karpathy(tmp_path, "flickr30k")
    assert item.captions == ("a dog", "two")
    assert item.files == (tmp_path / "flickr30k-images" / "1.jpg",)
    write(
        tmp_path / "dataset_coco.json",
        {"images": [{**entry("3.jpg", "c"), "filepath": "val2014"}]},
    )
    assert datasets.karpathy(tmp_path, "coco")[0].files == (tmp_path / "val2014" / "3.jpg",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ([], "not as published"),
        ({"images": []}, "not as published"),
        ({"images": [{"split": "test", "filename": 3}]}, "image 0"),
        ({"images": [entry("1.jpg")]}, "image 0"),
        ({"images": [entry("1.jpg", " ")]}, "not text"),
        ({"images": [entry("../../etc/passwd", "a")]}, "outside the data folder"),
        ({"images": [{**entry("passwd", "a"), "filepath": "/etc"}]}, "outside the data folder"),
        ({"images": [entry("\0", "a")]}, "impossible path"),
    ],
)
def test_wrong_split_files_are_named(tmp_path: Path, content: Any, match: str) -> None:
    write(tmp_path / "dataset_coco.json", content)
    with pytest.raises(InputError, match=match):
        datasets.karpathy(tmp_path, "coco")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "data"
    picture(tmp_path / "elsewhere" / "1.jpg")
    root.mkdir()
    (root / "val2014").symlink_to(tmp_path / "elsewhere")
    write(root / "dataset_coco.json", {"images": [{**entry("1.jpg", "a"), "filepath": "val2014"}]})
    with pytest.raises(InputError, match=r"out(side| of) the data folder"):
        datasets.karpathy(root, "coco")


def test_xtd(tmp_path: Path) -> None:
    write(tmp_path / "test_image_names.txt", "COCO_val2014_1.jpg\nCOCO_train2014_2.jpg\n")
    write(tmp_path / "test_1kcaptions_it.txt", "un\u2028gatto\nun cane\n")
    first, second = datasets.xtd(tmp_path, "it")
    assert first.files == (tmp_path / "val2014" / "COCO_val2014_1.jpg",)
    assert second.files == (tmp_path / "train2014" / "COCO_train2014_2.jpg",)
    assert (first.captions, second.captions) == (("un\u2028gatto",), ("un cane",))
    write(tmp_path / "test_1kcaptions_it.txt", "un gatto\n\nun cane\n")
    with pytest.raises(InputError, match="does not fit"):
        datasets.xtd(tmp_path, "it")
    with pytest.raises(InputError, match=r"test_1kcaptions_ko\.txt is missing"):
        datasets.xtd(tmp_path, "ko")


def test_videos(tmp_path: Path) -> None:
    for video, count in (("riding_a_bike/v1", 10), ("dancing/v2", 2)):
        for i in range(count):
            picture(tmp_path / video / f"{i:04}.jpg", i)
    result = datasets.videos(tmp_path, frames=4)
    assert result.names == ("dancing", "riding a bike")
    dancing, riding = result.items
    assert [f.name for f in riding.files] == ["0001.jpg", "0003.jpg", "0006.jpg", "0008.jpg"]
    assert len(dancing.files) == 2
    assert datasets.spread([Path(str(i)) for i in range(9)], 1) == (Path("4"),)  # the centre
    with pytest.raises(InputError, match="No data at"):
        datasets.videos(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="No data in"):
        datasets.videos(tmp_path / "empty")


def test_limits_do_not_depend_on_the_order() -> None:
    items = [datasets.Labelled(str(i), (), 0) for i in range(50)]
    assert choose(items, 9) == choose(items[::-1], 9)
    assert len(choose(items, 9)) == 9
    assert choose(items, None) == choose(items, 99) == items
    assert fingerprint(["a", "b"]) != fingerprint(["b", "a"])


def test_broken_images_are_skipped_up_to_a_tenth(tmp_path: Path) -> None:
    items = []
    for i in range(20):
        picture(tmp_path / f"{i:02}.png", i)
        items.append(datasets.Labelled(str(i), (tmp_path / f"{i:02}.png",), 0))
    for i in (3, 8):
        (tmp_path / f"{i:02}.png").write_bytes(b"\x89PNG no")
    reader = Reader(len(items))
    pieces = list(reader.pieces(items, 8, READ))
    assert [len(piece.items) for piece in pieces] == [7, 7, 4]
    names = [item.name for piece in pieces for item in piece.items]
    assert names == [str(i) for i in range(20) if i not in (3, 8)]
    for piece in pieces:
        files = [item.files[0] for item in piece.items]
        assert np.array_equal(piece.pixels.values, preprocess_images(files, SETTINGS))
    assert [s["file"] for s in reader.skipped] == ["3", "8"]
    (tmp_path / "15.png").unlink()
    with pytest.raises(InputError, match="3 of 20 samples cannot be read"):
        list(Reader(len(items)).pieces(items, 8, READ))
