"""Data sets for chat models as JSON lines, and how answers to them are scored.

======== ====================================================================================================
vqa      ``{"image": "1.jpg", "question": "What is it?", "answers": ["a ring", "ring", ...]}``; ten answers as
         VQA v2 has them, also as ``[{"answer": "a ring"}, ...]``, or one ``"answer"``
choices  ``{"image": "1.jpg", "question": "What is it?", "choices": ["a ring", "a star"], "answer": "A"}``;
         also ``"options"``, or ``"A": "a ring", "B": "a star"`` as MMBench has them; the answer is a letter,
         the number of a choice from 0, or its text; ``"hint"`` comes before the question
captions ``{"image": "1.jpg", "captions": ["a red ring", ...]}``, or one ``"caption"``
======== ====================================================================================================

``"image"`` may be a list; images are next to the file or below it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files.json import parse_json
from ..files.paths import inside
from .files import read_text
from .scores import Measure, check_cider, cider, mean, share

LETTERS = string.ascii_uppercase
VQA, CHOICES, CAPTIONS = "vqa", "choices", "captions"
PROMPTS = {
    VQA: "{}\nAnswer the question using a single word or phrase.",
    CHOICES: "{}\nAnswer with the option's letter from the given choices directly.",
    CAPTIONS: "Provide a one-sentence caption for the provided image.{}",
}
"""Prompt with ``{}`` for the question and its choices, as in the family's published evaluation."""
_EXAMPLES = {
    VQA: '{"image": "1.jpg", "question": "What is it?", "answers": ["a ring"]}',
    CHOICES: '{"image": "1.jpg", "question": "What is it?", "choices": ["a ring", "a star"], "answer": "A"}',
    CAPTIONS: '{"image": "1.jpg", "captions": ["a red ring"]}',
}


@dataclass(frozen=True)
class ChatItem:
    """A question about images.

    Args:
        name: the same on every machine.
        files: the images.
        question: with the choices, a line each.
        answers: those that are right: texts of annotators, or captions.
        choices: the options; empty: free text.
        right: number of the right choice.
    """

    name: str
    files: tuple[Path, ...]
    question: str
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    right: int = 0


