"""Plain ONNX graphs of a checkpoint's components, not quantised, with a copy of the weights or without."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BuildError, CapabilityError, UsageError
from ..files.locks import locked
from ..models.checkpoint import Checkpoint
from ..models.finite import check_finite
from ..models.registry import component_module
from ..progress import SILENT, Progress
from .binding import bind, save_graph
from .cached_attention import separate_past
from .concurrent import Check, concurrent
from .trace import export_component
from .weight_store import Store, cannot_write, plan_store
from .weights import stored_as, write_store

if TYPE_CHECKING:
    import onnx_ir as ir

DTYPES = ("bf16", "fp32")
MEGABYTE = 10**6
STORE = Path("weights") / "weights.safetensors"
GRAPH_BYTES = 64 << 20
"""Room for the graphs themselves; the largest takes a few MB."""


@dataclass(frozen=True)
class Exported:
    """The files written.

    Args:
        graphs: component to its graph.
        store: the weights store; None with zero copy.
        bytes_written: size of the new files.
        bytes_referred: size of the tensors that the graphs use, each counted once.
    """

    graphs: dict[str, Path]
    store: Path | None
    bytes_written: int
    bytes_referred: int


def export_plain(
    checkpoint: Checkpoint,
    out: Path,
    components: Sequence[str] = (),
    dtype: str = "bf16",
    zero_copy: bool = False,
    progress: Progress = SILENT,
) -> Exported:
    """Write ``<component>.<dtype>.onnx`` into ``out`` for each of ``components`` (none given: all).

    Copies are in one store below ``out``, each tensor once and aligned; ``out`` appears whole or not at all.
    fp32 graphs of a 16-bit checkpoint keep its 16-bit weights before Casts, which engines fold when they
    load: half the disk, equal values. With ``zero_copy`` the graphs refer to the checkpoint's own files.

    Args:
        checkpoint: the weights. Torch files (``.bin``, ``.pth``) can only be copied.
        out: a new folder; with ``zero_copy`` the one that holds the shards, or one above it.
        components: names of ``checkpoint.components``.
        dtype: compute type of the graphs, ``bf16`` or ``fp32``.
        zero_copy: write no weights.
        progress: receives the components, and ``weights`` in MB, which are copied meanwhile.

    Raises:
        UsageError: unknown dtype or component; ``out`` is there already, or does not hold the shards.
        CapabilityError: the checkpoint lacks a component; zero copy of files that runtimes would refuse.
        CheckpointError: a weight is NaN or infinite; all bytes that the graphs use are read.
        BuildError: the disk is too small, or a file cannot be written.
    """
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {dtype!r}.", f"Known: {', '.join(DTYPES)}.", "Give --dtype bf16.")
    names = list(dict.fromkeys(components)) or list(checkpoint.components)
    keys = weight_keys(checkpoint, names)
    used = sum(checkpoint.tensors[key].nbytes for key in keys)
    tell = ExportSteps(progress)
    if zero_copy:
        check_linkable(checkpoint, keys, out)
        tell("weights", 0, used)
        check_finite(checkpoint, keys, lambda count: tell("weights", count, used))
        models = _bound(checkpoint, checkpoint.tensors, names, dtype, out, tell)
        graphs = _saved(models, dtype, out)
        return Exported(graphs, None, _sizes(graphs.values()), used)

    stored = None if dtype == "fp32" else dtype
    layout = stored_as(checkpoint, keys, stored)
    total = sum(t.nbytes for t in layout)
    with _staged(out) as staging:
        check_space(staging, total + GRAPH_BYTES)
        store = staging / STORE

        def copy(go_on: Check) -> None:
            def advance(copied: int) -> None:
                go_on()
                tell("weights", copied, total)

            write_store(checkpoint, keys, store, stored, advance)

        tell("weights", 0, total)
        with concurrent(copy) as sound:  # copying is the system's work, tracing Python's
            models = _bound(checkpoint, plan_store(store, layout).refs, names, dtype, staging, tell, sound)
        _saved(models, dtype, staging)
    graphs = {name: out / f"{name}.{dtype}.onnx" for name in names}
    return Exported(graphs, out / STORE, _sizes([out / STORE, *graphs.values()]), used)


def weight_keys(checkpoint: Checkpoint, components: Sequence[str]) -> list[str]:
    """Published keys of the tensors that ``components`` read, each once.

    Raises:
        UsageError, CapabilityError: no such component, or not in this checkpoint.
    """
    import torch

    keys: dict[str, None] = {}
    for name in components:
        with torch.device("meta"):
            module = component_module(name, checkpoint.model)
        keys.update(dict.fromkeys(module.state_dict()))
    return list(keys)


def check_linkable(checkpoint: Checkpoint, keys: Sequence[str], out: Path) -> None:
    """Refuse graphs in ``out`` that refer to the checkpoint's files where runtimes would not follow.

    Raises:
        CapabilityError: the files are torch archives, or have a second name.
        UsageError: ``out`` is not a folder at or above all of them.
    """
    copy = "Leave --zero-copy out: the weights are then copied, a block at a time."
    for file in sorted({checkpoint.tensors[key].file for key in keys}):
        if file.suffix != ".safetensors":
            raise CapabilityError(
                f"{file.name} cannot be used without a copy.",
                "It is a torch archive, which does not say at which byte a tensor begins.",
                copy,
            )
        real = file.resolve()
        if not real.is_relative_to(out.resolve()):
            linked = f"{file} is a link to {real}. " if file.is_symlink() else ""
            raise UsageError(
                f"Graphs in {out} cannot refer to {real}.",
                f"{linked}Runtimes refuse external data outside the folder of the graph.",
                copy if file.is_symlink() else f"Give --out {file.parent}, or leave --zero-copy out.",
            )
        if real.stat().st_nlink > 1:
            raise CapabilityError(
                f"{real} cannot be used without a copy.",
                "The file has a second name (a hard link); onnx refuses such external data.",
                copy,
            )


def check_space(folder: Path, needed: int) -> None:
    """BuildError unless the disk of ``folder`` has ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            "There is not enough disk space for the weights.",
            f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.",
            "Free some, choose another --out, or give --zero-copy, which copies no weights.",
        )


