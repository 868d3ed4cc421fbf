"""Encoding in every precision on this CPU: fp32, INT8 and FP8 bundles, and PyTorch in bf16.

INT8 products have kernels here. FP8 products have none: ONNX Runtime runs them in fp32 on values that it
rounds to FP8 and back, so that FP8 on a CPU is fp32 and the rounding. bf16 is PyTorch's fastest type here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np

from ivl_export.benchmarks.runtime.measured import Candidate, Comparison, Goal, side_by_side
from ivl_export.benchmarks.runtime.models import PRECISIONS, Setting
from ivl_export.benchmarks.runtime.pytorch import BATCHES, calls
from ivl_export.models.load import load_model
from ivl_export.profiles.measure.baseline import torch_threads
from ivl_export.runtime import InternVL


def measure(setting: Setting) -> Iterator[Comparison]:
    """InternVL-C, InternVL-G and text at batch 1 and 8."""
    import torch

    with torch_threads(setting.threads), torch.inference_mode():
        for name in setting.models:
            with ExitStack() as opened:
                models = {
                    p: opened.enter_context(InternVL.load(setting.bundle(name, p), threads=setting.threads))
                    for p in PRECISIONS
                }
                bf16 = load_model(setting.checkpoint(name), torch.bfloat16)
                for batch in BATCHES:
                    ways = {p: list(calls(model, bf16, batch)) for p, model in models.items()}
                    for k, (case, *_) in enumerate(ways["fp32"]):
                        encodes = {f"runtime {p}": way[k][1] for p, way in ways.items()}
                        encodes["torch bf16"] = ways["fp32"][k][2]
                        reference = encodes["runtime fp32"]()
                        cosines = {n: cosine(call(), reference) for n, call in encodes.items()}
                        candidates = [
                            Candidate(n, call, n.rpartition(" ")[2], batch) for n, call in encodes.items()
                        ]
                        goals = [
                            Goal(n, "runtime fp32", "speed", 1.0) for n in ("runtime int8", "runtime fp8")
                        ]
                        goals.append(Goal("runtime int8", "torch bf16", "speed", 1.0))
                        yield Comparison(
                            f"{name}, {case}, batch {batch}",
                            side_by_side(candidates, setting.rounds),
                            tuple(goals),
                            {"cosine": cosines},
                        )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The smallest cosine of two rows."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / norms).min())
