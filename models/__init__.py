"""InternVL in PyTorch: configs, modules, checkpoints.

``load_model`` and ``load_chat`` are resolved on first use, so that importing a config does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import ChatConfig, InternViTConfig, InternVLConfig, QLlamaConfig, VisionConfig

if TYPE_CHECKING:
    from .load import load_chat as load_chat
    from .load import load_model as load_model

__all__ = [
    "ChatConfig",
    "InternVLConfig",
    "InternViTConfig",
    "QLlamaConfig",
    "VisionConfig",
    "load_chat",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name in ("load_chat", "load_model"):
        from . import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
