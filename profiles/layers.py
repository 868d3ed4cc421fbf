"""Where the time of one call goes: by layer, by layer type, by block.

ONNX Runtime's profile gives the time of each node, torch's profiler that of each operator inside each module.
Both slow a call down, small layers most: shares say where to look, not how fast it is.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..engines.ort_profile import Call, Event, profiled_calls
from ..errors import UsageError
from ..models.config import InternVLConfig
from .flops import layer_type
from .inputs import Array, random_inputs
from .latency import sizes_of
from .receipt import write

SCHEMA = "ivl-export.layers/1"
BACKENDS = ("onnxruntime", "torch")
OUTSIDE = "outside the blocks"
_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d+)(?:[./]|$)")


@dataclass(frozen=True)
class LayerTime:
    """A layer's milliseconds in one call, mean of all calls."""

    name: str
    op: str
    ms: float

    @property
    def type(self) -> str:
        """The name without the block's number."""
        return layer_type(self.name)

    @property
    def block(self) -> str:
        """``block 3``, or :data:`OUTSIDE`."""
        found = _BLOCK.search(self.name)
        return f"block {found[1]}" if found else OUTSIDE


@dataclass(frozen=True)
class LayerProfile:
    """One component's layers: ``call_ms`` is the mean of the whole calls, ``trace`` the last one's events."""

    component: str
    backend: str
    sizes: dict[str, int]
    calls: int
    call_ms: float
    layers: tuple[LayerTime, ...]
    trace: tuple[Event, ...]

    @property
    def rest_ms(self) -> float:
        """Time of a call in none of its layers; with several threads at work it may be negative."""
        return self.call_ms - sum(layer.ms for layer in self.layers)

    def by(self, key: Callable[[LayerTime], str]) -> dict[str, float]:
        """Milliseconds of one call by ``key``, the most first."""
        sums: dict[str, float] = defaultdict(float)
        for layer in self.layers:
            sums[key(layer)] += layer.ms
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def to_json(self) -> dict[str, Any]:
        """Plain data with the sums; events go into the trace only."""
        data = {k: v for k, v in asdict(self).items() if k != "trace"}
        sums = {
            "by_op": self.by(lambda layer: layer.op),
            "by_type": self.by(lambda layer: layer.type),
            "by_block": self.by(lambda layer: layer.block),
        }
        return {**data, "rest_ms": self.rest_ms, **sums}


def profile_layers(
    bundle: Bundle, component: str, backend: str, batch: int, calls: int, threads: int | None = None
) -> LayerProfile:
    """Time the layers of one component, at the sizes its engine is tuned for.

    Raises:
        UsageError: a backend that has no profiler here, a component in parts, or a batch it does not take.
        CapabilityError, IntegrityError: as opening the engine.
    """
    if backend not in BACKENDS:
        raise UsageError(
            f"The layers of {backend} engines cannot be timed here.", "", f"Give {' or '.join(BACKENDS)}."
        )
    config = InternVLConfig.from_published(bundle.manifest.model.config)
    spec = bundle.spec(component)
    axis = spec.axis("batch")
    if not axis.min <= batch <= axis.max:
        raise UsageError(f"{component} takes batches of {axis.min} to {axis.max}, not {batch}.")
    sizes = sizes_of(spec, batch, (), config)[0]
    inputs = random_inputs(spec, sizes, config.qllama.vocab_size)
    if backend == "torch":
        timed = _torch_calls(bundle, component, inputs, calls, threads)
    else:
        (engine, *parts) = bundle.engines(component, backend)
        if parts:
            raise UsageError(f"{component} is split into parts.", "", "Give --backend torch.")
        timed = profiled_calls(spec, bundle.path(engine.file), inputs, calls, threads=threads)
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for call in timed:
        for event in call.events:
            sums[event.name, event.op] += event.us
    layers = [LayerTime(name, op, us / len(timed) / 1e3) for (name, op), us in sums.items()]
    total = sum(call.us for call in timed) / len(timed) / 1e3
    return LayerProfile(
        component,
        backend,
        sizes,
        len(timed),
        total,
        tuple(sorted(layers, key=lambda la: -la.ms)),
        timed[-1].events,
    )


def _torch_calls(
    bundle: Bundle, component: str, inputs: dict[str, Array], calls: int, threads: int | None
) -> tuple[Call, ...]:
    """Calls of the torch backend on the CPU: each operator's own time, named by the module it is in."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from ..torch_backend.module import component_of
    from ..torch_backend.trace import named_ranges

    if threads is not None:
        torch.set_num_threads(threads)
    place = torch.device("cpu")
    module = component_of(bundle, component, dtype=torch.float32, device=place, product=None)
    feeds = [torch.from_numpy(inputs[tensor.name]) for tensor in bundle.spec(component).inputs]
    found = []
    with torch.no_grad(), named_ranges(module):
        module(*feeds)
        for _ in range(calls):
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                module(*feeds)
            found.append(_torch_call(recorded.events()))
    return tuple(found)


def _torch_call(events: Iterable[Any]) -> Call:
    from ..torch_backend.trace import MODULE

    found, total = [], 0.0
    for event in events:
        if event.name == MODULE:  # the component itself
            total += event.time_range.elapsed_us()
        if event.name.startswith(MODULE):
            continue
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith(MODULE):
            parent = parent.cpu_parent
        if parent is not None and event.self_cpu_time_total > 0:
            name = parent.name.removeprefix(MODULE)
            found.append(Event(name, event.name, event.time_range.start, event.self_cpu_time_total))
    return Call(total, tuple(found))


def chrome_trace(profiles: Iterable[LayerProfile]) -> dict[str, Any]:
    """The last call of each profile in Chrome's trace format (chrome://tracing, Perfetto)."""
    events: list[dict[str, Any]] = []
    for process, found in enumerate(profiles, 1):
        label = f"{found.component} on {found.backend}"
        events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": label}})
        start = min((event.start_us for event in found.trace), default=0.0)
        events += [
            {
                "name": event.name or event.op, "cat": event.op, "ph": "X", "pid": process, "tid": 1,
                "ts": event.start_us - start, "dur": event.us, "args": {"op": event.op},
            }
            for event in found.trace
        ]  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(profiles: Iterable[LayerProfile], path: Path) -> None:
    """Write :func:`chrome_trace` to ``path``, whole or not at all; BuildError if it cannot be written."""
    write(chrome_trace(profiles), path)
