"""Converts InternVL checkpoints into FP8 and INT8 engines, proves their precision, and runs them.

::

    import ivl_export

    bundle = ivl_export.build("CHECKPOINT", out="bundle", precision="fp8", calib="photos/")
    with ivl_export.load(bundle) as model:
        print(model.caption(["photo.jpg"]))

Names are imported when they are first used: ``import ivl_export`` takes milliseconds and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    AccuracyError,
    BuildError,
    BusyError,
    CapabilityError,
    CheckpointError,
    InputError,
    IntegrityError,
    IvlError,
    LatencyError,
    TimeLimitError,
    TooLargeError,
    TooLongError,
    UsageError,
)

if TYPE_CHECKING:
    from .api import build, calibrate, embed_folder, package
    from .bundle import Bundle
    from .progress import Progress
    from .quantization.recipe import Recipe
    from .runtime import InternVL, InternVLChat, load

__version__ = "0.1.0"
__all__ = [
    "AccuracyError",
    "BuildError",
    "Bundle",
    "BusyError",
    "CapabilityError",
    "CheckpointError",
    "InputError",
    "IntegrityError",
    "InternVL",
    "InternVLChat",
    "IvlError",
    "LatencyError",
    "Progress",
    "Recipe",
    "TimeLimitError",
    "TooLargeError",
    "TooLongError",
    "UsageError",
    "__version__",
    "build",
    "calibrate",
    "embed_folder",
    "load",
    "package",
]

_MODULES = {
    "Bundle": ".bundle",
    "InternVL": ".runtime",
    "InternVLChat": ".runtime",
    "Progress": ".progress",
    "Recipe": ".quantization.recipe",
    "build": ".api",
    "calibrate": ".api",
    "embed_folder": ".api",
    "load": ".runtime",
    "package": ".api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
