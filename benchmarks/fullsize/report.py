"""Costs of each step at full width: seconds, peak anonymous memory, bytes written, ratio to ``cp``.

Every step runs in a separate process and starts with the checkpoint's files out of the page cache. ``cp``
of the shards, measured in the same run, is the floor: a ratio is the seconds per byte that the step reads,
over those of ``cp``.

The receipt is rewritten after every step, so a run that is killed keeps its rows.

    python -m ivl_export.benchmarks.fullsize.report --work FOLDER --blocks 4 --out receipt.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ivl_export.benchmarks.fullsize.document import notes
from ivl_export.benchmarks.fullsize.make_checkpoint import ITEM_BYTES
from ivl_export.benchmarks.fullsize.measured import Run, StepFailed, run
from ivl_export.files.write import write_text
from ivl_export.models.config import InternVLConfig
from ivl_export.models.registry import expected_shapes, sliced
from ivl_export.profiles.measure.machine import commit, machine, versions

HERE = "ivl_export.benchmarks.fullsize"
FREE_AFTER = 20 * 10**9
"""Disk that a run leaves free."""


@dataclass(frozen=True)
class Row:
    """One step of the table.

    ``bytes_read`` are those of the weights it has to read, ``ratio`` is to ``cp`` of as many (None where it
    reads none: zero copy); ``error`` says why a step has no figures.
    """

    step: str
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_anonymous: int | None = None
    bytes_read: int = 0
    bytes_written: int = 0
    ratio: float | None = None
    details: dict[str, Any] | None = None
    error: str | None = None


class Report:
    """Runs steps one after another in the folder ``work``."""

    def __init__(self, work: Path, keep: Callable[[Sequence[Row]], None] = lambda rows: None) -> None:
        """``keep`` is called with all rows so far after every step."""
        self.work, self.model, self.keep = work, work / "model", keep
        self.rows: list[Row] = []
        self.floor: float | None = None
        """Seconds a byte of ``cp``."""

    def step(
        self,
        name: str,
        command: Sequence[str],
        written: Callable[[], int],
        read_bytes: int = 0,
        details: Callable[[Run], dict[str, Any]] | None = None,
    ) -> None:
        """Run ``command`` and add its row; ``written`` counts its output's bytes afterwards."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        self._evict()
        try:
            result = run(command)
            if name == "cp":
                self.floor = result.seconds / read_bytes
            ratio = result.seconds / (read_bytes * self.floor) if self.floor and read_bytes else None
            detail = details(result) if details else None
            row = Row(
                name,
                result.seconds,
                result.cpu_seconds,
                result.peak_anonymous,
                read_bytes,
                written(),
                ratio,
                detail,
            )
            print(f"{name}: {result.seconds:.1f} s", file=sys.stderr, flush=True)
        except StepFailed as error:
            row = Row(name, error=str(error))
            print(f"{name} failed: {error}", file=sys.stderr, flush=True)
        self.rows.append(row)
        self.keep(self.rows)

    def row(self, name: str) -> Row | None:
        """The row of a step that has figures."""
        return next((row for row in self.rows if row.step == name and not row.error), None)

    def shards(self) -> list[Path]:
        """The checkpoint's weight files."""
        return sorted(self.model.glob("*.safetensors"))

    def _evict(self) -> None:
        """Write dirty pages back and drop the shards from the page cache: every step starts cold."""
        os.sync()
        for path in self.shards():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def measure_all(report: Report, sizes: Sequence[str], steps: Sequence[str], components: str) -> None:
    """Run ``steps`` (of :data:`STEPS`) on a checkpoint that the maker makes with options ``sizes``."""
    from ivl_export.export.unquantized import weight_keys
    from ivl_export.models.checkpoint import open_checkpoint

    work, model = report.work, report.model
    python, tool = [sys.executable, "-m"], [sys.executable, "-m", f"{HERE}.tool"]
    report.step("make", [*python, f"{HERE}.make_checkpoint", str(model), *sizes], lambda: _size(model))
    if not report.shards():
        return
    checkpoint = open_checkpoint(model)
    used = sum(checkpoint.tensors[k].nbytes for k in weight_keys(checkpoint, components.split(",")))
    export = [*tool, "cli", "export", "--model", str(model), "--components", components, "--json"]
    scratch = work / "scratch"

    def fresh() -> Path:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        return scratch

    if "cp" in steps:
        shards = report.shards()
        copy = ["cp", *map(str, shards), str(fresh())]
        report.step("cp", copy, lambda: _size(scratch), sum(p.stat().st_size for p in shards))
    if "zero-copy" in steps:
        report.step("zero-copy", [*export, "--zero-copy"], lambda: _size(model, "*.onnx"))
    if "copy" in steps:
        out = fresh() / "copy"
        report.step("copy", [*export, "--out", str(out)], lambda: _size(out), used)
    for name in ("plain", "plain-mapped") if "plain" in steps else ():
        out = fresh() / "plain"
        command = [*tool, name, str(model), str(out), components]
        against = partial(_against, report.row("copy"))
        report.step(name, command, lambda: _size(scratch), used, against)
    for name in ("quantise", "quantise-int8") if "quantise" in steps else ():
        out = fresh() / "low"
        command = [*tool, name, str(model), str(out), components]
        report.step(name, command, partial(_size, out), used, _printed)
    if {"calibrate", "engine"} & set(steps):
        out = fresh() / "engine"
        calibrate = [*tool, "calibrate", str(model), str(out), components]
        report.step("calibrate", calibrate, lambda: _size(out), used, _printed)
    if "engine" in steps and report.row("calibrate"):
        report.step(
            "graphs", [*tool, "graphs", str(model), str(out), components], lambda: _size(out), used, _printed
        )
        for name in components.split(","):
            engine = out / f"{name}.engine"
            build = [*tool, "engine", str(model), str(out), name]
            report.step(f"engine {name}", build, partial(_size, out, engine.name), 0, _printed)
            engine.unlink(missing_ok=True)  # the disk holds one at a time
    fresh()


