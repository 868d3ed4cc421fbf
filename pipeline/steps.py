"""All steps of a build, in the order they run.

finite (a look at the weights), preprocess, smooth (if the recipe does), calibrate, sensitivity and search (of
a mixed recipe), weights, quantise, a graph for each component, an engine for each component and target,
kernels (the proof), accuracy of the components, accuracy on the tasks.
"""

from __future__ import annotations

from .accuracy_steps import accuracy_step, tasks_step
from .calibration_steps import calibrate_step, finite_step, fold_steps, preprocess_step
from .engine_steps import engine_step, kernels_step
from .graph_steps import graph_step, store_steps
from .job import Job
from .mixed import search_steps
from .step import Step


def steps(job: Job) -> list[Step]:
    """All steps of ``job`` in the order they run; a step's inputs hold the hashes of those it reads."""
    preprocess = preprocess_step(job)
    found = [finite_step(job), preprocess]
    smooth = fold_steps(job, preprocess)
    scales = list(smooth)
    if job.searched:
        _, *searched = search_steps(job)
        scales += searched
    elif job.plan.rounded:
        scales.append(calibrate_step(job, [preprocess, *smooth]))
    stores = store_steps(job, smooth)
    graph_steps = {c: graph_step(job, c, [*scales, *stores]) for c in job.components}
    engine_steps = [
        engine_step(job, component, part, backend, target, graph_steps[component])
        for component in job.components
        for backend, target in job.engines
        for part in range(job.parts[component])
    ]
    found += [*scales, *stores, *graph_steps.values(), *engine_steps]
    found.append(kernels_step(job, [*graph_steps.values(), *engine_steps]))
    found.append(accuracy_step(job, [preprocess, *graph_steps.values()]))
    if job.evaluation and set(job.components) >= set(job.checkpoint.components):
        found.append(tasks_step(job, preprocess, [*scales, *graph_steps.values()]))
    return found
