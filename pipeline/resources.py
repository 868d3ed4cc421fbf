"""Disk and memory that a build will take, checked before anything runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration.quantize import stored_tensors
from ..errors import BuildError
from ..export.weights import StoredTensor
from ..models.storage import ITEM_BYTES
from . import graphs

if TYPE_CHECKING:
    from .graphs import Source
    from .steps import Step

HEADROOM = 256 << 20
"""Disk for what is small: graphs, receipts, scales."""


def stored_bytes(source: Source, components: Iterable[str]) -> tuple[int, int]:
    """Bytes of the tensors that ``components`` read, each once: (kept in the base type, quantised)."""
    keys, layers = graphs.component_weights(source, list(components))
    tensors, base = source.checkpoint.tensors, source.recipe.base
    width = ITEM_BYTES[graphs.DTYPES[base]]
    kept = sum(tensors[key].nbytes // ITEM_BYTES[tensors[key].dtype] * width for key in keys)
    low: list[StoredTensor] = []
    for name in layers:
        shape = tensors[f"{name}.weight"].shape
        low += stored_tensors(name, source.plan.schemes[name], base, (shape[0], shape[1]))
    return kept, sum(tensor.nbytes for tensor in low)


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
