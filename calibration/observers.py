"""Observers of activation ranges, and the hooks that show them the inputs of linears and attentions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BuildError
from ..quantization.algorithms import algorithm_name
from ..quantization.attention import core_attentions, operand_names
from .histogram import Histogram, entropy_amax, mse_amax, percentile_amax

if TYPE_CHECKING:
    import torch


class Observer(Protocol):
    """Collects every input of one layer in one component; returns the amax at the end."""

    def collect(self, x: torch.Tensor, peak: float) -> None:
        """Look at one input [..., in], whose largest magnitude is ``peak``."""
        ...

    def amax(self) -> float:
        """The range to quantise to."""
        ...


class MaxObserver:
    """Largest magnitude seen."""

    def __init__(self) -> None:
        self._amax = 0.0

    def collect(self, x: torch.Tensor, peak: float) -> None:
        """Look at one input."""
        self._amax = max(self._amax, peak)

    def amax(self) -> float:
        """The largest magnitude."""
        return self._amax


class HistogramObserver:
    """A range taken from the histogram of all magnitudes; values beyond it saturate."""

    def __init__(self, pick: Callable[[Histogram], float]) -> None:
        self._histogram, self._pick = Histogram(), pick

    def collect(self, x: torch.Tensor, peak: float) -> None:
        """Count the values of one input."""
        self._histogram.add(x, peak)

    def amax(self) -> float:
        """The range that the algorithm picks; 0 if all inputs were zero."""
        return self._pick(self._histogram) if self._histogram.width else 0.0


class Watch:
    """Hooks on the linears of component modules.

    Args:
        modules: component -> module; weights may be shared between them, modules are not.
        make: makes the observer of a layer, by its name, for one component.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], make: Callable[[str], Observer]) -> None:
        self.modules, self.make = modules, make
        self.observers: dict[str, dict[str, Observer]] = {component: {} for component in modules}

    def see(self, component: str, layer: str, x: torch.Tensor) -> None:
        """Record one input of ``layer``; BuildError when it holds NaN or infinity."""
        x = x.detach()
        peak = float(x.abs().amax())
        if not math.isfinite(peak):
            raise BuildError(
                f"Calibration stopped: the input of {layer} holds NaN or infinity.",
                f"Seen in component {component}, shape {list(x.shape)}.",
                "Check the weights before this layer; calibration runs in fp32.",
            )
        observers = self.observers[component]
        if layer not in observers:
            observers[layer] = self.make(layer)
        observers[layer].collect(x, peak)

    def take(self) -> dict[str, dict[str, float]]:
        """component -> layer -> amax of the inputs since the last call.

        Raises:
            BuildError: nothing but zeros at a layer's input (named).
        """
        amax = {c: {n: o.amax() for n, o in layers.items()} for c, layers in self.observers.items()}
        self.observers = {component: {} for component in self.modules}
        for component, layers in amax.items():
            for layer, value in layers.items():
                if not (math.isfinite(value) and value > 0):
                    raise BuildError(
                        f"Calibration found no range for {layer}.",
                        f"In component {component} its input has amax {value} over all samples.",
                        "Check the weights before this layer (all zero?), or calibrate on more images.",
                    )
        return amax

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks are in place inside the ``with`` block only."""
        import torch

        handles = []
        for component, module in self.modules.items():
            for name, part in module.named_modules():
                if isinstance(part, torch.nn.Linear):
                    handles.append(part.register_forward_pre_hook(self._hook(component, name)))
            for name, part in core_attentions(module).items():
                handles.append(part.register_forward_pre_hook(self._attention_hook(component, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, component: str, layer: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        return lambda _, args: self.see(component, layer, args[0])

    def _attention_hook(self, component: str, attention: str) -> Callable[[Any, tuple[Any, ...]], None]:
        names = operand_names(attention)

        def hook(_: Any, args: tuple[Any, ...]) -> None:
            q, k, v = args[:3]
            for name, x in zip(names, (q * q.shape[-1] ** -0.5, k, v), strict=True):
                self.see(component, name, x)

        return hook


def observers(algorithm: str, kinds: Mapping[str, str] | None = None) -> Callable[[str], Observer]:
    """Factory of the observer of a layer.

    Args:
        algorithm: ``max``, ``percentile``, ``percentile-99.9``, ``entropy`` or ``mse``.
        kinds: layer -> the type its input will be rounded to; ``int8`` for those it leaves out.

    Raises:
        UsageError: an unknown algorithm or percentile.
    """
    name = algorithm_name(algorithm)
    if name == "max":
        return lambda layer: MaxObserver()
    if name.startswith("percentile"):
        percentile = float(name.partition("-")[2])
        return lambda layer: HistogramObserver(lambda seen: percentile_amax(seen, percentile))
    pick = entropy_amax if name == "entropy" else mse_amax
    chosen = kinds or {}
    return lambda layer: HistogramObserver(lambda seen: pick(seen, chosen.get(layer, "int8")))
