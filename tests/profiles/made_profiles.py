"""Profiles made up for tests: the cases given, on a machine that does not exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ivl_export.profiles.cost.flops import ComponentCost, LayerCost
from ivl_export.profiles.cost.table19 import Table19
from ivl_export.profiles.measure.cases import Case, EngineCalls, Floor, Kind
from ivl_export.profiles.measure.ceilings import Ceilings, CopySpeed, ProductSpeed
from ivl_export.profiles.measure.layer_profile import LayerProfile, LayerTime
from ivl_export.profiles.measure.machine import Gpu, Machine
from ivl_export.profiles.measure.receipt import Profile, Settings, Startup, Subject
from ivl_export.profiles.measure.sensors import Clocks
from ivl_export.profiles.measure.timing import Measurement, StopRule

CEILINGS = Ceilings(
    "CPU",
    (
        ProductSpeed("fp32", 100.0, 1024, "x"),
        ProductSpeed("int8", 400.0, 1024, "x"),
        ProductSpeed("bf16", 200.0, 1024, "y"),
    ),
    (CopySpeed(1 << 20, 100.0), CopySpeed(16 << 20, 50.0), CopySpeed(256 << 20, 20.0)),
)


def made_case(
    name: str = "vision",
    samples_ms: Sequence[float] = (1.0,) * 20,
    batch: int = 1,
    kind: Kind = "component",
    stable: bool = True,
    steady_from: int = 0,
    **sizes: int,
) -> Case:
    samples = tuple(round(ms * 1e6) for ms in samples_ms)
    result = Measurement(samples, (len(samples),), steady_from, "stable" if stable else "time limit", 1)
    all_sizes = {"batch": batch, **sizes}
    return Case(
        name, kind, batch, all_sizes, batch, "images", "from here to there", result, {}, "onnxruntime", "fp8",
        calls=(EngineCalls(name, all_sizes, 1),), floor=Floor(0.5, "compute", 0.5, 0.1),
    )  # fmt: skip


def made_cost(name: str = "vision", batch: int = 1, **sizes: int) -> ComponentCost:
    layers = tuple(
        LayerCost(f"vision_model.encoder.layers.*.{part}", "MatMul", 4, batch * macs, 4000, 100, "fp8")
        for part, macs in (("attn.qkv", 30_000_000), ("mlp.fc1", 40_000_000), ("mlp.fc2", 40_000_000))
    )
    return ComponentCost(name, "fp32", {"batch": batch, **sizes}, layers, 12_000, 1000 * batch, 1000 * batch)


def made_layers(component: str = "vision") -> LayerProfile:
    blocks = "vision_model.encoder.layers"
    layers = (
        LayerTime(f"{blocks}.0.mlp.fc1", "MatMul", 1.5),
        LayerTime(f"{blocks}.0.attn.qkv", "MatMul", 1.0),
        LayerTime(f"{blocks}.1.mlp.fc1", "MatMul", 0.5),
        *(
            LayerTime(f"{blocks}.0.{part}", "MatMul", 0.25)
            for part in ("mlp.fc2", "attn.proj", "norm1", "norm2")
        ),
    )
    return LayerProfile(component, "onnxruntime", {"batch": 1}, 10, 4.25, layers)


def made_profile(
    cases: Sequence[Case] = (),
    costs: Sequence[ComponentCost] = (),
    table: Table19 | None = None,
    gpus: tuple[Gpu, ...] = (),
    **changes: Any,
) -> Profile:
    values: dict[str, Any] = {
        "created": "2026-01-02T03:04:05+00:00",
        "subject": Subject("made-up", "0" * 64, "nano", 1000, "fp8", "bf16", 112),
        "settings": Settings("onnxruntime", None, 1, (1,), (), StopRule()),
        "machine": Machine("A CPU", (), "x86_64", 2, 1 << 30, "Linux", gpus, 0.5),
        "clocks": Clocks(2000.0, 2100.0, ()),
        "versions": {"python": "3.11.0"},
        "commit": None,
        "startup": Startup("from here to there", 12.0, {"vision": 0.1}, {"vision": 5.0}),
        "peak_memory_bytes": 1 << 28,
        "peak_device_bytes": None,
        "cases": tuple(cases),
        "costs": tuple(costs),
        "ceilings": CEILINGS,
        "table19": table,
        "notes": ("a note",),
    }
    return Profile(**values | changes)
