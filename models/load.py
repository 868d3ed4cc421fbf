"""From a checkpoint to a model ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError
from .checkpoint import Checkpoint, load_state, open_checkpoint
from .registry import CHAT, CONTRASTIVE, FEATURES, family_of

if TYPE_CHECKING:
    from .chat import InternVLChatModel
    from .internvl import InternVLModel


def load_model(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> InternVLModel:
    """The model of a checkpoint, in eval mode, weights memory-mapped and loaded a tensor at a time.

    An InternViT alone gives an :class:`.internvl.InternViTModel`, which has :meth:`.InternVLModel.vision`
    and nothing else.

    Args:
        path: as of :func:`.checkpoint.open_checkpoint`, or an opened checkpoint.
        dtype: type of all parameters; None keeps the stored types.
        device: where they go. On the CPU in the stored type the parameters stay views of the mapped file.

    Raises:
        CheckpointError: the checkpoint is not whole, or a chat model's (see :func:`load_chat`).
    """
    model: InternVLModel = _loaded(path, (CONTRASTIVE, FEATURES), dtype, device)
    return model


def load_chat(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> InternVLChatModel:
    """The chat model of a checkpoint in any published layout; arguments as :func:`load_model`.

    One of InternVL 1.1 to 3.5 is a :class:`.tiles_chat.TilesChatModel`, with the same methods. Blocks of the
    vision tower after the one that is read are left out.

    Raises:
        CheckpointError: the checkpoint is not whole or no chat model.
    """
    model: InternVLChatModel = _loaded(path, (CHAT,), dtype, device)
    return model


def load_torch(checkpoint: Checkpoint, dtype: torch.dtype | None = torch.float32) -> Any:
    """The model of a checkpoint of any family, as :func:`load_model` and :func:`load_chat` give it."""
    return _loaded(checkpoint, (CONTRASTIVE, FEATURES, CHAT), dtype, "cpu")


def _loaded(
    path: str | Path | Checkpoint,
    forms: tuple[str, ...],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Any:
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    family = family_of(checkpoint.model)
    if family.form not in forms:
        expected = "an InternVL-Chat" if CHAT in forms else "an InternVL-C or InternVL-G"
        raise CheckpointError(
            f"{checkpoint.path} is not {expected}.",
            f"It is {family.title}.",
            f"Give the checkpoint of {expected}, or call load_{'model' if CHAT in forms else 'chat'}.",
        )
    model = meta_model(checkpoint)
    load_state(model, checkpoint, dtype, device)
    return model


def meta_model(checkpoint: Checkpoint) -> nn.Module:
    """The whole model of a checkpoint of any family on the meta device (no memory), in eval mode."""
    with torch.device("meta"):
        return family_of(checkpoint.model).model(checkpoint.model).eval()
