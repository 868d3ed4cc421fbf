"""Memory of a loaded bundle, with shared weights and without, and how long it takes to load.

    python -m ivl_export.benchmarks.runtime.memory BUNDLE...    # of models.py: nano, mid

Each figure is of a fresh process, which opens all components and runs C, G, text and a caption. Memory is
``Pss`` by Linux: a page with several mappings counts once. Its growth is the weights, and
the buffers of calls (anonymous memory since the calls). Weights are compared with the size of each once, in
the type that ONNX Runtime multiplies it in.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ivl_export.benchmarks.runtime.measured import (
    RECEIPTS,
    ROUNDS,
    Candidate,
    Comparison,
    Goal,
    receipt,
    receipt_path,
    show,
    side_by_side,
)
from ivl_export.bundle import Bundle
from ivl_export.cli.output import print_table
from ivl_export.engines.onnx_graph import read_graph
from ivl_export.files.write import write_text
from ivl_export.runtime import InternVL

RATIO, LOAD_SECONDS = 1.15, 1.5
"""Goals: weights in memory over the size of each once; import and load of nano."""
COLUMNS = ("bundle", "weights", "stored MB", "once MB", "held MB", "ratio", "calls MB", "import s", "load s")
SHARING: dict[str, bool | None] = {"alone": False, "shared, first": True, "shared": True}
"""How a bundle is loaded: the first process that shares makes the files, later ones find them."""


@dataclass(frozen=True)
class Held:
    """What fresh processes of one kind found; the middle one of each figure.

    Args:
        bundle, weights: which, and how (of :data:`SHARING`).
        stored: bytes of weights in the bundle.
        once: bytes that each weight takes once.
        held: bytes that the sessions' weights took.
        calls: bytes that the calls work in.
        import_seconds, load_seconds: of ``ivl_export.runtime``, and of opening all components.
    """

    bundle: str
    weights: str
    stored: int
    once: int
    held: int
    calls: int
    import_seconds: float
    load_seconds: float

    @property
    def ratio(self) -> float:
        """Weights in memory over the size of each once."""
        return self.held / self.once

    def row(self) -> Sequence[str]:
        """A line of the table, as :data:`COLUMNS`."""
        sizes = [f"{size / 1e6:.1f}" for size in (self.stored, self.once, self.held)]
        times = [f"{seconds:.2f}" for seconds in (self.import_seconds, self.load_seconds)]
        return self.bundle, self.weights, *sizes, f"{self.ratio:.2f}", f"{self.calls / 1e6:.1f}", *times


def held(bundle: Path, rounds: int) -> Iterator[Held]:
    """What processes of each kind hold. The cache, where weights are shared, is to be empty."""
    stored, once = weight_bytes(Bundle.open(bundle))
    times_of: dict[str, list[dict[str, Any]]] = {how: [] for how in SHARING}
    for turn in range(rounds):
        for how in SHARING:
            if turn == 0 or how != "shared, first":
                times_of[how].append(_fresh(bundle, how))
    for how, seen in times_of.items():
        assert not any(run["heavy"] for run in seen), seen
        middle = {key: statistics.median(run[key] for run in seen) for key in seen[0] if key != "heavy"}
        sizes = {key: int(middle[key]) for key in ("held", "calls")}
        seconds = {key: middle[key] for key in ("import_seconds", "load_seconds")}
        yield Held(bundle.name, how, stored, once, **sizes, **seconds)


def _fresh(bundle: Path, how: str) -> dict[str, Any]:
    code = "ivl_export.benchmarks.runtime.held"
    process = subprocess.run(
        [sys.executable, "-m", code, str(bundle), json.dumps(SHARING[how])],
        capture_output=True,
        text=True,
        check=True,
    )
    report: dict[str, Any] = json.loads(process.stdout)
    return report


def weight_bytes(bundle: Bundle) -> tuple[int, int]:
    """Bytes of weights as stored, and of each weight once as ONNX Runtime multiplies it: int8, or fp32."""
    files = bundle.manifest.files.items()
    stored = sum(entry.size for rel, entry in files if rel.startswith("onnx/weights/"))
    sizes: dict[str, int] = {}
    for name in bundle.manifest.components:
        for key, (kind, shape) in read_graph(bundle.graph(name, "fp32")).initializers.items():
            sizes[f"{key} {kind} {shape}"] = math.prod(shape) * (1 if kind == "int8" else 4)
    return stored, sum(size for size in sizes.values() if size >= 1024)


def speed(bundle: Path, rounds: int) -> Iterator[Comparison]:
    """The same calls on shared weights and on weights of each session's own, in turns; results are equal."""
    with (
        InternVL.load(bundle, threads=1, share_weights=True) as shared,
        InternVL.load(bundle, threads=1, share_weights=False) as alone,
    ):
        rng = np.random.default_rng(0)
        pixels = rng.standard_normal((8, 3, *2 * (alone.image_settings.size,)), dtype=np.float32)
        calls: dict[str, Callable[[InternVL], Any]] = {
            "InternVL-G, batch 1": lambda model: model.encode_image(pixels[:1], "InternVL-G"),
            "text, batch 8": lambda model: model.encode_text(["two blue stars on a red ring"] * 8),
            "caption of 10 tokens": lambda model: model.caption(pixels[:1], "a", 1, 10, 10),
        }
        for case, call in calls.items():
            equal = np.array_equal(np.asarray(call(shared)), np.asarray(call(alone)))
            both = [Candidate("shared", partial(call, shared)), Candidate("alone", partial(call, alone))]
            timed = side_by_side(both, rounds)
            goal = Goal("shared", "alone", "time", 1.05)
            yield Comparison(f"{bundle.name}, {case}", timed, (goal,), {"equal": bool(equal)})


