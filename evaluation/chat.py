"""Scores a chat bundle by exact answers to questions about images.

Protocol: greedy decoding, every question in a separate conversation, several conversations
decoded together. Without a data set the drawn scenes of :mod:`..synthetic.chat_tasks` are used,
some in
two turns, and an answer is right word for word. On a user's own questions two shares are given: answers that
are right word for word, and those that are once both sides are :func:`normalised`.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ..errors import UsageError
from ..inputs.chat_template import Turn
from ..progress import SILENT, Progress, reported
from ..synthetic import chat_tasks, sign_tasks
from . import chat_sets
from .datasets import questions
from .files import Item, Reader, choose, fingerprint
from .runner import PIECE
from .scores import Measure, share
from .tasks import QUESTIONS, Result

if TYPE_CHECKING:
    from ..inputs.preprocess import PixelValues
    from ..inputs.sources import ImageInput
from ..runtime import InternVLChat


class Asked(Item, Protocol):
    """Images, and a question about them."""

    @property
    def question(self) -> str:
        """The question."""
        ...


Q = TypeVar("Q", bound=Asked)

MODE = "InternVL-Chat"
PLAIN = "{}"
"""A question as it is."""


class EngineChat:
    """A bundle's engines as :data:`..synthetic.chat_tasks.Answer`; answers are decoded together."""

    def __init__(self, model: InternVLChat, max_new_tokens: int = chat_tasks.LONGEST_ANSWER) -> None:
        self.model, self.max_new_tokens = model, max_new_tokens

    def signs(self, pictures: Sequence[Sequence[ImageInput]], turns: Sequence[Turn]) -> list[str]:
        """As :data:`..synthetic.sign_tasks.Answer`: each question about its own pictures."""
        pixels = [self.model.read_pixels(list(images)) for images in pictures]
        return self(pixels, [[turn] for turn in turns])

    def __call__(
        self, images: Iterable[ImageInput | PixelValues], conversations: Sequence[Sequence[Turn]]
    ) -> list[str]:
        """Greedy answers to the last turn of each conversation, each about one image."""
        with ThreadPoolExecutor(1) as apart:  # the caller may run an event loop
            return apart.submit(asyncio.run, self._answers(images, conversations)).result()

    async def _answers(
        self, images: Iterable[ImageInput | PixelValues], conversations: Sequence[Sequence[Turn]]
    ) -> list[str]:
        from ..inputs.preprocess import PixelValues
        from ..runtime.serving.admission import ServiceLimits
        from ..runtime.serving.chat_service import ChatService

        # As many conversations at a time as are decoded together: each has its own cache.
        together = self.model.components.spec("decoder").axis("batch").max
        places = asyncio.Semaphore(together)
        service = ChatService(self.model, ServiceLimits(max_running=together, timeout=float("inf")))

        async def answer(image: ImageInput | PixelValues, turns: Sequence[Turn]) -> str:
            *history, last = turns
            async with places:
                chat = await service.chat(image if isinstance(image, PixelValues) else [image], history)
                return (await service.ask(chat, last.question, self.max_new_tokens)).value

        try:
            pairs = zip(images, conversations, strict=True)
            return await asyncio.gather(*(answer(image, turns) for image, turns in pairs))
        finally:
            service.close()


def normalised(text: str) -> str:
    """An answer for comparison: Unicode's NFKC form without case, single spaces, no final full stop."""
    folded = unicodedata.normalize(
        "NFKC", text
    ).casefold()  # which may leave that form: as "ß" and an accent do
    return " ".join(unicodedata.normalize("NFKC", folded).split()).rstrip(". ")


def evaluate(
    model: InternVLChat,
    data: Path | None = None,
    limit: int | None = None,
    prompt: str = PLAIN,
    max_new_tokens: int = chat_tasks.LONGEST_ANSWER,
    progress: Progress = SILENT,
    task: str = QUESTIONS,
) -> Result:
    """Ask ``model`` about the images of ``data`` (:func:`.datasets.questions`; None: drawn scenes, or signs).

    Args:
        model: a chat bundle.
        data: a file or a folder.
        limit: so many questions (of drawn scenes: scenes), None: all.
        prompt: prompt with ``{}`` for a question of ``data``.
        max_new_tokens: longest answer.
        progress: receives the steps.
        task: ``questions``, or one of :mod:`.chat_sets`, with the prompt of :data:`.chat_sets.PROMPTS` unless
            ``prompt`` says another.

    Raises:
        UsageError: no data for a task that needs some; ``prompt`` has no place for the question, or there is
            none to put in.
        InputError: ``data`` is not as it must be, or over a tenth of the images cannot be read.
    """
    if PLAIN not in prompt or (data is None and prompt != PLAIN):
        raise UsageError(
            f"The prompt {prompt!r} is not usable.",
            "It needs {} for the question, and a data set: nano-chat knows the plain ones only.",
            'Give --prompt "{} Answer with one word." and --data.',
        )
    if task != QUESTIONS and prompt == PLAIN:
        prompt = chat_sets.PROMPTS[task]
    answer = EngineChat(model, max_new_tokens)
    settings: dict[str, Any] = {"prompt": prompt, "max_new_tokens": max_new_tokens}
    if task != QUESTIONS:
        if data is None:
            raise UsageError(f"{task} needs a data set.", fix="Give --data FILE.jsonl.")
        return _set(answer, task, data, limit, prompt, settings, progress)
    if data is None:
        drawn = _scenes if model.image_settings.tiling is None else _signs
        return drawn(answer, limit, settings, progress)
    return _questions(answer, data, limit, prompt, settings, progress)


