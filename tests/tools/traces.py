"""The exporter's graphs, kept between tests, workers and runs: tracing one takes seconds, reading it none.

A graph is kept under the hash of all it is made from: the sources of models and of tracing, the module that
defines the component, its config, and the releases of Python and of the libraries.
"""

from __future__ import annotations

import hashlib
import inspect
import shutil
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ivl_export.files.locks import locked
from ivl_export.files.write import atomic
from ivl_export.models.registry import ModelConfig, component_of, component_spec

if TYPE_CHECKING:
    import onnx_ir as ir

Trace = Callable[[str, ModelConfig], "ir.Model"]
ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "onnx", "onnxscript", "onnx-ir")


def kept(folder: Path, trace: Trace) -> Trace:
    """``trace``, which is only called for what is not in ``folder`` yet."""

    def kept_or_traced(name: str, config: ModelConfig) -> ir.Model:
        own = Path(inspect.getfile(type(component_of(name, config)))).read_bytes()
        digest = hashlib.sha256(own + repr((name, type(config).__name__, config)).encode()).hexdigest()
        place = folder / sources()
        if not place.exists():
            for old in (entry for entry in folder.iterdir() if entry != place):  # another worker may be first
                shutil.rmtree(old, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{digest[:32]}.onnx"
        with locked(path.with_suffix(".lock")):  # workers: one traces, the others wait
            if not path.exists():
                share_registry()
                model = trace(name, config)
                with atomic(path) as partial:
                    store(model, partial)
        return load(path, len(component_spec(name, config).inputs))

    return kept_or_traced


@cache
def share_registry() -> None:
    """The exporter makes its table of operators once; by itself it parses all of them for every graph."""
    from torch.onnx._internal.exporter import _registration

    table = _registration.ONNXRegistry
    table.from_torchlib = staticmethod(cache(table.from_torchlib))  # type: ignore[method-assign]


@cache
def sources() -> str:
    """The hash of what every graph is made from."""
    digest = hashlib.sha256(repr((sys.version_info, [version(name) for name in LIBRARIES])).encode())
    files = [*(ROOT / "models").rglob("*.py"), *(ROOT / name for name in ("bundle/spec.py", "dtypes.py"))]
    for path in [*sorted(files), ROOT / "export" / "trace.py", Path(__file__)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def store(model: ir.Model, path: Path) -> None:
    """Write a graph whose initializers have no data: they become its last inputs."""
    import onnx_ir as ir

    copy = model.clone()
    weights = list(copy.graph.initializers.values())
    copy.graph.initializers.clear()
    copy.graph.inputs.extend(weights)
    path.write_bytes(ir.serde.serialize_model(copy).SerializeToString())


def load(path: Path, inputs: int) -> ir.Model:
    """What :func:`store` wrote, of a component with so many inputs."""
    import onnx
    import onnx_ir as ir

    model = ir.serde.deserialize_model(onnx.load_model_from_string(path.read_bytes()))
    weights = list(model.graph.inputs)[inputs:]
    del model.graph.inputs[inputs:]
    for weight in weights:
        assert weight.name is not None
        model.graph.initializers[weight.name] = weight
    return model
