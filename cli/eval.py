"""``ivl-export eval``: published benchmarks on a user's own copy of the data. Imports no torch."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..settings import Setting, Table, read_settings, whole
from .command import SettingsOpt, command
from .options import ENGINE, FRAMES, BackendOpt, BundleArg, JsonOpt
from .output import print_json, print_table, show
from .progress import Bars

app = typer.Typer(add_completion=False)

SETTINGS: Table = {
    "batch": Setting("1, 8 or more", "images run at once; else what the engines are tuned for", whole(1)),
    **FRAMES,
    "max-new-tokens": Setting(
        "24, 1 or more", "length limit of a chat's answer; else 24", whole(1), default=24
    ),
    **ENGINE,
}


class Task(str, Enum):
    """``evaluation.tasks.TASKS``."""

    imagenet = "imagenet"
    flickr30k = "flickr30k"
    coco_retrieval = "coco-retrieval"
    coco_caption = "coco-caption"
    xtd = "xtd"
    video = "video"
    questions = "questions"
    vqa = "vqa"
    choices = "choices"
    captions = "captions"


class Head(str, Enum):
    """Which image embedding, by its published name."""

    C = "InternVL-C"
    G = "InternVL-G"


@app.command(cls=command(SETTINGS))
def evaluate(
    bundle: BundleArg,
    task: Annotated[Task, typer.Option(help="The benchmark.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(
            help="The data set's folder, as published, or a JSONL file of questions.",
            show_default="drawn scenes, for questions",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Number of images, chosen by the hash of their names.", show_default="all"),
    ] = None,
    mode: Annotated[Head, typer.Option(help="Which image embedding; captions always use QLLaMA.")] = Head.C,
    language: Annotated[
        str,
        typer.Option(
            help="Language of class names (en, zh, jp, ar, it) or of XTD's captions (also es, fr, ko, ru)."
        ),
    ] = "en",
    prompt: Annotated[str, typer.Option(help="Prompt of a chat bundle; {} is the question.")] = "{}",
    rerank: Annotated[
        int | None,
        typer.Option(
            min=1, help="In retrieval, score the best N again; the bundle must be built with --itm."
        ),
    ] = None,
    backend: BackendOpt = "onnxruntime",
    settings: SettingsOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Score a bundle on your own copy of a benchmark, next to the paper's number.

    Tasks of chat bundles are questions (exact answers), vqa, choices and captions. A line of their files is
    {"image": "1.jpg", "question": "What is it?", "answer": "a ring"}, or {..., "answers": ["a ring"]};
    {..., "choices": ["a ring", "a star"], "answer": "A"}; {"image": "1.jpg", "captions": ["a red ring"]}.
    """
    from ..evaluation import chat
    from ..evaluation.tasks import CHAT_TASKS, check_task
    from ..evaluation.tasks import evaluate as run
    from ..runtime import InternVL, InternVLChat

    check_task(task.value, language, rerank)
    start = time.perf_counter()
    engine: dict[str, Any] = {"backend": backend, **read_settings(SETTINGS, settings or ())}
    frames, max_new_tokens = engine.pop("frames"), engine.pop("max_new_tokens")
    if task.value in CHAT_TASKS:
        with InternVLChat.load(bundle, **engine) as model, Bars() as bars:
            recipe = model.bundle.manifest.recipe
            result = chat.evaluate(model, data, limit, prompt, max_new_tokens, bars, task.value)
    elif data is None:
        raise UsageError(f"{task.value} needs a data set.", fix="Give --data FOLDER.")
    else:
        with InternVL.load(bundle, **engine) as embedder, Bars() as bars:
            recipe = embedder.bundle.manifest.recipe
            result = run(embedder, task.value, data, mode.value, language, limit, frames, bars, rerank)
    seconds = time.perf_counter() - start
    if as_json:
        about = {"bundle": str(bundle), "recipe": recipe, "backend": backend, "seconds": seconds}
        print_json({**about, **result.to_json()})
        return
    shown = f"{result.task} ({result.language})" if result.language else result.task
    print_table(
        f"{shown}, {result.mode}, {recipe} on {backend}",
        ("measure", "result", "95% interval", "questions", "paper"),
        [
            (m.name, f"{m.value:.1f}", f"{m.low:.1f} to {m.high:.1f}", m.samples, m.reference)
            for m in result.measures
        ],
    )
    used = f"{result.samples} of {result.available} samples, {seconds:.1f} s"
    conditions = ", ".join(f"{name} {show(value)}" for name, value in result.settings.items())
    typer.echo(
        f"{used} ({conditions})" + (f"; paper: arXiv 2312.14238, {result.source}" if result.source else "")
    )
    if result.source and not result.whole:
        typer.echo("Not comparable with the paper: its numbers are for the whole set.")
    for skip in result.skipped:
        typer.echo(f"skipped {show(skip['file'])}: {show(skip['why'])}", err=True)
