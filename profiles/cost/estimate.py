"""Latency, throughput, memory and cost on a GPU that is not here, from the roofline.

Efficiencies come from receipts of this repository that timed the same type on a GPU of the table. Where there
is none, the 16-bit products' is the paper's own (Table 19), and the rest are assumptions. Each figure says
which it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ...models.config import InternVLConfig
from ...models.registry import ModelConfig, components_of
from ...quantization.recipe import LayerPlan, Recipe
from .evidence import TIMED, Check, Timed, check, paper, read_receipts, sizes_at
from .flops import ComponentCost
from .gpus import GpuPeaks
from .roofline import LOW, Arithmetic, ComponentTime, Efficiency, component_cost, component_time, peak
from .sizes import weights
from .table19 import SOURCE, TEXT_TOKENS

SCHEMA = "ivl-export.estimate/1"
COMPONENTS_SCHEMA = "ivl-export.component-estimate/1"
RECEIPTS = Path(__file__).parents[1] / "receipts"
LOW_ASSUMED = 0.5
"""Share of the peak of FP8 and INT8 products: the glue between them does not shrink as they do."""
MEMORY_ASSUMED = 0.8
WIDE_ASSUMED = 0.6


@dataclass(frozen=True)
class Share:
    """A share of a peak, the kind of its source, and the source."""

    value: float
    known: Literal["receipt", "paper", "assumption"]
    source: str


@dataclass(frozen=True)
class Efficiencies:
    """The shares an estimate is made with."""

    wide: Share
    low: Share
    memory: Share

    @property
    def values(self) -> Efficiency:
        """Without their sources."""
        return Efficiency(self.wide.value, self.low.value, self.memory.value)


@dataclass(frozen=True)
class Point:
    """One batch size: milliseconds a call, images and texts per second, and memory.

    ``image_c_ms`` is InternViT, ``image_g_ms`` InternViT and QLLaMA's queries, ``text_ms`` a batch of texts.
    ``cost_c`` and ``cost_g`` are for a million images, in the currency of the price; None without one.
    """

    batch: int
    image_c_ms: float
    image_g_ms: float
    text_ms: float
    images_c_per_s: float
    images_g_per_s: float
    texts_per_s: float
    cost_c: float | None
    cost_g: float | None
    memory_bytes: int
    fits: bool
    components: tuple[ComponentTime, ...]


@dataclass(frozen=True)
class Estimate:
    """Prediction of :func:`estimate`, and its assumptions."""

    gpu: GpuPeaks
    precision: str
    image_size: int
    text_tokens: int
    weight_bytes: int
    points: tuple[Point, ...]
    efficiencies: Efficiencies
    assumptions: tuple[str, ...]
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data with the schema's name."""
        return {"schema": SCHEMA, **asdict(self)}


def estimate(
    config: InternVLConfig,
    recipe: Recipe,
    layers: LayerPlan,
    gpu: GpuPeaks,
    batches: Sequence[int],
    cost_per_hour: float | None = None,
    receipts: Path = RECEIPTS,
) -> Estimate:
    """Predict a model of ``config`` in a precision on ``gpu``.

    Args:
        config: the model's sizes.
        recipe, layers: the precision, and its plan for this model.
        gpu: a row of the table.
        batches: images (texts) of one call.
        cost_per_hour: the GPU's price.
        receipts: folder of profile receipts.

    Raises:
        CapabilityError: the GPU has no peak for a type of this precision.
    """
    arithmetic = Arithmetic.of(recipe, layers)
    shares, assumptions, checks = known(gpu, arithmetic, receipts)
    needed = sum(weights(config, recipe, layers, [name]).nbytes for name in TIMED)
    points = tuple(
        _point(config, arithmetic, gpu, batch, shares.values, needed, cost_per_hour) for batch in batches
    )
    return Estimate(
        gpu,
        recipe.name,
        config.vision.image_size,
        TEXT_TOKENS,
        needed,
        points,
        shares,
        (
            "Engines of vision, qllama_query and qllama_text are loaded together, each with its own weights.",
            "Memory: these weights, and four times the widest layer's activations; no CUDA context.",
            *assumptions,
        ),
        checks,
    )


@dataclass(frozen=True)
class ComponentPoint:
    """One batch size of a model that is neither an InternVL nor a chat: each component's call.

    ``cost`` is for a million rows through all of them, in the currency of the price; None without one.
    """

    batch: int
    ms: float
    per_s: float
    cost: float | None
    memory_bytes: int
    fits: bool
    components: tuple[ComponentTime, ...]


@dataclass(frozen=True)
class ComponentEstimate:
    """Prediction of :func:`estimate_components`, and its assumptions."""

    gpu: GpuPeaks
    precision: str
    image_size: int
    weight_bytes: int
    points: tuple[ComponentPoint, ...]
    efficiencies: Efficiencies
    assumptions: tuple[str, ...]
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data with the schema's name."""
        return {"schema": COMPONENTS_SCHEMA, **asdict(self)}


