"""Modelled time of every linear layer in every scheme, which the search for a recipe weighs against
accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...models.registry import ModelConfig, component_of
from ...quantization.schemes import SCHEMES
from .estimate import efficiencies
from .evidence import paper
from .flops import layer_type
from .gpus import GPUS, GpuPeaks
from .roofline import Arithmetic, component_cost, component_time
from .sizes import linear_shapes


def gpu_of(target: str) -> GpuPeaks | None:
    """The first GPU of the table that ``target`` (``sm89``) runs on, None if there is none."""
    return next((gpu for gpu in GPUS.values() if gpu.sm == target), None)


def layer_times(
    config: ModelConfig, components: Sequence[str], schemes: Sequence[str], base: str, gpu: GpuPeaks
) -> dict[str, dict[str, float]]:
    """Layer -> scheme -> expected milliseconds, summed over the calls of ``components``.

    A call of each, at the sizes that engines are tuned for (``opt`` of the axes); of a chat's decoder the
    calls of a conversation: a prompt with its image and the steps of an answer, as the registry has them.
    Each layer has ``base`` among its schemes. The shares of the peaks are those of :mod:`.estimate`.

    Raises:
        CapabilityError: the GPU has no peak for a type.
    """
    layers = list(linear_shapes(config))
    shares = efficiencies(paper()).values
    times_of: dict[str, dict[str, float]] = {}
    for scheme in (base, *schemes):
        arithmetic = Arithmetic(base, _low(layers, scheme, base))
        for component, sizes, times_run in _calls(config, components):
            cost = component_cost(component, config, sizes, arithmetic)
            counts = {layer.layer: layer.count for layer in cost.layers}
            times = component_time(cost, gpu, arithmetic, shares).layers
            each = {time.layer: time.expected_ms / counts[time.layer] for time in times}
            for layer in layers:
                if layer_type(layer) in each:
                    own = times_of.setdefault(layer, {})
                    own[scheme] = own.get(scheme, 0.0) + times_run * each[layer_type(layer)]
    return times_of


def _calls(config: ModelConfig, components: Sequence[str]) -> Iterator[tuple[str, dict[str, int], int]]:
    """Component, sizes of a call, and how many calls."""
    for component in components:
        for sizes, count in component_of(component, config).typical_calls(config):
            yield component, sizes, count


def _low(layers: Sequence[str], scheme: str, base: str) -> Mapping[str, tuple[str, str]]:
    if scheme not in SCHEMES:
        return {}
    kind = SCHEMES[scheme]
    return {layer_type(layer): (kind.weight, kind.activation or base) for layer in layers}
