"""From a checkpoint to a model ready to run."""

from __future__ import annotations

from pathlib import Path

import torch

from .checkpoint import Checkpoint, load_state, open_checkpoint
from .internvl import InternVL


def load_model(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> InternVL:
    """The model of a checkpoint, in eval mode, weights memory-mapped and loaded a tensor at a time.

    Args:
        path: what :func:`.checkpoint.open_checkpoint` takes, or an opened checkpoint.
        dtype: type of all parameters; None keeps the stored types.
        device: where they go. On the CPU in the stored type the parameters stay views of the mapped file.

    Raises:
        CheckpointError: the checkpoint is not whole or not InternVL's.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    model = meta_model(checkpoint)
    load_state(model, checkpoint, dtype, device)
    return model


def meta_model(checkpoint: Checkpoint) -> InternVL:
    """The model of a checkpoint on the meta device (no memory), in eval mode."""
    with torch.device("meta"):
        model = InternVL(checkpoint.config, checkpoint.contrastive_only)
    return model.eval()