def estimate_components(
    config: ModelConfig,
    recipe: Recipe,
    layers: LayerPlan,
    gpu: GpuPeaks,
    batches: Sequence[int],
    cost_per_hour: float | None = None,
    receipts: Path = RECEIPTS,
) -> ComponentEstimate:
    """As :func:`estimate`, of any family: one call of each component, at the sizes engines are tuned for."""
    arithmetic = Arithmetic.of(recipe, layers)
    shares, assumptions, checks = known(gpu, arithmetic, receipts)
    components = [c for c in components_of(config) if not c.optional]
    weight_bytes = sum(weights(config, recipe, layers, [c.name]).nbytes for c in components)

    def point(batch: int) -> ComponentPoint:
        calls = [(c.name, {**c.typical_calls(config)[0][0], "batch": batch}) for c in components]
        costs, times = call_times(config, calls, arithmetic, gpu, shares.values)
        ms = sum(time.expected_ms for time in times)
        memory = weight_bytes + working_bytes(costs)
        cost = per_million(ms, batch, cost_per_hour)
        return ComponentPoint(batch, ms, 1e3 * batch / ms, cost, memory, gpu.fits(memory), times)

    return ComponentEstimate(
        gpu,
        recipe.name,
        config.image_size,
        weight_bytes,
        tuple(map(point, batches)),
        shares,
        (
            "One call of each component, one after another, each with its own weights.",
            "Memory: these weights, and four times the widest layer's activations; no CUDA context.",
            *assumptions,
        ),
        checks,
    )


def call_times(
    config: ModelConfig,
    calls: Iterable[tuple[str, dict[str, int]]],
    arithmetic: Arithmetic,
    gpu: GpuPeaks,
    efficiency: Efficiency,
) -> tuple[list[ComponentCost], tuple[ComponentTime, ...]]:
    """Costs and predicted times of ``calls`` (component, sizes of its axes), in order."""
    costs = [component_cost(name, config, sizes, arithmetic) for name, sizes in calls]
    return costs, tuple(component_time(cost, gpu, arithmetic, efficiency) for cost in costs)


def working_bytes(costs: Iterable[ComponentCost]) -> int:
    """Memory of activations: four times those of the widest layer of any call."""
    return 4 * max((la.activation_bytes // la.count for cost in costs for la in cost.layers), default=0)


def per_million(ms: float, rows: int, per_hour: float | None) -> float | None:
    """Price of a million rows of which ``rows`` take ``ms``; None without a price."""
    return None if per_hour is None else per_hour / 3600 * 1e3 * ms / rows


def known(
    gpu: GpuPeaks, arithmetic: Arithmetic, receipts: Path = RECEIPTS
) -> tuple[Efficiencies, tuple[str, ...], tuple[Check, ...]]:
    """Basis of every estimate for ``gpu``: shares of its peaks, assumptions, and predictions of measured
    times.

    Raises:
        CapabilityError: the GPU has no peak for a type of ``arithmetic``.
    """
    notes = [note for kind in arithmetic.products if (note := peak(gpu, kind)[1])]
    timed = (*read_receipts(receipts), *paper())
    shares = efficiencies(timed)
    assumptions = (
        "Peaks are the vendor's, dense; the GPU holds its clocks.",
        "A call has no launch gaps; preprocessing and copies from the host are not in it.",
        "The A100 of the paper's Table 19 is taken to be the SXM 80 GB.",
        *notes,
    )
    return shares, assumptions, tuple(check(one, shares.values) for one in timed)


def efficiencies(timed: Iterable[Timed]) -> Efficiencies:
    """Shares of the peaks from measured times, receipts before the paper; assumptions for the rest."""
    measured: dict[tuple[str, bool], list[float]] = {}
    for one in timed:
        if not one.published:
            continue  # shares of measured ceilings are another thing
        kind = "low" if set(one.arithmetic.products) & set(LOW) else "wide"
        measured.setdefault((kind if one.compute_bound else "memory", one.receipt), []).append(one.share)

    def share(kind: str, assumed: float, what: str) -> Share:
        if own := measured.get((kind, True)):
            return Share(median(own), "receipt", f"median of {len(own)} times in receipts")
        if theirs := measured.get((kind, False)):
            return Share(median(theirs), "paper", f"median of {len(theirs)} times: {SOURCE}")
        return Share(assumed, "assumption", f"no receipt timed {what} on a GPU of the table")

    return Efficiencies(
        wide=share("wide", WIDE_ASSUMED, "16-bit products"),
        low=share("low", LOW_ASSUMED, "FP8 or INT8 products"),
        memory=share("memory", MEMORY_ASSUMED, "a component that memory bounds"),
    )


def _point(
    config: InternVLConfig,
    arithmetic: Arithmetic,
    gpu: GpuPeaks,
    batch: int,
    efficiency: Efficiency,
    weight_bytes: int,
    price: float | None,
) -> Point:
    calls = [(name, sizes_at(name, batch)) for name in TIMED]
    costs, times = call_times(config, calls, arithmetic, gpu, efficiency)
    vision, query, text = times
    image_c, image_g = vision.expected_ms, vision.expected_ms + query.expected_ms
    memory = weight_bytes + working_bytes(costs)
    return Point(
        batch,
        image_c,
        image_g,
        text.expected_ms,
        1e3 * batch / image_c,
        1e3 * batch / image_g,
        1e3 * batch / text.expected_ms,
        per_million(image_c, batch, price),
        per_million(image_g, batch, price),
        memory,
        gpu.fits(memory),
        times,
    )
