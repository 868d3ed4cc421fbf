"""Latency, throughput, memory and cost on a GPU that is not here, from the roofline.

Efficiencies come from receipts of this repository that timed the same type on a GPU of the table. Where there
is none, the 16-bit products' is the paper's own (Table 19), and the rest are assumptions. Each figure says
which it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ..calibration.recipe import Plan, Recipe
from ..models.config import InternVLConfig, VisionConfig
from .flops import ComponentCost, LayerCost
from .gpus import GPUS, GpuPeaks, of_driver
from .roofline import LOW, Arithmetic, ComponentTime, Efficiency, component_cost, component_time, peak
from .sizes import weights
from .table19 import PAPER, SOURCE, TEXT_TOKENS

SCHEMA = "ivl-export.estimate/1"
RECEIPTS = Path(__file__).parent / "receipts"
LOW_ASSUMED = 0.5
"""Share of the peak of FP8 and INT8 products: the glue between them does not shrink as they do."""
MEMORY_ASSUMED = 0.8
WIDE_ASSUMED = 0.6
TIMED = ("vision", "qllama_query", "qllama_text")
_PAPER_GPU = "a100"


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
class Timed:
    """A measured time: ``ms`` a call; ``cost`` and ``arithmetic`` of what was timed, on ``gpu``."""

    name: str
    gpu: GpuPeaks
    cost: ComponentCost
    arithmetic: Arithmetic
    ms: float
    receipt: bool

    @property
    def share(self) -> float:
        """The share of the peak that was reached: of arithmetic or of memory, whichever decides the floor."""
        ideal = Efficiency(1.0, 1.0, 1.0)
        return component_time(self.cost, self.gpu, self.arithmetic, ideal).floor_ms / self.ms

    @property
    def compute_bound(self) -> bool:
        """Whether arithmetic decides the floor."""
        floor = component_time(self.cost, self.gpu, self.arithmetic, Efficiency(1.0, 1.0, 1.0)).floor_ms
        return floor > 1e3 * self.cost.bytes / (1e9 * self.gpu.memory_gbps) * (1 + 1e-9)


@dataclass(frozen=True)
class Check:
    """A prediction beside its measurement; ``error`` is (predicted - measured) / measured."""

    name: str
    gpu: str
    measured_ms: float
    predicted_ms: float
    error: float
    receipt: bool


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
    layers: Plan,
    gpu: GpuPeaks,
    batches: Sequence[int],
    arithmetic_of: Callable[[str], Arithmetic],
    cost_per_hour: float | None = None,
    receipts: Path = RECEIPTS,
) -> Estimate:
    """Predict a model of ``config`` in a precision on ``gpu``.

    Args:
        config: the model's sizes.
        recipe, layers: the precision and what it means for this model.
        gpu: a row of the table.
        batches: images (texts) of one call.
        arithmetic_of: the arithmetic of a shipped precision, for what receipts timed.
        cost_per_hour: the GPU's price.
        receipts: folder of profile receipts.

    Raises:
        CapabilityError: the GPU has no peak for a type of this precision.
    """
    arithmetic = Arithmetic.of(recipe, layers)
    notes = tuple(note for kind in arithmetic.products if (note := peak(gpu, kind)[1]))
    timed = (*read_receipts(receipts, arithmetic_of), *paper(arithmetic_of("bf16")))
    found = efficiencies(timed)
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
            "Peaks are the vendor's, dense; the GPU holds its clocks.",
            "Engines of vision, qllama_query and qllama_text are loaded together, each with its own weights.",
            "Memory: these weights, and four times the widest layer's activations; no CUDA context.",
            "A call has no launch gaps; preprocessing and copies from the host are not in it.",
            "The A100 of the paper's Table 19 is taken to be the SXM 80 GB.",
            *notes,
        ),
        tuple(check(one, found.values) for one in timed),
    )


def efficiencies(timed: Iterable[Timed]) -> Efficiencies:
    """Shares of the peaks from what was timed, receipts before the paper; assumptions for the rest."""
    found: dict[tuple[str, bool], list[float]] = {}
    for one in timed:
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


def check(timed: Timed, efficiency: Efficiency) -> Check:
    """What the estimate would have said of something that was measured."""
    predicted = component_time(timed.cost, timed.gpu, timed.arithmetic, efficiency).expected_ms
    error = (predicted - timed.ms) / timed.ms
    return Check(timed.name, timed.gpu.title, timed.ms, predicted, error, timed.receipt)


def paper(arithmetic: Arithmetic) -> list[Timed]:
    """The paper's Table 19 as measurements of bf16 at batch 128 on one A100."""
    batch = 128
    found: dict[str, Timed] = {}
    for row in PAPER:
        config = InternVLConfig(vision=VisionConfig(image_size=row.image_size))
        parts = zip(TIMED, (row.vit_ms, row.qllama_image_ms, row.qllama_text_ms), strict=True)
        for component, ms in parts:
            if ms is None:
                continue
            size = "" if component == "qllama_text" else f" at {row.image_size}"
            name = f"Table 19: {component}{size}"
            cost = component_cost(component, config, _sizes(component, batch), arithmetic)
            found[name] = Timed(name, GPUS[_PAPER_GPU], cost, arithmetic, ms * batch, False)
    return list(found.values())


def read_receipts(folder: Path, arithmetic_of: Callable[[str], Arithmetic]) -> list[Timed]:
    """Components that profile receipts in ``folder`` timed on a GPU of the table; others are passed over."""
    from .report import SCHEMA as PROFILE

    found = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != PROFILE or data["settings"]["backend"] == "onnxruntime":
            continue  # ONNX Runtime timed the CPU, whatever GPU the machine has
        gpu = next((g for one in data["machine"]["gpus"] if (g := of_driver(one["name"]))), None)
        if gpu is None:
            continue
        arithmetic = arithmetic_of(data["bundle"]["precision"])
        costs = {(c["component"], *sorted(c["sizes"].items())): c for c in data["costs"]}
        for case in data["cases"]:
            cost = costs.get((case["name"], *sorted(case["sizes"].items())))
            if case["kind"] == "component" and cost is not None:
                name = f"{path.stem}: {case['name']} at batch {case['batch']}"
                ms = case["measurement"]["summary"]["p50_ms"]
                found.append(Timed(name, gpu, _cost(cost), arithmetic, ms, True))
    return found


def _sizes(component: str, batch: int) -> dict[str, int]:
    return {"batch": batch, **({"text": TEXT_TOKENS} if component == "qllama_text" else {})}


def _cost(data: dict[str, Any]) -> ComponentCost:
    layers = tuple(LayerCost(**layer) for layer in data["layers"])
    names = ("component", "dtype", "sizes", "weight_bytes", "input_bytes", "output_bytes")
    return ComponentCost(layers=layers, **{name: data[name] for name in names})


def _point(
    config: InternVLConfig,
    arithmetic: Arithmetic,
    gpu: GpuPeaks,
    batch: int,
    efficiency: Efficiency,
    weight_bytes: int,
    price: float | None,
) -> Point:
    costs = [component_cost(name, config, _sizes(name, batch), arithmetic) for name in TIMED]
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
