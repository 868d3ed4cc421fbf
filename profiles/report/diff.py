"""Two profiles of the same cases: how the medians changed, and whether that is more than noise.

The interval of a ratio of medians comes from a circular block bootstrap: samples are drawn in runs of
neighbours, since disturbances outlast one call. It covers the noise within the two runs; what
differs between them as wholes (another machine, load, clock) is listed, not corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..measure.cases import Case
from ..measure.receipt import Profile

SCHEMA = "ivl-export.profile-diff/1"
CONFIDENCE = 0.95
RESAMPLES = 2000
MIN_CHANGE = 0.02
"""Medians closer than this are the same, as the windows of one measurement are."""

Verdict = Literal["faster", "slower", "same", "unclear"]


@dataclass(frozen=True)
class Change:
    """One case in both profiles.

    ``ratio`` is new / old of the medians (above 1 is slower) with its interval from ``low`` to ``high``.
    ``verdict`` is ``slower`` or ``faster`` if the whole interval is beyond 2%, ``same`` if it is within,
    else ``unclear``. ``steady``: both measurements had settled.
    """

    name: str
    kind: str
    batch: int
    sizes: dict[str, int]
    backend: str
    precision: str
    old_ms: float
    new_ms: float
    ratio: float
    low: float
    high: float
    verdict: Verdict
    steady: bool


@dataclass(frozen=True)
class Diff:
    """Changes from ``old`` to ``new``; ``differences`` are those of machine, settings and bundle.

    ``failed`` are the changes over the limit: the whole interval is above it.
    """

    old: str
    new: str
    changes: tuple[Change, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    differences: tuple[str, ...]
    fail_above: float | None
    failed: tuple[Change, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data with the schema's name."""
        return {"schema": SCHEMA, "confidence": CONFIDENCE, **asdict(self)}


def diff(old: Profile, new: Profile, fail_above: float | None = None) -> Diff:
    """Compare the cases that both have; ``fail_above`` 0.05 is a median over 5% slower.

    Raises:
        InputError: no case is in both.
    """
    before, after = ({_key(c): c for c in p.cases} for p in (old, new))
    shared = [key for key in before if key in after]
    if not shared:
        raise InputError(
            "These two profiles have no case in common.",
            f"{old.subject.name} has {len(before)}, {new.subject.name} {len(after)}.",
            "Profile both with the same --batch and --lengths.",
        )
    changes = tuple(_change(before[key], after[key]) for key in shared)
    return Diff(
        _title(old),
        _title(new),
        changes,
        tuple(_named(before[key]) for key in before if key not in after),
        tuple(_named(after[key]) for key in after if key not in before),
        tuple(_differences(old, new)),
        fail_above,
        tuple(c for c in changes if fail_above is not None and c.low > 1 + fail_above),
    )


def ratio_interval(
    old_ns: Sequence[int], new_ns: Sequence[int], confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of median(new) / median(old); the same for the same samples."""
    generator = np.random.default_rng(seed)
    ratios = _medians(new_ns, generator) / _medians(old_ns, generator)
    low, high = np.quantile(ratios, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)


def _medians(samples_ns: Sequence[int], generator: np.random.Generator) -> NDArray[np.float64]:
    """Medians of resamples of blocks of neighbours, about sqrt(n) long; the end joins the beginning."""
    values = np.asarray(samples_ns, np.float64)
    count = len(values)
    block = max(1, round(count**0.5))
    blocks = -(-count // block)
    out = np.empty(RESAMPLES)
    step = max(1, 1_000_000 // count)  # resamples at a time: a bounded amount of memory
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        first = generator.integers(0, count, (rows, blocks, 1))
        index = (first + np.arange(block)) % count
        out[start : start + rows] = np.median(values[index.reshape(rows, -1)[:, :count]], axis=1)
    return out


def _change(old: Case, new: Case) -> Change:
    before, after = (c.measurement.samples_ns[c.measurement.steady_from :] for c in (old, new))
    old_ms, new_ms = old.measurement.summary.p50_ms, new.measurement.summary.p50_ms
    low, high = ratio_interval(before, after)
    return Change(
        old.name, old.kind, old.batch, old.sizes, new.backend, new.precision, old_ms, new_ms,
        new_ms / old_ms, low, high, _verdict(low, high), old.measurement.stable and new.measurement.stable,
    )  # fmt: skip


def _verdict(low: float, high: float) -> Verdict:
    if low > 1 + MIN_CHANGE:
        return "slower"
    if high < 1 / (1 + MIN_CHANGE):
        return "faster"
    return "same" if low >= 1 / (1 + MIN_CHANGE) and high <= 1 + MIN_CHANGE else "unclear"


def _key(case: Case) -> tuple[object, ...]:
    """Key of equal cases: precisions and backends may differ, the baseline is separate."""
    baseline = case.backend if case.kind == "baseline" else ""
    return case.kind, case.name, case.batch, tuple(sorted(case.sizes.items())), case.clock, baseline


def _named(case: Case) -> str:
    return f"{case.kind} {case.name}, batch {case.batch}"


def _title(profile: Profile) -> str:
    return f"{profile.subject.name} of {profile.created}"


def _differences(old: Profile, new: Profile) -> list[str]:
    """Other changes, in words."""
    pairs = (
        ("bundle", old.subject.manifest_sha256[:12], new.subject.manifest_sha256[:12]),
        ("recipe", old.subject.recipe, new.subject.recipe),
        ("backend", old.settings.backend, new.settings.backend),
        ("threads", old.settings.threads, new.settings.threads),
        ("CPU", old.machine.cpu, new.machine.cpu),
        ("cores", old.machine.cores, new.machine.cores),
        ("GPUs", _gpus(old), _gpus(new)),
        ("load average", _load(old), _load(new)),
        *((name, old.versions.get(name), new.versions.get(name)) for name in old.versions | new.versions),
    )
    return [f"{name}: {a or 'none'} -> {b or 'none'}" for name, a, b in pairs if a != b]


def _gpus(profile: Profile) -> str:
    return ", ".join(gpu.name for gpu in profile.machine.gpus)


def _load(profile: Profile) -> str:
    """ModelConfig cores that were busy: less says nothing."""
    load = profile.machine.load_average
    return "unknown" if load is None else f"{round(load)}"
