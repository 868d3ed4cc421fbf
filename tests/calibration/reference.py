"""ModelConfig modules in memory: what running block by block is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from ivl_export.bundle.spec import ComponentSpec
from ivl_export.calibration.component_chain import Runner, run_chain
from ivl_export.calibration.dataset import Batch
from ivl_export.calibration.observers import Watch, observers
from ivl_export.calibration.segments import needed
from ivl_export.models.calls import Arrays
from ivl_export.models.checkpoint import Checkpoint, load_state
from ivl_export.models.registry import component_module, component_spec
from ivl_export.quantization.attention import core_attentions, operand_names


def torch_runner(module: torch.nn.Module | Callable[..., object], spec: ComponentSpec) -> Runner:
    """A runner over a component module that takes inputs and returns outputs in the spec's order."""
    names = [tensor.name for tensor in spec.outputs]

    def run(inputs: Arrays) -> Arrays:
        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[t.name])) for t in spec.inputs]
        with torch.inference_mode():
            outputs = module(*tensors)
        result = outputs if isinstance(outputs, tuple | list) else (outputs,)
        return {name: t.float().numpy() for name, t in zip(names, result, strict=True)}

    return run


def reference_modules(checkpoint: Checkpoint, components: Iterable[str]) -> dict[str, torch.nn.Module]:
    """fp32 modules of ``components`` and of those they need inputs from."""
    modules = {}
    for component in needed(components, checkpoint.model):
        with torch.device("meta"):
            module = component_module(component, checkpoint.config)
        load_state(module.requires_grad_(False), checkpoint, torch.float32)
        modules[component] = module
    return modules


def reference_runners(checkpoint: Checkpoint, components: Iterable[str]) -> dict[str, Runner]:
    """The same as runners."""
    modules = reference_modules(checkpoint, components)
    return {c: torch_runner(m, component_spec(c, checkpoint.config)) for c, m in modules.items()}


def whole_amax(
    checkpoint: Checkpoint,
    components: Iterable[str],
    batches: Iterable[Batch],
    algorithm: str = "max",
    kinds: Mapping[str, str] | None = None,
) -> dict[str, dict[str, float]]:
    """Activation amax of every linear and attention: component -> layer -> amax."""
    modules = reference_modules(checkpoint, components)
    runners = {c: torch_runner(m, component_spec(c, checkpoint.config)) for c, m in modules.items()}
    operands = {
        o: "fp8" for m in modules.values() for name in core_attentions(m) for o in operand_names(name)
    }
    watch = Watch(modules, observers(algorithm, {**operands, **(kinds or {})}))
    with watch.hooks():
        for batch in batches:
            for _ in run_chain(runners, batch, checkpoint.model):
                pass
    return watch.take()
