"""Conversations about images, from a file in LLaVA's layout. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files.text import read_text
from .chat_template import Turn

PLACEHOLDER = "<image>"
EXAMPLE = (
    'Write [{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, '
    '{"from": "gpt", "value": "A panda."}]}].'
)


class Conversation(NamedTuple):
    """Image files, and the questions and answers about them."""

    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


def read_conversations(path: Path, images: Path | None = None) -> tuple[Conversation, ...]:
    """Read conversations in LLaVA's layout: a JSON list, or one object a line (``.jsonl``).

        {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                             {"from": "gpt", "value": "A ring."}]}

    Args:
        path: the file. ``image`` may be left out (text alone) or be a list.
        images: the folder that image names are relative to; None: the file's own.

    Raises:
        InputError: the file, a conversation or an image name cannot be used; the first fault is named.
    """
    folder = (images or path.parent).resolve()
    try:
        text = read_text(path)
        rows = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read {path}.", str(error), "Give a JSON list, or JSONL.") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(
            f"{path} holds no conversations.",
            "It must be a list that is not empty.",
            EXAMPLE,
        )
    return tuple(_conversation(row, f"{path}, entry {i}", folder) for i, row in enumerate(rows))


def _conversation(row: Any, where: str, folder: Path) -> Conversation:
    said = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(said, list) or len(said) < 2:
        raise InputError(
            f"{where} is not a conversation.",
            "It needs 'conversations' of at least two messages.",
            EXAMPLE,
        )
    names = row.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(f"{where}: 'image' is not a file name.", f"It is {names!r:.200}.", EXAMPLE)
    paths = tuple((folder / name).resolve() for name in names)
    for file in paths:
        if not file.is_relative_to(folder) or not file.is_file():
            raise InputError(
                f"{where}: no image {file.name}.",
                f"Looked for it in {folder}.",
                "Check -O images, or leave the conversation out.",
            )
    texts = []
    for i, message in enumerate(said[: len(said) // 2 * 2]):
        want = ("human", "user") if i % 2 == 0 else ("gpt", "assistant")
        if not isinstance(message, dict) or message.get("from") not in want:
            raise InputError(
                f"{where}: message {i + 1} is not from {want[0]}.",
                "They must take turns.",
                "Put them in turns, or leave the conversation out.",
            )
        if not isinstance(message.get("value"), str):
            raise InputError(
                f"{where}: message {i + 1} has no text.", fix="Write one, or leave the conversation out."
            )
        texts.append(message["value"])
    turns = tuple(
        Turn(question.replace(PLACEHOLDER, "").strip(), answer.strip(), question.count(PLACEHOLDER))
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    )
    shown = sum(turn.images for turn in turns)
    if shown != len(paths):
        raise InputError(
            f"{where} has {shown} placeholders {PLACEHOLDER} and {len(paths)} images.",
            fix=f"Write {PLACEHOLDER} once for each image.",
        )
    return Conversation(paths, turns)
