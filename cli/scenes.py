"""``ivl-export train scenes``: drawn pictures with captions, to try internvl-nano on or to calibrate with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import BuildError, UsageError
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..synthetic.captions import Language
    from ..synthetic.scenes import Split

CAPTIONS = "captions.jsonl"
_DRAWN = re.compile(r"scene-\d{5,}\.(png|txt)")


def scenes(
    out: Annotated[Path, typer.Argument(help="Folder to draw into.", show_default=False)],
    count: Annotated[int, typer.Option(help="How many scenes.", min=1, max=100_000)] = 8,
    seed: Annotated[int, typer.Option(help="Equal seeds draw equal scenes.", min=0)] = 0,
    split: Annotated[
        str, typer.Option(help="'heldout' also shows what internvl-nano was never trained on; or 'train'.")
    ] = "heldout",
    lang: Annotated[str, typer.Option(help="Language of the captions: en or zh.")] = "en",
    force: Annotated[
        bool, typer.Option("--force", help="Draw into a folder with files; scenes drawn earlier are removed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw scenes of coloured shapes: PNG files, a caption beside each (.txt), and captions.jsonl.

    The folder or its captions.jsonl can be given to 'build --calib', and the folder to 'run'.
    """
    drawn = draw(out, count, seed, _split(split), _language(lang), force)
    if as_json:
        settings = {"count": count, "seed": seed, "split": split, "lang": lang}
        print_json({"folder": str(out), **settings, "scenes": drawn})
        return
    shown = [(row["image"], row["caption"], row["novel"]) for row in drawn[:20]]
    if count > len(shown):
        shown.append((f"… {count - len(shown)} more", "", ""))
    print_table(f"{count} scenes in {out}", ("image", "caption", "combination never trained on"), shown)


def draw(
    out: Path, count: int, seed: int, split: Split, lang: Language, force: bool = False
) -> list[dict[str, str | bool]]:
    """Draw ``count`` scenes into ``out``; one row a scene: image (file name), caption, novel.

    The first scenes of a seed are the same for every ``count``.

    Raises:
        UsageError: ``out`` is a file, or has files in it and ``force`` is not given.
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
    there = sorted(out.iterdir())
    if there and not force:
        raise UsageError(
            f"{out} is not empty.",
            f"It has {len(there)} files, {there[0].name} among them.",
            "Give a new folder, or --force to draw into this one.",
        )
    for path in there:
        if path.name == CAPTIONS or _DRAWN.fullmatch(path.name):
            path.unlink()


def _split(name: str) -> Split:
    known: dict[str, Split] = {"heldout": "heldout", "train": "train"}
    if name in known:
        return known[name]
    raise UsageError(f"Unknown split {name!r}.", fix="Use 'heldout' or 'train'.")


def _language(name: str) -> Language:
    known: dict[str, Language] = {"en": "en", "zh": "zh"}
    if name in known:
        return known[name]
    raise UsageError(f"Unknown language {name!r}.", fix="Use 'en' or 'zh'.")