@contextmanager
def new_cache() -> Iterator[None]:
    """An empty folder as the user's cache."""
    before = os.environ.get("IVL_EXPORT_CACHE")
    with tempfile.TemporaryDirectory(prefix="ivl-memory-") as folder:
        os.environ["IVL_EXPORT_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["IVL_EXPORT_CACHE"]
            if before is not None:
                os.environ["IVL_EXPORT_CACHE"] = before


def goals(runs: Sequence[Held]) -> Iterator[tuple[str, float, bool]]:
    """Goals, measured values, and whether they are met."""
    for run in runs:
        if run.bundle.startswith("mid") and run.weights != "alone":
            text = (
                f"{run.bundle}, {run.weights}: weights in memory at most {RATIO:g} of the size of each once"
            )
            yield text, run.ratio, run.ratio <= RATIO
        elif run.bundle.startswith("nano") and run.weights == "alone":
            seconds = run.import_seconds + run.load_seconds
            text = f"{run.bundle}: import and load in at most {LOAD_SECONDS:g} s"
            yield text, seconds, seconds <= LOAD_SECONDS


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Memory and load time of bundles, weights shared and not.")
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each kind")
    parser.add_argument("--out", type=Path, default=RECEIPTS, help="the folder of the receipt")
    args = parser.parse_args(argv)
    runs: list[Held] = []
    compared: list[Comparison] = []
    for bundle in args.bundles:
        with new_cache():
            runs += held(bundle, args.rounds)
            compared += speed(bundle, ROUNDS)
    print_table("memory and loading", COLUMNS, [run.row() for run in runs])
    show(compared)
    goal_rows = [{"goal": text, "found": value, "met": met} for text, value, met in goals(runs)]
    for goal in goal_rows:
        print(f"{goal['goal']}: {goal['found']:.2f}{'' if goal['met'] else ', missed'}")
    rows = [{**asdict(run), "ratio": run.ratio} for run in runs]
    result = {**receipt("memory", 1, compared), "held": rows, "goals": goal_rows}
    write_text(json.dumps(result, indent=1) + "\n", receipt_path("memory", args.out))
    return int(not all(goal["met"] for goal in goal_rows))


if __name__ == "__main__":
    sys.exit(main())
