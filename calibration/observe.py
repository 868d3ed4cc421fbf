"""Observers of activation ranges, and the hooks that show them every linear's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BuildError, CapabilityError, UsageError

if TYPE_CHECKING:
    import torch

ALGORITHMS = ("max", "percentile")


class Observer(Protocol):
    """Sees every input of one layer in one component, and says the amax at the end."""

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


class PercentileObserver:
    """A percentile of the magnitudes, over ModelOpt's histogram: outliers beyond it saturate."""

    def __init__(self, percentile: float) -> None:
        self._percentile = percentile
        self._calibrator: Any = _modelopt_calibrators().HistogramCalibrator(
            num_bits=8, axis=None, unsigned=False
        )

    def collect(self, x: torch.Tensor, peak: float) -> None:
        """Look at one input."""
        self._calibrator.collect(x)

    def amax(self) -> float:
        """The percentile."""
        return float(self._calibrator.compute_amax("percentile", percentile=self._percentile))


class Watch:
    """Hooks on the linears of component modules.

    Args:
        modules: component -> module; weights may be shared between them, modules are not.
        make: makes the observer of one layer in one component.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], make: Callable[[], Observer]) -> None:
        self.modules, self.make = modules, make
        self.found: dict[str, dict[str, Observer]] = {component: {} for component in modules}

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
        observers = self.found[component]
        if layer not in observers:
            observers[layer] = self.make()
        observers[layer].collect(x, peak)

    def take(self) -> dict[str, dict[str, float]]:
        """component -> layer -> amax of what was seen since the last call.

        Raises:
            BuildError: nothing but zeros at a layer's input (named).
        """
        amax = {c: {n: o.amax() for n, o in layers.items()} for c, layers in self.found.items()}
        self.found = {component: {} for component in self.modules}
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
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, component: str, layer: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        return lambda _, args: self.see(component, layer, args[0])


def algorithm_name(algorithm: str, percentile: float = 99.99) -> str:
    """As recorded in ``scales.json``."""
    return f"percentile-{percentile:g}" if algorithm == "percentile" else algorithm


def observers(algorithm: str, percentile: float = 99.99) -> Callable[[], Observer]:
    """What makes the observer of a layer.

    Raises:
        UsageError: an unknown algorithm or percentile.
        CapabilityError: ``percentile`` without ModelOpt.
    """
    if algorithm == "max":
        return MaxObserver
    if algorithm != "percentile":
        raise UsageError(f"Unknown calibration algorithm {algorithm!r}.", f"Known: {', '.join(ALGORITHMS)}.")
    if not 50 < percentile <= 100:
        raise UsageError(f"Percentile {percentile} is out of range.", fix="Use over 50, up to 100: 99.99.")
    _modelopt_calibrators()
    return lambda: PercentileObserver(percentile)


def _modelopt_calibrators() -> Any:
    try:
        from modelopt.torch.quantization import calib
    except ImportError as error:
        raise CapabilityError(
            "Percentile calibration needs NVIDIA ModelOpt.",
            str(error),
            "Install ivl-export[quant], or use the max algorithm.",
        ) from error
    return calib
