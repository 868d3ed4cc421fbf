"""Data sets in their published layouts: images with labels, captions or questions.

========== =====================================================================================
imagenet   ``val/<wnid>/*.JPEG``, ``<language>_classnames.json`` and
           ``<language>_zeroshot_classification_templates.json`` as in LAION's CLIP_benchmark
flickr30k  ``dataset_flickr30k.json`` (Karpathy), ``flickr30k-images/*.jpg``
coco       ``dataset_coco.json`` (Karpathy), ``val2014/*.jpg`` (and ``train2014/``)
xtd        ``test_image_names.txt``, ``test_1kcaptions_<language>.txt``, ``val2014/``, ``train2014/``
video      ``<class>/<video>/*.jpg``: frames in the order of their names
questions  ``questions.jsonl``, or a file of another name: ``{"image": "photos/1.jpg", "question":
           "What is it?", "answer": "a ring"}`` a line, or ``"answers": ["a ring", "ring"]``;
           images are next to the file or below it
========== =====================================================================================
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files.paths import inside
from .files import images_in, read_json, read_text, subfolders

#: The language codes of this package where CLIP_benchmark's file names differ.
FILE_LANGUAGE = {"zh": "cn"}
IMAGE_FOLDERS = ("flickr30k-images", "images", "Images", ".")


@dataclass(frozen=True)
class Labelled:
    """An image (or a video's frames) and the index of its class."""

    name: str
    files: tuple[Path, ...]
    label: int


@dataclass(frozen=True)
class Captioned:
    """An image and its captions."""

    name: str
    files: tuple[Path, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about an image, and the answers that are right."""

    name: str
    files: tuple[Path, ...]
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Classes:
    """A classification set: ``names`` of the classes, ``templates`` with ``{}`` for one, the items."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    items: tuple[Labelled, ...]


def imagenet(root: Path, language: str = "en") -> Classes:
    """ImageNet's validation images; classes are the sorted folders, in the order of the class names.

    Raises:
        InputError: a file is missing or wrong, or there are not as many folders as class names.
    """
    code = FILE_LANGUAGE.get(language, language)
    names = _texts(
        root / f"{code}_classnames.json",
        f"ImageNet's class names ({language}), as LAION's CLIP_benchmark has them",
        "imagenet1k",
    )
    what = f"ImageNet's prompt templates ({language}), as LAION's CLIP_benchmark has them"
    templates = _texts(root / f"{code}_zeroshot_classification_templates.json", what, "imagenet1k")
    folder = root / "val" if (root / "val").is_dir() else root
    folders = _folders(folder, "A folder for each class is needed, as in val/n01440764/.")
    if len(folders) != len(names):
        raise InputError(
            f"{folder} has {len(folders)} class folders.",
            f"{code}_classnames.json names {len(names)} classes, in the order of the sorted folders.",
            "Sort the validation images into one folder a class.",
        )
    return Classes(names, templates, _labelled(folder, folders))


def videos(root: Path, frames: int = 8) -> Classes:
    """Videos as folders of frames, ``frames`` of each spread evenly.

    Class names are the folder names with spaces for underscores, or ``classnames.json``; the template is
    ``{}``, or those of ``templates.json`` (both lists of texts).
    """
    folders = _folders(root, "A folder for each class is needed, with a folder of frames for each video.")
    names = tuple(f.name.replace("_", " ") for f in folders)
    if (root / "classnames.json").exists():
        names = _texts(root / "classnames.json", "class names")
        if len(names) != len(folders):
            raise InputError(
                f"{root} has {len(folders)} class folders.",
                f"classnames.json names {len(names)}, in the order of the sorted folders.",
                "Correct classnames.json.",
            )
    templates: tuple[str, ...] = ("{}",)
    if (root / "templates.json").exists():
        templates = _texts(root / "templates.json", "prompt templates")
    items = tuple(
        Labelled(f"{folder.name}/{video.name}", spread(images_in(video), frames), label)
        for label, folder in enumerate(folders)
        for video in subfolders(folder)
    )
    if not items:
        raise InputError(
            f"No videos in {root}.",
            "A video is a folder of frames: <class>/<video>/0001.jpg.",
            "Extract frames, with ffmpeg for one.",
        )
    return Classes(names, templates, items)


def spread(files: list[Path], count: int) -> tuple[Path, ...]:
    """``count`` of ``files``, the middles of as many equal parts; all where there are fewer."""
    if len(files) <= count:
        return tuple(files)
    return tuple(files[int((i + 0.5) * len(files) / count)] for i in range(count))


def karpathy(root: Path, dataset: str) -> tuple[Captioned, ...]:
    """The test split of Karpathy's ``dataset_<dataset>.json`` (``flickr30k``, ``coco``)."""
    path = root / f"dataset_{dataset}.json"
    data = read_json(path, "Karpathy's splits and captions")
    entries = data.get("images") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise _wrong(path, 'it has no list "images"')
    folder = next((f for f in IMAGE_FOLDERS if (root / f).is_dir()), ".") if dataset == "flickr30k" else "."
    items = tuple(
        _captioned(entry, root, folder, f"{path.name}, image {i}")
        for i, entry in enumerate(entries)
        if isinstance(entry, dict) and entry.get("split") == "test"
    )
    if not items:
        raise _wrong(path, 'no image has the split "test"')
    return items


def xtd(root: Path, language: str) -> tuple[Captioned, ...]:
    """XTD's 1,000 COCO images with one caption each in ``language``."""
    index = root / "test_image_names.txt"
    names = _lines(read_text(index, "XTD's image names, one a line"))
    captions_file = root / f"test_1kcaptions_{language}.txt"
    captions = _lines(read_text(captions_file, f"XTD's captions ({language}), one a line"))
    if len(names) != len(captions) or not all(names) or not all(captions):
        raise InputError(
            f"{captions_file} does not fit {index.name}.",
            f"It has {len(captions)} lines for {len(names)} images, or one of them is empty.",
            "Download both again.",
        )
    items = []
    for line, (name, caption) in enumerate(zip(names, captions, strict=True), 1):
        split = "val2014" if "val" in name else "train2014"
        file = inside(root, f"{split}/{name}", f"{index.name}, line {line}")
        items.append(Captioned(name, (file,), (caption,)))
    return tuple(items)


def questions(path: Path) -> tuple[Question, ...]:
    """The questions in a JSON-lines file, or in ``questions.jsonl`` of the folder ``path``.

    Raises:
        InputError: a line is not as the module says (it is named), or there is none.
    """
    file = path / "questions.jsonl" if path.is_dir() else path
    lines = read_text(file, "a question about an image a line").split("\n")
    parsed = [_question(line, file, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not parsed:
        raise InputError(f"{file} has no questions.", "It has no line.", f"Write {_QUESTION_LINE} a line.")
    return tuple(parsed)


_QUESTION_LINE = '{"image": "1.jpg", "question": "What is it?", "answer": "a ring"}'


def _question(line: str, file: Path, number: int) -> Question:
    where = f"{file}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON.", f"{error}.", f"Write {_QUESTION_LINE}.") from error
    row = row if isinstance(row, dict) else {}
    image, question = row.get("image"), row.get("question")
    expected = row["answers"] if "answers" in row else [row.get("answer")]
    answers = (
        [a.strip() if isinstance(a, str) else "" for a in expected] if isinstance(expected, list) else []
    )
    texts = all(isinstance(text, str) and text.strip() for text in (image, question))
    if not texts or not answers or not all(answers):
        raise InputError(
            f"{where} is not a question about an image.", f"{line[:200]!r}", f"Write {_QUESTION_LINE}."
        )
    return Question(
        f"{image}: {question}",
        (inside(file.parent, str(image), where),),
        str(question).strip(),
        tuple(answers),
    )


def _captioned(entry: dict[str, Any], root: Path, folder: str, where: str) -> Captioned:
    name, inner = entry.get("filename"), entry.get("filepath", "")
    sentences = entry.get("sentences")
    raw = (
        [s.get("raw") if isinstance(s, dict) else None for s in sentences]
        if isinstance(sentences, list)
        else []
    )
    if not isinstance(name, str) or not name or not isinstance(inner, str) or not raw:
        raise InputError(f"{where} is not as Karpathy's files are.", "It needs filename and sentences.")
    if not all(isinstance(text, str) and text.strip() for text in raw):
        raise InputError(f"{where} has a caption that is not text.", f"{raw!r:.200}")
    relative = f"{inner}/{name}" if inner else name
    path = inside(root, str(Path(folder, relative)), where)
    return Captioned(relative, (path,), tuple(" ".join(str(text).split()) for text in raw))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]  # splitlines() also splits inside captions


def _texts(path: Path, what: str, key: str | None = None) -> tuple[str, ...]:
    """A list of texts in ``path``, or below ``key``; CLIP_benchmark's ``{c}`` becomes ``{}``."""
    data = read_json(path, what)
    if key is not None and isinstance(data, dict):
        data = data.get(key)
    if not isinstance(data, list) or not data or not all(isinstance(t, str) and t.strip() for t in data):
        raise _wrong(path, f"it needs a list of texts{f' named {key!r}' if key else ''}")
    return tuple(text.replace("{c}", "{}") for text in data)


def _folders(root: Path, why: str) -> list[Path]:
    if not root.is_dir():
        raise InputError(f"No data at {root}.", "There is no such folder.", "Check --data.")
    names = subfolders(root)
    if not names:
        raise InputError(f"No data in {root}.", why, "Check --data.")
    return names


def _labelled(root: Path, folders: list[Path]) -> tuple[Labelled, ...]:
    items = tuple(
        Labelled(f"{folder.name}/{file.name}", (file,), label)
        for label, folder in enumerate(folders)
        for file in images_in(folder)
    )
    if not items:
        raise InputError(f"No images in {root}.", "Every class folder is empty.", "Check --data.")
    return items


def _wrong(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not as published.", f"Read as JSON, {why}.", "Download it again.")
