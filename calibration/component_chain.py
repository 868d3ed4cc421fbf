"""Components chained on one batch, for calibration and accuracy.

A runner takes a component's inputs by name and returns its outputs by name, in numpy: a torch module, an ONNX
Runtime session and an engine all fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..arrays import Array
from ..models.calls import Arrays, Call
from ..models.registry import ModelConfig, component_of, family_of
from .dataset import Batch

Runner = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Step:
    """One run of one component."""

    component: str
    inputs: Arrays
    outputs: Arrays


def run_chain(runners: Mapping[str, Runner], batch: Batch, config: ModelConfig) -> Iterator[Step]:
    """Run every component that has a runner, and whose inputs others made, on ``batch``."""
    components = [name for name in runners if _fed(name, config, runners)]
    calls = family_of(config).calls(config, components, batch)
    yield from chain_steps(
        calls, batch.pixel_values, config, lambda call, inputs: runners[call.component](inputs)
    )


def chain_steps(
    calls: Iterable[Call],
    pixel_values: Array,
    config: ModelConfig,
    run: Callable[[Call, Arrays], Arrays],
) -> Iterator[Step]:
    """The steps of a batch's ``calls``, each fed with the outputs of those before it.

    Args:
        calls: all of one batch, in order.
        pixel_values: its images, float32 [B, 3, S, S].
        config: the model's sizes.
        run: gives the outputs of a call, from its inputs.
    """
    outputs: dict[str, Arrays] = {"samples": {"pixel_values": pixel_values}}
    for call in calls:
        inputs = component_of(call.component, config).feeds(config, call, outputs)
        step = Step(call.component, inputs, run(call, inputs))
        if call.continues is None:  # several calls may continue the keys and values of one
            outputs[call.component] = step.outputs
        yield step


def _fed(component: str, config: ModelConfig, runners: Mapping[str, Runner]) -> bool:
    """Whether all inputs of ``component`` that others make can be made."""
    own = component_of(component, config)
    makers = {link.component for link in own.links(config).values()} | {own.continues or component}
    makers.discard(component)
    return all(maker in runners and _fed(maker, config, runners) for maker in makers)
