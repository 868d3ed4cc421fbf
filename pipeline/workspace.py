"""Content-hashed steps, and the staging folder of a build that they make their files in.

A bundle ``out`` is made in ``.<name>.build/bundle`` next to it, at the same relative paths; the records of
finished steps are in ``.<name>.build/steps``. A step's hash covers everything that decides its files: its
inputs, the library versions, and this package's own code. A step whose record has that hash, and whose files
are there, is not run again; if the finished bundle has them, the files are copied. So a killed build resumes,
and a repeated one runs only the steps that changed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle, disk_errors
from ..bundle.replace import refuse_foreign
from ..engines.memory import Load
from ..errors import BuildError, IntegrityError
from ..files.hashing import copy_with_sha256, sha256_json
from ..files.json import Count, RelativePath, Sha256, decode
from ..files.locks import locked
from ..files.write import atomic
from ..progress import Progress

RECEIPT = "build"
Data = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """A finished step: its hash, its files (relative path to size), its seconds, and data for later steps."""

    digest: Sha256
    files: dict[RelativePath, Count]
    seconds: float
    data: Data = field(default_factory=dict)


StepResult = tuple[list[str], Data]
"""Files that a step wrote, relative to the staging folder, and data for its record."""


@dataclass(frozen=True)
class Step:
    """One step; ``run(space, advanced)`` writes files to ``space.staging_dir`` and calls ``advanced(done)``.

    ``inputs`` decides the result; ``total`` is the total of ``advanced``, in ``unit``; ``writes`` are about
    the bytes of disk it takes, where they are many; ``load`` is the memory that an engine takes, as one of
    ``parts`` of its component.
    """

    name: str
    inputs: Data
    run: Callable[[Workspace, Callable[[int], None]], StepResult]
    total: int | None = None
    writes: int = 0
    unit: str = ""
    load: Load | None = None
    parts: int = 1

    @property
    def digest(self) -> str:
        """Content hash."""
        return step_digest(self.name, self.inputs)


class Workspace:
    """Steps of one build into ``out``. Use as a context manager: it holds a lock on the staging folder.

    ``sealed`` is the bundle that is there already and its steps' records; BuildError if ``out`` is something
    else.
    """

    def __init__(self, out: Path, progress: Progress) -> None:
        self.out, self.progress = out.absolute(), progress
        self.work_dir = self.out.parent / f".{self.out.name}.build"
        self.staging_dir, self._steps = self.work_dir / "bundle", self.work_dir / "steps"
        self.records: dict[str, Record] = {}
        self.ran: list[str] = []
        refuse_foreign(self.out)
        self.sealed = _sealed(self.out)

    def __enter__(self) -> Workspace:
        try:
            self.staging_dir.mkdir(parents=True, exist_ok=True)
            self._steps.mkdir(exist_ok=True)
        except OSError as error:
            raise BuildError(
                f"Cannot write to {self.work_dir.parent}.",
                str(error),
                "Give --out a folder you may write to.",
            ) from error
        self._lock = locked(self._steps, wait=False)
        try:
            self._lock.__enter__()
        except BlockingIOError as error:
            raise BuildError(
                f"Another build into {self.out} is running.", str(error), "Wait for it, or use another --out."
            ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.__exit__(None, None, None)

    def step(
        self,
        name: str,
        inputs: Data,
        run: Callable[[Path], tuple[list[str], Data]],
        total: int | None = None,
        unit: str = "",
    ) -> Record:
        """The record of step ``name``, which is run only if it has to be.

        Args:
            name: unique in the build; it becomes part of a file name.
            inputs: plain data that decides the result.
            run: makes files below the folder it is given; returns their relative paths and plain data.
            total: total of the progress.
            unit: its unit, for the reader.
        """
        digest = step_digest(name, inputs)
        record = self._staged(name, digest) or self._from_bundle(name, digest)
        if record is not None:
            self.progress.finished(name, record.seconds, True)
        else:
            self.progress.started(name, total, unit)
            started = time.perf_counter()
            with disk_errors(self.out):
                self._forget(name)
                files, data = run(self.staging_dir)
                seconds = time.perf_counter() - started
                sizes = {rel: (self.staging_dir / rel).stat().st_size for rel in files}
                record = Record(digest, sizes, seconds, data)
                self._write(name, record)
            self.ran.append(name)
            self.progress.finished(name, seconds, False)
        self.records[name] = record
        return record

    def known(self, name: str, inputs: Data) -> bool:
        """Whether :meth:`step` would find its result already there."""
        old = self.sealed[1].get(name)
        return self.staged(name, inputs) or (old is not None and old.digest == step_digest(name, inputs))

    def staged(self, name: str, inputs: Data) -> bool:
        """Whether the result of a step is in the staging folder, where it takes no more disk."""
        return self._staged(name, step_digest(name, inputs)) is not None

    def finish(self) -> None:
        """Keep only files made by the steps of this build; write their records to ``receipts/build.json``."""
        paths = {rel for record in self.records.values() for rel in record.files}
        receipt = self.staging_dir / "receipts" / f"{RECEIPT}.json"
        with disk_errors(self.out):
            receipt.parent.mkdir(exist_ok=True)
            receipt.write_text(json.dumps({n: asdict(r) for n, r in self.records.items()}, indent=1) + "\n")
        paths.add(receipt.relative_to(self.staging_dir).as_posix())
        for file in [p for p in self.staging_dir.rglob("*") if not p.is_dir()]:
            if file.relative_to(self.staging_dir).as_posix() not in paths:
                file.unlink()
        for folder in sorted((p for p in self.staging_dir.rglob("*") if p.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()

    def discard(self) -> None:
        """Remove the staging folder: the bundle has all of it."""
        shutil.rmtree(self.work_dir, ignore_errors=True)

    def _staged(self, name: str, digest: str) -> Record | None:
        record = _read_record(self._record_path(name))
        if record is None or record.digest != digest:
            return None
        return record if _present(self.staging_dir, record) else None

    def _from_bundle(self, name: str, digest: str) -> Record | None:
        """The record of a step whose files are copied from the bundle; None if that has no intact ones.

        Not as hard links: onnx.checker refuses weights that have a second name.
        """
        bundle, records = self.sealed
        record = records.get(name)
        if bundle is None or record is None or record.digest != digest:
            return None
        with disk_errors(self.out):
            self._forget(name)
            try:
                for rel in record.files:
                    _copy(bundle, rel, self.staging_dir / rel)
            except IntegrityError:
                return None  # damaged since: the step is run again
            self._write(name, record)
        return record

    def _forget(self, name: str) -> None:
        """Remove the files that an earlier run of step ``name`` left.

        The record goes before the new files come: with it, a run killed half way would pass for the old one.
        """
        old = _read_record(self._record_path(name))
        self._record_path(name).unlink(missing_ok=True)
        for rel in old.files if old is not None else ():
            (self.staging_dir / rel).unlink(missing_ok=True)

    def _write(self, name: str, record: Record) -> None:
        with atomic(self._record_path(name)) as partial:
            partial.write_text(json.dumps(asdict(record)))

    def _record_path(self, name: str) -> Path:
        return self._steps / f"{name}.json"


def run_step(space: Workspace, step: Step) -> None:
    """Run ``step`` in ``space``, if it has to be."""

    def run(root: Path) -> StepResult:
        return step.run(space, space.progress.advanced)

    space.step(step.name, step.inputs, run, step.total, step.unit)


def write_receipt(space: Workspace, name: str, data: Any) -> str:
    """Write ``receipts/<name>.json`` into the staging folder; its path there."""
    path = space.staging_dir / "receipts" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path.relative_to(space.staging_dir).as_posix()


def after(before: list[Step]) -> Data:
    """The step input that makes a step depend on those of ``before``."""
    return {"after": {step.name: step.digest for step in before}}


def step_digest(name: str, inputs: Data) -> str:
    """Content hash of a step: its inputs, library versions and this package's code."""
    from .environment import code_digest, tool_versions

    content = [name, inputs, tool_versions(), code_digest()]
    return sha256_json(content)


def _sealed(out: Path) -> tuple[Bundle | None, dict[str, Record]]:
    """The bundle in ``out`` and the records of its steps; nothing if there is none, or a damaged one."""
    try:
        bundle = Bundle.open(out)
        return bundle, decode(dict[str, Record], bundle.receipt(RECEIPT), what="The receipt of a build")
    except (IntegrityError, OSError):
        return None, {}


def _read_record(path: Path) -> Record | None:
    try:
        return decode(Record, path, what="The record of a step")
    except (IntegrityError, OSError):
        return None


def _copy(bundle: Bundle, rel: str, target: Path) -> None:
    """Copy a file out of ``bundle``; IntegrityError if its hash differs from the manifest's."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if copy_with_sha256(bundle.path(rel), target) != bundle.manifest.files[rel].sha256:
        target.unlink()
        raise IntegrityError(f"{rel} in {bundle.root} is damaged.")


def _present(root: Path, record: Record) -> bool:
    return all((root / rel).is_file() and (root / rel).stat().st_size == n for rel, n in record.files.items())
