"""The report of a finished build as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..calibration.magnitudes import Magnitudes, notes, weight_notes
from .accuracy_steps import headlines
from .run import Result


def describe(result: Result, notices: Sequence[str]) -> dict[str, Any]:
    """Accuracy, verification and steps of ``result``, read from the bundle's receipts."""
    bundle, manifest = result.bundle, result.bundle.manifest
    verification, accuracy = bundle.receipt("verification"), bundle.receipt("accuracy")
    magnitudes = Magnitudes.from_json(accuracy["magnitudes"])
    faint = result.records["finite"].data.get("denormal", [])
    in_type = [*weight_notes(faint, manifest.compute_dtype), *notes(magnitudes, manifest.compute_dtype)]
    tasks: dict[str, Any] = {}
    if "tasks" in manifest.receipts:
        scores = bundle.receipt("tasks")["scores"]
        order = sorted(scores, key=lambda name: ({"fp32": 0, "bf16": 1}.get(name, 2), name))
        tasks = {precision: headlines(scores[precision]) for precision in order}
    return {
        "bundle": str(bundle.root),
        "recipe": manifest.recipe,
        "bytes": sum(f.size for f in manifest.files.values()),
        "files": len(manifest.files),
        "notices": [*notices, *_unread(result), *in_type],
        "over_budget": result.over_budget,
        "components": accuracy["chained"],
        "components_in": accuracy["backend"],
        "largest": magnitudes.summary(manifest.compute_dtype),
        "tasks": tasks,
        "verification": {
            engine: {name: _summary(report) for name, report in components.items()}
            for engine, components in verification.items()
        },
        "fallback_causes": _causes(verification),
        "steps": [
            {"step": name, "seconds": round(record.seconds, 2), "reused": name not in result.ran}
            for name, record in result.records.items()
        ],
    }


def _unread(result: Result) -> list[str]:
    """Engines whose kernels are unknown: all of them, where one could not be opened, or some."""
    data = result.records["verification"].data
    notes = [
        f"Kernels of {name} on the CPU were not read: {why}." for name, why in data.get("unread", {}).items()
    ]
    for engine, components in data.get("not_told", {}).items():
        for name, promises in components.items():
            notes.append(
                f"{engine} does not tell the types of {len(promises)} promised products of {name} "
                f"({promises[0]}): what it tells is in receipts/."
            )
    return notes


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    return {
        "promised": len(report["promised"]),
        "precisions": report["precisions"],
        "fused_attention": report["fused_attention"],
        "attention": len(report["attention"]),
        "fallbacks": len(report["fallbacks"]),
        "not_told": len(report["not_told"]),
        "kernels": report["kernels"],
    }


def _causes(verification: dict[str, Any]) -> list[str]:
    """Why quantised products do not run in 8 bits, each cause once for an engine."""
    causes: dict[str, None] = {}
    for engine, components in verification.items():
        for component, report in components.items():
            fallbacks = set(report["fallbacks"])
            for gemm in report["gemms"]:
                if gemm["node"] in fallbacks:
                    causes[f"{engine}, {component}: {gemm['cause'] or 'unknown cause'}"] = None
    return list(causes)
