"""Steps that write the weights stores and the graphs over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..bundle.spec import ComponentSpec
from ..export.components import component_spec
from . import graphs
from .graphs import Source, folded_checkpoint, graph_path, source
from .job import Job
from .resources import stored_bytes
from .step import Made, Step, after, model_of
from .workspace import Workspace

MEGABYTE = 10**6
STORES = ("weights", "quantise")
"""The steps of :func:`store_steps`."""


def store_steps(job: Job, smooth: list[Step]) -> list[Step]:
    """The store of the base type, and that of the quantised weights where there are any."""
    made = Source(job.checkpoint, job.recipe, job.plan, None)
    keys, layers = graphs.component_weights(made, job.components)
    inputs = {**model_of(job), "base": job.recipe.base, **(after(smooth) if smooth else {})}

    def folded(root: Path) -> Source:
        return replace(made, checkpoint=folded_checkpoint(job, root))

    def base(space: Workspace, advanced: Callable[[int], None]) -> Made:
        files = graphs.write_base_store(
            folded(space.root), keys, space.root, lambda done: advanced(done // MEGABYTE)
        )
        return files, {"tensors": len(keys)}

    def low(space: Workspace, advanced: Callable[[int], None]) -> Made:
        files = graphs.write_quantised_store(folded(space.root), layers, space.root, advanced)
        return files, {"layers": len(layers)}

    kept, quantised = stored_bytes(made, job.components)
    found = [Step("weights", {**inputs, "keys": keys}, base, kept // MEGABYTE, kept, "MB")]
    if layers:
        schemes = {name: job.plan.schemes[name] for name in layers}
        found.append(Step("quantise", {**inputs, "schemes": schemes}, low, len(layers), quantised))
    return found


def graph_step(job: Job, component: str, before: list[Step]) -> Step:
    """One component's graphs, one for each compute type."""
    spec = component_spec(component, job.checkpoint.whole)

    def run(space: Workspace, advanced: Callable[[int], None]) -> Made:
        made, files = source(job, space.root), []
        promised: dict[str, dict[str, str]] = {}
        pieces: list[ComponentSpec] = []
        for done, (compute, style) in enumerate(made.variants(), 1):
            if count == 1:
                promised[compute] = graphs.write_graph(made, component, space.root, compute, style)
            else:
                promised[compute], pieces = graphs.write_split_graph(
                    made, component, space.root, compute, style, count
                )
            names = [component, *(piece.name for piece in pieces)]
            files += [graph_path(name, compute).as_posix() for name in names]
            advanced(done)
        parts = {"parts": [piece.to_json() for piece in pieces]} if pieces else {}
        return files, {"promised": promised, **parts}

    count = job.parts[component]
    parts = {"parts": count} if count > 1 else {}
    return Step(f"graph-{component}", {"spec": spec.to_json(), **parts, **after(before)}, run, 2)
