"""Time and memory of this process to load a bundle: seconds, and bytes by Linux.

    python -m ivl_export.benchmarks.runtime.held BUNDLE true

Prints JSON. ``true``, ``false`` or ``null``: whether weights are shared. Nothing that the runtime imports is
imported before its import is timed.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

HEAVY = ("torch", "transformers", "modelopt", "onnx", "onnxscript", "matplotlib")


def memory() -> dict[str, int]:
    """Bytes of this process: ``Pss`` (shared pages in parts) and ``Anonymous`` (of no file)."""
    sizes = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, size, *_ = line.split()
        sizes[name.removesuffix(":")] = 1024 * int(size)
    return {name: sizes[name] for name in ("Pss", "Anonymous")}


def look(bundle: str, share: bool | None) -> dict[str, Any]:
    """Seconds of import and of loading all components; bytes of their weights and of calls of all of them."""
    began = time.perf_counter()
    from ivl_export.runtime import InternVL

    imported = time.perf_counter()
    import onnxruntime  # noqa: F401 - its libraries are not weights, its time counts as loading

    ready = time.perf_counter()
    before = memory()
    started = time.perf_counter()
    model = InternVL.load(bundle, threads=1, share_weights=share)
    for name in model.bundle.manifest.components:
        model.components.open(name)
    loaded = time.perf_counter()
    opened = memory()

    import numpy as np

    pixels = np.zeros((1, 3, *2 * (model.image_settings.size,)), np.float32)
    model.encode_image(pixels, "InternVL-C")
    model.encode_image(pixels, "InternVL-G")
    model.encode_text(["a"])
    model.caption(pixels, max_new_tokens=2)
    ran = memory()
    calls = ran["Anonymous"] - opened["Anonymous"]
    return {
        "import_seconds": imported - began,
        "load_seconds": ready - imported + loaded - started,
        "calls": calls,
        "held": ran["Pss"] - before["Pss"] - calls,
        "heavy": [name for name in HEAVY if name in sys.modules],
    }


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1], json.loads(sys.argv[2]))))
