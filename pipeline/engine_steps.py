"""Steps that build engines, and prove what they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..bundle.spec import ComponentSpec
from ..engines.tensorrt import library as trt
from ..engines.tensorrt.build import build_engine
from ..engines.tensorrt.engine_cache import EngineKey, keep_engine, take_engine
from ..engines.tensorrt.open import open_tensorrt
from ..engines.tensorrt.shapes import Profile
from ..export.components import component_spec
from ..files.hashing import sha256_file_once
from ..verify.expectations import check_promise
from ..verify.inspector import proof_from_inspector
from ..verify.onnxruntime import proof_from_onnxruntime
from ..verify.report import KernelReport, joined
from ..verify.rtx import proof_from_engine
from . import evaluate
from .graph_steps import STORES
from .graphs import Source, graph_path
from .job import Job
from .manifest import engine_file, part_specs
from .request import ORT, RTX
from .resources import build_load, stored_bytes
from .step import Made, Step, after, write_receipt
from .workspace import Data, Workspace


def engine_path(component: str, backend: str, target: str) -> Path:
    """Where the engine of ``component`` for ``target`` lies in a bundle."""
    return Path("engines") / f"{backend}-{target}" / f"{component}.engine"


def engine_step(job: Job, component: str, part: int, backend: str, target: str, graph: Step) -> Step:
    """The engine of one component, or of one part of it, for one target: built, or one kept from before."""
    split = job.parts[component] > 1
    name = f"{component}.{part}" if split else component

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        parts = part_specs(space.records, component)
        spec = parts[part] if split else component_spec(component, job.checkpoint.whole)
        rel = engine_path(name, backend, target)
        path, out = space.root / graph_path(name, job.recipe.base), space.root / rel
        place, profiles = {"component": component, "part": part}, job.profiles(spec)
        key = _key(job, space, path, profiles, backend, target) if job.request.cache else None
        if key is not None and (kept := take_engine(key, out)) is not None:
            return [rel.as_posix()], {**kept, **place, "cached": True}
        record = build_engine(
            path,
            spec,
            out,
            backend=backend,
            target=target,
            options=job.options,
            profiles=profiles,
            parts=count,
            cache=job.request.cache,
        )
        if key is not None:
            keep_engine(key, out, record.to_json(), job.request.cache_size)
        return [rel.as_posix()], {**record.to_json(), **place}

    made, count = Source(job.checkpoint, job.recipe, job.plan, None), job.parts[component]
    # An engine carries a copy of the weights it reads.
    size = sum(stored_bytes(made, [component])) // count
    load = build_load(made, component).split(count)
    whole = component_spec(component, job.checkpoint.whole)
    inputs = {
        "target": target,
        "profiles": job.profiles(whole),
        "options": job.options.to_json(),
        **({} if backend == RTX else {"backend": backend, "gpu": str(job.gpu)}),
        **after([graph]),
    }
    return Step(f"engine-{name}-{target}", inputs, run, writes=size, load=load, parts=count)


def _key(
    job: Job, space: Workspace, graph: Path, profiles: tuple[Profile, ...], backend: str, target: str
) -> EngineKey:
    """What the engine of ``graph`` follows from."""
    stores = [rel for name, record in space.records.items() if name in STORES for rel in record.files]
    return EngineKey(
        graph=sha256_file_once(graph),
        weights=tuple(sha256_file_once(space.root / rel) for rel in stores),
        recipe=job.recipe.to_json(),
        profiles=profiles,
        options=job.options.to_json(),
        backend=backend,
        release=trt.installed_release(backend) or "",
        target=target if backend == RTX else str(job.gpu),
    )


def kernels_step(job: Job, before: list[Step]) -> Step:
    """The proof: what really runs in 8 bits. A broken promise fails the build."""

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        proofs: dict[str, dict[str, Any]] = {}
        unread: dict[str, str] = {}
        for component in job.components:
            promised = space.records[f"graph-{component}"].data["promised"]
            pieces = [spec.name for spec in part_specs(space.records, component)] or [component]
            if why := evaluate.no_session(job.checkpoint, [component]):
                unread[component] = why
            else:
                plain = [space.root / graph_path(name, "fp32") for name in pieces]
                report = joined([proof_from_onnxruntime(path) for path in plain])
                # ONNX Runtime has no FP8 kernels on a CPU: there only INT8 is held to its promise.
                # Beside FP8 nodes, which it may not touch, it fuses no INT8 either.
                int8 = {node: s for node, s in promised["fp32"].items() if s == "int8"}
                if int8 and "fp8" not in promised["fp32"].values():
                    check_promise(report, int8)
                proofs.setdefault(f"{ORT}-cpu", {})[component] = _proof(report, promised["fp32"])
            for backend, target in job.engines:
                parts = part_specs(space.records, component)
                specs = parts or [component_spec(component, job.checkpoint.whole)]
                report = joined([_engine_proof(job, space, spec, backend, target) for spec in specs])
                check_promise(report, promised[job.recipe.base])
                proofs.setdefault(f"{backend}-{target}", {})[component] = _proof(
                    report, promised[job.recipe.base]
                )
        return [write_receipt(space, "kernels", proofs)], {"unread": unread}

    return Step("kernels", after(before), run)


def _engine_proof(job: Job, space: Workspace, spec: ComponentSpec, backend: str, target: str) -> KernelReport:
    """What an engine runs: of RTX from its file, of TensorRT from its inspector, on the GPU it is for."""
    engine = space.root / engine_path(spec.name, backend, target)
    graph = space.root / graph_path(spec.name, job.recipe.base)
    if backend == RTX:
        return proof_from_engine(engine, graph)
    record = engine_file(space.records[f"engine-{spec.name}-{target}"])
    with open_tensorrt(spec, engine, record=record, graph=graph) as opened, TemporaryDirectory() as folder:
        info = Path(folder) / "layers.json"
        info.write_text(opened.layers(), encoding="utf-8")
        return proof_from_inspector(info, graph)


def _proof(report: KernelReport, promised: dict[str, str]) -> Data:
    return {"promised": promised, **report.to_json()}
