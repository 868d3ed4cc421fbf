"""Dialogues about scenes: color, shape, number, where, yes or no, and questions that refer back.

    What shape is in the middle?   ring
    What color is it?              blue
    And the other one?             red

Every question has one right answer, which follows from the scene and the earlier questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..inputs.chat_template import SYSTEM, Turn
from .captions import caption, words
from .scenes import COLORS, MAX_COUNT, RELATIONS, SHAPES, SIZES, Obj, Scene

Kind = Literal["color", "shape", "size", "count", "where", "yes or no", "describe", "refers back"]
KINDS: tuple[Kind, ...] = ("color", "shape", "size", "count", "where", "yes or no", "describe", "refers back")
_COUNT = {1: "one", 2: "two", 3: "three"}
_REFERS_BACK = 0.4


@dataclass(frozen=True)
class QuestionAnswer:
    """A question, its right answer, and its subject.

    Args:
        kind: of question.
        question, answer: texts.
        about: index of the object, None for a question about the whole scene.
        attribute: of that object: ``color`` or ``shape``; None for any other question.
    """

    kind: Kind
    question: str
    answer: str
    about: int | None = None
    attribute: Literal["color", "shape"] | None = None


def dialogue(rng: np.random.Generator, scene: Scene, turns: int) -> list[QuestionAnswer]:
    """At most ``turns`` questions about ``scene``: without repetition; some refer to the one before."""
    said: list[QuestionAnswer] = []
    while len(said) < turns:
        later = _follow_ups(scene, said[-1]) if said and rng.random() < _REFERS_BACK else []
        before = {a.question for a in said if a.kind != "refers back"}
        candidates = later or [a for a in _questions(rng, scene) if a.question not in before]
        if not candidates:
            break
        said.append(candidates[int(rng.integers(len(candidates)))])
    return said


def two_turns(rng: np.random.Generator, scene: Scene) -> list[QuestionAnswer]:
    """A question about an object, and one that only its history makes clear."""
    first = [a for a in _questions(rng, scene) if _follow_ups(scene, a)]
    one = first[int(rng.integers(len(first)))]
    later = _follow_ups(scene, one)
    return [one, later[int(rng.integers(len(later)))]]


def conversation(questions: Sequence[QuestionAnswer]) -> list[Turn]:
    """As turns; the image comes with the first."""
    return [Turn(a.question, a.answer, images=int(i == 0)) for i, a in enumerate(questions)]


def corpus() -> Iterator[list[str]]:
    """Texts in words, for training the tokenizer: the prompt's frame, and every word of the questions."""
    rng = np.random.default_rng(0)
    frame = _spaced([*SYSTEM.split(" "), "USER", ":"])
    for shape in SHAPES:
        for color in COLORS:
            for relation in RELATIONS:
                pair = (Obj(shape, color, "small"), Obj(SHAPES[0], "red", "small"))
                scenes = [Scene(pair, relation, "noise", 0)]
                scenes += [
                    Scene((Obj(shape, color, size, n),), None, "noise", 0)
                    for size in SIZES
                    for n in range(1, MAX_COUNT + 1)
                ]
                for scene in scenes:
                    yield frame
                    for pair_asked in dialogue(rng, scene, 8):
                        question = _words(pair_asked.question)
                        answer = words(scene) if pair_asked.kind == "describe" else _words(pair_asked.answer)
                        yield question
                        yield [" USER", ":", " ", *question, " ASSISTANT", ":"]
                        yield [" USER", ":", " " + question[0], *question[1:], " ASSISTANT", ":"]
                        yield [" ASSISTANT", ":", " " + answer[0], *answer[1:]]


