"""The bundle's manifest: its schema, and strict reading of a ``manifest.json`` of unknown origin.

:func:`read_manifest` accepts exactly what :meth:`Manifest.dumps` writes. Unknown or missing entries, wrong
types, paths that leave the bundle, and references to files or components that are not listed raise
:class:`~ivl_export.errors.IntegrityError` naming the entry. A change of the schema raises :data:`SCHEMA`.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from ..errors import IntegrityError
from ..files.json import MAX_TEXT, Count, Name, RelativePath, Sha256, decode, read_json
from ..files.lfs import refuse_lfs_pointer
from .spec import ComponentSpec

SCHEMA = 4
MANIFEST = "manifest.json"
SHIPPED = " (shipped)"
"""Suffix of the source of a shipped checkpoint, after its name."""


@dataclass(frozen=True)
class Model:
    """The checkpoint a bundle was built from.

    ``revision`` maps ``checkpoint`` to the identity of config and weights
    (:attr:`ivl_export.models.checkpoint.Checkpoint.revision`), ``config`` is the published ``config.json``,
    ``logit_scale`` the stored logarithm (the temperature is its exponential), 0 of a chat model. ``chat`` is
    how a chat model is prompted (:class:`ivl_export.inputs.chat_template.ChatFormat`); None of others.
    """

    name: str
    source: str
    revision: dict[str, Sha256]
    config: dict[str, Any]
    logit_scale: float
    parameters: Count
    chat: dict[str, Any] | None = None


@dataclass(frozen=True)
class Calibration:
    """The calibration set: hash of its content, inputs used, inputs skipped, drawn or real.

    ``without_caption`` of the samples had generic sentences; ``small`` sets have fewer than are advised;
    ``algorithm`` picked the ranges (empty where no input is rounded).
    """

    sha256: Sha256
    samples: Count
    skipped: Count
    synthetic: bool
    without_caption: Count = 0
    small: bool = False
    algorithm: str = "max"


@dataclass(frozen=True)
class Component:
    """A component's contract and its graphs by compute type: ``{"fp32": "onnx/vision.fp32.onnx"}``.

    ``parts`` are the pieces of a split component in the order they run, ``<name>.<k>`` each, without parts of
    their own: its engines are theirs. Together they replace ``graphs``.
    """

    spec: ComponentSpec
    graphs: dict[str, RelativePath]
    parts: tuple[Component, ...] = ()


@dataclass(frozen=True)
class Built:
    """How a TensorRT engine was built: checked by a loader before the library reads the file.

    ``dtype`` is the element type of its float inputs and outputs, ``profiles`` the ranges of every axis (axis
    name -> min, opt, max) for each optimization profile, ``options`` the builder options that differ from the
    library's own, ``gpu`` and ``sm`` the GPU it is tied to (empty: it is tied to its target only).
    """

    dtype: Name
    profiles: tuple[dict[str, tuple[Count, Count, Count]], ...]
    options: dict[str, Any]
    gpu: str = ""
    sm: str = ""

    def __post_init__(self) -> None:
        for axis, sizes in ((axis, sizes) for profile in self.profiles for axis, sizes in profile.items()):
            if list(sizes) != sorted(sizes):
                raise ValueError(f"the sizes of {axis} are not smallest, tuned-for and largest: {sizes}")


@dataclass(frozen=True)
class EngineFile:
    """A built engine; ``release`` is the exact library release that built it (engines are tied to it).

    ``part`` says which part of a split component it is; ``built`` is None for engines without a builder.
    """

    component: Name
    backend: Name
    target: Name
    file: RelativePath
    release: str
    part: Count = 0
    built: Built | None = None


@dataclass(frozen=True)
class FileEntry:
    """Content hash and size in bytes of one file."""

    sha256: Sha256
    size: Count


@dataclass(frozen=True)
class Manifest:
    """All a bundle says about itself.

    ``recipe`` is the name of the recipe that was applied, ``rules`` all of it as plain data.
    ``compute_dtype`` is the engines' type outside quantised layers, by its name in
    :attr:`Component.graphs`. ``receipts`` are the names of ``receipts/<name>.json``, ``steps`` the content
    hashes of the build's steps, ``tools`` library versions. :func:`ivl_export.bundle.seal` fills ``files``.
    """

    model: Model
    recipe: Name
    compute_dtype: Name
    rules: dict[str, Any]
    calibration: Calibration | None
    components: dict[str, Component]
    engines: tuple[EngineFile, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    receipts: tuple[Name, ...] = ()
    steps: dict[str, str] = field(default_factory=dict)
    files: dict[RelativePath, FileEntry] = field(default_factory=dict)
    schema: Count = SCHEMA

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


FIX = "Copy the bundle again from where it was built, or rebuild it."


def read_manifest(path: Path) -> Manifest:
    """Read a ``manifest.json`` of unknown origin; IntegrityError if it is missing or not of the schema."""
    refuse_lfs_pointer(path, IntegrityError)
    try:
        data = read_json(path, fix=FIX)
    except OSError as error:
        raise IntegrityError(
            f"{path.parent} is not a bundle.",
            f"Its {MANIFEST} cannot be read: {error.strerror or error}.",
            "Point to a folder that 'ivl-export build' wrote.",
        ) from error
    return manifest_from_json(data, path.parent)


def manifest_from_json(data: Any, folder: Path | None = None) -> Manifest:
    """Read plain data; IntegrityError names the first entry that is not as the schema says.

    ``folder`` is the bundle's, for the command that builds a bundle of an older schema again.
    """
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is int and schema != SCHEMA:
        raise IntegrityError(
            f"This bundle's manifest has schema {schema}.",
            f"This version of ivl-export reads schema {SCHEMA}.",
            f"Build it again: {_rebuild_line(data, folder)}"
            if schema < SCHEMA
            else "Use the release of ivl-export that wrote it, or a later one.",
        )
    manifest = decode(Manifest, data, what="The bundle's manifest", fix=FIX)
    _check_references(manifest)
    if place := _first_difference(data, manifest.to_json(), ""):
        _refuse(place, "is missing, or is there where 'ivl-export build' writes no such entry")
    return manifest


def _rebuild_line(data: dict[str, Any], folder: Path | None) -> str:
    """The command that rebuilds a bundle of an older schema, from its manifest."""

    def entry(*keys: str) -> Any:
        node: Any = data
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    words = ["ivl-export", "build"]
    source = entry("model", "source")
    for option, value in (
        ("--model", source.removesuffix(SHIPPED) if isinstance(source, str) else None),
        ("--precision", entry("precision")),
        ("--calib", "IMAGES" if entry("calibration", "synthetic") is False else None),
        ("--out", None if folder is None else str(folder)),
    ):
        if isinstance(value, str) and value and len(value) <= MAX_TEXT and value.isprintable():
            words += [option, value]
    return shlex.join(words)


def _check_references(manifest: Manifest) -> None:
    """IntegrityError when a graph, engine or receipt is not in ``files``, or names clash."""
    if MANIFEST in manifest.files:
        _refuse("files", f"lists {MANIFEST} itself")
    references: list[tuple[str, str]] = []
    for name, component in manifest.components.items():
        _check_spec(f"components.{name}.spec", component.spec, name)
        _check_parts(f"components.{name}.parts", component)
        for piece in (component, *component.parts):
            where = f"components.{piece.spec.name}.graphs"
            references += [(f"{where}.{k}", path) for k, path in piece.graphs.items()]
    parts: dict[tuple[str, str, str], set[int]] = {}
    for i, engine in enumerate(manifest.engines):
        key = (engine.component, engine.backend, engine.target)
        if engine.component not in manifest.components:
            _refuse(f"engines[{i}].component", f"names unknown component {engine.component!r}")
        if engine.part in parts.setdefault(key, set()):
            _refuse(f"engines[{i}]", f"repeats {'/'.join(key)}")
        parts[key].add(engine.part)
        references.append((f"engines[{i}].file", engine.file))
    for key, numbers in parts.items():
        if numbers != set(range(len(manifest.components[key[0]].parts) or 1)):
            _refuse("engines", f"has other parts of {'/'.join(key)} than the component: {sorted(numbers)}")
    if len(set(manifest.receipts)) != len(manifest.receipts):
        _refuse("receipts", "repeats a name")
    references += [(f"receipts: {name}", f"receipts/{name}.json") for name in manifest.receipts]
    for where, path in references:
        if path not in manifest.files:
            _refuse(where, f"refers to {path!r}, which is not under 'files'")


def _check_spec(where: str, spec: ComponentSpec, name: str) -> None:
    """A contract has the name it is listed under, and its shapes name axes that it has."""
    if spec.name != name:
        _refuse(f"{where}.name", f"is {spec.name!r}")
    axes = {axis.name for axis in spec.axes}
    for kind, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        for i, tensor in enumerate(tensors):
            for k, size in enumerate(tensor.shape):
                if isinstance(size, str) and size not in axes:
                    _refuse(f"{where}.{kind}[{i}].shape[{k}]", f"names unknown axis {size!r}")


def _check_parts(where: str, component: Component) -> None:
    """Each part reads the component's inputs and earlier parts' outputs; together they have its outputs."""
    if len(component.parts) == 1:
        _refuse(where, "has fewer than 2 parts")
    known, produced = {t.name for t in component.spec.inputs}, set()
    for k, part in enumerate(component.parts):
        spec = part.spec
        _check_spec(f"{where}[{k}].spec", spec, f"{component.spec.name}.{k}")
        if part.parts:
            _refuse(f"{where}[{k}].parts", "is a part of a part")
        if strange := sorted({t.name for t in spec.inputs} - known):
            _refuse(f"{where}[{k}].spec.inputs", f"has {strange[0]!r}, which nothing before gives")
        outputs = {t.name for t in spec.outputs}
        if again := sorted(outputs & known):
            _refuse(f"{where}[{k}].spec.outputs", f"has {again[0]!r}, which is there already")
        known |= outputs
        produced |= outputs
    if component.parts and (lost := sorted({t.name for t in component.spec.outputs} - produced)):
        _refuse(where, f"do not give {lost[0]!r}")


def _first_difference(left: Any, right: Any, place: str) -> str:
    """Where two trees of plain data differ first; empty if nowhere."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in [*left, *right]:
            if key not in left or key not in right:
                return f"{place}.{key}"
            if left[key] != right[key]:
                return _first_difference(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for i, pair in enumerate(zip(left, right, strict=True)):
            if pair[0] != pair[1]:
                return _first_difference(*pair, f"{place}[{i}]")
    return place if left != right else ""


def _refuse(where: str, why: str) -> NoReturn:
    """Raise IntegrityError for the entry ``where``; ``why`` continues a sentence that starts with It."""
    raise IntegrityError(f"The bundle's manifest is not valid at {where.lstrip('.')}.", f"It {why}.", FIX)
