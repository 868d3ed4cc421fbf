"""``ivl-export run`` on a real bundle and real image files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from ivl_export import cli
from ivl_export.runtime import InternVL

pytestmark = pytest.mark.numeric


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.png"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> Any:
    assert cli.main(["run", *map(str, args), "--threads", "1", "--json"]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    return json.loads(captured.out)


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".png", ".jpg"))


def test_embed(tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "embed", tiny_bundle, folder, "--text", "a red ring", "--mode", "G")
    with InternVL.load(tiny_bundle, threads=1) as model:
        images = model.encode_image(files(folder), "InternVL-G")
        want = np.concatenate([images, model.encode_text(["a red ring"])])
    np.testing.assert_allclose([item["embedding"] for item in out["items"]], want, atol=1e-6)
    assert [item.get("file") or item["text"] for item in out["items"]] == [
        *map(str, files(folder)),
        "a red ring",
    ]
    assert out["mode"] == "InternVL-G"
    assert out["timings"]["vision"]["calls"] == 1

    saved = folder / "out.npy"
    out = run(capsys, "embed", tiny_bundle, folder, "--out", saved, "--normalize")
    vectors = np.load(saved)
    assert vectors.shape == (3, 48)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert "embedding" not in out["items"][0]
    assert cli.main(["run", "embed", str(tiny_bundle), str(folder), "--out", str(folder / "no/x.npy")]) == 2


def test_classify(tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = folder / "labels.txt"
    labels.write_text("red ring\nblue star\n\n")
    out = run(capsys, "classify", tiny_bundle, folder, "--labels-file", labels, "--template", "a {}")
    same = run(
        capsys, "classify", tiny_bundle, folder, "--labels", "red ring, blue star", "--template", "a {}"
    )
    assert out["items"] == same["items"]
    with InternVL.load(tiny_bundle, threads=1) as model:
        want = model.classify(files(folder), ["red ring", "blue star"], ["a {}"])
    for item, row in zip(out["items"], want, strict=True):
        assert item["label"] == out["labels"][int(row.argmax())]
        assert sum(p["probability"] for p in item["top"]) == pytest.approx(1, abs=1e-5)
        assert item["top"][0]["probability"] == pytest.approx(float(row.max()), abs=1e-5)


def test_retrieve(tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(
        capsys, "retrieve", tiny_bundle, folder, "--query", "a ring", "--query", "two stars", "--top", "2"
    )
    with InternVL.load(tiny_bundle, threads=1) as model:
        want = model.retrieve(["a ring", "two stars"], files(folder), top=2)
    files_of_queries = [[r["file"] for r in item["results"]] for item in out["items"]]
    assert files_of_queries == [[str(files(folder)[i]) for i in row] for row in want.indices]


def test_caption(tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(
        capsys, "caption", tiny_bundle, folder, "--beams", "2", "--max-new-tokens", "6", "--prompt", "a"
    )
    with InternVL.load(tiny_bundle, threads=1) as model:
        want = model.caption(files(folder), "a", num_beams=2, max_new_tokens=6)
    assert [item["caption"] for item in out["items"]] == want


def test_a_caption_is_drawn(tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ivl_export.sampling import Sampling

    options = ("--temperature", "3", "--top-k", "20", "--seed", "5", "--max-new-tokens", "6")
    out = run(capsys, "caption", tiny_bundle, folder, *options)
    with InternVL.load(tiny_bundle) as model:
        want = model.caption(files(folder), max_new_tokens=6, sampling=Sampling(3.0, 20, seed=5))
        assert want != model.caption(files(folder), max_new_tokens=6)
    assert [item["caption"] for item in out["items"]] == want


def test_features(tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = folder / "out.safetensors"
    out = run(capsys, "features", tiny_bundle, folder, "--blocks", "1,-1", "--out", saved)
    assert out["shapes"] == {"features.1": [3, 17, 60], "features.3": [3, 17, 60]}
    with InternVL.load(tiny_bundle, threads=1) as model:
        want = model.features(files(folder), [1, 3])
    with safe_open(saved, "numpy") as file:
        assert json.loads(file.metadata()["images"]) == [str(f) for f in files(folder)]
        for block, states in want.items():
            np.testing.assert_allclose(file.get_tensor(f"features.{block}"), states, atol=1e-6)
    run(capsys, "features", tiny_bundle, folder, "--out", folder / "last.npy")
    np.testing.assert_allclose(np.load(folder / "last.npy"), want[3], atol=1e-6)
    line = ["run", "features", str(tiny_bundle), str(folder), "--out", str(folder / "x.npy"), "--blocks"]
    for blocks, said in (("1,2", "an .npy file one"), ("one", "cannot be read"), ("4", "no block 4")):
        assert cli.main([*line, blocks]) == 2
        assert said in capsys.readouterr().err


def test_tables_and_skipped_files(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing more")
    for args in (
        ["embed"],
        ["classify", "--labels", "red ring,blue star"],
        ["retrieve", "--query", "a ring"],
        ["caption", "--max-new-tokens", "3"],
    ):
        assert cli.main(["run", args[0], str(tiny_bundle), str(folder), *args[1:], "--threads", "1"]) == 0
        captured = capsys.readouterr()
        assert all(f.name in captured.out for f in files(folder) if f.name != "broken.png"), captured.out
        assert "broken.png" not in captured.out
        assert "skipped" in captured.err
        assert "broken.png" in captured.err
        assert "vision" in captured.out


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["caption", "{bundle}", "{folder}/missing.png"], 3),
        (["caption", "{bundle}", "{folder}/text.png"], 3),
        (["caption", "{bundle}", "{folder}", "--max-new-tokens", "9999"], 3),
        (["caption", "{bundle}", "{folder}", "--backend", "tensorrt-rtx"], 5),
        (["caption", "{bundle}", "{folder}", "--backend", "tensorflow"], 2),
        (["caption", "{bundle}", "{folder}", "--target", "sm89"], 5),
        (["caption", "{bundle}", "{folder}", "--max-new-tokens", "3", "--min-new-tokens", "4"], 2),
        (["embed", "{bundle}", "{folder}", "--out", "{folder}"], 2),
        (["features", "{bundle}", "{folder}", "--out", "{folder}/no/x.npy"], 2),
        (["features", "{bundle}", "{folder}", "--out", "{folder}/x.txt"], 2),
        (["caption", "{folder}", "{folder}"], 8),
        (["classify", "{bundle}", "{folder}", "--labels", "a,a"], 3),
        (["classify", "{bundle}", "{folder}", "--labels", " , "], 3),
        (["classify", "{bundle}", "{folder}", "--labels-file", "{folder}/none.txt"], 3),
        (["classify", "{bundle}", "{folder}", "--labels", "a", "--template", "x"], 2),
    ],
)
def test_wrong_input_has_its_exit_code(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int
) -> None:
    (folder / "text.png").write_text("no picture")
    filled = [a.format(bundle=tiny_bundle, folder=folder) for a in args]
    assert cli.main(["run", *filled]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "\n  fix: " in captured.err
    assert not captured.out


def test_another_backend_and_device(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    one = run(capsys, "embed", tiny_bundle, folder, "--backend", "torch", "--device", "cpu")
    two = run(capsys, "embed", tiny_bundle, folder)
    assert (one["backend"], two["backend"]) == ("torch", "onnxruntime")
    np.testing.assert_allclose(
        [item["embedding"] for item in one["items"]], [item["embedding"] for item in two["items"]], atol=1e-5
    )
    assert cli.main(["run", "embed", str(tiny_bundle), str(folder), "--device", "gpu"]) == 2
