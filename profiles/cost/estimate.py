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
    """A share of a peak, what it is known from, and where that stands."""

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
    """What :func:`estimate` predicts, and everything it assumed."""

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
        recipe, layers: the precision and what it means for this model.
        gpu: a row of the table.
        batches: images (texts) of one call.
        cost_per_hour: the GPU's price.
        receipts: folder of profile receipts.

    Raises:
        CapabilityError: the GPU has no peak for a type of this precision.
    """
    arithmetic = Arithmetic.of(recipe, layers)
    found, assumptions, checks = known(gpu, arithmetic, receipts)
    needed = sum(weights(config, recipe, layers, [name]).nbytes for name in TIMED)
    points = tuple(
        _point(config, arithmetic, gpu, batch, found.values, needed, cost_per_hour) for batch in batches
    )
    return Estimate(
        gpu,
        recipe.name,
        config.vision.image_size,
        TEXT_TOKENS,
        needed,
        points,
        found,
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
    """What :func:`estimate_components` predicts, and everything it assumed."""

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
    """As :func:`estimate`, of any family: one call of each component, at what engines are tuned for."""
    arithmetic = Arithmetic.of(recipe, layers)
    shares, assumptions, checks = known(gpu, arithmetic, receipts)
    components = [c for c in components_of(config) if not c.optional]
    weight_bytes = sum(weights(config, recipe, layers, [c.name]).nbytes for c in components)

    def point(batch: int) -> ComponentPoint:
        calls = [(c.name, {**c.typical_calls(config)[0][0], "batch": batch}) for c in components]
        costs = [component_cost(name, config, sizes, arithmetic) for name, sizes in calls]
        times = tuple(component_time(cost, gpu, arithmetic, shares.values) for cost in costs)
        ms = sum(time.expected_ms for time in times)
        widest = max((la.activation_bytes // la.count for cost in costs for la in cost.layers), default=0)
        memory = weight_bytes + 4 * widest
        cost = None if cost_per_hour is None else cost_per_hour / 3600 * 1e3 * ms / batch
        fits = memory <= gpu.memory_gb * 1e9
        return ComponentPoint(batch, ms, 1e3 * batch / ms, cost, memory, fits, times)

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


def known(
    gpu: GpuPeaks, arithmetic: Arithmetic, receipts: Path = RECEIPTS
) -> tuple[Efficiencies, tuple[str, ...], tuple[Check, ...]]:
    """What every estimate for ``gpu`` starts from: shares of its peaks, assumptions, and what they say of
    everything that was timed.

    Raises:
        CapabilityError: the GPU has no peak for a type of ``arithmetic``.
    """
    notes = [note for kind in arithmetic.products if (note := peak(gpu, kind)[1])]
    timed = (*read_receipts(receipts), *paper())
    found = efficiencies(timed)
    assumptions = (
        "Peaks are the vendor's, dense; the GPU holds its clocks.",
        "A call has no launch gaps; preprocessing and copies from the host are not in it.",
        "The A100 of the paper's Table 19 is taken to be the SXM 80 GB.",
        *notes,
    )
    return found, assumptions, tuple(check(one, found.values) for one in timed)


def efficiencies(timed: Iterable[Timed]) -> Efficiencies:
    """Shares of the peaks from what was timed, receipts before the paper; assumptions for the rest."""
    found: dict[tuple[str, bool], list[float]] = {}
    for one in timed:
        if not one.published:
            continue  # shares of measured ceilings are another thing
        kind = "low" if set(one.arithmetic.products) & set(LOW) else "wide"
        found.setdefault((kind if one.compute_bound else "memory", one.receipt), []).append(one.share)

    def share(kind: str, assumed: float, what: str) -> Share:
        if own := found.get((kind, True)):
            return Share(median(own), "receipt", f"median of {len(own)} times in receipts")
        if theirs := found.get((kind, False)):
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
    costs = [component_cost(name, config, sizes_at(name, batch), arithmetic) for name in TIMED]
    vision, query, text = times = tuple(component_time(c, gpu, arithmetic, efficiency) for c in costs)
    image_c, image_g = vision.expected_ms, vision.expected_ms + query.expected_ms
    widest = max(layer.activation_bytes // layer.count for cost in costs for layer in cost.layers)
    memory = weight_bytes + 4 * widest
    per_million = None if price is None else price / 3600 * 1e3 / batch
    return Point(
        batch,
        image_c,
        image_g,
        text.expected_ms,
        1e3 * batch / image_c,
        1e3 * batch / image_g,
        1e3 * batch / text.expected_ms,
        None if per_million is None else per_million * image_c,
        None if per_million is None else per_million * image_g,
        memory,
        memory <= gpu.memory_gb * 1e9,
        times,
    )
