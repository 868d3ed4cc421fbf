"""Does a TensorRT-RTX engine load and run on this GPU, and is it right?

TensorRT-RTX is made for RTX GPUs; its documentation does not list Hopper. Each engine of the bundle is
opened, run on drawn inputs and compared with the bundle's own weights in torch on the same GPU (fp32,
products of 8-bit values). What fails is a row with the reason.

    python -m ivl_export.benchmarks.gpu.rtx_on_h200 BUNDLE --out rtx_on_h200.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ivl_export.benchmarks.gpu.shared import Budget, Receipt, arguments, cosine
from ivl_export.bundle import Bundle
from ivl_export.errors import IvlError
from ivl_export.profiles.measure.inputs import random_inputs
from ivl_export.runtime.components import Components

BATCH = 2
LEAST = 0.995


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("bundle", type=Path, help="a bundle's folder")
    parser.add_argument("--backend", default="tensorrt-rtx")
    parser.add_argument("--target", help="which engines (sm89); the first if not given")
    args = parser.parse_args(argv)
    receipt, budget = Receipt(f"{args.backend} engines here", args.out), Budget(args.limit)
    bundle = Bundle.open(args.bundle, "hash")
    if torch.cuda.is_available():
        receipt.add(gpu=torch.cuda.get_device_name(), capability=str(torch.cuda.get_device_capability()))
    options = {"any_gpu": True} if args.backend.startswith("tensorrt") else {}  # that is the question
    engines = Components(bundle, args.backend, args.target, **options)
    torch_engines = Components(bundle, "torch", device=args.device, dtype="fp32")
    vocabulary = int(bundle.manifest.model.config.get("qllama_config", {}).get("vocab_size", 100))
    for component in bundle.manifest.components:
        if budget.left(10):
            _compare(receipt, component, engines, torch_engines, vocabulary)
    cosines = [row["cosine"] for row in receipt.rows if "cosine" in row]
    ran = {row["component"] for row in receipt.rows if "cosine" in row}
    receipt.goal(
        f"all {len(bundle.manifest.components)} engines load and run",
        len(ran) == len(bundle.manifest.components),
    )
    receipt.goal(f"every cosine at least {LEAST}", min(cosines) >= LEAST if cosines else None)
    return 0


def _compare(
    receipt: Receipt, component: str, engines: Components, torch_engines: Components, vocabulary: int
) -> None:
    try:
        engines.open(component)
        spec = engines.spec(component)
    except IvlError as error:
        receipt.add(component=component, ran=False, what=error.what, why=error.why)
        return
    sizes = {axis.name: max(axis.opt, axis.min, 1) for axis in spec.axes} | {"batch": BATCH}
    if "total" in sizes:
        sizes["total"] = sizes["past"] + sizes["text"]
    inputs = random_inputs(spec, sizes, vocabulary)
    try:
        got = engines.run(component, inputs)
    except IvlError as error:
        receipt.add(component=component, ran=False, what=error.what, why=error.why)
        return
    want = torch_engines.run(component, inputs)
    for name in want:
        if "." not in name:
            finite = bool(np.isfinite(got[name]).all())
            value = cosine(torch.from_numpy(got[name]), torch.from_numpy(want[name])) if finite else 0.0
            receipt.add(component=component, ran=True, output=name, finite=finite, cosine=value)


if __name__ == "__main__":
    sys.exit(main())
