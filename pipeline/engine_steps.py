"""Steps that build engines, and verify their precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..bundle.spec import ComponentSpec
from ..engines.tensorrt import library as trt
from ..engines.tensorrt.backend import open_tensorrt
from ..engines.tensorrt.build import build_engine
from ..engines.tensorrt.engine_cache import EngineKey, keep_engine, take_engine
from ..engines.tensorrt.shapes import Profile
from ..files.hashing import sha256_file_once
from ..models.registry import component_spec
from ..verify.expectations import check_expectations
from ..verify.inspector import read_inspector
from ..verify.onnxruntime import read_onnxruntime
from ..verify.report import VerificationReport, merge_reports
from ..verify.rtx import read_rtx
from .accuracy_steps import no_session
from .config import ORT, RTX
from .graph_steps import STORES, GraphSource, build_load, graph_path, stored_bytes
from .manifest import engine_file, part_specs
from .plan import BuildPlan
from .workspace import Data, Step, StepResult, Workspace, after, write_receipt


def engine_path(component: str, backend: str, target: str) -> Path:
    """Path in a bundle of the engine of ``component`` for ``target``."""
    return Path("engines") / f"{backend}-{target}" / f"{component}.engine"


def layers_path(component: str, backend: str, target: str) -> Path:
    """Path in a bundle of the layer information of an engine, as the library's inspector told it."""
    return Path("receipts") / f"layers-{backend}-{target}-{component}.json"


def engine_step(plan: BuildPlan, component: str, part: int, backend: str, target: str, graph: Step) -> Step:
    """The engine of one component, or of one part of it, for one target: built, or one kept from before."""
    split = plan.parts[component] > 1
    name = f"{component}.{part}" if split else component

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        parts = part_specs(space.records, component)
        spec = parts[part] if split else component_spec(component, plan.checkpoint.model)
        rel = engine_path(name, backend, target)
        path, out = space.staging_dir / graph_path(name, plan.recipe.base), space.staging_dir / rel
        place, profiles = {"component": component, "part": part}, plan.profiles(spec)
        key = _key(plan, space, path, profiles, backend, target) if not plan.config.no_cache else None
        if key is not None and (cached := take_engine(key, out)) is not None:
            return [rel.as_posix()], {**cached, **place, "cached": True}
        record = build_engine(
            path,
            spec,
            out,
            backend=backend,
            target=target,
            options=plan.engine_options,
            profiles=profiles,
            parts=count,
            cache=not plan.config.no_cache,
        )
        if key is not None:
            keep_engine(key, out, record.to_json(), plan.config.cache_size)
        return [rel.as_posix()], {**record.to_json(), **place}

    source, count = GraphSource(plan.checkpoint, plan.recipe, plan.layers, None), plan.parts[component]
    # An engine carries a copy of the weights it reads.
    size = sum(stored_bytes(source, [component])) // count
    load = build_load(source, component).split(count)
    whole = component_spec(component, plan.checkpoint.model)
    inputs = {
        "target": target,
        "profiles": plan.profiles(whole),
        "options": plan.engine_options.to_json(),
        **({} if backend == RTX else {"backend": backend, "gpu": str(plan.gpu)}),
        **after([graph]),
    }
    return Step(f"engine-{name}-{target}", inputs, run, writes=size, load=load, parts=count)


def _key(
    plan: BuildPlan, space: Workspace, graph: Path, profiles: tuple[Profile, ...], backend: str, target: str
) -> EngineKey:
    """Step inputs of the engine of ``graph``."""
    stores = [rel for name, record in space.records.items() if name in STORES for rel in record.files]
    return EngineKey(
        graph=sha256_file_once(graph),
        weights=tuple(sha256_file_once(space.staging_dir / rel) for rel in stores),
        recipe=plan.recipe.to_json(),
        profiles=profiles,
        options=plan.engine_options.to_json(),
        backend=backend,
        release=trt.installed_release(backend) or "",
        target=target if backend == RTX else str(plan.gpu),
    )


def verification_step(plan: BuildPlan, before: list[Step]) -> Step:
    """The verification report: the products that really run in 8 bits. A broken promise fails the build."""

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        reports: dict[str, dict[str, Any]] = {}
        unread: dict[str, str] = {}
        not_told: dict[str, Data] = {}
        told: list[Path] = []
        for component in plan.components:
            promised = space.records[f"graph-{component}"].data["promised"]
            pieces = [spec.name for spec in part_specs(space.records, component)] or [component]
            if why := no_session(plan.checkpoint, [component]):
                unread[component] = why
            else:
                plain = [space.staging_dir / graph_path(name, "fp32") for name in pieces]
                report = merge_reports([read_onnxruntime(path) for path in plain])
                # ONNX Runtime has no FP8 kernels on a CPU: there only INT8 is checked.
                # It fuses no INT8 next to FP8 nodes either.
                int8 = {node: s for node, s in promised["fp32"].items() if s == "int8"}
                if int8 and "fp8" not in promised["fp32"].values():
                    check_expectations(report, int8)
                reports.setdefault(f"{ORT}-cpu", {})[component] = _report(report, promised["fp32"])
            for backend, target in plan.engines:
                parts = part_specs(space.records, component)
                specs = parts or [component_spec(component, plan.checkpoint.model)]
                report = merge_reports([_engine_report(plan, space, spec, backend, target) for spec in specs])
                told += [layers_path(spec.name, backend, target) for spec in specs if backend != RTX]
                # Layer information of TensorRT tells some types by a kernel's name only, which may be new.
                strict = backend == RTX or plan.config.require_proof
                rest = check_expectations(report, promised[plan.recipe.base], require_proof=strict)
                if rest:
                    not_told.setdefault(f"{backend}-{target}", {})[component] = list(rest)
                reports.setdefault(f"{backend}-{target}", {})[component] = _report(
                    report, promised[plan.recipe.base]
                )
        data = {"unread": unread, "not_told": not_told}
        return [write_receipt(space, "verification", reports), *(path.as_posix() for path in told)], data

    return Step("verification", after(before), run)


def _engine_report(
    plan: BuildPlan, space: Workspace, spec: ComponentSpec, backend: str, target: str
) -> VerificationReport:
    """The products that an engine runs: RTX's from its file, TensorRT's by its inspector.

    What the inspector told is kept at :func:`layers_path`.
    """
    engine = space.staging_dir / engine_path(spec.name, backend, target)
    graph = space.staging_dir / graph_path(spec.name, plan.recipe.base)
    if backend == RTX:
        return read_rtx(engine, graph)
    record = engine_file(space.records[f"engine-{spec.name}-{target}"])
    with open_tensorrt(spec, engine, record=record, graph=graph) as opened:
        layers = opened.layers()
    info = space.staging_dir / layers_path(spec.name, backend, target)
    info.parent.mkdir(exist_ok=True)
    info.write_text(layers, encoding="utf-8")
    return read_inspector(info, graph)


def _report(report: VerificationReport, promised: dict[str, str]) -> Data:
    return {"promised": promised, **report.to_json()}
