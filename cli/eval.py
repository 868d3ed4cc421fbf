"""``ivl-export eval``: published benchmarks on a user's own copy of the data. Torch is not imported."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .output import print_json, print_table, show
from .progress import Bars
from .session import BackendOpt, BundleArg, JsonOpt, TargetOpt, ThreadsOpt

app = typer.Typer(add_completion=False)


class Task(str, Enum):
    """``evaluation.tasks.TASKS``."""

    imagenet = "imagenet"
    flickr30k = "flickr30k"
    coco_retrieval = "coco-retrieval"
    coco_caption = "coco-caption"
    xtd = "xtd"
    video = "video"
    questions = "questions"


class Head(str, Enum):
    """Which image embedding."""

    C = "InternVL-C"
    G = "InternVL-G"


@app.command()
def evaluate(
    bundle: BundleArg,
    task: Annotated[Task, typer.Option(help="What is measured.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="The data set's folder, as published; a JSONL of questions. Else drawn scenes."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use so many images, chosen by the hash of their names.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images run at once.")] = None,
    mode: Annotated[Head, typer.Option(help="Which image embedding; captions have one way only.")] = Head.C,
    language: Annotated[
        str, typer.Option(help="Of class names (en, zh, jp, ar, it) or XTD's captions (and es, fr, ko, ru).")
    ] = "en",
    frames: Annotated[int, typer.Option(min=1, help="Frames used of a video.")] = 8,
    prompt: Annotated[str, typer.Option(help="What a chat bundle is asked; {} is the question.")] = "{}",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer of a chat bundle.")] = 24,
    rerank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of retrieval: match the best so many too; the bundle was built with --itm."
        ),
    ] = None,
    backend: BackendOpt = "onnxruntime",
    target: TargetOpt = None,
    threads: ThreadsOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure a bundle on your own copy of a benchmark, beside the paper's number.

    A chat bundle has one task, questions: exact answers. A line of its file is {"image": "1.jpg", "question":
    "What is it?", "answer": "a ring"}, with several right ones {..., "answers": ["a ring", "ring"]}.
    """
    from ..evaluation import chat
    from ..evaluation.tasks import QUESTIONS, check_task
    from ..evaluation.tasks import evaluate as run
    from ..runtime import InternVL, InternVLChat

    check_task(task.value, language, rerank)
    start = time.perf_counter()
    opened: dict[str, Any] = {"backend": backend, "threads": threads, "target": target, "batch": batch}
    if task.value == QUESTIONS:
        with InternVLChat.load(bundle, **opened) as talker, Bars() as bars:
            recipe = talker.bundle.manifest.recipe
            result = chat.evaluate(talker, data, limit, prompt, max_new_tokens, bars)
    elif data is None:
        raise UsageError(f"{task.value} needs a data set.", fix="Give --data FOLDER.")
    else:
        with InternVL.load(bundle, **opened) as model, Bars() as bars:
            recipe = model.bundle.manifest.recipe
            result = run(model, task.value, data, mode.value, language, limit, frames, bars, rerank)
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
    settings = ", ".join(f"{name} {show(value)}" for name, value in result.settings.items())
    typer.echo(
        f"{used} ({settings})" + (f"; paper: arXiv 2312.14238, {result.source}" if result.source else "")
    )
    if result.source and not result.whole:
        typer.echo("The paper's numbers are of its whole set: not comparable.")
    for skip in result.skipped:
        typer.echo(f"skipped {show(skip['file'])}: {show(skip['why'])}", err=True)
