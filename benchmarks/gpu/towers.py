"""The towers at their true size on this GPU: time, arithmetic rate, share of the matmul peak, memory.

Weights are drawn: times do not depend on them. Three ways to run: bf16 eager, bf16 compiled, FP8 compiled
(the torch backend's layers, by the shipped recipe). The peak is that of plain large products of the same type
in the same call. Table 19 of the paper (an A100) has a separate column; no ratio is formed with it.

    python -m ivl_export.benchmarks.gpu.towers --out towers.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ivl_export.benchmarks.gpu.shared import (
    TEXT_TOKENS,
    TINY,
    Budget,
    Receipt,
    arguments,
    matmul_peak,
    median_ms,
    memory,
    random_component,
    random_inputs,
    release,
    to_fp8,
)
from ivl_export.engines.torch.module import compile_blocks
from ivl_export.models.config import InternVLConfig
from ivl_export.models.registry import component_of
from ivl_export.profiles.cost.roofline import component_macs
from ivl_export.profiles.cost.table19 import PAPER, SOURCE

WAYS = ("bf16", "bf16 compiled", "fp8 rowwise", "fp8 tensorwise")
SIZES = (224, 336, 448)
BATCHES = (1, 8, 128)
CALIBRATED_ON = 2
CASE_SECONDS = 20.0
"""Time that a case needs before the limit, or it is left out."""
TOWER = "vision"


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=_numbers, default=BATCHES)
    parser.add_argument("--sizes", type=_numbers, default=SIZES)
    args = parser.parse_args(argv)
    budget, receipt = Budget(args.limit), Receipt("Towers", args.out)
    # The goals are about 224 pixels and the largest batch: these cases come first, so that a limit cuts off
    # the others.
    sizes = (TINY.vision.image_size,) if args.tiny else args.sizes
    base = TINY if args.tiny else InternVLConfig()
    peaks = {kind: _peak(receipt, kind, args) for kind in ("bf16", "fp8")}
    for size in sizes:
        config = replace(base, vision=replace(base.vision, image_size=size))
        for component in ("vision", "qllama_query", "qllama_text"):
            if component_of(component, config).unit == "texts" and size != sizes[0]:
                continue  # texts know nothing of the image's size
            for way in WAYS:
                if not budget.left(CASE_SECONDS if not args.tiny else 0):
                    receipt.add(case=component, size=size, way=way, note="left out: out of time")
                    continue
                _run(receipt, budget, peaks, component, config, way, args)
                release()
    _goals(receipt, sizes[0], max(args.batches))
    print(f"Table 19: {SOURCE}")
    return 0


def _peak(receipt: Receipt, kind: str, args: Any) -> float | None:
    try:
        peak = matmul_peak(kind, args.device, args.tiny)
    except RuntimeError as error:  # a GPU without FP8
        receipt.add(case="matmul peak", type=kind, note=_first_line(error))
        return None
    receipt.add(case="matmul peak", type=kind, tflops=peak / 1e12)
    return peak


def _run(
    receipt: Receipt,
    budget: Budget,
    peaks: dict[str, float | None],
    component: str,
    config: InternVLConfig,
    way: str,
    args: Any,
) -> None:
    kind, size, dtype = way.split()[0], config.vision.image_size, torch.bfloat16
    try:
        module = random_component(component, config, args.device, dtype)
        if kind == "fp8":
            product: Any = way.split()[1]
            to_fp8(module, random_inputs(component, config, CALIBRATED_ON, args.device, dtype), product)
        compiled = way != "bf16" and not args.tiny  # which takes a minute on a CPU
        if compiled:
            compile_blocks(module, dynamic=False)
        for batch in sorted(args.batches, reverse=True):
            if not budget.left():
                break
            inputs = random_inputs(component, config, batch, args.device, dtype)
            with torch.no_grad(), memory(args.device) as used:
                ms = median_ms(partial(module, *inputs), args.device, 0.05 if args.tiny else 1.0)
            macs = component_macs(component, config, {"batch": batch, "text": TEXT_TOKENS})
            rate, peak = 2 * sum(macs.values()) / ms * 1e3, peaks[kind]
            receipt.add(
                case=component, size=size, way=way, batch=batch, ms_per_item=ms / batch, tflops=rate / 1e12,
                share_of_peak=rate / peak if peak else None, memory_gb=used["peak"] / 1e9 if used else None,
                table19_ms=_paper(component, size), compiled=compiled,
            )  # fmt: skip
    except (torch.OutOfMemoryError, RuntimeError) as error:  # a type or kernel this GPU or torch lacks
        receipt.add(case=component, size=size, way=way, note=_first_line(error))


def _paper(component: str, size: int) -> float | None:
    """Milliseconds a pair in the paper's table."""
    row = next((r for r in PAPER if r.method == "InternVL-G" and r.image_size == size), None)
    if row is None:
        return None
    return {"vision": row.vit_ms, "qllama_query": row.qllama_image_ms}.get(component, row.qllama_text_ms)


def _goals(receipt: Receipt, size: int, batch: int) -> None:
    def of(kind: str, key: str) -> float | None:
        rates = [
            row[key]
            for row in receipt.rows
            if (row["case"], row.get("size"), row.get("batch")) == (TOWER, size, batch)
            and row.get(key) is not None
            and row["way"].startswith(kind)
            and row["way"] != "bf16"
        ]
        return None if not rates else max(rates) if key == "share_of_peak" else min(rates)

    where = f"InternViT, {size} pixels, batch {batch}"
    for kind, least in (("bf16", 0.70), ("fp8", 0.60)):
        share = of(kind, "share_of_peak")
        what = f"{where}: {kind} compiled at least {least:.0%} of the matmul peak"
        receipt.goal(what, None if share is None else share >= least)
    bf16, fp8 = of("bf16", "ms_per_item"), of("fp8", "ms_per_item")
    faster = None if bf16 is None or fp8 is None else bf16 / fp8 >= 1.5
    receipt.goal(f"{where}: fp8 at least 1.5 times as fast as bf16", faster)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
