"""Steps that write the weights stores and the graphs of every component, and the bytes that they take."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.spec import ComponentSpec
from ..dtypes import dtype_of
from ..engines.memory import Load
from ..export.binding import bind, save_graph
from ..export.cached_attention import separate_past
from ..export.split import split_graph
from ..export.trace import export_component
from ..export.weight_store import StoreWriter, open_store
from ..export.weights import write_store
from ..models.checkpoint import Checkpoint
from ..models.registry import component_module, component_of, component_spec
from ..quantization.qdq import write_qdq
from ..quantization.qdq_nodes import Style
from ..quantization.quantize import quantise_layer, stored_tensors
from ..quantization.ranges import ActivationRanges
from ..quantization.recipe import LayerPlan, Recipe
from ..quantization.schemes import folded_layers
from .plan import SMOOTHING, BuildPlan
from .workspace import Step, StepResult, Workspace, after

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

GRAPHS = Path("onnx")
BASE_STORE = GRAPHS / "weights" / "base.safetensors"
LOW_STORE = GRAPHS / "weights" / "quantised.safetensors"
RANGES = "ranges.json"

MEGABYTE = 10**6
STORES = ("weights", "quantise")
"""The steps of :func:`store_steps`."""
_JOINED = re.compile(r"(self_attn\.[qkv]|cross_attn\.[kv]|mlp\.gate|mlp\.up)_proj\.weight")
"""Layers that share their input: a builder joins their weights."""


@dataclass(frozen=True)
class GraphSource:
    """Source of graphs.

    Args:
        checkpoint: the weights.
        recipe: gives the base type.
        layers: scheme of every linear layer.
        ranges: activation ranges; None where no input is rounded.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    layers: LayerPlan
    ranges: ActivationRanges | None

    def variants(self) -> tuple[tuple[str, Style], ...]:
        """Compute type and runtime of the graphs of a component; in fp32 one graph is for both."""
        own: tuple[tuple[str, Style], ...] = ((self.recipe.base, "tensorrt"),)
        return (("fp32", "onnxruntime"), *(own if self.recipe.base != "fp32" else ()))


def graph_path(component: str, compute: str) -> Path:
    """Path in a bundle of the graph that computes in ``compute``."""
    return GRAPHS / f"{component}.{compute}.onnx"


def component_weights(source: GraphSource, components: Sequence[str]) -> tuple[list[str], list[str]]:
    """(keys kept in the base type, quantised layers) that ``components`` need, each once and in order."""
    import torch

    keys: dict[str, None] = {}
    for component in components:
        with torch.device("meta"):
            module = component_module(component, source.checkpoint.model)
        keys.update(dict.fromkeys(module.state_dict()))
    quantised = [name for name in source.layers.quantised if f"{name}.weight" in keys]
    low = {f"{name}.weight" for name in quantised}
    return [key for key in keys if key not in low], quantised


def write_base_store(
    source: GraphSource, keys: Sequence[str], root: Path, progress: Callable[[int], None] = lambda count: None
) -> list[str]:
    """The tensors that stay in the base type; returns the files written, relative to ``root``.

    ``progress`` is called with the bytes written so far.
    """
    (root / BASE_STORE).parent.mkdir(parents=True, exist_ok=True)
    write_store(source.checkpoint, keys, root / BASE_STORE, source.recipe.base, progress)
    return [BASE_STORE.as_posix()]


