"""The task of internvl-nano-chat: questions about scenes that training never drew, answered word for word.

The first half of the scenes gets one question, the second half two, of which the second refers back. The
history has the model's own answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..inputs.chat_template import Turn
from .dialogues import KINDS, QuestionAnswer, conversation, dialogue, two_turns
from .render import Image8, render
from .scenes import Scene
from .tasks import Score, TaskScore, eval_scenes

Answer = Callable[[Image8, Sequence[Sequence[Turn]]], list[str]]
"""Images uint8 [B, H, W, 3], and of each a conversation whose last turn is open -> the answers to those."""

SCENES = 1000
"""Enough for an interval of two points."""
LONGEST_ANSWER = 24
"""In tokens."""
_TASK = 3
_STREAM = 0xC4A7


def exact(said: str, answers: Sequence[str]) -> bool:
    """Whether ``said`` is one of ``answers`` word for word; spaces around it do not count."""
    return said.strip() in answers


def held_out(scenes: int = SCENES, seed: int = 0) -> tuple[list[Scene], list[list[QuestionAnswer]]]:
    """Held-out scenes, and the questions about each."""
    shown = eval_scenes(_TASK, scenes, seed)
    rng = np.random.default_rng([_STREAM, seed])
    return shown, [
        dialogue(rng, scene, 1) if i < scenes // 2 else two_turns(rng, scene) for i, scene in enumerate(shown)
    ]


def evaluate(
    answer: Answer,
    scenes: int = SCENES,
    seed: int = 0,
    batch: int = 50,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """``{"chat": {"all": score, <kind of question>: score, ...}, "settings": ...}``.

    ``progress`` is called with the number of scenes done.
    """
    shown, questions = held_out(scenes, seed)
    right: list[tuple[QuestionAnswer, Scene, bool]] = []
    for start in range(0, scenes, batch):
        part = slice(start, start + batch)
        right += _ask(answer, shown[part], questions[part])
        progress(min(start + batch, scenes))
    scores = {"all": _score(right)}
    scores.update({kind: _score([r for r in right if r[0].kind == kind]) for kind in KINDS})
    return {
        "chat": {name: score.to_json() for name, score in scores.items()},
        "settings": {"seed": seed, "scenes": scenes},
    }


def _ask(
    answer: Answer, scenes: Sequence[Scene], questions_of: Sequence[list[QuestionAnswer]]
) -> list[tuple[QuestionAnswer, Scene, bool]]:
    images = np.stack([render(scene) for scene in scenes])
    history: list[list[Turn]] = [[] for _ in scenes]
    answers = []
    for number in range(max(map(len, questions_of))):
        rows = [i for i, questions in enumerate(questions_of) if len(questions) > number]
        opened = [replace(conversation(questions_of[i])[number], answer=None) for i in rows]
        said = answer(images[rows], [[*history[i], turn] for i, turn in zip(rows, opened, strict=True)])
        for i, turn, text in zip(rows, opened, said, strict=True):
            history[i].append(replace(turn, answer=text.strip()))
            question = questions_of[i][number]
            answers.append((question, scenes[i], exact(text, [question.answer])))
    return answers


def _score(right: Sequence[tuple[QuestionAnswer, Scene, bool]]) -> TaskScore:
    novel = [ok for _, scene, ok in right if scene.novel]
    return TaskScore(Score(sum(ok for *_, ok in right), len(right)), Score(sum(novel), len(novel)))
