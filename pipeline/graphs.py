"""Steps that write the weights store and the graphs of every component."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..export.binding import bind, save_graph
from ..export.cached_attention import separate_past
from ..export.components import component_module, component_spec
from ..export.split import split_graph
from ..export.trace import export_component
from ..export.weight_store import StoreWriter, open_store
from ..export.weights import write_store
from ..models.checkpoint import Checkpoint
from ..quantization.qdq import write_qdq
from ..quantization.qdq_nodes import Style
from ..quantization.quantize import quantise_layer, stored_tensors
from ..quantization.ranges import Scales
from ..quantization.recipe import LayerPlan, Recipe
from ..quantization.schemes import folded_layers
from .calibration import SMOOTHING

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ..bundle.spec import ComponentSpec
    from .job import Job

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
GRAPHS = Path("onnx")
BASE_STORE = GRAPHS / "weights" / "base.safetensors"
LOW_STORE = GRAPHS / "weights" / "quantised.safetensors"
SCALES = "scales.json"


@dataclass(frozen=True)
class Source:
    """What graphs are made from.

    Args:
        checkpoint: the weights.
        recipe: gives the base type.
        plan: scheme of every linear layer.
        scales: activation ranges; None where no input is rounded.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    plan: LayerPlan
    scales: Scales | None

    def variants(self) -> tuple[tuple[str, Style], ...]:
        """Compute type and runtime of the graphs of a component."""
        return (("fp32", "onnxruntime"), (self.recipe.base, "tensorrt"))


def graph_path(component: str, compute: str) -> Path:
    """Where the graph that computes in ``compute`` lies in a bundle."""
    return GRAPHS / f"{component}.{compute}.onnx"


def component_weights(source: Source, components: Sequence[str]) -> tuple[list[str], list[str]]:
    """(keys kept in the base type, quantised layers) that ``components`` need, each once and in order."""
    import torch

    keys: dict[str, None] = {}
    for component in components:
        with torch.device("meta"):
            module = component_module(component, source.checkpoint.whole, source.checkpoint.contrastive_only)
        keys.update(dict.fromkeys(module.state_dict()))
    quantised = [name for name in source.plan.quantised if f"{name}.weight" in keys]
    low = {f"{name}.weight" for name in quantised}
    return [key for key in keys if key not in low], quantised


def write_base_store(
    source: Source, keys: Sequence[str], root: Path, progress: Callable[[int], None] = lambda done: None
) -> list[str]:
    """The tensors that stay in the base type; returns the files written, relative to ``root``.

    ``progress`` hears the bytes written so far.
    """
    (root / BASE_STORE).parent.mkdir(parents=True, exist_ok=True)
    write_store(source.checkpoint, keys, root / BASE_STORE, DTYPES[source.recipe.base], progress)
    return [BASE_STORE.as_posix()]


def write_quantised_store(
    source: Source, layers: Sequence[str], root: Path, progress: Callable[[int], None] = lambda done: None
) -> list[str]:
    """FP8 / INT8 values and scales of ``layers``, one block of rows in memory at a time."""
    base, tensors = source.recipe.base, source.checkpoint.tensors
    layout = [
        stored
        for name in layers
        for stored in stored_tensors(name, source.plan.schemes[name], base, _shape(tensors, name))
    ]
    (root / LOW_STORE).parent.mkdir(parents=True, exist_ok=True)

    def read(name: str) -> torch.Tensor:
        return source.checkpoint.load(name)

    with StoreWriter(root / LOW_STORE, layout) as store:
        for done, name in enumerate(layers, 1):
            quantise_layer(read, store.write, name, source.plan.schemes[name], base)
            progress(done)
    return [LOW_STORE.as_posix()]


def write_graph(source: Source, component: str, root: Path, compute: str, style: Style) -> dict[str, str]:
    """Trace ``component``, quantise the graph, bind it to the stores below ``root`` and save it.

    Returns:
        Node name -> scheme of the quantised GEMMs: what engines must keep.
    """
    model, promised = _quantised(source, component, compute, style)
    _save(model, root, graph_path(component, compute))
    return promised


def write_split_graph(
    source: Source, component: str, root: Path, compute: str, style: Style, parts: int
) -> tuple[dict[str, str], list[ComponentSpec]]:
    """As :func:`write_graph`, and beside the graph its ``parts``, as graphs of ``<component>.<k>``.

    Returns:
        What :func:`write_graph` returns, which is the promise of all parts together, and their contracts.
    """
    model, promised = _quantised(source, component, compute, style)
    pieces = split_graph(model, component_spec(component, source.checkpoint.whole), parts)
    for piece, spec in pieces:
        _save(piece, root, graph_path(spec.name, compute))
    _save(model, root, graph_path(component, compute))
    return promised, [spec for _, spec in pieces]


def _quantised(source: Source, component: str, compute: str, style: Style) -> tuple[ir.Model, dict[str, str]]:
    model = export_component(component, source.checkpoint, DTYPES[compute])
    promised: dict[str, str] = {}
    if source.plan.quantised:
        promised = write_qdq(
            model,
            source.plan.quantised,
            source.scales.amax[component] if source.scales else {},
            compute=DTYPES[compute],
            base=source.recipe.base,
            style=style,
            attentions=source.plan.attention.get(component, ()),
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


def source(job: Job, root: Path) -> Source:
    """What the graphs of ``job`` are made from, once calibration is done."""
    scales = Scales.load(root / SCALES) if job.plan.rounded else None
    return Source(folded_checkpoint(job, root), job.recipe, job.plan, scales)


def folded_checkpoint(job: Job, root: Path) -> Checkpoint:
    """The weights that graphs are made from: folded where the recipe says so."""
    if not folded_layers(job.plan.schemes):
        return job.checkpoint
    from safetensors.torch import load_file

    from ..calibration.folding import fold

    return fold(job.checkpoint, load_file(root / SMOOTHING))