def _questions(rng: np.random.Generator, scene: Scene) -> list[QuestionAnswer]:
    """One question of every kind that suits ``scene``."""
    total = sum(obj.count for obj in scene.objects)
    questions = [
        QuestionAnswer("count", "How many shapes are there?", _COUNT[total]),
        QuestionAnswer("describe", "Describe the image.", caption(scene)),
        _is_there(rng, scene),
    ]
    if scene.relation is None:
        obj = scene.objects[0]
        return [
            *questions,
            QuestionAnswer("color", "What color do you see?", obj.color, 0, "color"),
            QuestionAnswer("shape", "What shape do you see?", obj.shape, 0, "shape"),
            QuestionAnswer("size", "Small or large?", obj.size),
        ]
    outer, middle = scene.objects
    questions += [
        QuestionAnswer("color", "What color is the shape in the middle?", middle.color, 1, "color"),
        QuestionAnswer("shape", "What shape is in the middle?", middle.shape, 1, "shape"),
        QuestionAnswer("color", "What color is the outer shape?", outer.color, 0, "color"),
        QuestionAnswer("shape", "What is the outer shape?", outer.shape, 0, "shape"),
        QuestionAnswer("where", "Where is the outer shape?", f"{scene.relation} the middle"),
    ]
    if outer.shape != middle.shape:
        i = int(rng.integers(2))
        place = f"{scene.relation} the {middle.shape}" if i == 0 else "in the middle"
        questions += [
            QuestionAnswer("where", f"Where is the {scene.objects[i].shape}?", place),
            QuestionAnswer(
                "color", f"What color is the {scene.objects[i].shape}?", scene.objects[i].color, i, "color"
            ),
        ]
    if (outer.shape, outer.color) != (middle.shape, middle.color):
        questions.append(_is_related(rng, scene))
    return questions


def _follow_ups(scene: Scene, last: QuestionAnswer) -> list[QuestionAnswer]:
    """Questions that only ``last`` makes clear."""
    if last.about is None:
        return []
    obj = scene.objects[last.about]
    questions = [
        QuestionAnswer("refers back", "And what color is it?", obj.color, last.about, "color"),
        QuestionAnswer("refers back", "And what shape is it?", obj.shape, last.about, "shape"),
    ]
    questions = [a for a in questions if a.attribute != last.attribute]
    if scene.relation is not None and last.attribute is not None:
        other = 1 - last.about
        value = getattr(scene.objects[other], last.attribute)
        questions.append(QuestionAnswer("refers back", "And the other one?", value, other, last.attribute))
    return questions


def _is_there(rng: np.random.Generator, scene: Scene) -> QuestionAnswer:
    obj = scene.objects[int(rng.integers(len(scene.objects)))]
    there = rng.random() < 0.5
    if not there:
        shown = {(o.shape, o.color) for o in scene.objects}
        near = [(s, obj.color) for s in SHAPES] + [(obj.shape, c) for c in COLORS]
        wrong = [pair for pair in near if pair not in shown]
        # A wrong shape as often as a wrong color, of which there are more.
        same_color = obj.color if rng.random() < 0.5 else None
        some = [pair for pair in wrong if (pair[1] == obj.color) == (same_color is not None)]
        shape, color = some[int(rng.integers(len(some)))]
        obj = replace(obj, shape=shape, color=color)
    return QuestionAnswer("yes or no", f"Is there a {obj.color} {obj.shape}?", "yes" if there else "no")


def _is_related(rng: np.random.Generator, scene: Scene) -> QuestionAnswer:
    assert scene.relation is not None
    outer, middle = scene.objects
    right = rng.random() < 0.5
    others = [r for r in RELATIONS if r != scene.relation]
    relation = scene.relation if right else others[int(rng.integers(len(others)))]
    question = f"Is the {outer.color} {outer.shape} {relation} the {middle.color} {middle.shape}?"
    return QuestionAnswer("yes or no", question, "yes" if right else "no")


def _words(text: str) -> list[str]:
    """Words of a question or answer, with their spaces; the mark at the end is a word."""
    mark = text[-1] if text[-1] in "?." else ""
    return [*_spaced(text.removesuffix(mark).split(" ")), *([mark] if mark else [])]


def _spaced(text: Sequence[str]) -> list[str]:
    return [text[0], *(word if word == ":" else f" {word}" for word in text[1:])]
