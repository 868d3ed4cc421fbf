"""Strict reading of a bundle's manifest.

A manifest is untrusted input. :func:`manifest_from_json` accepts exactly the schema of :mod:`.manifest`:
unknown or missing keys, wrong types, paths that leave the bundle, and references to files or components that
are not listed raise :class:`~ivl_export.errors.IntegrityError` naming the entry.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import IntegrityError
from ..files.strict_json import Node, read_json, refuse
from .manifest import (
    MANIFEST,
    SCHEMA,
    Built,
    Calibration,
    Component,
    EngineFile,
    FileEntry,
    Manifest,
    Model,
)
from .spec import ComponentSpec

_LONG = {"bfloat16": "bf16", "float16": "fp16"}
"""Compute types as the first builds of this schema named them."""


def read_manifest(path: Path) -> Manifest:
    """Read a ``manifest.json`` of unknown origin; IntegrityError if it is missing or not the schema."""
    try:
        data = read_json(path)
    except OSError as error:
        raise IntegrityError(
            f"{path.parent} is not a bundle.",
            f"Its {MANIFEST} cannot be read: {error.strerror or error}.",
            "Point to a folder that 'ivl-export build' wrote.",
        ) from error
    return manifest_from_json(data)


def manifest_from_json(data: Any) -> Manifest:
    """Read plain data; IntegrityError names the first entry that is not as the schema says."""
    top = Node("", data).object()
    schema = top["schema"].integer() if "schema" in top.data else top.bad("has no 'schema'")
    if schema != SCHEMA:
        raise IntegrityError(
            f"This bundle's manifest has schema {schema}.",
            f"This version of ivl-export reads schema {SCHEMA}.",
            "Rebuild the bundle, or use the ivl-export release that wrote it.",
        )
    top.keys(set(Manifest.__dataclass_fields__))
    manifest = Manifest(
        model=_model(top["model"]),
        precision=top["precision"].name(),
        compute_dtype=_LONG.get(dtype := top["compute_dtype"].name(), dtype),
        recipe=top["recipe"].object().data,
        calibration=None if top["calibration"].data is None else _calibration(top["calibration"]),
        components=top["components"].map(_component),
        engines=tuple(top["engines"].list(_engine)),
        tools=top["tools"].map(Node.text),
        receipts=tuple(top["receipts"].list(Node.name)),
        steps=top["steps"].map(Node.text),
        files=top["files"].map(_file, check_key=_path),
    )
    _check_references(manifest)
    return manifest


def _check_references(manifest: Manifest) -> None:
    """IntegrityError when a graph, engine or receipt is not in ``files``, or names clash."""
    wanted: list[tuple[str, str]] = []
    for name, component in manifest.components.items():
        if component.spec.name != name:
            refuse(f"components.{name}.spec.name", f"is {component.spec.name!r}")
        _check_chain(component)
        for piece in (component, *component.parts):
            where = f"components.{piece.spec.name}.graphs"
            wanted += [(f"{where}.{k}", path) for k, path in piece.graphs.items()]
    seen: dict[tuple[str, str, str], set[int]] = {}
    for i, engine in enumerate(manifest.engines):
        key = (engine.component, engine.backend, engine.target)
        if engine.component not in manifest.components:
            refuse(f"engines[{i}].component", f"names unknown component {engine.component!r}")
        if engine.part in seen.setdefault(key, set()):
            refuse(f"engines[{i}]", f"repeats {'/'.join(key)}")
        seen[key].add(engine.part)
        wanted.append((f"engines[{i}].file", engine.file))
    for key, parts in seen.items():
        if parts != set(range(len(manifest.components[key[0]].parts) or 1)):
            refuse("engines", f"has other parts of {'/'.join(key)} than the component: {sorted(parts)}")
    if len(set(manifest.receipts)) != len(manifest.receipts):
        refuse("receipts", "repeats a name")
    wanted += [(f"receipts: {name}", f"receipts/{name}.json") for name in manifest.receipts]
    for where, path in wanted:
        if path not in manifest.files:
            refuse(where, f"refers to {path!r}, which is not under 'files'")


def _path(node: Node) -> str:
    if node.path() == MANIFEST:
        node.bad(f"lists {MANIFEST} itself")
    return str(node.data)


def _model(node: Node) -> Model:
    node.keys(set(Model.__dataclass_fields__))
    return Model(
        name=node["name"].text(),
        source=node["source"].text(),
        revision=node["revision"].map(Node.sha256),
        config=node["config"].object().data,
        logit_scale=node["logit_scale"].number(),
        parameters=node["parameters"].integer(),
    )


def _calibration(node: Node) -> Calibration:
    node.keys(set(Calibration.__dataclass_fields__))
    samples, skipped = node["samples"].integer(), node["skipped"].integer()
    return Calibration(
        sha256=node["sha256"].sha256(),
        samples=samples,
        skipped=skipped,
        synthetic=node["synthetic"].flag(),
        without_caption=node["without_caption"].integer(),
        small=node["small"].flag(),
        algorithm=node["algorithm"].text(),
    )


def _check_chain(component: Component) -> None:
    """Each part takes what the component takes and earlier parts give; together they give its outputs."""
    known, found = {t.name for t in component.spec.inputs}, set()
    for k, part in enumerate(component.parts):
        where = f"components.{component.spec.name}.parts[{k}]"
        if part.spec.name != f"{component.spec.name}.{k}":
            refuse(f"{where}.spec.name", f"is {part.spec.name!r}")
        if strange := sorted({t.name for t in part.spec.inputs} - known):
            refuse(f"{where}.spec.inputs", f"has {strange[0]!r}, which nothing before gives")
        outputs = {t.name for t in part.spec.outputs}
        if again := sorted(outputs & known):
            refuse(f"{where}.spec.outputs", f"has {again[0]!r}, which is there already")
        known |= outputs
        found |= outputs
    if component.parts and (lost := sorted({t.name for t in component.spec.outputs} - found)):
        refuse(f"components.{component.spec.name}.parts", f"do not give {lost[0]!r}")


def _component(node: Node) -> Component:
    split = "parts" in node.object().data
    node.keys({"spec", "graphs", "parts"} if split else {"spec", "graphs"})
    parts = tuple(node["parts"].list(lambda part: _whole(part.keys({"spec", "graphs"})))) if split else ()
    if split and len(parts) < 2:
        node["parts"].bad("has fewer than 2 parts")
    return replace(_whole(node), parts=parts)


def _whole(node: Node) -> Component:
    spec, graphs = node["spec"], node["graphs"].map(Node.path)
    _check_spec(spec)
    try:
        return Component(ComponentSpec.from_json(spec.data), graphs)
    except ValueError as error:  # an axis whose min, opt and max are out of order
        spec.bad(f"is refused: {error}")


def _check_spec(node: Node) -> None:
    node.keys({"name", "inputs", "outputs", "axes"})["name"].name()

    def axis(item: Node) -> str:
        item.keys({"name", "min", "opt", "max"})
        for key in ("min", "opt", "max"):
            item[key].integer()
        return item["name"].name()

    axes = set(node["axes"].list(axis))

    def size(item: Node) -> None:
        if isinstance(item.data, str):
            if item.data not in axes:
                item.bad(f"names unknown axis {item.data!r}")
        else:
            item.integer()

    def tensor(item: Node) -> None:
        item.keys({"name", "dtype", "shape"})
        item["name"].name()
        item["dtype"].name()
        item["shape"].list(size)

    node["inputs"].list(tensor)
    node["outputs"].list(tensor)


def _engine(node: Node) -> EngineFile:
    optional = {"part", "built"} & set(node.object().data)
    node.keys({"component", "backend", "target", "file", "release"} | optional)
    return EngineFile(
        component=node["component"].name(),
        backend=node["backend"].name(),
        target=node["target"].name(),
        file=node["file"].path(),
        release=node["release"].text(),
        part=node["part"].integer() if "part" in optional else 0,
        built=_built(node["built"]) if "built" in optional else None,
    )


def _built(node: Node) -> Built:
    node.keys(set(Built.__dataclass_fields__))
    return Built(
        dtype=node["dtype"].name(),
        profiles=tuple(node["profiles"].list(lambda profile: profile.map(_range))),
        options=node["options"].object().data,
        gpu=node["gpu"].text(),
        sm=node["sm"].text(),
    )


def _range(node: Node) -> tuple[int, int, int]:
    sizes = node.list(Node.integer)
    if len(sizes) != 3 or sizes != sorted(sizes):
        node.bad("is not a smallest, a tuned-for and a largest size")
    return sizes[0], sizes[1], sizes[2]


def _file(node: Node) -> FileEntry:
    node.keys(set(FileEntry.__dataclass_fields__))
    return FileEntry(node["sha256"].sha256(), node["size"].integer())
