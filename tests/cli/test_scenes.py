"""``ivl-export train scenes``: what is drawn, what it may overwrite, and that the other verbs take it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivl_export.calibration.sources import open_calibration
from ivl_export.cli import main
from ivl_export.synthetic.batches import batch_scenes
from ivl_export.synthetic.captions import Language, caption
from ivl_export.synthetic.render import render
from ivl_export.synthetic.scenes import Split


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(("split", "lang"), [("heldout", "en"), ("train", "zh")])
def test_pictures_and_captions_belong_together(
    split: Split, lang: Language, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a" / "scenes"
    args = ["train", "scenes", str(out), "--count", "5", "--seed", "3"]
    args += ["--split", split, "--lang", lang, "--json"]
    assert main(args) == 0
    printed = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text("utf-8").splitlines()]
    assert [{k: row[k] for k in ("image", "caption")} for row in printed["scenes"]] == lines
    assert len(contents(out)) == 2 * 5 + 1
    for line, row, scene in zip(lines, printed["scenes"], batch_scenes(3, 0, split, 5)[0], strict=True):
        with Image.open(out / line["image"]) as image:
            assert np.array_equal(np.asarray(image), render(scene))
        assert line["caption"] == caption(scene, lang)
        assert (out / line["image"]).with_suffix(".txt").read_text("utf-8").strip() == line["caption"]
        assert row["novel"] is scene.novel
    assert any(row["novel"] for row in printed["scenes"]) == (split == "heldout")


def test_equal_seeds_draw_equal_files_and_fewer_are_the_first(tmp_path: Path) -> None:
    for name, args in (
        ("a", ["--count", "4"]),
        ("b", ["--count", "4"]),
        ("c", ["--count", "2"]),
        ("d", ["--count", "4", "--seed", "1"]),
    ):
        assert main(["train", "scenes", str(tmp_path / name), *args]) == 0
    a, b, c, d = (contents(tmp_path / name) for name in "abcd")
    assert a == b
    assert all(a[name] == data for name, data in c.items() if name != "captions.jsonl")
    assert a["captions.jsonl"].startswith(c["captions.jsonl"])
    assert not set(a.values()) & {v for k, v in d.items() if k.endswith(".png")}


def test_a_table_names_what_was_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "scenes", str(tmp_path / "x"), "--count", "21"]) == 0
    out = capsys.readouterr().out
    assert "21 scenes in" in out
    assert "scene-00020.png" in out
    assert "scene-00021.png" not in out
    assert "1 more" in out


def test_calibration_takes_folder_and_manifest(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    assert main(["train", "scenes", str(out), "--count", "6"]) == 0
    captions = {s.caption for s in open_calibration(out).samples}
    assert len(captions) == 6
    assert captions == {s.caption for s in open_calibration(out / "captions.jsonl").samples}
    assert captions == {json.loads(x)["caption"] for x in (out / "captions.jsonl").open(encoding="utf-8")}


def test_a_folder_with_files_is_left_alone_without_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scenes"
    assert main(["train", "scenes", str(out), "--count", "3"]) == 0
    (out / "notes.txt").write_text("mine")
    (out / "scene-1.png").write_text("not a name that is drawn")
    before = contents(out)
    assert main(["train", "scenes", str(out), "--count", "2"]) == 2
    assert "--force" in capsys.readouterr().err
    assert contents(out) == before

    assert main(["train", "scenes", str(out), "--count", "2", "--seed", "5", "--force"]) == 0
    after = contents(out)
    fresh = tmp_path / "fresh"
    assert main(["train", "scenes", str(fresh), "--count", "2", "--seed", "5"]) == 0
    assert after == {
        **contents(fresh),
        "notes.txt": b"mine",
        "scene-1.png": before["scene-1.png"],
    }  # the third scene of the first run is gone


@pytest.mark.parametrize(
    "args",
    [
        ["--split", "test"],
        ["--lang", "de"],
        ["--count", "0"],
        ["--seed", "-1"],
        ["--count", "many"],
    ],
)
def test_wrong_usage(args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scenes"
    assert main(["train", "scenes", str(out), *args]) == 2
    assert args[0].strip("-") in capsys.readouterr().err.lower().replace("language", "lang")
    assert not out.exists()


def test_places_that_cannot_be_drawn_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("here")
    assert main(["train", "scenes", str(file), "--json"]) == 2
    assert json.loads(capsys.readouterr().err)["what"] == f"{file} is not a folder."
    assert main(["train", "scenes", str(file / "below"), "--json"]) == 6
    assert json.loads(capsys.readouterr().err)["error"] == "BuildError"
    assert file.read_text() == "here"


def test_torch_is_not_needed(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = None
from ivl_export.cli import main
assert main(["train", "scenes", {str(tmp_path / "x")!r}, "--count", "1"]) == 0
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
