"""A profile's cases as CSV: a line each, units in the heads."""

from __future__ import annotations

import csv
import io

from ..measure.receipt import Profile

COLUMNS = (
    "bundle", "model", "kind", "name", "backend", "precision", "batch", "sizes", "unit", "p50_ms", "p90_ms",
    "p95_ms", "p99_ms", "mean_ms", "min_ms", "max_ms", "items_per_s", "samples", "stable", "floor_ms",
    "of_floor", "bound", "gmac", "weight_bytes", "clock", "boundary",
)  # fmt: skip


def sheet(profile: Profile) -> str:
    """The CSV text. What does not apply or was not measured is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case in profile.cases:
        s, floor, cost = case.measurement.summary, case.floor, profile.cost(case)
        sizes = " ".join(f"{name}={size}" for name, size in case.sizes.items())
        writer.writerow(
            (
                profile.subject.name, profile.subject.model, case.kind, case.name, case.backend,
                case.precision, case.batch, sizes, case.unit, s.p50_ms, s.p90_ms, s.p95_ms, s.p99_ms,
                s.mean_ms, s.min_ms, s.max_ms, case.per_second, s.samples, case.measurement.stable,
                floor.ms if floor else None, case.of_floor, floor.bound if floor else None,
                cost.macs / 1e9 if cost else None, cost.weight_bytes if cost else None, case.clock,
                case.boundary,
            )
        )  # fmt: skip
    return file.getvalue()
