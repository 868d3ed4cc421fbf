"""Triton's ``config.pbtxt``: messages as text, and the one of a component's graph or engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..bundle.manifest import Component, EngineFile
from ..bundle.spec import ComponentSpec, TensorSpec
from ..engines.onnx_graph import Graph, read_graph
from ..engines.tensorrt.shapes import restrict_axes
from ..errors import CapabilityError, IntegrityError


class Word(str):
    """A name of an enumeration, which text format writes without quotes."""


TYPES = {
    "fp32": "TYPE_FP32", "fp16": "TYPE_FP16", "bf16": "TYPE_BF16", "int64": "TYPE_INT64",
    "int32": "TYPE_INT32", "int8": "TYPE_INT8", "bool": "TYPE_BOOL",
}  # fmt: skip
"""Element type -> Triton's name."""
ONNX_TYPES = frozenset(TYPES) - {"bf16"}
"""Types of inputs and outputs that Triton's ONNX Runtime backend takes (its onnxruntime_utils.cc)."""
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
BATCH = "batch"


def text(message: Mapping[str, Any]) -> str:
    """A message in protobuf's text format: numbers, texts, :class:`Word`, messages, and lists of these."""
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for key, value in message.items():
        if isinstance(value, Mapping):
            yield from _block(key, value)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for one in value:
                yield from _block(key, one)
        elif isinstance(value, list):
            yield f"{key}: [ {', '.join(map(_plain, value))} ]"
        else:
            yield f"{key}: {_plain(value)}"


def _block(key: str, message: Mapping[str, Any]) -> Iterator[str]:
    yield f"{key} {{"
    yield from (f"  {line}" for line in _lines(message))
    yield "}"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, str) and not isinstance(value, Word) else str(value)


def parameters(values: Mapping[str, str]) -> list[dict[str, Any]]:
    """The entries of a configuration's ``parameters``."""
    return [{"key": key, "value": {"string_value": value}} for key, value in values.items()]


@dataclass(frozen=True)
class Serving:
    """How the models of a repository are served.

    Args:
        device: ``cpu`` or ``cuda``.
        instances: of each model.
        delay: microseconds that a request waits for others.
    """

    device: str
    instances: int
    delay: int

    @property
    def group(self) -> dict[str, Any]:
        """An instance group."""
        return {
            "count": self.instances,
            "kind": Word("KIND_GPU" if self.device == "cuda" else "KIND_CPU"),
        }


def tensor(name: str, kind: str, dims: Sequence[int], **more: Any) -> dict[str, Any]:
    """An input or output of a row; -1 is any size."""
    return {"name": name, "data_type": Word(kind), "dims": list(dims), **more}


def component_config(
    bundle: Bundle, component: Component, engine: EngineFile, serving: Serving
) -> dict[str, Any]:
    """The configuration of the model that runs ``engine``, a graph or a plan, of ``component`` (or a part).

    Raises:
        IntegrityError: the graph does not have the inputs and outputs of the component's contract.
        CapabilityError: one of them has a type that Triton's backend does not take.
    """
    spec, on_onnx = component.spec, engine.backend == "onnxruntime"
    if on_onnx:
        graph = read_graph(bundle.path(engine.file))
        check_contract(spec, graph, bundle.path(engine.file))
        kinds = {name: kind for name, (kind, _) in (*graph.inputs.items(), *graph.outputs.items())}
        profiles: tuple[Any, ...] = ()
    else:
        built = engine.built
        dtype = built.dtype if built is not None else bundle.manifest.compute_dtype
        kinds = {t.name: dtype for t in (*spec.inputs, *spec.outputs) if t.dtype == "float"}
        profiles = built.profiles if built is not None else ()
        spec = restrict_axes(spec, profiles)
    tensors = (*spec.inputs, *spec.outputs)
    batched = all(t.shape[:1] == (BATCH,) for t in tensors)
    config: dict[str, Any] = {
        "name": spec.name,
        "backend": engine.backend,
        "default_model_filename": FILES[engine.backend],
        "max_batch_size": spec.axis(BATCH).max if batched else 0,
    }
    allowed = ONNX_TYPES if on_onnx else frozenset(TYPES)
    for key, side in (("input", spec.inputs), ("output", spec.outputs)):
        config[key] = [
            tensor(t.name, _type(spec, t, kinds, allowed), **_sizes(t.shape[1:] if batched else t.shape))
            for t in side
        ]
    group = serving.group if on_onnx else {"count": serving.instances, "kind": Word("KIND_GPU")}
    if len(profiles) > 1:
        group["profile"] = [str(number) for number in range(len(profiles))]
    config["instance_group"] = [group]
    if batched and spec.axis(BATCH).max > 1:
        config["dynamic_batching"] = {
            "preferred_batch_size": [max(1, spec.axis(BATCH).opt)],
            "max_queue_delay_microseconds": serving.delay,
        }
    return config


def ensemble_config(component: Component, max_batch: int, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The configuration that runs the models of a split component one after another.

    A step's inputs are the component's, or outputs of steps before, under the same names.
    """
    known = {t["name"]: t for part in parts for t in (*part["input"], *part["output"])}
    return {
        "name": component.spec.name,
        "platform": "ensemble",
        "max_batch_size": max_batch,
        "input": [known[t.name] for t in component.spec.inputs],
        "output": [known[t.name] for t in component.spec.outputs],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": part["name"],
                    "model_version": -1,
                    "input_map": [{"key": t["name"], "value": t["name"]} for t in part["input"]],
                    "output_map": [{"key": t["name"], "value": t["name"]} for t in part["output"]],
                }
                for part in parts
            ]
        },
    }


def check_contract(spec: ComponentSpec, graph: Graph, path: Path) -> None:
    """IntegrityError where a graph has other inputs, outputs or sizes than ``spec``."""
    for what, side, own in (("input", spec.inputs, graph.inputs), ("output", spec.outputs, graph.outputs)):
        for t in side:
            sizes = tuple(0 if isinstance(size, str) else size for size in t.shape)
            if t.name not in own or own[t.name][1] != sizes:
                have = list(own[t.name][1]) if t.name in own else "none of that name"
                raise IntegrityError(
                    f"{path} is not the graph of {spec.name}.",
                    f"Its {what} {t.name} should be {list(t.shape)}; it has {have}.",
                    "Build the bundle again.",
                )
    if extra := sorted({*graph.inputs} - {t.name for t in spec.inputs} - {*graph.initializers}):
        raise IntegrityError(
            f"{path} is not the graph of {spec.name}.",
            f"It also takes {extra[0]}.",
            "Build the bundle again.",
        )


def _type(spec: ComponentSpec, t: TensorSpec, kinds: Mapping[str, str], allowed: frozenset[str]) -> str:
    kind = kinds.get(t.name, t.dtype)
    if kind not in allowed:
        raise CapabilityError(
            f"Triton cannot serve {spec.name}: {t.name} is {kind}.",
            f"Its backend takes {', '.join(sorted(allowed))}.",
            "Leave out the models of graphs and engines: -O graphs=false.",
        )
    return TYPES[kind]


def _sizes(shape: Sequence[int | str]) -> dict[str, Any]:
    """The entries for sizes without the batch. Of none a client sends 1, which Triton takes off again."""
    dims = [size if isinstance(size, int) else -1 for size in shape]
    return {"dims": dims} if dims else {"dims": [1], "reshape": {}}
