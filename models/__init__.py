"""InternVL in PyTorch: configs, modules, checkpoints.

``load_model`` is resolved on first use, so that importing a config does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import InternVLConfig, QLlamaConfig, VisionConfig

if TYPE_CHECKING:
    from .load import load_model as load_model

__all__ = ["InternVLConfig", "QLlamaConfig", "VisionConfig", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from .load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
