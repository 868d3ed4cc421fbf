"""The bundle's manifest: what ``manifest.json`` may say. Schema changes raise ``SCHEMA``.

:mod:`.manifest_reading` reads one that came from elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .spec import ComponentSpec

SCHEMA = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Model:
    """The checkpoint a bundle was built from.

    ``revision`` maps ``checkpoint`` to the identity of config and weights
    (:attr:`ivl_export.models.checkpoint.Checkpoint.revision`), ``config`` is the published ``config.json``,
    ``logit_scale`` the stored logarithm (the temperature is its exponential), 0 of a chat model.
    """

    name: str
    source: str
    revision: dict[str, str]
    config: dict[str, Any]
    logit_scale: float
    parameters: int


@dataclass(frozen=True)
class Calibration:
    """The calibration set: hash of its content, inputs used, inputs skipped, drawn or real.

    ``without_caption`` of the samples had stand-in sentences; ``small`` sets have fewer than are advised;
    ``algorithm`` picked the ranges (empty where no input is rounded).
    """

    sha256: str
    samples: int
    skipped: int
    synthetic: bool
    without_caption: int = 0
    small: bool = False
    algorithm: str = "max"


@dataclass(frozen=True)
class Component:
    """A component's contract and its graphs by compute type: ``{"fp32": "onnx/vision.fp32.onnx"}``.

    ``parts`` are the pieces of a split component in the order they run, ``<name>.<k>`` each, without parts of
    their own: its engines are theirs. Together they do what ``graphs`` do.
    """

    spec: ComponentSpec
    graphs: dict[str, str]
    parts: tuple[Component, ...] = ()


@dataclass(frozen=True)
class Built:
    """How a TensorRT engine was built: what a loader checks before the library sees the file.

    ``dtype`` is the element type of its float inputs and outputs, ``profiles`` the ranges of every axis (axis
    name -> min, opt, max) for each optimization profile, ``options`` the builder options that differ from the
    library's own, ``gpu`` and ``sm`` the GPU it is tied to (empty: it is tied to its target only).
    """

    dtype: str
    profiles: tuple[dict[str, tuple[int, int, int]], ...]
    options: dict[str, Any]
    gpu: str = ""
    sm: str = ""


@dataclass(frozen=True)
class EngineFile:
    """A built engine; ``release`` is the exact library release that built it (engines are tied to it).

    ``part`` says which part of a split component it is; ``built`` is None for what no builder made.
    """

    component: str
    backend: str
    target: str
    file: str
    release: str
    part: int = 0
    built: Built | None = None


@dataclass(frozen=True)
class FileEntry:
    """Content hash and size in bytes of one file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """All a bundle says about itself.

    ``compute_dtype`` is what engines compute in where nothing is quantised, by its name in
    :attr:`Component.graphs`. ``recipe`` is the quantisation recipe as plain data, ``receipts`` the names of
    ``receipts/<name>.json``, ``steps`` the build steps' content hashes, ``tools`` library versions.
    ``files`` is filled by :func:`ivl_export.bundle.seal`.
    """

    model: Model
    precision: str
    compute_dtype: str
    recipe: dict[str, Any]
    calibration: Calibration | None
    components: dict[str, Component]
    engines: tuple[EngineFile, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    receipts: tuple[str, ...] = ()
    steps: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain data, the exact content of ``manifest.json``."""
        return dict(json.loads(self.dumps()))

    def dumps(self) -> str:
        """``manifest.json`` as text; ValueError or TypeError if a free-form part is not plain JSON."""
        data = asdict(self)
        for component in data["components"].values():
            for whole in component["parts"] or [component]:
                del whole["parts"]
        for engine in data["engines"]:
            if not self.components[engine["component"]].parts:
                del engine["part"]
            if engine["built"] is None:
                del engine["built"]
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    def with_files(self, files: dict[str, FileEntry]) -> Manifest:
        """A copy that lists ``files``."""
        return replace(self, files=dict(files))
