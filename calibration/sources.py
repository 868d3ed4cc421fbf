"""Opening calibration sets.

A folder of images (a caption may stand beside each as ``.txt``), a JSONL manifest
(``{"image": "relative/path.jpg", "caption": "..."}`` a line), or drawn scenes (for nano). The choice of
samples depends on names and the seed only, so it is the same on every machine. Files are untrusted: paths in
a manifest may not leave its folder, and what cannot be decoded is skipped and listed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..paths import inside
from ..pictures import load_image
from .dataset import CalibrationSet, Sample, Skipped, read_bytes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")
MAX_CORRUPT = 0.1
MAX_CAPTION_BYTES = 8192
MAX_LINES = 10_000_000

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def open_calibration(
    source: str | Path, samples: int = 512, seed: int = 0, progress: Progress | None = None
) -> CalibrationSet:
    """Choose up to ``samples`` usable images of a folder or JSONL manifest.

    Every chosen image is decoded once here; one that cannot be is skipped and another takes its place.

    Raises:
        InputError: no such source, nothing in it, a manifest that is broken or points outside its folder, or
            more than 10% of the files tried cannot be decoded.
    """
    path = Path(source)
    if samples < 1:
        raise InputError(f"{samples} calibration samples were asked for.", fix="Ask for at least 1.")
    if path.is_dir():
        entries = _folder(path)
    elif path.is_file() and path.suffix in (".jsonl", ".ndjson"):
        entries = _manifest(path)
    else:
        why = "It is neither a folder nor a .jsonl file." if path.exists() else "There is no such path."
        raise InputError(f"No calibration data at {path}.", why, "Check the path given as --calib.")
    if not entries:
        raise InputError(
            f"No calibration data in {path}.",
            f"It has no image ({', '.join(IMAGE_SUFFIXES)})." if path.is_dir() else "It has no line.",
            "Give a folder of images, or a JSONL manifest with an image and a caption a line.",
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
    from ..training.batches import batch_scenes
    from ..training.grammar import caption

    scenes, languages = batch_scenes(seed, 0, "train", samples)
    found = [
        Sample(
            f"scene-{i}", hashlib.sha256(repr(scene).encode()).hexdigest(), caption(scene, language), scene
        )
        for i, (scene, language) in enumerate(zip(scenes, languages, strict=True))
    ]
    return CalibrationSet("scenes", tuple(found), synthetic=True, asked=samples)


@dataclass(frozen=True)
class _Entry:
    """An image that may be chosen; ``caption`` may also stand in a sidecar file."""

    name: str
    path: Path
    caption: str | None = None

    def check(self) -> Sample | Skipped:
        try:
            data = read_bytes(self.path)
            load_image(data, self.name)
            caption = self.caption if self.caption is not None else _sidecar(self.path)
        except InputError as error:
            return Skipped(self.name, error.why or error.what)
        return Sample(self.name, hashlib.sha256(data).hexdigest(), caption or None, self.path)


def _folder(root: Path) -> list[_Entry]:
    """Images below ``root``; linked folders are not entered, hidden files are not images."""
    found = []
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                path = Path(folder, file)
                name = path.relative_to(root).as_posix()  # may hold bytes that are no UTF-8
                found.append(_Entry(name.encode("utf-8", "backslashreplace").decode(), path))
    return found


def _manifest(path: Path) -> list[_Entry]:
    found: dict[str, _Entry] = {}
    root = path.parent.resolve()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if number > MAX_LINES:
                    raise InputError(f"{path} has over {MAX_LINES:,} lines.", fix="Split it.")
                if line.strip():
                    entry = _line(line, root, f"{path}, line {number}")
                    found.setdefault(f"{entry.name}\0{entry.caption}", entry)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8.", str(error), "Save it as UTF-8.") from error
    return list(found.values())


def _line(line: str, root: Path, where: str) -> _Entry:
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
        (caption or "").encode()
    except UnicodeEncodeError as error:  # JSON can name lone surrogates, which no tokenizer takes
        raise InputError(f"{where} has an impossible text.", f"{caption!r}: {error}") from error
    return _Entry(Path(image).as_posix(), inside(root, image, where), caption)


def _sidecar(image: Path) -> str | None:
    path = image.with_suffix(".txt")
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return file.read(MAX_CAPTION_BYTES).decode("utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Caption {path} cannot be read.", f"Its caption {path.name}: {error}.") from error