STEPS = ("cp", "zero-copy", "copy", "plain", "quantise", "calibrate", "engine")
"""``engine`` calibrates, writes the FP8 graphs and builds an engine of each component."""


def print_report(rows: Sequence[Row], title: str) -> None:
    """The table on stdout."""
    from ivl_export.cli.output import human_bytes, print_table

    columns = ("step", "seconds", "CPU seconds", "anonymous GB", "GB read", "written", "x cp")
    cells = [
        (
            row.step,
            row.seconds and round(row.seconds, 1),
            row.cpu_seconds and round(row.cpu_seconds, 1),
            row.peak_anonymous and round(row.peak_anonymous / 1e9, 2),
            round(row.bytes_read / 1e9, 2),
            human_bytes(row.bytes_written),
            row.ratio and round(row.ratio, 2),
        )
        for row in rows
    ]
    print_table(title, columns, cells)
    for row in rows:
        for note in [row.error] if row.error else notes(asdict(row)):
            print(f"{row.step}: {note}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure every step at full width.")
    parser.add_argument("--work", type=Path, required=True, help="an empty or new folder, removed at the end")
    parser.add_argument("--config", type=Path, help="a config.json; else InternVL-14B's widths")
    parser.add_argument("--blocks", type=int, default=4, help="blocks of both towers")
    parser.add_argument("--qllama-blocks", type=int, help="blocks of QLLaMA, if different")
    parser.add_argument("--components", default="vision", help="exported and quantised, joined by commas")
    parser.add_argument(
        "--holes",
        action="store_true",
        help="a checkpoint of sparse files: for zero-copy, which reads no weights",
    )
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--out", type=Path, required=True, help="the receipt, a JSON file")
    args = parser.parse_args(argv)
    steps = args.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"unknown steps {', '.join(sorted(unknown))}; known: {', '.join(STEPS)}")
    if args.holes and steps != ["zero-copy"]:
        parser.error("--holes has no weights to read: give --steps zero-copy")
    blocks = (args.blocks, args.qllama_blocks or args.blocks)
    args.work.mkdir(parents=True, exist_ok=True)
    if any(args.work.iterdir()):
        parser.error(f"{args.work} is not empty")
    whole = InternVLConfig.load(args.config) if args.config else InternVLConfig()
    config = sliced(whole, *blocks)
    needed, free = (
        (0 if args.holes else _needed(config, steps, args.components.split(","))) + FREE_AFTER,
        shutil.disk_usage(args.work).free,
    )
    if free < needed:
        parser.error(f"{needed / 1e9:.0f} GB of disk are needed (20 stay free), {free / 1e9:.0f} GB are free")
    title = f"{blocks[0]} InternViT and {blocks[1]} QLLaMA blocks; components: {args.components}"
    about = {
        "title": title,
        "holes": args.holes,
        "config": config.to_published(),
        "components": args.components.split(","),
        "machine": asdict(machine()),
        "versions": versions(),
        "commit": commit(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(args.work, lambda rows: write({**about, "rows": [asdict(r) for r in rows]}, args.out))
    try:
        sizes = ["--vision-blocks", str(blocks[0]), "--qllama-blocks", str(blocks[1])]
        sizes += ["--config", str(args.config)] if args.config else []
        sizes += ["--holes"] if args.holes else []
        measure_all(report, sizes, steps, args.components)
    finally:
        shutil.rmtree(args.work)
    print_report(report.rows, title)
    return int(any(row.error for row in report.rows))


def write(data: dict[str, Any], out: Path) -> None:
    """The receipt, whole or not at all."""
    write_text(json.dumps(data, indent=1) + "\n", out)


def _needed(config: InternVLConfig, steps: Sequence[str], components: Sequence[str]) -> int:
    """Most bytes on the disk at once: the checkpoint, and the largest output of one step."""
    import torch

    from ivl_export.models.registry import component_module

    shapes = expected_shapes(config)
    sizes = {key: ITEM_BYTES * math.prod(shape) for key, shape in shapes.items()}
    whole = sum(sizes.values())
    if not set(steps) - {"zero-copy"}:
        return whole
    plain = 0
    if "plain" in steps:  # what components share is written for each of them
        for name in components:
            with torch.device("meta"):
                plain += sum(sizes[key] for key in component_module(name, config).state_dict())
    return whole + max(whole, plain)


def _against(ours: Row | None, result: Run) -> dict[str, Any]:
    """How many times the seconds and the anonymous memory of our row of the same components."""
    if ours is None or not ours.seconds or not ours.peak_anonymous:
        return {}
    return {
        "times_seconds_of_copy": result.seconds / ours.seconds,
        "times_memory_of_copy": result.peak_anonymous / ours.peak_anonymous,
    }


def _printed(result: Run) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def _size(folder: Path, pattern: str = "*") -> int:
    """Bytes of the files in ``folder``; a hole counts nothing."""
    stats = [path.stat() for path in folder.rglob(pattern) if path.is_file()]
    return sum(min(s.st_size, s.st_blocks * 512) for s in stats)


if __name__ == "__main__":
    sys.exit(main())
