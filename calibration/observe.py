"""Measuring activation ranges: the fp32 model runs on a calibration set, hooks see every linear's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BuildError, CapabilityError, UsageError
from .chain import Runner, run_chain
from .dataset import Batch

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


@dataclass
class Watch:
    """Hooks on all linears of a model; ``component`` says under which heading they record.

    Args:
        make: makes the observer of one layer in one component.
        component: the component that runs now; None records nothing.
    """

    make: Callable[[], Observer]
    component: str | None = None
    found: dict[str, dict[str, Observer]] = field(default_factory=dict)

    def see(self, layer: str, x: torch.Tensor) -> None:
        """Record one input of ``layer``; BuildError when it holds NaN or infinity."""
        if self.component is None:
            return
        observers = self.found.setdefault(self.component, {})
        x = x.detach()
        peak = float(x.abs().amax())
        if not math.isfinite(peak):
            raise BuildError(
                f"Calibration stopped: the input of {layer} holds NaN or infinity.",
                f"Seen in component {self.component}, shape {list(x.shape)}.",
                "Check the checkpoint with `--precision bf16` first; calibration runs in fp32.",
            )
        if layer not in observers:
            observers[layer] = self.make()
        observers[layer].collect(x, peak)

    @contextmanager
    def on(self, model: torch.nn.Module) -> Iterator[Watch]:
        """Hooks are in place inside the ``with`` block only."""
        import torch

        handles = []
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):

                def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...], layer: str = name) -> None:
                    self.see(layer, args[0])

                handles.append(module.register_forward_pre_hook(hook))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def observe(
    model: torch.nn.Module,
    runners: Mapping[str, Runner],
    batches: Iterable[Batch],
    *,
    algorithm: str = "max",
    percentile: float = 99.99,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Activation amax of every linear, for each component it runs in.

    Args:
        model: the module that ``runners`` run, in fp32; its ``named_modules`` give the layers their names.
        runners: component -> torch runner (:func:`.chain.torch_runner`).
        batches: one in memory at a time.
        algorithm: one of :data:`ALGORITHMS`.
        percentile: of the magnitudes, for ``percentile``.
        progress: called with the number of samples done.

    Returns:
        component -> layer -> amax, all over 0.

    Raises:
        BuildError: NaN, infinity, or nothing but zeros at a layer's input (named); no batch at all.
        UsageError: an unknown algorithm or percentile.
        CapabilityError: ``percentile`` without ModelOpt.
    """
    watch = Watch(_observers(algorithm, percentile))
    tracked = {name: _tracked(watch, name, runner) for name, runner in runners.items()}
    done = 0
    with watch.on(model):
        for batch in batches:
            for _ in run_chain(tracked, batch):
                pass
            done += len(batch.pixel_values)
            if progress is not None:
                progress(done)
    if not done:
        raise BuildError("Calibration saw no batch.", fix="Give a calibration set with at least one image.")
    found = {c: {n: o.amax() for n, o in layers.items()} for c, layers in watch.found.items()}
    for component, layers in found.items():
        for layer, value in layers.items():
            if not (math.isfinite(value) and value > 0):
                raise BuildError(
                    f"Calibration found no range for {layer}.",
                    f"In component {component} its input has amax {value} over {done} samples.",
                    "Check the weights before this layer (all zero?), or calibrate on more images.",
                )
    return found


def algorithm_name(algorithm: str, percentile: float = 99.99) -> str:
    """As recorded in ``scales.json``."""
    return f"percentile-{percentile:g}" if algorithm == "percentile" else algorithm


def _tracked(watch: Watch, component: str, runner: Runner) -> Runner:
    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        watch.component = component
        try:
            return runner(inputs)
        finally:
            watch.component = None

    return run


def _observers(algorithm: str, percentile: float) -> Callable[[], Observer]:
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