def _scenes(answer: EngineChat, limit: int | None, settings: dict[str, Any], progress: Progress) -> Result:
    count = min(limit or chat_tasks.SCENES, chat_tasks.SCENES)
    with reported(progress, "scenes", count) as advanced:
        scores_by_kind = chat_tasks.evaluate(answer, count, progress=advanced)
    scores = {**scores_by_kind["chat"], "new combinations": scores_by_kind["chat"]["all"]["novel"]}
    measures = tuple(
        Measure(f"exact, {kind}", 100 * s["accuracy"], 100 * s["low"], 100 * s["high"], s["total"], "wilson")
        for kind, s in scores.items()
        if s["total"]
    )
    texts = [
        text for said in chat_tasks.held_out(count)[1] for one in said for text in (one.question, one.answer)
    ]
    return _result(count, chat_tasks.SCENES, texts, {"data": "drawn scenes", **settings}, measures, [])


def _signs(answer: EngineChat, limit: int | None, settings: dict[str, Any], progress: Progress) -> Result:
    count = min(limit or sign_tasks.QUESTIONS, sign_tasks.QUESTIONS)
    with reported(progress, "questions", count) as advanced:
        scores = sign_tasks.evaluate(answer.signs, count, progress=advanced)["signs"]
    measures = tuple(
        Measure(f"exact, {kind}", 100 * s["accuracy"], 100 * s["low"], 100 * s["high"], s["total"], "wilson")
        for kind, s in scores.items()
        if s["total"]
    )
    questions = [row.questions[0] for row in sign_tasks.held_out(count)]
    asked = [text for one in questions for text in (one.question, one.answer)]
    return _result(count, sign_tasks.QUESTIONS, asked, {"data": "drawn signs", **settings}, measures, [])


def _questions(
    answer: EngineChat,
    data: Path,
    limit: int | None,
    prompt: str,
    settings: dict[str, Any],
    progress: Progress,
) -> Result:
    every = questions(data)
    items = choose(every, limit)
    reader = Reader(len(items))
    read_items, said = _answered(answer, items, reader, prompt, progress)
    pairs = list(zip(said, read_items, strict=True))
    same = [normalised(text) in map(normalised, item.answers) for text, item in pairs]
    word = [chat_tasks.exact(text, item.answers) for text, item in pairs]
    measures = share("exact, normalised", np.array(same)), share("exact, word for word", np.array(word))
    texts = [text for item in read_items for text in (item.name, *item.answers)]
    return _result(
        len(read_items), len(every), texts, {"data": data.name, **settings}, measures, reader.skipped
    )


def _set(
    answer: EngineChat,
    task: str,
    data: Path,
    limit: int | None,
    prompt: str,
    settings: dict[str, Any],
    progress: Progress,
) -> Result:
    chat_sets.check_scores(task)
    every = chat_sets.read_items(task, data)
    items = choose(every, limit)
    reader = Reader(len(items))
    read_items, said = _answered(answer, items, reader, prompt, progress)
    texts = [text for item in read_items for text in (item.name, item.question, *item.answers)]
    measures = chat_sets.score(task, said, read_items)
    settings = {"data": data.name, **settings}
    return _result(len(read_items), len(every), texts, settings, measures, reader.skipped, task)


def _answered(
    answer: EngineChat, items: Sequence[Q], reader: Reader, prompt: str, progress: Progress
) -> tuple[list[Q], list[str]]:
    """The items whose images could be read, and the answers to them."""
    tiling = answer.model.image_settings.tiling
    size = PIECE if tiling is None else max(1, PIECE // tiling.most)
    read_items: list[Q] = []
    said: list[str] = []
    with reported(progress, "questions", len(items)) as advanced:
        for piece in reader.pieces(items, size, answer.model.read_images):
            ends = np.cumsum([0, *piece.counts]).tolist()
            shown = [piece.pixels[start:end] for start, end in pairwise(ends)]
            counted = zip(piece.items, piece.counts, strict=True)
            turns = [[Turn(prompt.replace(PLAIN, item.question), None, count)] for item, count in counted]
            said += answer(shown, turns)
            read_items += piece.items
            advanced(len(read_items) + len(reader.skipped))
    return read_items, said


def _result(
    samples: int,
    available: int,
    texts: Sequence[str],
    settings: dict[str, Any],
    measures: tuple[Measure, ...],
    skipped: Sequence[dict[str, str]],
    task: str = QUESTIONS,
) -> Result:
    whole = samples == available
    return Result(
        task,
        MODE,
        "",
        samples,
        available,
        whole,
        fingerprint(texts),
        "",
        settings,
        measures,
        tuple(skipped),
    )
