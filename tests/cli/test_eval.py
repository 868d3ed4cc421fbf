"""``ivl-export eval``: every task on small data sets in the true layout, through a real bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ivl_export import cli
from ivl_export.evaluation.tasks import TASKS, evaluate
from ivl_export.runtime import InternVL
from ivl_export.runtime.zero_shot import l2
from ivl_export.synthetic.captions import caption
from ivl_export.synthetic.render import render
from ivl_export.synthetic.scenes import Scene
from ivl_export.synthetic.tasks import eval_scenes

COUNT = 12


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return eval_scenes(1, COUNT, 0, distinct=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, scenes: list[Scene]) -> Path:
    """All data sets in one folder a task, drawn."""
    root = tmp_path_factory.mktemp("data")
    images: dict[str, list[dict[str, Any]]] = {"flickr30k": [], "coco": []}
    for i, scene in enumerate(scenes):
        picture = Image.fromarray(render(scene))
        sentences = [{"raw": caption(scene)}, {"raw": caption(scene, "zh")}][: 1 + i % 2]
        base = {"filename": f"{i}.png", "split": "test", "sentences": sentences}
        images["flickr30k"].append(base)
        images["coco"].append({**base, "filepath": "val2014"})
        label, word = ("n01", "ring") if i % 2 else ("n02", "star")
        for place in (
            f"flickr30k/flickr30k-images/{i}.png",
            f"coco/val2014/{i}.png",
            f"xtd/val2014/val_{i}.png",
            f"imagenet/val/{label}/{i}.png",
            f"video/{word}/clip{i}/0.png",
            f"video/{word}/clip{i}/1.png",
        ):
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            (picture if not place.endswith("/1.png") or "video" not in place else picture.rotate(180)).save(
                root / place
            )
    for name, entries in images.items():
        (root / name / f"dataset_{name}.json").write_text(json.dumps({"images": entries}))
    (root / "xtd" / "test_image_names.txt").write_text("".join(f"val_{i}.png\n" for i in range(COUNT)))
    (root / "xtd" / "test_1kcaptions_zh.txt").write_text("".join(caption(s, "zh") + "\n" for s in scenes))
    for code in ("en", "it"):
        (root / "imagenet" / f"{code}_classnames.json").write_text('{"imagenet1k": ["ring", "star"]}')
        (root / "imagenet" / f"{code}_zeroshot_classification_templates.json").write_text(
            '{"imagenet1k": ["a {c}.", "the {c}."]}'
        )
    return root


def run(capsys: pytest.CaptureFixture[str], bundle: Path, task: str, folder: Path, *more: str) -> Any:
    arguments = [
        "eval",
        str(bundle),
        "--task",
        task,
        "--data",
        str(folder),
        "--threads",
        "1",
        "--json",
        *more,
    ]
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def values(out: Any) -> dict[str, float]:
    return {m["name"]: m["value"] for m in out["measures"]}


def test_retrieval_against_a_full_matrix(
    tiny_bundle: Path, data: Path, scenes: list[Scene], capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, tiny_bundle, "flickr30k", data / "flickr30k", "--mode", "InternVL-G")
    assert (out["samples"], out["available"], out["whole"]) == (COUNT, COUNT, False)
    owner = [i for i in range(COUNT) for _ in range(1 + i % 2)]
    with InternVL.load(tiny_bundle, threads=1) as model:
        pictures = [Image.fromarray(render(s)) for s in scenes]
        images = l2(model.encode_image(pictures, "InternVL-G", "square"))
        texts = l2(
            model.encode_text(
                [t for i, s in enumerate(scenes) for t in (caption(s), caption(s, "zh"))[: 1 + i % 2]]
            )
        )
    similarity = texts @ images.T
    for k in (1, 5, 10):
        best = np.argsort(-similarity, axis=1)[:, :k]
        t2i = np.mean([i in row for i, row in zip(owner, best, strict=True)])
        best = np.argsort(-similarity.T, axis=1)[:, :k]
        i2t = np.mean([any(owner[t] == i for t in row) for i, row in enumerate(best)])
        assert values(out)[f"text to image R@{k}"] == pytest.approx(100 * t2i)
        assert values(out)[f"image to text R@{k}"] == pytest.approx(100 * i2t)
    counts = {m["name"]: m["samples"] for m in out["measures"]}
    assert counts["text to image R@1"] == len(owner)
    assert counts["image to text R@1"] == COUNT
    assert {m["name"]: m["reference"] for m in out["measures"]}["text to image R@1"] == 85.0


@pytest.mark.parametrize("top", [4, 100])
@pytest.mark.slow
def test_reranked_recall_is_shown_next_to_the_search(
    tiny_bundle: Path, data: Path, scenes: list[Scene], capsys: pytest.CaptureFixture[str], top: int
) -> None:
    folder = data / "flickr30k"
    plain = run(capsys, tiny_bundle, "flickr30k", folder)
    out = run(capsys, tiny_bundle, "flickr30k", folder, "--rerank", str(top))
    how = f", best {top} re-ranked"
    assert {name: value for name, value in values(out).items() if how not in name} == values(plain)
    assert out["settings"]["rerank"] == top
    owner = np.repeat(np.arange(COUNT), [1 + i % 2 for i in range(COUNT)])
    texts = [t for i, s in enumerate(scenes) for t in (caption(s), caption(s, "zh"))[: 1 + i % 2]]
    pictures = [Image.fromarray(render(s)) for s in scenes]
    with InternVL.load(tiny_bundle, threads=1) as model:
        similarity = l2(model.encode_text(texts)) @ l2(model.encode_image(pictures, resize="square")).T
        chance = [model.match(pictures, [text] * COUNT).astype(np.float64) for text in texts]
        scale = np.exp(model.bundle.manifest.model.logit_scale)
    both = np.log(chance) - np.log1p(-np.array(chance)) + scale * similarity

    def recall(first: Any, then: Any, right: Any, k: int) -> float:
        hits = []
        for row, again, own in zip(first, then, right, strict=True):
            best = np.argsort(-row)[:top]
            hits.append(own[best[np.argsort(-again[best])][:k]].any())
        return 100 * float(np.mean(hits))

    right = owner[:, None] == np.arange(COUNT)
    for k in (1, 5, 10):
        if k <= top:  # the best of a search stay before the rest
            assert values(out)[f"text to image R@{k}{how}"] == pytest.approx(
                recall(similarity, both, right, k)
            )
            want = recall(similarity.T, both.T, right.T, k)
            assert values(out)[f"image to text R@{k}{how}"] == pytest.approx(want)
        else:
            assert values(out)[f"text to image R@{k}{how}"] == values(out)[f"text to image R@{k}"]


def test_imagenet_is_classify_with_an_ensemble(
    tiny_bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, tiny_bundle, "imagenet", data / "imagenet", "--language", "it")
    with InternVL.load(tiny_bundle, threads=1) as model:
        files = sorted((data / "imagenet" / "val").rglob("*.png"))
        rows = model.classify(files, ["ring", "star"], ("a {}.", "the {}."))
    right = [row.argmax() == (file.parent.name == "n02") for file, row in zip(files, rows, strict=True)]
    assert values(out)["top-1"] == pytest.approx(100 * np.mean(right))
    assert values(out)["top-5"] == 100
    assert out["measures"][0]["reference"] == 65.7
    assert out["settings"] == {"classes": 2, "templates": 2}


def test_videos_average_their_frames(
    tiny_bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, tiny_bundle, "video", data / "video")
    clips = sorted((data / "video").glob("*/*"))
    with InternVL.load(tiny_bundle, threads=1) as model:
        classes = model.class_embeddings(["ring", "star"])
        right = []
        for clip in clips:
            embeds = l2(model.encode_image(sorted(clip.iterdir()), "InternVL-C", "center_crop"))
            right.append((embeds.mean(0) @ classes.T).argmax() == (clip.parent.name == "star"))
    assert out["samples"] == COUNT
    assert values(out)["top-1"] == pytest.approx(100 * np.mean(right))


def test_xtd_limit_and_questions(tiny_bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xtd = ("xtd", data / "xtd", "--language", "zh")
    whole, part = run(capsys, tiny_bundle, *xtd), run(capsys, tiny_bundle, *xtd, "--limit", "5")
    again = run(capsys, tiny_bundle, *xtd, "--limit", "5", "--batch", "2")
    assert (whole["samples"], part["samples"], part["available"]) == (COUNT, 5, COUNT)
    assert values(part)["text to image R@5"] == 100
    assert part["questions"] == again["questions"] != whole["questions"]
    assert values(part) == values(again)


@pytest.mark.slow
def test_captions(tiny_bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "eval",
        str(tiny_bundle),
        "--task",
        "coco-caption",
        "--data",
        str(data / "coco"),
        "--limit",
        "3",
    ]
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        assert cli.main(arguments) == 5
        assert "ivl-export[eval]" in capsys.readouterr().err
        return
    if shutil.which("java") is None:
        assert cli.main(arguments) == 5
        assert "java" in capsys.readouterr().err
        return
    out = run(capsys, tiny_bundle, "coco-caption", data / "coco", "--limit", "3")
    assert out["measures"][0]["name"] == "CIDEr"
    assert out["measures"][0]["reference"] == 128.2
    assert out["settings"]["beams"] == 5


def test_table_progress_and_skipped(
    tiny_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(data / "flickr30k", tmp_path / "flickr30k")
    (folder / "flickr30k-images" / "3.png").write_bytes(b"no image")
    assert cli.main(["eval", str(tiny_bundle), "--task", "flickr30k", "--data", str(folder)]) == 0
    captured = capsys.readouterr()
    assert "94.7" in captured.out
    assert "11 of 12 samples" in captured.out
    assert "Not comparable" in captured.out
    assert "done images" in captured.err
    assert "skipped 3.png" in captured.err
    (folder / "flickr30k-images" / "4.png").unlink()
    assert cli.main(["eval", str(tiny_bundle), "--task", "flickr30k", "--data", str(folder)]) == 3
    assert "2 of 12 samples" in capsys.readouterr().err


def test_wrong_use(tiny_bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["eval", str(tiny_bundle), "--data", str(data / "xtd"), "--task"]
    assert cli.main([*base, "coco-retrieval", "--language", "zh"]) == 2
    assert cli.main([*base, "imagenet21k"]) == 2
    assert cli.main([*base, "imagenet", "--rerank", "5"]) == 2
    assert cli.main([*base, "flickr30k"]) == 3
    assert "dataset_flickr30k.json" in capsys.readouterr().err


def test_the_command_offers_every_task(tiny_bundle: Path) -> None:
    from ivl_export.cli.eval import Task

    assert tuple(task.value for task in Task) == tuple(sorted(TASKS, key=[t.value for t in Task].index))
    with pytest.raises(Exception, match="Unknown task"), InternVL.load(tiny_bundle, threads=1) as model:
        evaluate(model, "cifar", tiny_bundle)
