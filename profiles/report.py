"""The profile of a bundle: times, costs and where they come from, as one receipt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..errors import BuildError, CapabilityError
from ..manifest import MANIFEST
from ..models.config import InternVLConfig
from ..runtime import InternVL
from .flops import ComponentCost, graph_cost
from .latency import Case, Progress, plan, run
from .machine import Machine, commit, machine, peak_memory, versions
from .measure import StopRule
from .table19 import TEXT_TOKENS, Table19, different_model, table19

SCHEMA = "ivl-export.profile/1"


@dataclass(frozen=True)
class Subject:
    """The bundle that was profiled; its manifest's hash covers every file of it."""

    name: str
    manifest_sha256: str
    model: str
    parameters: int
    precision: str
    compute_dtype: str


@dataclass(frozen=True)
class Settings:
    """How it was profiled. ``threads`` None: the backend's own choice."""

    backend: str
    target: str | None
    threads: int | None
    batches: tuple[int, ...]
    stop: StopRule


@dataclass(frozen=True)
class Profile:
    """Everything measured and counted.

    ``load_seconds`` are the engines' loading times, ``costs`` one entry for each component case that was
    timed, ``notes`` what is missing and why, ``peak_memory_bytes`` the whole process' (host memory).
    """

    created: str
    subject: Subject
    settings: Settings
    machine: Machine
    versions: dict[str, str]
    commit: str | None
    load_seconds: dict[str, float]
    peak_memory_bytes: int | None
    cases: tuple[Case, ...]
    costs: tuple[ComponentCost, ...]
    table19: Table19 | None
    notes: tuple[str, ...]

    def cost(self, case: Case) -> ComponentCost | None:
        """What one call of a component case costs; None where it was not counted."""
        return next((c for c in self.costs if c.component == case.name and c.sizes == case.sizes), None)

    def to_json(self) -> dict[str, Any]:
        """The receipt: plain data with the schema's name, raw samples included."""
        return {
            "schema": SCHEMA,
            "created": self.created,
            "bundle": asdict(self.subject),
            "settings": asdict(self.settings),
            "machine": asdict(self.machine),
            "versions": self.versions,
            "commit": self.commit,
            "load_seconds": self.load_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "cases": [case.to_json() for case in self.cases],
            "costs": [cost.to_json() for cost in self.costs],
            "table19": None if self.table19 is None else self.table19.to_json(),
            "notes": list(self.notes),
        }


def profile(
    path: Path | str,
    backend: str = "onnxruntime",
    target: str | None = None,
    threads: int | None = None,
    batches: Sequence[int] | None = None,
    rule: StopRule | None = None,
    with_table19: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Profile the bundle in ``path`` on this machine.

    Args:
        path: the bundle's folder.
        backend, target, threads: see :meth:`ivl_export.runtime.InternVL.load`.
        batches: batch sizes; None: 1 and 8.
        rule: when each measurement ends.
        with_table19: include the paper's cost table for any model; the full model always has it.
        progress: called before each measurement.

    Raises:
        UsageError: a batch size the engines do not take.
        IntegrityError, CapabilityError, CheckpointError: the bundle is damaged or cannot run here.
    """
    rule, here = rule or StopRule(), machine()
    with InternVL.load(path, backend, threads=threads, target=target) as model:
        bundle = model.bundle
        about, config = bundle.manifest.model, InternVLConfig.from_published(bundle.manifest.model.config)
        with_table19 = with_table19 or different_model(about, config) is None
        tasks = plan(model, config, batches, TEXT_TOKENS if with_table19 else None)
        cases = run(model, tasks, rule, progress)
        load = {k.removeprefix("open "): t.seconds for k, t in model.timings.items() if k.startswith("open ")}
    costs, notes = _costs(bundle, backend, cases)
    manifest = bundle.manifest
    return Profile(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        subject=Subject(
            bundle.root.resolve().name,
            hashlib.sha256((bundle.root / MANIFEST).read_bytes()).hexdigest(),
            about.name,
            about.parameters,
            manifest.precision,
            manifest.compute_dtype,
        ),
        settings=Settings(backend, target, threads, tuple(dict.fromkeys(c.batch for c in cases)), rule),
        machine=here,
        versions=versions(),
        commit=commit(),
        load_seconds=load,
        peak_memory_bytes=peak_memory(),
        cases=cases,
        costs=costs,
        table19=table19(about, config, cases) if with_table19 else None,
        notes=notes,
    )


def write(receipt: Any, out: Path) -> None:
    """Write plain data as JSON, whole or not at all; BuildError if the file system refuses."""
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_text(json.dumps(receipt, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BuildError(f"Cannot write {out}.", str(error), "Choose another place for --out.") from error


def _costs(
    bundle: Bundle, backend: str, cases: Sequence[Case]
) -> tuple[tuple[ComponentCost, ...], tuple[str, ...]]:
    """FLOPs and bytes of every component case; where they cannot be counted, why."""
    # ONNX Runtime computes in fp32 on the CPU; a compiled engine in the bundle's own type.
    wanted = "fp32" if backend == "onnxruntime" else bundle.manifest.compute_dtype
    costs, notes = [], []
    for case in cases:
        if case.kind != "component":
            continue
        graphs = bundle.manifest.components[case.name].graphs
        dtype = wanted if wanted in graphs else next(iter(graphs), wanted)
        try:
            costs.append(
                graph_cost(bundle.graph(case.name, dtype), bundle.spec(case.name), case.sizes, dtype)
            )
        except (CapabilityError, BuildError) as error:
            notes.append(f"FLOPs and bytes of {case.name}: {error}")
    return tuple(costs), tuple(dict.fromkeys(notes))
