"""Questions about signs: reading, counting, and telling two pictures apart. Each has one right answer.

What number is it?                 8093        read
图中的汉字是什么?                    望爱重       read
How many red shapes are there?     4           count
Which image has a word?            2           two images
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from ..inputs.chat_template import Turn
from .glyphs import HEIGHT, chinese
from .scenes import Split
from .signs import (
    COLORS,
    SHAPES,
    TEXT_KINDS,
    Item,
    Sign,
    TextKind,
    arranged,
    sample_text,
    shape_item,
    text_item,
)

Task = Literal["read", "count", "two images"]
TASKS: tuple[Task, ...] = ("read", "count", "two images")
GRIDS = ((3, 1), (1, 3), (4, 1), (1, 4))
"""Columns and rows of a picture that is shown alone; in tiles."""
PAIR_GRIDS = ((2, 1), (1, 2), (3, 1), (1, 3))
"""Of one of two pictures."""
SMALL_GRIDS = {1: ((1, 1),), 2: ((1, 1), (2, 1), (1, 2))}
"""Of a picture that has at most so many tiles, for the beginning of training."""
ALBUM = 6
"""The most pictures of an album."""
MOST = 6
"""The most shapes that are counted."""
READ_QUESTIONS: dict[TextKind, tuple[str, ...]] = {
    "number": ("What number is it?", "图中的数字是什么?"),
    "word": ("What word is it?", "图中的英文是什么?"),
    "chinese": ("What characters are they?", "图中的汉字是什么?"),
}
READ_ALL = "What does it say?"
_NAMES = {"number": "number", "word": "word", "chinese": "characters"}
_COLORS = tuple(COLORS)
Name = TypeVar("Name", bound=str)
_STREAM: dict[Split, int] = {"train": 0x516A, "heldout": 0x516B}


@dataclass(frozen=True)
class SignQuestion:
    """A question and its answer; ``kind`` says more about it than its ``task``."""

    task: Task
    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class SignDialogue:
    """One or two pictures, and questions about them that do not refer to each other."""

    signs: tuple[Sign, ...]
    questions: tuple[SignQuestion, ...]


def sign_dialogue(
    rng: np.random.Generator,
    task: Task,
    split: Split,
    turns: int,
    tiles: int | None = None,
    by_text: bool = False,
) -> SignDialogue:
    """At most ``turns`` questions in random order, the first of ``task``.

    Args:
        rng: draws everything.
        task: of the first question.
        split: whose texts are shown.
        turns: the most questions.
        tiles: the most tiles of a picture, 1 or 2; None: pictures as the task has them.
        by_text: questions for an image name its text ("the word KITE"), not the kind of text ("a word").
    """
    grids = SMALL_GRIDS[tiles] if tiles else PAIR_GRIDS if task == "two images" else GRIDS
    while True:
        signs = tuple(_sign(rng, grids, split, task) for _ in range(2 if task == "two images" else 1))
        every = _about_several(signs, by_text) if len(signs) == 2 else _about_one(rng, signs[0])
        order = [every[i] for i in rng.permutation(len(every))]
        first = next((q for q in order if q.task == task), None)
        if first is not None:
            rest = [q for q in order if q.question != first.question]
            return SignDialogue(signs, (first, *rest[: turns - 1]))


def lines(seed: int, index: int, batch: int, texts: int) -> list[SignDialogue]:
    """Batch ``index`` of pictures of one tile with up to ``texts`` texts, each to be read from end to end.

    Rows of 16 pixels are read in turn, in the order of visual tokens; a space is between two texts.
    """
    rng = np.random.default_rng([_STREAM["train"], seed, index, 1])
    read = []
    for _ in range(batch):
        count = 1 + int(rng.integers(texts))
        kinds = [_pick(rng, TEXT_KINDS) for _ in range(count)]
        items = [text_item(rng, kind, sample_text(rng, kind, "train")) for kind in kinds]
        sign = arranged(rng, 1, 1, items)
        order = sorted(sign.items, key=lambda item: ((item.y + HEIGHT // 2) // HEIGHT, item.x))
        text = " ".join(item.content for item in order)
        read.append(SignDialogue((sign,), (SignQuestion("read", "all", READ_ALL, text),)))
    return read


def albums(seed: int, index: int, batch: int, turns: int) -> list[SignDialogue]:
    """Batch ``index``: two to six pictures of one tile (up to three: or two), up to ``turns`` questions.

    A picture is found by its number, and a number by what the picture shows. Of two pictures, half of the
    answers are right by chance, and a model learns little from them.
    """
    rng = np.random.default_rng([_STREAM["train"], seed, index, 2])
    rows: list[SignDialogue] = []
    while len(rows) < batch:
        count = 2 + int(rng.integers(ALBUM - 1))
        grids = SMALL_GRIDS[2 if count <= 3 else 1]
        signs = tuple(_sign(rng, grids, "train", "two images") for _ in range(count))
        if every := _about_several(signs, by_text=False):
            order = rng.permutation(len(every))[:turns]
            rows.append(SignDialogue(signs, tuple(every[i] for i in order)))
    return rows


def dialogues(
    seed: int,
    index: int,
    batch: int,
    split: Split,
    turns: int,
    tiles: int | None = None,
    tasks: tuple[Task, ...] = TASKS,
    by_text: bool = False,
) -> list[SignDialogue]:
    """Batch ``index``: a pure function of its arguments (:func:`sign_dialogue`); ``tasks`` take turns."""
    rng = np.random.default_rng([_STREAM[split], seed, index])
    return [sign_dialogue(rng, tasks[i % len(tasks)], split, turns, tiles, by_text) for i in range(batch)]


def conversation(dialogue: SignDialogue) -> list[Turn]:
    """As turns; the pictures come with the first."""
    return [
        Turn(question.question, question.answer, 0 if number else len(dialogue.signs))
        for number, question in enumerate(dialogue.questions)
    ]


def _sign(rng: np.random.Generator, grids: tuple[tuple[int, int], ...], split: Split, task: Task) -> Sign:
    columns, rows = grids[int(rng.integers(len(grids)))]
    often = 0.4 if task == "count" else 0.7
    kinds = [kind for kind in TEXT_KINDS if rng.random() < often]
    items: list[Item] = [text_item(rng, kind, sample_text(rng, kind, split)) for kind in kinds]
    shapes = [_pick(rng, SHAPES) for _ in range(2)]
    colors = [_pick(rng, _COLORS) for _ in range(2)]
    most = 9 if task == "count" else 5
    count = int(rng.integers(most))
    items += [
        shape_item(rng, shapes[int(rng.integers(2))], colors[int(rng.integers(2))]) for _ in range(count)
    ]
    return arranged(rng, columns, rows, items)


def _about_one(rng: np.random.Generator, sign: Sign) -> list[SignQuestion]:
    questions = [
        SignQuestion("read", kind, _pick(rng, READ_QUESTIONS[kind]), text)
        for kind in TEXT_KINDS
        for text in sign.texts(kind)
    ]
    shown = [item for item in sign.items if item.kind == "shape"]
    shapes = {item.content for item in shown} | {_pick(rng, SHAPES)}
    colors = {item.color for item in shown} | {_pick(rng, _COLORS)}
    counts = [("shape", f"How many {plural(s)} are there?", sign.count(shape=s)) for s in sorted(shapes)]
    counts += [("color", f"How many {c} shapes are there?", sign.count(color=c)) for c in sorted(colors)]
    counts.append(("all", "How many shapes are there?", sign.count()))
    return questions + [SignQuestion("count", kind, q, str(n)) for kind, q, n in counts if n <= MOST]


def _about_several(signs: tuple[Sign, ...], by_text: bool) -> list[SignQuestion]:
    questions: list[SignQuestion] = []
    for index, sign in enumerate(signs, 1):
        others = [*signs[: index - 1], *signs[index:]]
        for kind in TEXT_KINDS:
            for text in sign.texts(kind):
                verb = "are" if kind == "chinese" else "is"
                question = f"What {_NAMES[kind]} {verb} in image {index}?"
                questions.append(SignQuestion("two images", "read", question, text))
                if by_text and not any(text in other.texts(kind) for other in others):
                    question = f"Which image has the {_NAMES[kind]} {text}?"
                    questions.append(SignQuestion("two images", "text", question, str(index)))
            if not by_text and sign.texts(kind) and not any(other.texts(kind) for other in others):
                question = f"Which image has a {_NAMES[kind]}?".replace("a characters", "characters")
                questions.append(SignQuestion("two images", "text", question, str(index)))
        only = {(i.color, i.content) for i in sign.items if i.kind == "shape"}
        only -= {(i.color, i.content) for other in others for i in other.items}
        for color, shape in sorted(only):
            question = f"Which image has a {color} {shape}?"
            questions.append(SignQuestion("two images", "shape", question, str(index)))
        for shape in SHAPES:
            most = max(other.count(shape=shape) for other in others)
            if sign.count(shape=shape) >= most + 2:
                question = f"Which image has more {plural(shape)}?"
                questions.append(SignQuestion("two images", "more", question, str(index)))
    return questions


def plural(shape: str) -> str:
    """The word for several of a shape."""
    return shape + ("es" if shape == "cross" else "s")


def _pick(rng: np.random.Generator, names: tuple[Name, ...]) -> Name:
    return names[int(rng.integers(len(names)))]


def pieces() -> list[str]:
    """Pieces of the tokenizer, one token each: the words of questions, the roles of a prompt, and every
    Chinese character.

    No piece has a capital letter after its first one or after a space: texts in capitals stay letters.
    """
    questions = ["system", "user", "assistant", "Image", READ_ALL]
    questions += [text for pair in READ_QUESTIONS.values() for text in pair]
    questions += [f"What {name} are is in image" for name in _NAMES.values()]
    questions += [f"Which image has the {name} a more {' '.join(COLORS)}" for name in _NAMES.values()]
    for shape in SHAPES:
        questions.append(f"How many {shape} {plural(shape)} shapes are there")
    pieces_found = set(chinese())
    for question in questions:
        for number, word in enumerate(question.rstrip("?").split(" ")):
            pieces_found |= {f" {word}" if number else word} if word.isascii() else set(word)
    return sorted(pieces_found)
