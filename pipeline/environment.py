"""Environment of a build, part of every step's hash: library versions and this package's code."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..files.hashing import sha256_sources

TOOLS = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-cu12",
    "numpy",
    "pillow",
)
CODE = (
    "files", "bundle", "inputs", "synthetic", "models", "export", "quantization", "calibration", "training",
    "engines", "verify", "runtime", "evaluation", "pipeline",
)  # fmt: skip


@cache
def tool_versions() -> dict[str, str]:
    """Installed versions of :data:`TOOLS` and of this package; others are left out."""
    installed = {name: version for name in TOOLS if (version := _version(name)) is not None}
    return {"ivl-export": __version__, **installed}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def code_digest() -> str:
    """Hash of this package's source files: a changed line makes old steps stale."""
    root = Path(__file__).parent.parent
    files = [*root.glob("*.py"), *(p for folder in CODE for p in (root / folder).rglob("*.py"))]
    return sha256_sources(root, sorted(path.relative_to(root).as_posix() for path in files))
