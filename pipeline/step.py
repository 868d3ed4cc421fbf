"""One step of a build, as data: name, what decides the result, and how to make it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.memory import Load
from .job import Job
from .workspace import Data, Workspace, step_digest

Made = tuple[list[str], Data]
"""Files a step made, relative to the staging folder, and what it found out."""


@dataclass(frozen=True)
class Step:
    """One step; ``run(space, advanced)`` makes its files in ``space.root`` and calls ``advanced(done)``.

    ``inputs`` decides the result; ``total`` is what ``advanced`` counts to, in ``unit``; ``writes`` are about
    the bytes of disk it takes, where they are many; ``load`` says what memory an engine takes, as one of
    ``parts`` of its component.
    """

    name: str
    inputs: Data
    run: Callable[[Workspace, Callable[[int], None]], Made]
    total: int | None = None
    writes: int = 0
    unit: str = ""
    load: Load | None = None
    parts: int = 1

    @property
    def digest(self) -> str:
        """Content hash."""
        return step_digest(self.name, self.inputs)


def run_step(space: Workspace, step: Step) -> None:
    """Run ``step`` in ``space``, if it has to be."""

    def run(root: Path) -> Made:
        return step.run(space, space.reporter.advanced)

    space.step(step.name, step.inputs, run, step.total, step.unit)


def write_receipt(space: Workspace, name: str, data: Any) -> str:
    """Write ``receipts/<name>.json`` into the staging folder; its path there."""
    path = space.root / "receipts" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path.relative_to(space.root).as_posix()


def model_of(job: Job) -> Data:
    """What says which checkpoint a step read."""
    return {"revision": job.checkpoint.revision}


def after(before: list[Step]) -> Data:
    """What says that a step read the results of ``before``."""
    return {"after": {step.name: step.digest for step in before}}