def write_quantised_store(
    source: GraphSource,
    layers: Sequence[str],
    root: Path,
    progress: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """FP8 / INT8 values and scales of ``layers``, one block of rows in memory at a time."""
    base, tensors = source.recipe.base, source.checkpoint.tensors
    layout = [
        stored
        for name in layers
        for stored in stored_tensors(name, source.layers.schemes[name], base, _shape(tensors, name))
    ]
    (root / LOW_STORE).parent.mkdir(parents=True, exist_ok=True)

    def read(name: str) -> torch.Tensor:
        return source.checkpoint.load(name)

    with StoreWriter(root / LOW_STORE, layout) as store:
        for number, name in enumerate(layers, 1):
            quantise_layer(read, store.write, name, source.layers.schemes[name], base)
            progress(number)
    return [LOW_STORE.as_posix()]


def write_graph(
    source: GraphSource, component: str, root: Path, compute: str, style: Style
) -> dict[str, str]:
    """Trace ``component``, quantise the graph, bind it to the stores below ``root`` and save it.

    Returns:
        Node name -> scheme of the quantised GEMMs: engines must keep them.
    """
    model, promised = _quantised(source, component, compute, style)
    _save(model, root, graph_path(component, compute))
    return promised


def write_split_graph(
    source: GraphSource, component: str, root: Path, compute: str, style: Style, parts: int
) -> tuple[dict[str, str], list[ComponentSpec]]:
    """As :func:`write_graph`, and also writes its ``parts``, as graphs of ``<component>.<k>``.

    Returns:
        The result of :func:`write_graph`, which is the promise of all parts together, and their contracts.
    """
    model, promised = _quantised(source, component, compute, style)
    config = source.checkpoint.model
    place = component_of(component, config).place(config)
    pieces = split_graph(model, component_spec(component, config), place, parts)
    for piece, spec in pieces:
        _save(piece, root, graph_path(spec.name, compute))
    _save(model, root, graph_path(component, compute))
    return promised, [spec for _, spec in pieces]


def _quantised(
    source: GraphSource, component: str, compute: str, style: Style
) -> tuple[ir.Model, dict[str, str]]:
    model = export_component(component, source.checkpoint, compute)
    promised: dict[str, str] = {}
    if source.layers.quantised:
        promised = write_qdq(
            model,
            source.layers.quantised,
            source.ranges.amax[component] if source.ranges else {},
            compute=compute,
            base=source.recipe.base,
            style=style,
            attentions=source.layers.attention.get(component, ()),
        )
    if style == "onnxruntime":
        separate_past(model)
    return model, promised


def _save(model: ir.Model, root: Path, path: Path) -> None:
    stores = [root / store for store in (BASE_STORE, LOW_STORE) if (root / store).is_file()]
    bind(model, open_store(*stores), root / GRAPHS)
    save_graph(model, root / path)


def _shape(tensors: dict[str, Any], layer: str) -> tuple[int, int]:
    out_features, in_features = tensors[f"{layer}.weight"].shape
    return out_features, in_features


def graph_source(plan: BuildPlan, root: Path) -> GraphSource:
    """Checkpoint, recipe and ranges that the graphs of ``plan`` are made from, after calibration."""
    ranges = ActivationRanges.load(root / RANGES) if plan.layers.rounded else None
    return GraphSource(folded_checkpoint(plan, root), plan.recipe, plan.layers, ranges)


def folded_checkpoint(plan: BuildPlan, root: Path) -> Checkpoint:
    """The weights that graphs are made from: folded where the recipe says so."""
    if not folded_layers(plan.layers.schemes):
        return plan.checkpoint
    from safetensors.torch import load_file

    from ..calibration.folding import fold

    return fold(plan.checkpoint, load_file(root / SMOOTHING))


def stored_bytes(source: GraphSource, components: Iterable[str]) -> tuple[int, int]:
    """Bytes of the tensors that ``components`` read, each once: (kept in the base type, quantised)."""
    base, low = _stored(source, components)
    return sum(base.values()), sum(low.values())


def _stored(source: GraphSource, components: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each tensor of ``components``: (kept in the base type, quantised), under its published key."""
    keys, layers = component_weights(source, list(components))
    tensors, base = source.checkpoint.tensors, source.recipe.base
    high = {key: dtype_of(base).nbytes(math.prod(tensors[key].shape)) for key in keys}
    low = {}
    for name in layers:
        rows, columns = tensors[f"{name}.weight"].shape
        parts = stored_tensors(name, source.layers.schemes[name], base, (rows, columns))
        low[f"{name}.weight"] = sum(part.nbytes for part in parts)
    return high, low


def build_load(source: GraphSource, component: str) -> Load:
    """The :func:`..engines.memory.graph_load` of the graph of ``component``, before it is written."""
    base, low = _stored(source, [component])
    sizes = {**base, **low}
    return Load.of({key: size * (2 if _JOINED.search(key) else 1) for key, size in sizes.items()})


def store_steps(plan: BuildPlan, smooth: list[Step]) -> list[Step]:
    """The store of the base type, and that of the quantised weights where there are any."""
    source = GraphSource(plan.checkpoint, plan.recipe, plan.layers, None)
    keys, layers = component_weights(source, plan.components)
    inputs = {**plan.identity, "base": plan.recipe.base, **(after(smooth) if smooth else {})}

    def folded(root: Path) -> GraphSource:
        return replace(source, checkpoint=folded_checkpoint(plan, root))

    def base(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        files = write_base_store(
            folded(space.staging_dir), keys, space.staging_dir, lambda count: advanced(count // MEGABYTE)
        )
        return files, {"tensors": len(keys)}

    def low(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        files = write_quantised_store(folded(space.staging_dir), layers, space.staging_dir, advanced)
        return files, {"layers": len(layers)}

    base_bytes, low_bytes = stored_bytes(source, plan.components)
    steps = [Step("weights", {**inputs, "keys": keys}, base, base_bytes // MEGABYTE, base_bytes, "MB")]
    if layers:
        schemes = {name: plan.layers.schemes[name] for name in layers}
        steps.append(Step("quantise", {**inputs, "schemes": schemes}, low, len(layers), low_bytes))
    return steps


def graph_step(plan: BuildPlan, component: str, before: list[Step]) -> Step:
    """One component's graphs, one for each compute type."""
    spec = component_spec(component, plan.checkpoint.model)

    def run(space: Workspace, advanced: Callable[[int], None]) -> StepResult:
        source, files = graph_source(plan, space.staging_dir), []
        promised: dict[str, dict[str, str]] = {}
        pieces: list[ComponentSpec] = []
        for number, (compute, style) in enumerate(source.variants(), 1):
            if count == 1:
                promised[compute] = write_graph(source, component, space.staging_dir, compute, style)
            else:
                promised[compute], pieces = write_split_graph(
                    source, component, space.staging_dir, compute, style, count
                )
            names = [component, *(piece.name for piece in pieces)]
            files += [graph_path(name, compute).as_posix() for name in names]
            advanced(number)
        parts = {"parts": [piece.to_json() for piece in pieces]} if pieces else {}
        return files, {"promised": promised, **parts}

    count = plan.parts[component]
    parts = {"parts": count} if count > 1 else {}
    return Step(f"graph-{component}", {"spec": spec.to_json(), **parts, **after(before)}, run, 2)
