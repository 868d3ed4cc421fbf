"""A checkpoint's tensors in a weights store: as they are, or cast, a block of rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..dtypes import dtype_of
from ..errors import CheckpointError
from ..models.checkpoint import Checkpoint
from ..models.finite import FiniteCheck, NonFinite, not_finite
from .copying import in_threads
from .weight_store import StoredTensor, StoreWriter

if TYPE_CHECKING:
    import torch

BLOCK_VALUES = 1 << 22
"""Weights converted at a time, for tensors of every size."""


def stored_as(checkpoint: Checkpoint, keys: Iterable[str], dtype: str | None) -> list[StoredTensor]:
    """Tensors that :func:`write_store` writes for ``keys``, each once, in reading order.

    Raises:
        CheckpointError: no such tensor.
    """
    listed, refs = list(dict.fromkeys(keys)), checkpoint.tensors
    absent = [key for key in listed if key not in refs]
    if absent:
        raise CheckpointError(f"{checkpoint.path} lacks {len(absent)} tensors.", ", ".join(absent[:5]))
    listed.sort(key=lambda key: (refs[key].file, refs[key].offset or 0))  # from front to back
    stored = dtype_of(dtype).array if dtype else None
    return [StoredTensor(k, stored or refs[k].dtype, refs[k].shape) for k in listed]


def write_store(
    checkpoint: Checkpoint,
    keys: Iterable[str],
    path: Path,
    dtype: str | None,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Copy tensors of ``checkpoint`` to the store ``path``, a block of rows at a time.

    Args:
        checkpoint: where they come from.
        keys: published keys; a key given twice is stored once.
        path: the file to write, ``<graph folder>/weights/<name>.safetensors``.
        dtype: stored type: ``fp32``, ``bf16`` or ``fp16``; None: as they are.
        progress: callback with the bytes of the store written.

    Raises:
        CheckpointError: no such tensor; a value that is NaN or infinite, or too large for ``dtype``. Every
            byte is looked at on its way.
        BuildError: the file cannot be written.
    """
    import torch

    refs, layout = checkpoint.tensors, stored_as(checkpoint, keys, dtype)
    bytes_done, one_at_a_time = 0, threading.Lock()

    def advance(nbytes: int) -> None:
        nonlocal bytes_done
        with one_at_a_time:
            bytes_done += nbytes
            progress(bytes_done)

    def as_it_is(tensor: StoredTensor) -> bool:
        return tensor.dtype == refs[tensor.name].dtype and refs[tensor.name].offset is not None

    reports: list[NonFinite] = []

    def copy(name: str) -> None:
        if report := store.copy(name, refs[name], advance):
            reports.append(report)

    with StoreWriter(path, layout) as store:
        copied = [tensor.name for tensor in layout if as_it_is(tensor)]
        in_threads(copy, copied)
        for tensor in layout:
            if as_it_is(tensor):
                continue
            values, begin = checkpoint.load(tensor.name), 0
            target: torch.dtype = dtype_of(tensor.dtype).torch
            check = FiniteCheck(tensor.name, tensor.dtype, tensor.shape)
            for rows in _row_blocks(values):
                stored = rows.to(target).contiguous()
                check.look(stored.reshape(-1).view(torch.uint8).numpy().data, begin)
                store.write(tensor.name, stored)
                nbytes = stored.numel() * stored.element_size()
                begin += nbytes
                advance(nbytes)
            if report := check.result():
                if bool(torch.isfinite(values[report.index])):
                    raise _too_large(report, float(values[report.index]), tensor.dtype)
                reports.append(report)
        if reports:
            raise not_finite(str(checkpoint.path), reports)


def _too_large(report: NonFinite, value: float, dtype: str) -> CheckpointError:
    import torch

    return CheckpointError(
        f"{report.name} holds values too large for {dtype}.",
        f"{list(report.index)} is {value:.6g}, {dtype} ends at {torch.finfo(dtype_of(dtype).torch).max:.6g}.",
        "Use --precision bf16, or fp8 / int8, which build on bf16."
        if dtype == "float16"
        else "Check the checkpoint: no trained model has such weights.",
    )


def _row_blocks(values: torch.Tensor) -> Sequence[torch.Tensor]:
    """``values`` in blocks of whole rows; views, of about :data:`BLOCK_VALUES`."""
    if not values.dim() or values.numel() <= BLOCK_VALUES:
        return [values]
    step = max(1, BLOCK_VALUES * values.shape[0] // values.numel())
    return [values[i : i + step] for i in range(0, values.shape[0], step)]
