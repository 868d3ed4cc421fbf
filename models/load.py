"""From a checkpoint to a model ready to run."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import CheckpointError
from .chat import InternVLChatModel
from .checkpoint import Checkpoint, load_state, open_checkpoint
from .config import ChatConfig, InternViTConfig
from .internvl import InternViTModel, InternVLModel


def load_model(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> InternVLModel:
    """The model of a checkpoint, in eval mode, weights memory-mapped and loaded a tensor at a time.

    An InternViT alone gives an :class:`.internvl.InternViTModel`, which has :meth:`.InternVLModel.vision`
    and nothing else.

    Args:
        path: what :func:`.checkpoint.open_checkpoint` takes, or an opened checkpoint.
        dtype: type of all parameters; None keeps the stored types.
        device: where they go. On the CPU in the stored type the parameters stay views of the mapped file.

    Raises:
        CheckpointError: the checkpoint is not whole, or a chat model's (see :func:`load_chat`).
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    if isinstance(checkpoint.model, InternViTConfig):
        with torch.device("meta"):
            model: InternVLModel = InternViTModel(checkpoint.model).eval()
    else:
        model = meta_model(checkpoint)
    load_state(model, checkpoint, dtype, device)
    return model


def load_chat(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> InternVLChatModel:
    """The chat model of a checkpoint in the LLaVA layout; arguments as :func:`load_model`.

    Blocks of the vision tower after the one that is read are left out.

    Raises:
        CheckpointError: the checkpoint is not whole or no chat model.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    if not isinstance(checkpoint.model, ChatConfig):
        raise CheckpointError(
            f"{checkpoint.path} is not an InternVL-Chat.",
            "Its config.json has no model_type that begins with llava.",
            "Give the checkpoint of an InternVL-Chat.",
        )
    model = meta_chat(checkpoint)
    load_state(model, checkpoint, dtype, device)
    return model


def meta_chat(checkpoint: Checkpoint) -> InternVLChatModel:
    """As :func:`meta_model`, of a chat checkpoint."""
    assert isinstance(checkpoint.model, ChatConfig)
    with torch.device("meta"):
        return InternVLChatModel(checkpoint.model).eval()


def meta_model(checkpoint: Checkpoint) -> InternVLModel:
    """The model of a checkpoint on the meta device (no memory), in eval mode."""
    with torch.device("meta"):
        model = InternVLModel(checkpoint.config, checkpoint.contrastive_only)
    return model.eval()
