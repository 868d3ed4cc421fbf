"""The manifest of a build."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..bundle.manifest import SHIPPED, Built, Calibration, Component, EngineFile, Manifest, Model
from ..bundle.spec import ComponentSpec
from ..calibration.dataset import SMALL
from ..engines.tensorrt.library import BUILDERS
from ..files.json import decode
from ..models.checkpoint import Checkpoint
from ..models.registry import component_spec
from ..models.shipped import shipped_name
from .config import ORT
from .environment import tool_versions
from .graph_steps import graph_path
from .plan import BuildPlan
from .workspace import Record


def manifest_of(plan: BuildPlan, records: Mapping[str, Record], receipts: Sequence[str]) -> Manifest:
    """The manifest of the bundle of ``plan``, without the hashes of its files."""
    checkpoint = plan.checkpoint
    computes = dict.fromkeys(("fp32", plan.recipe.base))

    def component(spec: ComponentSpec, parts: Sequence[ComponentSpec] = ()) -> Component:
        files = {c: graph_path(spec.name, c).as_posix() for c in computes}
        return Component(spec, files, tuple(component(part) for part in parts))

    components = {
        name: component(component_spec(name, checkpoint.model), part_specs(records, name))
        for name in plan.components
    }
    engines = [
        EngineFile(name, ORT, "cpu", piece.graphs["fp32"], "", part)
        for name, whole in components.items()
        for part, piece in enumerate(whole.parts or [whole])
    ]
    engines += [engine_file(r) for r in records.values() if r.data.get("backend") in BUILDERS]
    name = shipped_name(plan.config.model)
    return Manifest(
        model=Model(
            name=plan.folder.resolve().name,
            source=f"{name}{SHIPPED}" if name else str(plan.config.model),
            revision={"checkpoint": checkpoint.revision},
            config=checkpoint.model.to_published(),
            logit_scale=_logit_scale(checkpoint),
            parameters=sum(math.prod(ref.shape) for ref in checkpoint.tensors.values()),
            chat=None if plan.chat is None else plan.chat.to_json(),
        ),
        recipe=plan.recipe.name,
        compute_dtype=plan.recipe.base,
        rules=plan.recipe.to_json(),
        calibration=_calibration(plan),
        components=components,
        engines=tuple(engines),
        tools=tool_versions(),
        receipts=tuple(receipts),
        steps={name: record.digest for name, record in records.items()},
    )


def engine_file(record: Record) -> EngineFile:
    """The manifest's entry of the engine that a step made; its record may have been plain JSON."""
    data, (file, *_) = record.data, record.files
    fields = data["built"]
    profiles = tuple({axis: tuple(sizes) for axis, sizes in p.items()} for p in fields["profiles"])
    where = data["component"], data["backend"], data["target"]
    return EngineFile(*where, file, data["release"], data["part"], Built(**{**fields, "profiles": profiles}))


def _calibration(plan: BuildPlan) -> Calibration | None:
    """The manifest's entry on the samples of the ranges; None: nothing was measured."""
    if plan.ranges_file is not None:
        ranges = plan.ranges_file.ranges
        counts = (ranges.set_hash, ranges.samples, ranges.skipped, ranges.synthetic, ranges.without_caption)
        return Calibration(*counts, ranges.samples < SMALL, ranges.algorithm)
    if not plan.measures:
        return None
    chosen = plan.calibration
    counts = (chosen.hash, len(chosen), len(chosen.skipped), chosen.synthetic, chosen.without_caption)
    algorithm = plan.algorithm if plan.layers.rounded else ""
    return Calibration(*counts, len(chosen) < SMALL, algorithm)


def part_specs(records: Mapping[str, Record], component: str) -> list[ComponentSpec]:
    """Contracts of the parts of ``component``, as its graph step recorded them; empty if it is not split."""
    record = records.get(f"graph-{component}")
    parts = record.data.get("parts", []) if record else []
    return list(decode(tuple[ComponentSpec, ...], parts, what="The step's record"))


def _logit_scale(checkpoint: Checkpoint) -> float:
    return float(checkpoint.load("logit_scale").float()) if "logit_scale" in checkpoint.tensors else 0.0
