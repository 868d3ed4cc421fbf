"""``ivl-export train scenes``: drawn images with captions, to try internvl-nano or to calibrate it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import BuildError, UsageError
from ..settings import Setting, Table, choice, read_settings, whole
from .command import SettingsOpt
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..synthetic.captions import Language
    from ..synthetic.scenes import Split

SETTINGS: Table = {
    "seed": Setting("0, 1 or more", "equal seeds draw equal scenes; else 0", whole(), default=0),
    "split": Setting(
        "heldout or train",
        "heldout (the default) includes combinations that internvl-nano was not trained on",
        choice(("heldout", "train")),
        default="heldout",
    ),
    "lang": Setting("en or zh", "language of the captions; else en", choice(("en", "zh")), default="en"),
}
CAPTIONS = "captions.jsonl"
_DRAWN = re.compile(r"scene-\d{5,}\.(png|txt)")


def scenes(
    out: Annotated[Path, typer.Argument(help="Folder to draw into.", show_default=False)],
    count: Annotated[int, typer.Option(help="How many scenes.", min=1, max=100_000)] = 8,
    force: Annotated[
        bool, typer.Option("--force", help="Draw into a folder with files; earlier scenes are removed.")
    ] = False,
    settings: SettingsOpt = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw scenes of coloured shapes: PNG files, a caption for each (.txt), and captions.jsonl.

    'build --calib' takes the folder or its captions.jsonl, 'run' the folder.
    """
    values = read_settings(SETTINGS, settings or ())
    drawn = draw(out, count, **values, force=force)
    if as_json:
        print_json({"folder": str(out), "count": count, **values, "scenes": drawn})
        return
    shown = [(row["image"], row["caption"], row["novel"]) for row in drawn[:20]]
    if count > len(shown):
        shown.append((f"… {count - len(shown)} more", "", ""))
    print_table(f"{count} scenes in {out}", ("image", "caption", "unseen in training"), shown)


def draw(
    out: Path, count: int, seed: int, split: Split, lang: Language, force: bool = False
) -> list[dict[str, str | bool]]:
    """Draw ``count`` scenes into ``out``; one row a scene: image (file name), caption, novel.

    The first scenes of a seed are the same for every ``count``.

    Raises:
        UsageError: ``out`` is a file, or a folder with files and ``force`` is False.
        BuildError: it cannot be written.
    """
    from PIL import Image

    from ..synthetic.batches import batch_scenes
    from ..synthetic.captions import caption
    from ..synthetic.render import render

    try:
        _make_room(out, force)
        rows: list[dict[str, str | bool]] = []
        for number, scene in enumerate(batch_scenes(seed, 0, split, count)[0], 1):
            image, text = out / f"scene-{number:05d}.png", caption(scene, lang)
            Image.fromarray(render(scene)).save(image)
            image.with_suffix(".txt").write_text(f"{text}\n", encoding="utf-8")
            rows.append({"image": image.name, "caption": text, "novel": scene.novel})
        lines = (json.dumps({k: row[k] for k in ("image", "caption")}, ensure_ascii=False) for row in rows)
        (out / CAPTIONS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise BuildError(
            f"Cannot draw into {out}.", str(error), "Free some space or give another folder."
        ) from error
    return rows


def _make_room(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is not a folder.", "It is a file.", "Give a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(out.iterdir())
    if files and not force:
        raise UsageError(
            f"{out} is not empty.",
            f"It holds {len(files)} files, {files[0].name} among them.",
            "Give a new folder, or --force to draw into this one.",
        )
    for path in files:
        if path.name == CAPTIONS or _DRAWN.fullmatch(path.name):
            path.unlink()
