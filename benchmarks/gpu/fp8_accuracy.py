"""FP8 and bf16 on this GPU's tensor cores against fp32: cosine of every output of every component.

The fp32 reference runs on the same GPU with TF32 off, from the same weights: the shipped nano's, or drawn
ones of the published size. FP8 products are taken in every way the torch backend has, with and without
the tensor cores' shorter sums.

    python -m ivl_export.benchmarks.gpu.fp8_accuracy --out fp8_accuracy.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ivl_export.benchmarks.gpu.shared import (
    TINY,
    Budget,
    Inputs,
    Receipt,
    arguments,
    cosine,
    random_component,
    random_inputs,
    release,
    to_fp8,
)
from ivl_export.engines.torch.linears import Product
from ivl_export.models.checkpoint import load_state, open_checkpoint
from ivl_export.models.config import InternVLConfig
from ivl_export.models.registry import component_module, component_spec

NANO = Path(__file__).parents[2] / "models" / "nano"
COMPONENTS = ("vision", "qllama_query", "qllama_text")
WAYS: dict[str, tuple[Product, bool] | None] = {
    "bf16": None,
    "fp8 rowwise": ("rowwise", True),
    "fp8 tensorwise": ("tensorwise", True),
    "fp8 rowwise, full sums": ("rowwise", False),
    "fp8 restored": ("restored", False),
}
LEAST = {"bf16": 0.999, "fp8": 0.995}
CASE_SECONDS = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=("both", "nano", "full"), default="both")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    budget, receipt = Budget(args.limit), Receipt("FP8 accuracy", args.out)
    models = ("tiny",) if args.tiny else ("nano", "full") if args.model == "both" else (args.model,)
    for model in models:
        for component in COMPONENTS:
            if args.tiny or budget.left(CASE_SECONDS):
                try:
                    _compare(receipt, model, component, args.device, args.batch)
                except torch.OutOfMemoryError as error:
                    receipt.add(model=model, component=component, note=str(error).split("\n", 1)[0])
            else:
                receipt.add(model=model, component=component, note="left out: out of time")
            release()
    for kind, least in LEAST.items():
        rows = [
            row["cosine"] for row in receipt.rows if row.get("way", "").startswith(kind) and "cosine" in row
        ]
        receipt.goal(f"{kind}: every cosine to fp32 at least {least}", min(rows) >= least if rows else None)
    return 0


def _compare(receipt: Receipt, model: str, component: str, device: str, batch: int) -> None:
    config = _config(model)
    outputs = [t.name for t in component_spec(component, config).outputs if "." not in t.name]
    inputs = random_inputs(component, config, batch, device, torch.float32)
    want: list[Tensor] | None = None
    for way in ("fp32", *WAYS):
        module = _module(model, component, config, device, torch.float32 if way == "fp32" else torch.bfloat16)
        try:
            feeds: Inputs = tuple(
                t.bfloat16() if way != "fp32" and t.is_floating_point() else t for t in inputs
            )
            chosen = WAYS.get(way)
            if chosen is not None:
                to_fp8(module, feeds, *chosen)
            with torch.no_grad():
                got = [t.cpu() for t in module(*feeds)[: len(outputs)]]
        except RuntimeError as error:  # a kernel that this GPU lacks
            receipt.add(model=model, component=component, way=way, note=str(error).split("\n", 1)[0][:200])
            continue
        if want is None:
            want = got
        else:
            for name, ours, theirs in zip(outputs, got, want, strict=True):
                receipt.add(
                    model=model, component=component, way=way, output=name, cosine=cosine(ours, theirs)
                )
        del module
        release()


def _config(model: str) -> InternVLConfig:
    return {"tiny": TINY, "full": InternVLConfig()}.get(model) or InternVLConfig.load(NANO / "config.json")


def _module(model: str, component: str, config: InternVLConfig, device: str, dtype: torch.dtype) -> nn.Module:
    """Always the same weights, which bf16 holds exactly."""
    if model != "nano":
        return random_component(component, config, device, torch.bfloat16).to(dtype)
    with torch.device("meta"):
        module = component_module(component, config)
    load_state(module, open_checkpoint(NANO), torch.bfloat16, device)
    return module.to(dtype).eval().requires_grad_(False)


if __name__ == "__main__":
    sys.exit(main())
