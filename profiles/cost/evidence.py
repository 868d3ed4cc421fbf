"""Measured times that estimates are checked against: the paper's table and this repository's receipts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...models.config import ChatConfig, InternVLConfig, VisionConfig
from ...models.registry import ModelConfig, component_of, component_spec
from ...quantization.recipe import load_recipe
from ..measure.ceilings import CPU
from ..measure.receipt import SCHEMA, Profile, read
from .flops import ComponentCost
from .gpus import GPUS, GpuPeaks, of_driver
from .roofline import Arithmetic, Efficiency, component_cost, component_time
from .sizes import plan_of
from .table19 import BATCH, PAPER, TEXT_TOKENS

TIMED = ("vision", "qllama_query", "qllama_text")
_PAPER_GPU = "a100"


@dataclass(frozen=True)
class Timed:
    """A measured time: ``ms`` a call; ``cost`` and ``arithmetic`` of the timed call, on ``gpu``.

    ``published``: the peaks of ``gpu`` are its vendor's; else they are the machine's measured ceilings.
    """

    name: str
    gpu: GpuPeaks
    cost: ComponentCost
    arithmetic: Arithmetic
    ms: float
    receipt: bool
    published: bool = True

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
    """A prediction and its measurement; ``error`` is (predicted - measured) / measured."""

    name: str
    gpu: str
    measured_ms: float
    predicted_ms: float
    error: float
    receipt: bool
    published: bool


def check(timed: Timed, efficiency: Efficiency) -> Check:
    """The estimate's prediction of a measured time."""
    predicted = component_time(timed.cost, timed.gpu, timed.arithmetic, efficiency).expected_ms
    error = (predicted - timed.ms) / timed.ms
    return Check(timed.name, timed.gpu.title, timed.ms, predicted, error, timed.receipt, timed.published)


@cache
def arithmetic_of(precision: str) -> Arithmetic:
    """That of a shipped precision at the published sizes, of InternVL and of both forms of InternVL-Chat."""
    recipe = load_recipe(precision)
    whole: tuple[ModelConfig, ...] = (InternVLConfig(), ChatConfig(), ChatConfig(InternVLConfig()))
    arithmetics = [Arithmetic.of(recipe, plan_of(recipe, config)) for config in whole]
    return Arithmetic(recipe.base, {layer: types for one in arithmetics for layer, types in one.low.items()})


def paper() -> list[Timed]:
    """The paper's Table 19 as measurements of bf16 at batch 128 on one A100."""
    times: dict[str, Timed] = {}
    arithmetic = arithmetic_of("bf16")
    for row in PAPER:
        config = InternVLConfig(vision=VisionConfig(image_size=row.image_size))
        parts = zip(TIMED, (row.vit_ms, row.qllama_image_ms, row.qllama_text_ms), strict=True)
        for component, ms in parts:
            if ms is None:
                continue
            size = "" if component_of(component, config).unit == "texts" else f" at {row.image_size}"
            name = f"Table 19: {component}{size}"
            cost = component_cost(component, config, sizes_at(component, BATCH), arithmetic)
            times[name] = Timed(name, GPUS[_PAPER_GPU], cost, arithmetic, ms * BATCH, False)
    return list(times.values())


def read_receipts(folder: Path) -> list[Timed]:
    """The components with products that profile receipts in ``folder`` timed; other receipts are passed over.

    On a GPU of the table they are held to its published peaks, elsewhere to the ceilings measured with them.

    Raises:
        InputError: a receipt is damaged.
    """
    times = []
    for path in sorted(folder.glob("*.json")):
        if json.loads(path.read_text(encoding="utf-8")).get("schema") != SCHEMA:
            continue
        profile = read(path)
        published = None if profile.settings.on_cpu else _gpu(profile)
        peaks = published or _measured(profile)
        arithmetic = arithmetic_of(profile.subject.recipe)
        for case in profile.of_kind("component"):
            cost = profile.cost(case)
            if peaks is not None and cost is not None and cost.layers:
                name = f"{path.stem}: {case.name} at batch {case.batch}"
                new, past = case.sizes.get("text"), case.sizes.get("past")
                name += "" if new is None else f", {new} tokens" if past is None else f", {new} after {past}"
                ms = case.measurement.summary.p50_ms
                times.append(Timed(name, peaks, cost, arithmetic, ms, True, published is not None))
    return times


def sizes_at(component: str, batch: int) -> dict[str, int]:
    """The axes of a component of InternVL as the paper's table has them."""
    axes = {axis.name for axis in component_spec(component, InternVLConfig()).axes}
    return {"batch": batch, **({"text": TEXT_TOKENS} if "text" in axes else {})}


def _gpu(profile: Profile) -> GpuPeaks | None:
    return next((gpu for one in profile.machine.gpus if (gpu := of_driver(one.name))), None)


def _measured(profile: Profile) -> GpuPeaks | None:
    """The measured ceilings in the place of published peaks; None where they are missing."""
    ceilings = profile.ceilings
    if ceilings is None:
        return None

    def tflops(kind: str) -> float | None:
        gflops = ceilings.gflops(profile.settings.backend, kind)
        return None if gflops is None else gflops / 1e3

    bandwidth = ceilings.gbps(sum(cost.weight_bytes for cost in profile.costs[:1]))
    if bandwidth is None or tflops("bf16") is None:
        return None
    where = profile.machine.cpu if ceilings.device == CPU else ceilings.device
    wide = tflops("fp16"), tflops("bf16")
    return GpuPeaks("here", f"{where}, its ceilings", "-", *wide, tflops("fp8"), tflops("int8"), bandwidth,
                    0.0, 0, "", "measured")  # fmt: skip
