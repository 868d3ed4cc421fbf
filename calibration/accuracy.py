"""How near a quantised component is to fp32, and whether a task's loss is within its budget."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import Array
from ..errors import AccuracyError, BuildError
from ..models.calls import Arrays
from ..models.registry import ModelConfig
from .component_chain import Runner, Step, run_chain
from .dataset import Batch
from .magnitudes import NOT_MEASURED, Magnitudes
from .tokens import LOGITS, TokenComparison, TokenMetrics

BUDGETS = {"fp8": 1.0, "int8": 1.5, "mixed": 0.3}
"""Largest loss in percentage points on each task, by recipe (bf16 and fp16: as fp8)."""

SIMULATED = "simulated in torch"
"""Backend name in receipts of models that :mod:`.simulate` ran block by block."""


@dataclass(frozen=True)
class Metrics:
    """Candidate against reference.

    Args:
        cosine: mean over samples of the cosine of the flattened arrays.
        worst_cosine: of the worst sample.
        sqnr_db: 10 log10(sum ref^2 / sum (ref - cand)^2) over everything; infinity where equal,
            never under -200.
        max_abs: largest difference.
        samples: how many were compared.
        tokens: of logits: what became of the tokens chosen from them.
    """

    cosine: float
    worst_cosine: float
    sqnr_db: float
    max_abs: float
    samples: int
    tokens: TokenMetrics | None = None


Table = dict[str, dict[str, Metrics]]
"""component -> output -> metrics."""


@dataclass(frozen=True)
class Receipt:
    """Accuracy of a bundle's components against the fp32 torch model, on samples not calibrated on.

    Args:
        recipe: its name.
        backend: backend that ran the graphs, or :data:`SIMULATED`.
        set_hash: hash of the held-out part of the calibration set.
        samples: its size.
        held_out: False where the set was too small to hold any sample back.
        teacher_forced: component -> output -> metrics; every component got fp32 inputs.
        chained: the same, components fed with each other's outputs.
        blocks: component -> metrics of the hidden states after each block, where the model was simulated
            block by block (:mod:`.simulate`) because it does not fit into memory.
        magnitudes: how large everything became in the fp32 model.
    """

    recipe: str
    backend: str
    set_hash: str
    samples: int
    held_out: bool
    teacher_forced: Table
    chained: Table
    blocks: dict[str, list[Metrics]] = field(default_factory=dict)
    magnitudes: Magnitudes = NOT_MEASURED

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite SQNR (bit-equal) becomes None."""
        data = {**asdict(self), "magnitudes": self.magnitudes.to_json()}
        listed = [
            m for mode in ("teacher_forced", "chained") for o in data[mode].values() for m in o.values()
        ]
        for metrics in (*listed, *(m for blocks in data["blocks"].values() for m in blocks)):
            if math.isinf(metrics["sqnr_db"]):
                metrics["sqnr_db"] = None
            if metrics["tokens"] is None:
                del metrics["tokens"]
        return data

    def save(self, path: Path) -> None:
        """Write ``path``."""
        path.write_text(json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


class Comparison:
    """Accumulates metrics over batches, so that no more than one is in memory.

    Args:
        output: its name; of :data:`.tokens.LOGITS` the tokens are compared, too.
    """

    def __init__(self, output: str = "") -> None:
        self._signal = self._noise = self._max = 0.0
        self._cosines: list[float] = []
        self._tokens = TokenComparison() if output == LOGITS else None

    def add(self, reference: Array, candidate: Array) -> None:
        """Arrays of one shape, samples along axis 0.

        Raises:
            BuildError: shapes differ, or the candidate holds NaN or infinity.
        """
        if reference.shape != candidate.shape:
            raise BuildError(
                "Outputs cannot be compared.", f"Shapes {list(reference.shape)} and {list(candidate.shape)}."
            )
        ref = reference.reshape(len(reference), -1).astype(np.float64)
        cand = candidate.reshape(len(candidate), -1).astype(np.float64)
        if not np.isfinite(cand).all():
            raise BuildError(
                "A quantised component gives NaN or infinity.",
                f"{int((~np.isfinite(cand)).sum())} of {cand.size} values.",
                "Calibrate on more images, or use a bf16 base.",
            )
        if self._tokens is not None:
            self._tokens.add(reference, candidate)
        difference = ref - cand
        self._signal += float(np.square(ref).sum())
        self._noise += float(np.square(difference).sum())
        self._max = max(self._max, float(np.abs(difference).max(initial=0.0)))
        norms = np.linalg.norm(ref, axis=1) * np.linalg.norm(cand, axis=1)
        dots = (ref * cand).sum(1)
        same = (difference == 0).all(1)  # also two rows of zeros, which have no angle
        cosines = np.where(same, 1.0, dots / np.where(norms > 0, norms, 1.0))
        self._cosines += np.minimum(cosines, 1.0).tolist()

    def metrics(self) -> Metrics:
        """The metrics of all samples added; BuildError if there were none."""
        if not self._cosines:
            raise BuildError("Nothing was compared.", fix="Give at least one held-out sample.")
        sqnr = math.inf
        if self._noise > 0:
            sqnr = 10 * math.log10(max(self._signal / self._noise, 1e-20))
        mean = math.fsum(self._cosines) / len(self._cosines)
        tokens = None if self._tokens is None else self._tokens.metrics()
        return Metrics(mean, min(self._cosines), sqnr, self._max, len(self._cosines), tokens)


def compare(reference: Array, candidate: Array) -> Metrics:
    """Metrics of two arrays of one shape, samples along axis 0."""
    comparison = Comparison()
    comparison.add(reference, candidate)
    return comparison.metrics()


def component_accuracy(
    reference: Iterable[tuple[Batch, Sequence[Step]]], candidate: Mapping[str, Runner], config: ModelConfig
) -> tuple[Table, Table]:
    """Run ``candidate`` on the same inputs as the fp32 model.

    Args:
        reference: held-out batches, and the fp32 steps of :func:`.component_chain.run_chain` on each, of
            all components that ``candidate`` has.
        candidate: runners of the graphs or engines under test.
        config: the model's sizes.

    Returns:
        (teacher forced, chained): component -> output -> metrics. Chained leaves out components whose
        inputs no candidate makes.
    """
    forced: dict[str, dict[str, Comparison]] = {}
    chained: dict[str, dict[str, Comparison]] = {}
    for batch, all_steps in reference:
        steps = [step for step in all_steps if step.component in candidate]
        for step in steps:
            _add(forced, step, candidate[step.component](step.inputs))
        remaining = list(steps)
        for got in run_chain(candidate, batch, config):
            want = next(step for step in remaining if step.component == got.component)
            remaining.remove(want)
            _add(chained, want, got.outputs)
    return _finish(forced), _finish(chained)


def check_budget(
    reference: Mapping[str, float], candidate: Mapping[str, float], points: float, what: str = "quantised"
) -> dict[str, float]:
    """Losses in percentage points, by task.

    Args:
        reference: task -> accuracy (0..1) in fp32.
        candidate: the same tasks, quantised.
        points: the largest loss allowed.
        what: names the candidate in the error.

    Raises:
        AccuracyError: a loss is over ``points``; every such task is listed with its numbers.
    """
    losses = {task: round(100 * (value - candidate[task]), 6) for task, value in reference.items()}
    over = [task for task, loss in losses.items() if not loss <= points]  # NaN is over
    if over:
        listed = "; ".join(
            f"{t}: {reference[t]:.2%} -> {candidate[t]:.2%}, {losses[t]:.2f} points" for t in over
        )
        raise AccuracyError(
            f"The {what} model loses more than {points:g} points on {len(over)} of {len(losses)} tasks.",
            f"{listed}.",
            "Calibrate on more data, leave sensitive layers in 16 bits, or give --allow-accuracy-loss.",
        )
    return losses


def _add(table: dict[str, dict[str, Comparison]], want: Step, got: Arrays) -> None:
    outputs = table.setdefault(want.component, {})
    for name, array in want.outputs.items():
        outputs.setdefault(name, Comparison(name)).add(array, got[name])


def _finish(table: dict[str, dict[str, Comparison]]) -> Table:
    return {c: {o: comparison.metrics() for o, comparison in outputs.items()} for c, outputs in table.items()}
