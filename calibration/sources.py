"""Opening calibration sets.

A folder of images (each may have a caption in a ``.txt`` file of the same name), a JSONL manifest
(``{"image": "relative/path.jpg", "caption": "..."}`` a line), conversations in LLaVA's layout
(:mod:`..inputs.conversations`; those whose first question shows the only image), WebDataset shards
(:mod:`.webdataset`), a Hugging Face data set on disk (:mod:`.hf_datasets`), or drawn scenes (for nano). The
choice of samples depends on names and the seed only, so it is the same on every machine. Files are untrusted:
paths in a manifest may not leave its folder, and undecodable files are skipped and listed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..errors import InputError, UsageError
from ..files.paths import inside
from ..files.text import decode_text, text_encoding
from ..inputs.conversations import read_conversations
from ..inputs.images import IMAGE_SUFFIXES
from ..inputs.sources import name_of
from ..inputs.webdataset import MAX_CAPTION_BYTES, braced
from .dataset import CalibrationSet, Sample
from .entries import MAX_ENTRIES, Entry, plain
from .hf_datasets import dataset_files, table_entries
from .webdataset import shard_entries

MAX_CORRUPT = 0.1
KINDS = (
    f"a folder of images ({', '.join(IMAGE_SUFFIXES)})",
    "a JSONL manifest with an image and a caption a line",
    "conversations in LLaVA's layout (.json, .jsonl)",
    "WebDataset shards (a .tar, a folder of them, or shards-{000..011}.tar)",
    "a Hugging Face data set (what save_to_disk wrote, or a snapshot with Parquet files)",
)


def open_calibration(
    source: str | Path,
    samples: int = 512,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    columns: tuple[str, ...] = (),
) -> CalibrationSet:
    """Choose up to ``samples`` usable images of ``source``; its kind follows from the path.

    Every chosen image is decoded once here; one that cannot be is skipped and another takes its place.

    Args:
        source: one of :data:`KINDS`.
        samples: number of samples.
        seed: of the random choice.
        progress: callback with the number of images read, and of all.
        columns: of the image and of the caption in a Hugging Face data set; the last names the caption in the
            JSON of shards. Else those with the usual names are taken.

    Raises:
        UsageError: columns for a source that has none.
        InputError: no such source, nothing in it, one that is broken or points outside its folder, or more
            than 10% of the files tried cannot be decoded.
        CapabilityError: a Hugging Face data set without pyarrow.
    """
    path = Path(source)
    if samples < 1:
        raise InputError(f"{samples} calibration samples were requested.", fix="Ask for at least 1.")
    entries = _entries(path, columns)
    if not entries:
        raise InputError(
            f"No calibration data in {path}.",
            f"It has no image ({', '.join(IMAGE_SUFFIXES)})."
            if path.is_dir()
            else "It has no line or image.",
            f"Give {'; '.join(KINDS)}.",
        )
    order = sorted(entries, key=lambda e: hashlib.sha256(f"{seed}:{e.name}".encode()).digest())
    good, skipped = [], []
    for entry in order:
        result = entry.check()
        if isinstance(result, Sample):
            good.append(result)
        else:
            skipped.append(result)
        if progress is not None:
            progress(len(good), min(samples, len(order)))
        if len(good) == samples:
            break
    tried = len(good) + len(skipped)
    if len(skipped) > MAX_CORRUPT * tried:
        listed = "; ".join(f"{s.name}: {s.reason}" for s in skipped[:5])
        raise InputError(
            f"{len(skipped)} of {tried} calibration images in {path} cannot be used, over {MAX_CORRUPT:.0%}.",
            f"{listed}{' ...' if len(skipped) > 5 else ''}",
            "Repair or remove them.",
        )
    return CalibrationSet(str(source), tuple(good), tuple(skipped), False, samples)


def scenes_calibration(samples: int = 256, seed: int = 20_231_214) -> CalibrationSet:
    """Drawn scenes with their captions (a quarter Chinese), from the combinations nano was trained on."""
    from ..synthetic.batches import batch_scenes
    from ..synthetic.captions import caption

    scenes, languages = batch_scenes(seed, 0, "train", samples)
    scene_samples = [
        Sample(
            f"scene-{i}", hashlib.sha256(repr(scene).encode()).hexdigest(), caption(scene, language), scene
        )
        for i, (scene, language) in enumerate(zip(scenes, languages, strict=True))
    ]
    return CalibrationSet("scenes", tuple(scene_samples), synthetic=True, requested=samples)


def signs_calibration(samples: int = 256, seed: int = 20_241_205) -> CalibrationSet:
    """Drawn signs with dialogues about them, of texts that nano-tiles was trained on."""
    from ..synthetic.sign_questions import dialogues

    drawn = [row for row in dialogues(seed, 0, 2 * samples, "train", 4) if len(row.signs) == 1][:samples]
    sign_samples = [
        Sample(f"sign-{i}", hashlib.sha256(repr(row).encode()).hexdigest(), row.questions[0].answer, row)
        for i, row in enumerate(drawn)
    ]
    return CalibrationSet("signs", tuple(sign_samples), synthetic=True, requested=samples)


def _entries(path: Path, columns: tuple[str, ...]) -> list[Entry]:
    """All candidates in ``path``."""
    shards = [path] if path.is_file() and path.suffix == ".tar" else []
    if not path.exists() and (names := braced(str(path))) != [str(path)]:
        shards = [Path(name) for name in names]
    if path.is_dir() and not shards:
        shards = sorted(p for p in path.glob("*.tar") if p.is_file())
    if shards:
        return shard_entries(shards, columns[-1] if columns else None)
    tables = dataset_files(path) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    if tables:
        return table_entries(tables, path if path.is_dir() else path.parent, columns)
    if columns:
        raise UsageError(f"{path} has no columns.", fix="Leave -O calib-columns out.")
    if path.is_dir():
        return _folder(path)
    if path.is_file() and (path.suffix == ".json" or _has_conversations(path)):
        return _conversations(path)
    if path.is_file() and path.suffix in (".jsonl", ".ndjson"):
        return _manifest(path)
    why = "It is not one of these kinds." if path.exists() else "There is no such path."
    raise InputError(f"No calibration data at {name_of(path)}.", why, f"Give {'; '.join(KINDS)}.")


def _folder(root: Path) -> list[Entry]:
    """Images below ``root``; linked folders are not entered, hidden files are not images."""
    entries = []
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                path = Path(folder, file)
                name = path.relative_to(root).as_posix()  # may hold bytes that are not UTF-8
                name = name.encode("utf-8", "backslashreplace").decode()
                entries.append(Entry(name, path, partial(_sidecar, path)))
    return entries


def _has_conversations(path: Path) -> bool:
    """Whether the first line of a ``.jsonl`` file is a conversation."""
    if path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    try:
        row = json.loads(decode_text(first))
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "conversations" in row


def _conversations(path: Path) -> list[Entry]:
    """Conversations about one image each, which the first question shows; others are left out."""
    root, entries = path.parent.resolve(), []
    for number, (images, turns) in enumerate(read_conversations(path)):
        if len(images) == 1 and turns[0].images == 1:
            answer = turns[-1].answer or ""
            name = f"{images[0].relative_to(root).as_posix()}#{number}"
            entries.append(Entry(name, images[0], partial(str, answer), turns))
    if not entries:
        raise InputError(
            f"{path} has no conversation to calibrate on.",
            "Each is about no image, or about several.",
            "Give --calib images like those that you will serve.",
        )
    return entries


def _manifest(path: Path) -> list[Entry]:
    entries: dict[str, Entry] = {}
    root = path.parent.resolve()
    try:
        with path.open(encoding=text_encoding(path)) as file:
            for number, line in enumerate(file, 1):
                if number > MAX_ENTRIES:
                    raise InputError(f"{path} has over {MAX_ENTRIES:,} lines.", fix="Split it.")
                if line.strip():
                    entry, caption = _line(line, root, f"{path}, line {number}")
                    entries.setdefault(f"{entry.name}\0{caption}", entry)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8.", str(error), "Save it as UTF-8.") from error
    return list(entries.values())


def _line(line: str, root: Path, where: str) -> tuple[Entry, str | None]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where} is not JSON.", str(error), 'Write {"image": ..., "caption": ...}.'
        ) from error
    image = row.get("image") if isinstance(row, dict) else None
    caption = row.get("caption") if isinstance(row, dict) else None
    if not isinstance(image, str) or not image or not isinstance(caption, str | None):
        raise InputError(
            f"{where} has no usable image.", f"{line[:200]!r}", 'Write {"image": ..., "caption": ...}.'
        )
    try:
        own_text = plain(caption)
    except InputError as error:
        raise InputError(f"{where} has an impossible text.", error.why) from error
    resolved = inside(root, image, where)
    text_name = Path(image).with_suffix(".txt").as_posix()  # of the name: a link's image may be elsewhere
    text = partial(_text_in, root, text_name, where) if caption is None else lambda: own_text
    return Entry(Path(image).as_posix(), resolved, text), caption


def _sidecar(image: Path) -> str | None:
    return _caption_in(image.with_suffix(".txt"))


def _text_in(root: Path, name: str, where: str) -> str | None:
    return _caption_in(inside(root, name, where))


def _caption_in(path: Path) -> str | None:
    """The caption in a text file; None where there is none."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return decode_text(file.read(MAX_CAPTION_BYTES)).strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Caption {path} cannot be read.", f"Its caption {path.name}: {error}.") from error
