"""Text files that users give: byte order marks, UTF-16, Git LFS pointers, in every place that reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import ivl_export
from ivl_export.bundle import Bundle
from ivl_export.calibration.sources import open_calibration
from ivl_export.cli.inputs import ImageFiles
from ivl_export.cli.run import _labels
from ivl_export.errors import IntegrityError, IvlError
from ivl_export.evaluation.datasets import questions
from ivl_export.files.text import decode_text
from ivl_export.inputs.preprocess import ImageSettings
from ivl_export.inputs.video import frames_of
from ivl_export.models.checkpoint import open_checkpoint
from ivl_export.profiles.measure.receipt import read as read_receipt
from ivl_export.quantization.ranges import ActivationRanges
from ivl_export.quantization.recipe import load_recipe
from ivl_export.training.conversations import read_llava

SHIPPED = Path(ivl_export.__file__).parent / "models" / "nano"
TINY = Path(__file__).parents[1] / "goldens" / "tiny"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4554190\n"
MARKED = ("utf-8", "utf-8-sig", "utf-16", "utf-32")


# The mark of UTF-16 and a NUL are the mark of UTF-32.
@given(text=st.text().filter(lambda t: not t.startswith(("\ufeff", "\0"))), encoding=st.sampled_from(MARKED))
def test_a_mark_says_the_encoding(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding)) == text


def test_big_endian_marks() -> None:
    assert decode_text("\ufeffring".encode("utf-16-be")) == "ring"
    assert decode_text("\ufeffring".encode("utf-32-be")) == "ring"


def lines(*rows: dict[str, Any]) -> str:
    return "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def calibrated(path: Path) -> Any:
    return [sample.caption for sample in open_calibration(path, 8).samples]


def checkpoint(path: Path) -> Any:
    for name in ("config.json", "model.safetensors"):
        if name != path.name:
            shutil.copy(TINY / name, path.parent)
    return len(open_checkpoint(path.parent).tensors)


RECIPE = "name: mine\nsummary: Größe.\nbase: bf16\nattention: base\nrules: []\n"
READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "calibration": ("c.jsonl", lines({"image": "1.png", "caption": "ein größerer Ring"}), calibrated),
    "questions": (
        "q.jsonl",
        lines({"image": "1.png", "question": "Größe?", "answer": "groß"}),
        lambda path: questions(path)[0].answers,
    ),
    "labels": ("l.txt", "Größe\r\nRing\r\n", lambda path: _labels(None, path)),
    "recipe": ("r.yaml", RECIPE, lambda path: load_recipe(path).summary),
    "config": ("config.json", (TINY / "config.json").read_text(), checkpoint),
    "preprocessor": (
        "preprocessor_config.json",
        (SHIPPED / "preprocessor_config.json").read_text(),
        ImageSettings.load,
    ),
    "conversations": (
        "t.json",
        json.dumps(
            [{"conversations": [{"from": "human", "value": "Größe?"}, {"from": "gpt", "value": "Ja"}]}]
        ),
        lambda path: len(read_llava(path)),
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "1.png")
    return tmp_path


@pytest.mark.parametrize("what", READERS)
def test_every_reader_takes_marks_and_names_pointers(what: str, folder: Path) -> None:
    name, text, layer = READERS[what]
    path = folder / name
    results = []
    for encoding in MARKED:
        path.write_bytes(text.encode(encoding))
        results.append(layer(path))
    assert all(result == results[0] for result in results)
    path.write_text(POINTER)
    with pytest.raises(IvlError, match="Git LFS pointer"):
        layer(path)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("s.tar", calibrated),
        ("p.parquet", calibrated),
        ("v.mp4", lambda path: frames_of(path, 2)),
        ("ranges.json", ActivationRanges.load),
        ("receipt.json", read_receipt),
    ],
)
def test_pointers_in_place_of_other_files(name: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(IvlError, match="Git LFS pointer"):
        read(tmp_path / name)


def hub(tmp_path: Path) -> Path:
    """A snapshot of a Hub cache: every file is a link to a blob."""
    snapshot, blobs = tmp_path / "datasets--x" / "snapshots" / "abc", tmp_path / "datasets--x" / "blobs"
    (snapshot / "photos").mkdir(parents=True)
    blobs.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(blobs / f"i{number}", format="PNG")
        (blobs / f"t{number}").write_text(f"ring {number}")
        for suffix, kind in ((".png", "i"), (".txt", "t")):
            (snapshot / "photos" / f"{number}{suffix}").symlink_to(f"../../../blobs/{kind}{number}")
    (blobs / "j").write_text(lines(*({"image": f"photos/{number}.png"} for number in range(3))))
    (snapshot / "c.jsonl").symlink_to("../../blobs/j")
    return snapshot


def test_captions_lie_beside_the_link_and_not_beside_its_blob(tmp_path: Path) -> None:
    assert sorted(calibrated(hub(tmp_path) / "c.jsonl")) == ["ring 0", "ring 1", "ring 2"]


def test_broken_links_in_a_folder_are_not_passed_over(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to("nowhere.png")
    (tmp_path / "3.png").symlink_to("3.png")
    names = [path.name for path in ImageFiles.find([tmp_path]).files]
    assert names == ["1.png", "2.png", "3.png"]  # those that cannot be read are counted as skipped


def test_a_bundle_of_links_says_how_to_copy_it(tiny_bundle: Path, tmp_path: Path) -> None:
    for file in tiny_bundle.rglob("*"):
        if file.is_file():
            link = tmp_path / "snapshot" / file.relative_to(tiny_bundle)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    with pytest.raises(IntegrityError, match=r"is a link to a place outside the bundle.*cp -rL"):
        Bundle.open(tmp_path / "snapshot", verify="size")
