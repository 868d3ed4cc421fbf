"""The PyTorch bf16 baseline: the torch modules with the checkpoint's own weights, in the same run.

The paper's measurement (eager, bf16, fused attention) on this machine. The one module of the profiles that
imports torch and opens a checkpoint, both only when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle.manifest import SHIPPED, Model
from ...bundle.spec import ComponentSpec
from ...errors import IvlError, UsageError
from ...models.config import InternVLConfig
from ...models.registry import Component, component_of
from ...models.shipped import FOLDERS, checkpoint_path, shipped_folder
from ...progress import SILENT, Progress, reported
from .cases import GRAPHS, Case, Task
from .device_timing import captured, event_timer, has_gpu
from .inputs import random_inputs
from .timing import StopRule

if TYPE_CHECKING:
    from ...models.checkpoint import Checkpoint

BACKEND, PRECISION = "PyTorch", "bf16"
GRAPH_BACKEND = f"{BACKEND}{GRAPHS}"


def run_baseline(
    checkpoint: Checkpoint,
    config: InternVLConfig,
    calls: Sequence[tuple[ComponentSpec, dict[str, int]]],
    rule: StopRule,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> tuple[Case, ...]:
    """Time the torch modules of components of ``calls``, on the GPU if torch has one.

    Args:
        checkpoint: the weights, those of the bundle that is profiled.
        config: the model's sizes.
        calls: component contracts and sizes.
        rule: when each measurement ends.
        threads: CPU threads of torch; None: torch's choice.
        progress: receives the measurements as one step.
    """
    import torch

    cases = []
    with (
        torch_threads(threads),
        torch.inference_mode(),
        reported(progress, "measure torch bf16", len(calls)) as advanced,
    ):
        for number, (spec, sizes) in enumerate(calls):
            advanced(number, detail=f"{spec.name}, batch {sizes['batch']}")
            call = _module_call(checkpoint, config, spec, sizes)
            cases += [task.time(rule) for task in _tasks(component_of(spec.name, config), sizes, call)]
    return tuple(cases)


def find_checkpoint(model: Model, user_path: Path | None) -> tuple[Checkpoint | None, str]:
    """The checkpoint that a bundle was built from, or None and why there is no baseline.

    Args:
        model: its entry in the manifest.
        user_path: the user's path; None: where the bundle was built from, or the shipped nano.

    Raises:
        UsageError: ``user_path`` holds other weights.
        CheckpointError: ``user_path`` cannot be read.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        return None, "No PyTorch baseline: torch is not installed."
    from ...models.checkpoint import open_checkpoint

    source = model.source
    name = source.removesuffix(SHIPPED)
    recorded = shipped_folder(name) if source.endswith(SHIPPED) and name in FOLDERS else Path(source)
    path = checkpoint_path(user_path) if user_path is not None else recorded
    try:
        checkpoint = open_checkpoint(path)
        same = checkpoint.revision == model.revision.get("checkpoint")
    except IvlError:
        if user_path is not None:
            raise
        return None, f"No PyTorch baseline: {model.name} is not where it was; give -O checkpoint."
    if same:
        return checkpoint, ""
    if user_path is not None:
        raise UsageError(
            f"-O checkpoint={user_path} is not the one that the bundle was built from.",
            "Its weights or its config differ.",
            f"Give the checkpoint of {model.name} that the bundle was built from.",
        )
    return None, f"No PyTorch baseline: the checkpoint of {model.name} has changed; give -O checkpoint."


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Torch's CPU threads inside the ``with`` block; None, or no torch: nothing happens."""
    if threads is None:
        yield
        return
    try:
        import torch
    except ImportError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _module_call(
    checkpoint: Checkpoint, config: InternVLConfig, spec: ComponentSpec, sizes: dict[str, int]
) -> Callable[[], object]:
    """The module of a component in bf16 on its device, and its inputs there, as one call."""
    import torch

    from ...models.checkpoint import load_state
    from ...models.registry import component_module

    device = "cuda" if has_gpu() else "cpu"
    with torch.device("meta"):
        module = component_module(spec.name, config)
    load_state(module, checkpoint, torch.bfloat16, device)
    arrays = random_inputs(spec, sizes, config.qllama.vocab_size)
    tensors = [_tensor(arrays[t.name], device) for t in spec.inputs]
    return partial(module, *tensors)


def _tensor(array: Any, device: str) -> Any:
    import torch

    tensor = torch.from_numpy(array).to(device)
    return tensor.bfloat16() if tensor.is_floating_point() else tensor


def _tasks(component: Component[Any], sizes: dict[str, int], call: Callable[[], object]) -> list[Task]:
    """Eager, and on a GPU as a CUDA graph too."""
    make = partial(Task.component, "baseline", component.name, component.unit, sizes)
    if not has_gpu():
        boundary = "one call of the torch module: tensors in host memory in, all outputs in host memory out"
        return [make(boundary, lambda: call).of(BACKEND, PRECISION)]
    boundary = "one call of the torch module: tensors in GPU memory in, all outputs in GPU memory out"
    eager = make(boundary, lambda: call).of(BACKEND, PRECISION)
    replay = make(f"{boundary}; one launch of a CUDA graph", lambda: captured(call)).of(
        GRAPH_BACKEND, PRECISION
    )
    return [replace(task, timer=event_timer) for task in (eager, replay)]
