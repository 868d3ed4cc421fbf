"""The task of internvl-nano-tiles: questions about signs whose texts training never drew.

Answers are right word for word. Every question is a separate conversation. The same pictures in one
tile each show how much of the answers comes from the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..inputs.chat_template import Turn
from .chat_tasks import exact
from .render import Image8
from .sign_questions import TASKS, SignDialogue, dialogues
from .signs import draw
from .tasks import Score

Answer = Callable[[Sequence[Sequence[Image8]], Sequence[Turn]], list[str]]
"""The pictures of each question, uint8 [H, W, 3], and the question -> the answers."""
LONGEST_ANSWER = 8
"""In tokens: the longest text, and the end of the answer."""
QUESTIONS = 900
"""A third of each task: enough for an interval of four points."""


def held_out(questions: int = QUESTIONS, seed: int = 0) -> list[SignDialogue]:
    """Pictures whose texts no training shows, and one question each; the tasks take turns."""
    return dialogues(seed, 0, questions, "heldout", 1)


def turn(dialogue: SignDialogue) -> Turn:
    """The first question of ``dialogue``, still open."""
    return Turn(dialogue.questions[0].question, None, len(dialogue.signs))


def evaluate(
    answer: Answer,
    questions: int = QUESTIONS,
    seed: int = 0,
    batch: int = 60,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """``{"signs": {"all": score, <task>: score, <task, kind>: score, ...}, "settings": ...}``.

    ``progress`` is called with the number of questions done.
    """
    conversations = held_out(questions, seed)
    right: list[bool] = []
    for start in range(0, questions, batch):
        part = conversations[start : start + batch]
        said = answer([[draw(sign) for sign in one.signs] for one in part], [turn(one) for one in part])
        right += [exact(text, [one.questions[0].answer]) for text, one in zip(said, part, strict=True)]
        progress(len(right))
    groups: dict[str, list[bool]] = {"all": right}
    groups |= {task: [] for task in TASKS}
    for one, ok in zip(conversations, right, strict=True):
        question = one.questions[0]
        groups[question.task].append(ok)
        groups.setdefault(f"{question.task}, {question.kind}", []).append(ok)
    scores = {name: Score(sum(oks), len(oks)).to_json() for name, oks in groups.items()}
    return {"signs": scores, "settings": {"seed": seed, "questions": questions}}
