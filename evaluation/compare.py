"""Two bundles side by side, from their manifests and receipts. Runs no engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..bundle import Bundle
from ..errors import IntegrityError

Data = dict[str, Any]


def compare(a: Bundle, b: Bundle) -> Data:
    """``{bundles, components, tasks, verification, engines, notes}`` as plain data; None if missing.

    ``engines`` has, for those that both have, whether their files and their programs are equal
    (``same_program``; None if a receipt lacks it): see :func:`..verify.program.program_digest`.
    ``notes`` lists reasons why numbers of the two cannot be compared. IntegrityError if a receipt is not
    as builds write it.
    """
    try:
        return _side_by_side(a, b)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            "A receipt is not as builds write it.", f"{type(error).__name__}: {error}.", "Rebuild the bundle."
        ) from error


def _side_by_side(a: Bundle, b: Bundle) -> Data:
    notes: list[str] = []
    accuracy, tasks, verification = (
        _receipts(a, b, name, notes) for name in ("accuracy", "tasks", "verification")
    )
    same = a.manifest.model.revision == b.manifest.model.revision
    if not same:
        notes.append("The bundles were built from different checkpoints: no difference is given.")
    if None not in accuracy and accuracy[0]["set_hash"] != accuracy[1]["set_hash"]:
        notes.append("Component accuracy was measured on different sets.")
    if None not in tasks and tasks[0]["sizes"] != tasks[1]["sizes"]:
        same = False
        notes.append("Task scores are of different questions: no difference is given.")
    scores: list[dict[str, Data]] = []
    for bundle, receipt in zip((a, b), tasks, strict=True):
        scores.append({} if receipt is None else _scores(receipt, bundle))
        if receipt is not None and not scores[-1]:
            notes.append(f"{bundle.root} has task scores, but none of its own recipe.")
    return {
        "bundles": [_overview(bundle) for bundle in (a, b)],
        "components": _merged([{} if x is None else _components(x) for x in accuracy]),
        "tasks": [_task(row, same) for row in _merged(scores)],
        "verification": _merged([{} if x is None else _precisions(x) for x in verification]),
        "engines": _engines(a, b, verification),
        "notes": notes,
    }


def difference(a: Data, b: Data) -> tuple[float, float, float]:
    """b - a of two shares with Wilson intervals, and its 95% interval (Newcombe 1998, method 10).

    The questions are the same, so the true interval is narrower: a loss outside this one is outside that.
    """
    gap = b["accuracy"] - a["accuracy"]
    low = gap - math.hypot(b["accuracy"] - b["low"], a["high"] - a["accuracy"])
    high = gap + math.hypot(b["high"] - b["accuracy"], a["accuracy"] - a["low"])
    return gap, low, high


def _overview(bundle: Bundle) -> Data:
    m = bundle.manifest
    weights = sum(f.size for path, f in m.files.items() if path.startswith("onnx/weights/"))
    return {
        "path": str(bundle.root),
        "model": m.model.name,
        "compute_dtype": m.compute_dtype,
        "recipe": m.recipe,
        "calibration": None if m.calibration is None else m.calibration.samples,
        "synthetic_calibration": None if m.calibration is None else m.calibration.synthetic,
        "bytes": sum(f.size for f in m.files.values()),
        "weights_bytes": weights,
        "engines_bytes": sum(m.files[e.file].size for e in m.engines),
    }


def _receipts(a: Bundle, b: Bundle, name: str, notes: list[str]) -> list[Any]:
    receipts = []
    for bundle in (a, b):
        has = name in bundle.manifest.receipts
        if not has:
            notes.append(f"{bundle.root} has no {name} receipt.")
        receipts.append(bundle.receipt(name) if has else None)
    return receipts


def _components(receipt: Data) -> dict[str, Data]:
    """The worst output of each component: fed with fp32 inputs, and with earlier components' outputs."""
    rows = {}
    for component in receipt["teacher_forced"]:
        row: Data = {"samples": receipt["samples"]}
        for key, view in (("own", "teacher_forced"), ("chained", "chained")):
            outputs = receipt[view].get(component, {}).values()
            known = [o["sqnr_db"] for o in outputs if o["sqnr_db"] is not None]  # None: bit-equal
            row[f"{key}_cosine"] = min((float(o["cosine"]) for o in outputs), default=None)
            row[f"{key}_sqnr_db"] = min(map(float, known), default=None)
        rows[component] = row
    return rows


def _scores(receipt: Data, bundle: Bundle) -> dict[str, Data]:
    scores: Data = receipt["scores"].get(bundle.manifest.recipe, {})
    keys = ("accuracy", "low", "high")
    return {
        name: {**{key: float(score[key]) for key in keys}, "total": int(score["total"])}
        for name, score in _leaves("", scores)
    }


def _leaves(path: str, scores: Data) -> Iterator[tuple[str, Data]]:
    """Every score with its name; those of a part of the questions are left out."""
    for key, value in scores.items():
        if key in ("settings", "novel") or not isinstance(value, dict):
            continue
        name = f"{path} {key}".strip()
        if "accuracy" in value:
            yield name, value
        else:
            yield from _leaves(name, value)


def _task(row: Data, same: bool) -> Data:
    out = {**row, "difference": None, "low": None, "high": None, "within": None}
    if same and row["a"] and row["b"] and row["a"]["total"] == row["b"]["total"]:
        gap, low, high = difference(row["a"], row["b"])
        out |= {"difference": gap, "low": low, "high": high, "within": low <= 0 <= high}
    return out


def _precisions(receipt: Data) -> dict[str, dict[str, int]]:
    """GEMMs by precision of each component on each backend."""
    return {
        f"{where} {component}": {str(name): int(count) for name, count in proof["precisions"].items()}
        for where, components in receipt.items()
        for component, proof in components.items()
    }


def _engines(a: Bundle, b: Bundle, verification: list[Any]) -> list[Data]:
    """The engines that both bundles have: equal files, equal programs."""

    def files(bundle: Bundle) -> dict[tuple[str, str], list[str]]:
        files_of: dict[tuple[str, str], list[str]] = {}
        for e in bundle.manifest.engines:
            place = f"{e.backend}-{e.target}", e.component
            files_of.setdefault(place, []).append(bundle.manifest.files[e.file].sha256)
        return files_of

    def program(receipt: Any, where: str, component: str) -> str:
        return str(((receipt or {}).get(where) or {}).get(component, {}).get("program", ""))

    first, second = files(a), files(b)
    rows: list[Data] = []
    for where, component in (place for place in first if place in second):
        programs = [program(receipt, where, component) for receipt in verification]
        same_bytes = first[where, component] == second[where, component]
        same = programs[0] == programs[1] if all(programs) else None
        same_program = True if same_bytes else same
        rows.append({"name": f"{where} {component}", "same_bytes": same_bytes, "same_program": same_program})
    return rows


def _merged(sides: list[dict[str, Any]]) -> list[Data]:
    names = dict.fromkeys([*sides[0], *sides[1]])
    return [{"name": name, "a": sides[0].get(name), "b": sides[1].get(name)} for name in names]
