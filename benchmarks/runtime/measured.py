"""Calls timed side by side: rounds that take turns, medians, ratios of medians, a table and a receipt.

Every round calls each candidate once, the first of them another one each time: what disturbs the machine for
a while disturbs all. A sample of a short call is the mean of many, so that the clock does not show.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ivl_export.files.json import decode
from ivl_export.files.write import write_text
from ivl_export.profiles.measure.machine import commit, machine, versions

SCHEMA = "ivl-export.runtime/1"
RECEIPTS = Path(__file__).resolve().parents[2] / "profiles" / "receipts"
ROUNDS = 7
LEAST_SECONDS = 0.05
"""Of a sample: a call that is shorter is repeated."""
MORE_SECONDS, MOST_ROUNDS = 4.0, 41
"""Short calls have further rounds in this time, up to so many: what disturbs them lasts for several."""
COLUMNS = ("what", "precision", "ms", "quartiles", "a second", "against")


@dataclass(frozen=True)
class Candidate:
    """One way to do the measured task.

    Args:
        name: as in the table.
        call: does it once.
        precision: of its products.
        items: inputs or outputs of a call (images, tokens).
    """

    name: str
    call: Callable[[], object]
    precision: str = ""
    items: float = 1


@dataclass(frozen=True)
class Timed:
    """A candidate's samples: seconds of a call, one for each round."""

    name: str
    precision: str
    items: float
    seconds: tuple[float, ...]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Seconds: the first quartile, the median, the third."""
        low, middle, high = np.percentile(self.seconds, (25, 50, 75))
        return float(low), float(middle), float(high)

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return self.quartiles[1]

    @property
    def rate(self) -> float:
        """Items a second."""
        return self.items / self.median


@dataclass(frozen=True)
class Goal:
    """What ``of`` shall reach in comparison with ``over``.

    ``time``: at most ``bound`` times its time a call. ``speed``: at least ``bound`` times its items a second.
    """

    of: str
    over: str
    kind: Literal["time", "speed"]
    bound: float


@dataclass(frozen=True)
class Comparison:
    """Candidates that did the same in the same rounds.

    Args:
        case: the task.
        timed: candidates and their times.
        goals: required ratios.
        facts: further results, plain data (distances between results, say).
        notes: sentences for the document.
    """

    case: str
    timed: tuple[Timed, ...]
    goals: tuple[Goal, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def ratio(self, goal: Goal) -> float:
        """The measured ratio of medians for ``goal``."""
        by_name = {t.name: t for t in self.timed}
        of, over = by_name[goal.of], by_name[goal.over]
        return of.median / over.median if goal.kind == "time" else of.rate / over.rate

    def met(self, goal: Goal) -> bool:
        """Whether ``goal`` was reached."""
        ratio = self.ratio(goal)
        return ratio <= goal.bound if goal.kind == "time" else ratio >= goal.bound

    def to_json(self) -> dict[str, Any]:
        """Plain data: samples, and what follows from them for readers without this code."""
        return {
            "case": self.case,
            "timed": [{**asdict(t), "median_seconds": t.median, "rate": t.rate} for t in self.timed],
            "goals": [{**asdict(g), "ratio": self.ratio(g), "met": self.met(g)} for g in self.goals],
            "facts": dict(self.facts),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        """The reverse of :meth:`to_json`."""
        return decode(cls, data, what="The comparison", fix="Measure it again.", ignore_unknown=True)


def side_by_side(
    candidates: Sequence[Candidate], rounds: int = ROUNDS, least_seconds: float = LEAST_SECONDS
) -> tuple[Timed, ...]:
    """Time ``candidates`` in turns, ``rounds`` or more, after one call of each that does not count."""
    repeats = [_repeats(c.call, least_seconds) for c in candidates]
    samples: list[list[float]] = [[] for _ in candidates]
    began, turn = time.perf_counter(), 0
    while turn < rounds or (turn < MOST_ROUNDS and time.perf_counter() - began < MORE_SECONDS):
        for k in range(len(candidates)):
            which = (k + turn) % len(candidates)
            samples[which].append(_sample(candidates[which].call, repeats[which]))
        turn += 1
    return tuple(
        Timed(c.name, c.precision, c.items, tuple(s)) for c, s in zip(candidates, samples, strict=True)
    )


def _repeats(call: Callable[[], object], least_seconds: float) -> int:
    first = _sample(call, 1)  # kernels are chosen, memory is taken
    return 1 if first > 1 else max(1, round(least_seconds / max(_sample(call, 1), 1e-9)))


def _sample(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def receipt(part: str, threads: int, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """A part's receipt: machine, versions and comparisons."""
    return {
        "schema": SCHEMA,
        "part": part,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": asdict(machine()),
        "versions": versions() | _compared_with(),
        "commit": commit(),
        "threads": threads,
        "comparisons": [c.to_json() for c in comparisons],
    }


def _compared_with() -> dict[str, str]:
    """Releases of the packages that the runtime is compared with; installed ones only."""
    releases = {}
    for name in ("transformers", "onnxruntime-genai"):
        with suppress(PackageNotFoundError):
            releases[name] = version(name)
    return releases


def receipt_path(part: str, folder: Path = RECEIPTS) -> Path:
    """Path of the receipt of ``part``."""
    return folder / f"runtime-{part}.json"


def keep(receipt: Mapping[str, Any], folder: Path = RECEIPTS) -> Path:
    """Write a receipt to its place in ``folder``, whole or not at all."""
    path = receipt_path(receipt["part"], folder)
    write_text(json.dumps(receipt, indent=1, allow_nan=False) + "\n", path)
    return path


def rows(comparison: Comparison) -> Iterator[Sequence[str]]:
    """The lines of one comparison, as :data:`COLUMNS`."""
    for t in comparison.timed:
        low, middle, high = (f"{1e3 * s:.3g}" for s in t.quartiles)
        against = [_said(comparison, g) for g in comparison.goals if g.of == t.name]
        yield t.name, t.precision, middle, f"{low} to {high}", f"{t.rate:,.4g}", "; ".join(against)


def _said(comparison: Comparison, goal: Goal) -> str:
    bound = f"goal at {'most' if goal.kind == 'time' else 'least'} {goal.bound:g}"
    missed = "" if comparison.met(goal) else ", missed"
    return f"{comparison.ratio(goal):.2f}x the {goal.kind} of {goal.over} ({bound}{missed})"


def show(comparisons: Iterable[Comparison]) -> None:
    """The tables on stdout."""
    from ivl_export.cli.output import print_table

    for comparison in comparisons:
        print_table(comparison.case, COLUMNS, rows(comparison))
        for note in comparison.notes:
            print(note)