def read_items(task: str, path: Path) -> tuple[ChatItem, ...]:
    """The items of a file, or of ``TASK.jsonl`` in the folder ``path``.

    Raises:
        InputError: a line is not as the module says (it is named), or there is none.
    """
    file = path / f"{task}.jsonl" if path.is_dir() else path
    lines = read_text(file, f"an item a line, {_EXAMPLES[task]}").split("\n")
    items = [_item(task, line, file, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise InputError(f"{file} has no questions.", "It has no line.", f"Write {_EXAMPLES[task]} a line.")
    return tuple(items)


def check_scores(task: str) -> None:
    """CapabilityError where answers cannot be scored here; checked before any is generated."""
    if task == CAPTIONS:
        check_cider()


def score(task: str, said: Sequence[str], items: Sequence[ChatItem]) -> tuple[Measure, ...]:
    """Measures of the answers ``said`` to ``items``."""
    pairs = list(zip(said, items, strict=True))
    if task == CAPTIONS:
        return (mean("CIDEr", cider(said, [item.answers for item in items])),)
    if task == VQA:
        return (mean("VQA accuracy", [vqa_accuracy(text, item.answers) for text, item in pairs]),)
    chosen = [choice_of(text, item.choices) for text, item in pairs]
    right = np.array([choice == item.right for choice, item in zip(chosen, items, strict=True)])
    return share("right choice", right), share(
        "a choice was named", np.array([c is not None for c in chosen])
    )


def vqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """VQA's accuracy: an answer that three of the others gave is right, averaged over all others of one.

    With fewer than three answers: whether it is among them.
    """
    text, references = vqa_normalised(said), [vqa_normalised(answer) for answer in answers]
    if len(references) < 3:
        return float(text in references)
    count = references.count(text)
    return float(np.mean([min(1.0, (count - (one == text)) / 3) for one in references]))


_ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}
_MARKS = re.compile(r"[;/\[\]\"{}()=+\\_\-<>@`?!]")


def vqa_normalised(text: str) -> str:
    """As VQA's evaluation compares answers: no marks, no articles, numbers as digits, lower case."""
    text = _MARKS.sub(" ", text.replace("\n", " ").lower())
    text = re.sub(r"(?<!\d)[.,](?!\d)|[.,]$|(?<=\d),(?=\d)", "", text).replace(":", " ")
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def choice_of(said: str, choices: Sequence[str]) -> int | None:
    """The number of the choice that an answer names by its letter, or by its text; None: it names none."""
    letters = LETTERS[: len(choices)]
    # A letter alone, or before a mark: "a ring" begins with an article.
    before = r"\W*(?:the\s+)?(?:answer|option)?(?:\s+is)?\W*"
    first = re.match(rf"{before}([{letters}])(?=\s*$|[.):,\n])", said.strip(), re.IGNORECASE)
    texts = [vqa_normalised(choice) for choice in choices]
    if (text := vqa_normalised(said)) in texts:
        return texts.index(text)
    if first is not None:
        return letters.index(first[1].upper())
    named = [number for number, choice in enumerate(texts) if choice and choice in text]
    return named[0] if len(named) == 1 else None


def _item(task: str, line: str, file: Path, number: int) -> ChatItem:
    where = f"{file}, line {number}"
    try:
        row: Any = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON.", f"{error}.", f"Write {_EXAMPLES[task]}.") from error
    try:
        return _READERS[task](row, file, where)
    except (KeyError, TypeError, ValueError) as error:
        why = f"{error}." if isinstance(error, ValueError) else f"{line[:200]!r}"
        raise InputError(f"{where} is not as {task} are.", why, f"Write {_EXAMPLES[task]}.") from error


def _images(row: Mapping[str, Any], file: Path, where: str) -> tuple[Path, ...]:
    listed = row["image"] if isinstance(row["image"], list) else [row["image"]]
    return tuple(inside(file.parent, _text(name), where) for name in listed)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is not text")
    return value.strip()


def _texts(row: Mapping[str, Any], many: str, one: str) -> tuple[str, ...]:
    listed = row[many] if many in row else [row[one]]
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{many} is not a list of texts")
    return tuple(_text(entry["answer"] if isinstance(entry, dict) else entry) for entry in listed)


def _vqa(row: Mapping[str, Any], file: Path, where: str) -> ChatItem:
    question = _text(row["question"])
    name = f"{row['image']}: {question}"
    return ChatItem(name, _images(row, file, where), question, _texts(row, "answers", "answer"))


def _captions(row: Mapping[str, Any], file: Path, where: str) -> ChatItem:
    return ChatItem(str(row["image"]), _images(row, file, where), "", _texts(row, "captions", "caption"))


def _choices(row: Mapping[str, Any], file: Path, where: str) -> ChatItem:
    listed = row.get("choices", row.get("options"))
    if listed is None:
        listed = [row[letter] for letter in LETTERS if isinstance(row.get(letter), str)]
    if not isinstance(listed, list) or not 2 <= len(listed) <= len(LETTERS):
        raise ValueError("it has no choices")
    choices, answer = tuple(map(_text, listed)), row["answer"]
    if isinstance(answer, str) and answer.strip() in choices:
        right = choices.index(answer.strip())
    elif isinstance(answer, str) and answer.strip().rstrip(".").upper() in [*LETTERS[: len(choices)]]:
        right = LETTERS.index(answer.strip().rstrip(".").upper())
    elif type(answer) is int and 0 <= answer < len(choices):
        right = answer
    else:
        raise ValueError(f"the answer {answer!r} is none of the choices")
    hint = row.get("hint")
    question = _text(row["question"])
    lines = [*([hint.strip()] if isinstance(hint, str) and hint.strip() else []), question]
    lines += [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    name = f"{row['image']}: {question}"
    return ChatItem(name, _images(row, file, where), "\n".join(lines), (), choices, right)


_READERS: dict[str, Callable[[Mapping[str, Any], Path, str], ChatItem]] = {
    VQA: _vqa,
    CHOICES: _choices,
    CAPTIONS: _captions,
}
