"""Task accuracy of a chat model trained on scenes: questions answered word for word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime import InternVLChat
    from .job import Job

SIZES = {"scenes": 200}


def evaluate_torch(job: Job, dtype: str) -> dict[str, Any]:
    """Scores of the PyTorch model in ``dtype``."""
    import torch

    from ..models.load import load_chat
    from ..synthetic import chat_tasks
    from ..training.chat_model import TorchChat

    model = load_chat(job.checkpoint, getattr(torch, dtype))
    return chat_tasks.evaluate(TorchChat(model, job.tokenizer, job.settings), SIZES["scenes"])


def evaluate_engines(model: InternVLChat) -> dict[str, Any]:
    """Scores of a bundle's engines."""
    from ..evaluation.chat import EngineChat
    from ..synthetic import chat_tasks

    return chat_tasks.evaluate(EngineChat(model), SIZES["scenes"])
