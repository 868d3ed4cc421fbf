"""Task accuracy of a chat model trained on scenes: questions answered word for word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..conversation import Turn
from ..preprocess import Array

if TYPE_CHECKING:
    from ..runtime import InternVLChat
    from .job import Job

SCENES = 200
LONGEST_ANSWER = 24


class EngineChat:
    """A bundle's engines as :data:`..training.chat_tasks.Answer`."""

    def __init__(self, model: InternVLChat) -> None:
        self.model = model

    def __call__(self, images: Array, conversations: Sequence[Sequence[Turn]]) -> list[str]:
        """Greedy answers to the last turn of each conversation."""
        return [
            self.model.chat([image], history).ask(last.question, LONGEST_ANSWER)
            for image, (*history, last) in zip(images, conversations, strict=True)
        ]


def evaluate_torch(job: Job, dtype: str) -> dict[str, Any]:
    """Scores of the PyTorch model in ``dtype``."""
    import torch

    from ..models.load import load_chat
    from ..training import chat_tasks
    from ..training.chat_model import TorchChat

    model = load_chat(job.checkpoint, getattr(torch, dtype))
    return chat_tasks.evaluate(TorchChat(model, job.tokenizer, job.settings), SCENES)


def evaluate_engines(model: InternVLChat) -> dict[str, Any]:
    """Scores of a bundle's engines."""
    from ..training import chat_tasks

    return chat_tasks.evaluate(EngineChat(model), SCENES)
