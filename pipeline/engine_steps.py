"""Steps that build engines, and prove what they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engines.build import build_engine
from ..engines.promise import check_promise
from ..engines.proof import KernelReport, joined
from ..engines.proof_onnxruntime import proof_from_onnxruntime
from ..engines.proof_rtx import proof_from_engine
from ..export.components import component_spec
from . import evaluate
from .graphs import Source, graph_path
from .manifest import part_specs
from .request import ORT, RTX, Job
from .resources import build_load, stored_bytes
from .step import Made, Step, after, write_receipt
from .workspace import Data, Workspace


def engine_path(component: str, target: str) -> Path:
    """Where the TensorRT-RTX engine of ``component`` lies in a bundle."""
    return Path("engines") / f"{RTX}-{target}" / f"{component}.engine"


def engine_step(job: Job, component: str, part: int, target: str, graph: Step) -> Step:
    """The engine of one component, or of one part of it, for one target."""
    split = job.parts[component] > 1
    name = f"{component}.{part}" if split else component

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        parts = part_specs(space.records, component)
        spec = parts[part] if split else component_spec(component, job.checkpoint.whole)
        out = engine_path(name, target)
        path = space.root / graph_path(name, job.recipe.base)
        record = build_engine(path, spec, space.root / out, backend=RTX, target=target, parts=count)
        return [out.as_posix()], {**record.to_json(), "component": component, "part": part}

    made, count = Source(job.checkpoint, job.recipe, job.plan, None), job.parts[component]
    # An engine carries a copy of the weights it reads.
    size = sum(stored_bytes(made, [component])) // count
    load = build_load(made, component).split(count)
    inputs = {"target": target, **after([graph])}
    return Step(f"engine-{name}-{target}", inputs, run, writes=size, load=load, parts=count)


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
            for target in job.targets if RTX in job.backends else ():
                report = joined([_engine_proof(job, space.root, name, target) for name in pieces])
                check_promise(report, promised[job.recipe.base])
                proofs.setdefault(f"{RTX}-{target}", {})[component] = _proof(
                    report, promised[job.recipe.base]
                )
        return [write_receipt(space, "kernels", proofs)], {"unread": unread}

    return Step("kernels", after(before), run)


def _engine_proof(job: Job, root: Path, name: str, target: str) -> KernelReport:
    return proof_from_engine(root / engine_path(name, target), root / graph_path(name, job.recipe.base))


def _proof(report: KernelReport, promised: dict[str, str]) -> Data:
    return {"promised": promised, **report.to_json()}
