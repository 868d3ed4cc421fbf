"""Disk and memory that a build will take, checked before anything runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..engines.memory import Load
from ..errors import BuildError
from ..models.storage import ITEM_BYTES
from ..quantization.quantize import stored_tensors
from . import graphs

if TYPE_CHECKING:
    from .graphs import Source
    from .step import Step

HEADROOM = 256 << 20
"""Disk for what is small: graphs, receipts, scales."""
_JOINED = re.compile(r"(self_attn\.[qkv]|cross_attn\.[kv]|mlp\.gate|mlp\.up)_proj\.weight")
"""Layers that share their input: a builder joins their weights."""


def stored_bytes(source: Source, components: Iterable[str]) -> tuple[int, int]:
    """Bytes of the tensors that ``components`` read, each once: (kept in the base type, quantised)."""
    kept, low = _stored(source, components)
    return sum(kept.values()), sum(low.values())


def _stored(source: Source, components: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each tensor of ``components``: (kept in the base type, quantised), under its published key."""
    keys, layers = graphs.component_weights(source, list(components))
    tensors, base = source.checkpoint.tensors, source.recipe.base
    width = ITEM_BYTES[graphs.DTYPES[base]]
    kept = {key: tensors[key].nbytes // ITEM_BYTES[tensors[key].dtype] * width for key in keys}
    low = {}
    for name in layers:
        rows, columns = tensors[f"{name}.weight"].shape
        parts = stored_tensors(name, source.plan.schemes[name], base, (rows, columns))
        low[f"{name}.weight"] = sum(part.nbytes for part in parts)
    return kept, low


def build_load(source: Source, component: str) -> Load:
    """What :func:`..engines.memory.graph_load` will find in the graph of ``component``."""
    kept, low = _stored(source, [component])
    held = {**kept, **low}
    return Load.of({key: size * (2 if _JOINED.search(key) else 1) for key, size in held.items()})


def check_disk(out: Path, to_run: Sequence[Step]) -> None:
    """BuildError unless the disk of ``out`` holds what the steps ``to_run`` write, all together."""
    needed = sum(step.writes for step in to_run) + HEADROOM
    folder = next(p for p in out.absolute().parents if p.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        largest = sorted((step for step in to_run if step.writes), key=lambda step: -step.writes)[:3]
        raise BuildError(
            "There is not enough disk space for this build.",
            f"It will write {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. Most goes to "
            + ", ".join(f"{step.name} ({step.writes / 1e9:.1f} GB)" for step in largest)
            + ".",
            "Free some, choose another --out, or build fewer --components or --targets.",
        )
