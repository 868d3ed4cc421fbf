"""Times the layers of one call, by layer type and by block.

ONNX Runtime's profile gives the time of each node, torch's profiler that of each operator inside each module,
TensorRT's that of each layer of the engine. All slow a call down, small layers most: shares say where to
look, not how fast it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...arrays import Array
from ...bundle import Bundle
from ...bundle.spec import ComponentSpec
from ...engines.chain import ChainedEngine
from ...engines.layer_times import TimedCall, concatenate_calls
from ...engines.onnxruntime import profile as ort_profile
from ...engines.tensorrt import profile as trt_profile
from ...engines.tensorrt.library import BUILDERS
from ...errors import UsageError
from ...models.registry import config_from_published, family_of
from ...runtime.components import Components
from .inputs import random_inputs
from .latency import sizes_of
from .layer_profile import LayerProfile, LayerTime
from .receipt import write

SCHEMA = "ivl-export.layers/1"
BACKENDS = ("onnxruntime", "torch", *BUILDERS)
Timed = tuple[tuple[TimedCall, ...], dict[str, Array]]
"""Calls, and the outputs of the last one."""


def profile_layers(
    bundle: Bundle,
    component: str,
    backend: str,
    batch: int,
    calls: int,
    threads: int | None = None,
    target: str | None = None,
    device: str | None = None,
) -> LayerProfile:
    """Time the layers of one component, at the sizes its engine is tuned for.

    Args:
        bundle: where the component is; of one in parts these are timed one after another.
        component, backend, target: whose engine.
        batch: rows of a call.
        calls: calls that are timed.
        threads: CPU threads of an engine.
        device: the GPU of TensorRT engines; None: the first.

    Raises:
        UsageError: a backend that has no profiler here, or a batch it does not take.
        CapabilityError, IntegrityError: as opening the engine.
    """
    if backend not in BACKENDS:
        raise UsageError(
            f"The layers of {backend} engines cannot be timed here.",
            "",
            f"Give one of {', '.join(BACKENDS)}.",
        )
    config = config_from_published(bundle.manifest.model.config)
    spec = bundle.spec(component)
    axis = spec.axis("batch")
    if not axis.min <= batch <= axis.max:
        raise UsageError(
            f"{component} takes batches of {axis.min} to {axis.max}, not {batch}.",
            fix=f"Give --batch {axis.min}, for example.",
        )
    sizes = sizes_of(spec, batch, (), config)[0]
    inputs = random_inputs(spec, sizes, family_of(config).vocabulary(config))
    if backend == "torch":
        from ...engines.torch.profile import profiled_calls

        timed = profiled_calls(bundle, component, inputs, calls, threads)
    elif backend in BUILDERS:
        timed = _tensorrt_calls(bundle, component, backend, inputs, calls, target, device)
    else:
        timed = _onnxruntime_calls(bundle, component, inputs, calls, threads)
    # Disturbances make a call longer: the slower half is left out.
    quick = sorted(timed, key=lambda call: call.us)[: -(-len(timed) // 2)]
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for call in quick:
        for event in call.events:
            sums[event.name, event.op] += event.us
    layers = [LayerTime(name, op, us / len(quick) / 1e3) for (name, op), us in sums.items()]
    return LayerProfile(
        component,
        backend,
        sizes,
        len(timed),
        sum(call.us for call in quick) / len(quick) / 1e3,
        tuple(sorted(layers, key=lambda la: -la.ms)),
        quick[0].events,
    )


def _onnxruntime_calls(
    bundle: Bundle, component: str, inputs: dict[str, Array], calls: int, threads: int | None
) -> tuple[TimedCall, ...]:
    files, whole = bundle.engines(component, "onnxruntime"), bundle.manifest.components[component]
    specs = [part.spec for part in whole.parts] or [whole.spec]

    def run(spec: ComponentSpec, feeds: dict[str, Array]) -> Timed:
        path = bundle.path(files[specs.index(spec)].file)
        return ort_profile.profiled_calls(spec, path, feeds, calls, threads=threads)

    return _chained(specs, inputs, run)


def _tensorrt_calls(
    bundle: Bundle,
    component: str,
    backend: str,
    inputs: dict[str, Array],
    calls: int,
    target: str | None,
    device: str | None,
) -> tuple[TimedCall, ...]:
    options: dict[str, Any] = {"device": device} if device else {}
    components = Components(bundle, backend, target, None, **options)
    try:
        engine: Any = components.open(component)
        parts: tuple[Any, ...] = engine.parts if isinstance(engine, ChainedEngine) else (engine,)
        of_spec = {part.spec.name: part for part in parts}
        return _chained(
            [part.spec for part in parts],
            inputs,
            lambda spec, feeds: trt_profile.profiled_calls(of_spec[spec.name], feeds, calls),
        )
    finally:
        components.close()


def _chained(
    specs: Sequence[ComponentSpec],
    inputs: dict[str, Array],
    run: Callable[[ComponentSpec, dict[str, Array]], Timed],
) -> tuple[TimedCall, ...]:
    """The calls of a component's parts, each fed with the outputs of those before, joined call by call."""
    values, timed = dict(inputs), []
    for spec in specs:
        calls, outputs = run(spec, {tensor.name: values[tensor.name] for tensor in spec.inputs})
        values |= outputs
        timed.append(calls)
    return tuple(concatenate_calls(parts) for parts in zip(*timed, strict=True))


def chrome_trace(profiles: Iterable[LayerProfile]) -> dict[str, Any]:
    """The quickest call of each profile in Chrome's trace format (chrome://tracing, Perfetto)."""
    events: list[dict[str, Any]] = []
    for process, profile in enumerate(profiles, 1):
        label = f"{profile.component} on {profile.backend}"
        events.append({"name": "process_name", "ph": "M", "pid": process, "args": {"name": label}})
        start = min((event.start_us for event in profile.trace), default=0.0)
        events += [
            {
                "name": event.name or event.op, "cat": event.op, "ph": "X", "pid": process, "tid": 1,
                "ts": event.start_us - start, "dur": event.us, "args": {"op": event.op},
            }
            for event in profile.trace
        ]  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(profiles: Iterable[LayerProfile], path: Path) -> None:
    """Write :func:`chrome_trace` to ``path``, whole or not at all; BuildError if it cannot be written."""
    write(chrome_trace(profiles), path)
