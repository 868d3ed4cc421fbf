"""``ivl-export run chat``: questions about images, from the command line or typed in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import UsageError
from .output import print_json

if TYPE_CHECKING:
    from ..runtime import Chat, InternVLChat
    from ..sampling import Sampling


def chat(
    bundle: Path,
    shown: tuple[list[Path], list[Path], int],
    questions: list[str],
    max_new_tokens: int,
    sampling: Sampling,
    engines: dict[str, Any],
    as_json: bool,
) -> None:
    """Answer ``questions``, or those typed in until the input ends; answers are printed token by token.

    ``shown``: image files, video files, and how many frames of each video.
    """
    if as_json and not questions:
        raise UsageError(
            "There is no question.", "--json reads none from the keyboard.", "Give --question TEXT."
        )
    from ..runtime import InternVLChat

    started = time.perf_counter()
    images, videos, frames = shown
    with InternVLChat.load(bundle, **engines) as model:
        talk = _conversation(model, images, videos, frames)
        for question in questions or _typed():
            if questions and not as_json:
                typer.echo(f"> {question}")
            for piece in talk.stream(question, max_new_tokens, sampling):
                if not as_json:
                    typer.echo(piece, nl=False)
            if not as_json:
                typer.echo()
        seconds = time.perf_counter() - started
        if as_json:
            print_json(
                {
                    "bundle": str(bundle),
                    "backend": engines["backend"],
                    "recipe": model.bundle.manifest.recipe,
                    "images": [str(image) for image in images],
                    "videos": [str(video) for video in videos],
                    "turns": [{"question": t.question, "answer": t.answer} for t in talk.history],
                    "seconds": seconds,
                    "timings": {
                        k: {"calls": t.calls, "seconds": t.seconds} for k, t in model.timings.items()
                    },
                }
            )


def _conversation(model: InternVLChat, images: list[Path], videos: list[Path], frames: int) -> Chat:
    """About images and videos; where images are cut into tiles, a frame is one."""
    from ..runtime import frames_of

    if model.image_settings.tiling is None:
        return model.chat([*images, *(frame for video in videos for frame in frames_of(video, frames))])
    if len(videos) == 1 and not images:
        return model.chat_video(videos[0], frames)
    shown = [frame for video in videos for frame in frames_of(video, frames)]
    limits = [*[model.image_settings.tiling.max_tiles] * len(images), *[1] * len(shown)]
    return model.chat([*images, *shown], max_tiles=limits)


def _typed() -> Iterator[str]:
    """Lines that are typed in, until the input ends."""
    while True:
        try:
            line = input("> ")
        except (EOFError, StopIteration):
            typer.echo()
            return
        if line.strip():
            yield line.strip()