def _bound(
    checkpoint: Checkpoint,
    store: Store,
    names: Sequence[str],
    dtype: str,
    folder: Path,
    tell: ExportSteps,
    sound: Check = lambda: None,
) -> dict[str, ir.Model]:
    """Graphs of ``names`` that refer to ``store``; they are checked and saved once it is there."""
    models = {}
    for name in names:
        sound()
        tell(name, 0, 1)
        models[name] = export_component(name, checkpoint, dtype)
        if dtype == "fp32":
            separate_past(models[name])
        bind(models[name], store, folder)
        tell(name, 1, 1)
    return models


def _saved(models: dict[str, ir.Model], dtype: str, folder: Path) -> dict[str, Path]:
    graphs = {name: folder / f"{name}.{dtype}.onnx" for name in models}
    for name, path in graphs.items():
        save_graph(models[name], path)
    return graphs


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` when the block ends without an error, and is removed otherwise.

    Its name is fixed, so that the files of a killed run are found and removed by the next one.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} is there already.",
            "An export writes a new folder.",
            "Remove it, or choose another --out.",
        )
    staging = out.absolute().with_name(f".{out.absolute().name}.export")
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    with _only_export(staging, out):
        for old in staging.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        try:
            yield staging
            try:
                staging.replace(out)
            except OSError as error:
                raise cannot_write(out, error) from error
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def _only_export(staging: Path, out: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(staging, wait=False))
        except BlockingIOError as error:
            raise BuildError(
                f"Another export into {out} is running.", str(error), "Wait for it, or use another --out."
            ) from error
        yield


class ExportSteps:
    """Reports an export, whose weights are copied in a thread while components are traced in another.

    While weights are copied they are the step that advances, and components that end meanwhile only end.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self._current = ""
        self._began: dict[str, float] = {}

    def __call__(self, step: str, done: int, total: int) -> None:
        """``done`` of ``total`` bytes of ``weights``, or 0 or 1 of 1 of a component."""
        with self._lock:
            self._report(step, done, total)

    def _report(self, step: str, done: int, total: int) -> None:
        if step not in self._began:
            self._began[step] = time.perf_counter()
            if not self._current:
                self._start(step, total)
        if step == self._current:
            self._progress.advanced(_units(step, done))
        if done < total:
            return
        self._progress.finished(step, time.perf_counter() - self._began.pop(step))
        if step == self._current:
            self._current = ""
            for other in self._began:  # it is still running
                self._start(other, 1)

    def _start(self, step: str, total: int) -> None:
        self._current = step
        self._progress.started(step, _units(step, total), "MB" if step == "weights" else "")


def _units(step: str, amount: int) -> int:
    return -(-amount // MEGABYTE) if step == "weights" else amount


def _sizes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
