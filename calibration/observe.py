"""Measuring activation ranges: the fp32 model runs on a calibration set, hooks see every linear's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BuildError, CapabilityError, UsageError
from ..preprocess import ImageSettings, Tokenizer
from ..specs import ComponentSpec
from .chain import Arrays, Runner, reference_modules, run_chain, torch_runner
from .dataset import Batch, CalibrationSet
from .scales import Scales

if TYPE_CHECKING:
    import torch

    from ..models.checkpoint import Checkpoint

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
    """Hooks on the linears of component modules; they record while their own component runs, and only then.

    Args:
        modules: component -> module; parts may be shared between modules.
        make: makes the observer of one layer in one component.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], make: Callable[[], Observer]) -> None:
        self.modules, self.make = modules, make
        self.running: str | None = None
        self.found: dict[str, dict[str, Observer]] = {component: {} for component in modules}

    def see(self, component: str, layer: str, x: torch.Tensor) -> None:
        """Record one input of ``layer``; BuildError when it holds NaN or infinity."""
        if component != self.running:
            return
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

    def runner(self, component: str, runner: Runner) -> Runner:
        """``runner``, with :attr:`running` set while it runs."""

        def run(inputs: Arrays) -> Arrays:
            self.running = component
            try:
                return runner(inputs)
            finally:
                self.running = None

        return run


def observe(
    modules: Mapping[str, torch.nn.Module],
    specs: Mapping[str, ComponentSpec],
    batches: Iterable[Batch],
    *,
    algorithm: str = "max",
    percentile: float = 99.99,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Activation amax of every linear, for each component it runs in.

    Args:
        modules: component -> fp32 module (:func:`.chain.reference_modules`) of these and all before them.
        specs: component -> its spec.
        batches: one in memory at a time.
        algorithm: one of :data:`ALGORITHMS`.
        percentile: of the magnitudes, for ``percentile``.
        progress: called with the number of samples done.

    Returns:
        component -> layer (published name without ``.weight``) -> amax, all over 0.

    Raises:
        BuildError: NaN, infinity, or nothing but zeros at a layer's input (named); no batch at all.
        UsageError: an unknown algorithm or percentile.
        CapabilityError: ``percentile`` without ModelOpt.
    """
    watch = Watch(modules, _observers(algorithm, percentile))
    runners = {c: watch.runner(c, torch_runner(module, specs[c])) for c, module in modules.items()}
    done = 0
    with watch.hooks():
        for batch in batches:
            for _ in run_chain(runners, batch):
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


def calibrate(
    checkpoint: Checkpoint,
    components: Sequence[str],
    chosen: CalibrationSet,
    settings: ImageSettings,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 8,
    algorithm: str = "max",
    percentile: float = 99.99,
    progress: Callable[[int], None] | None = None,
) -> Scales:
    """Measure a checkpoint on a calibration set; arguments and errors as :func:`observe`.

    Components that ``components`` need inputs from are run too, and measured.
    """
    modules, specs = reference_modules(checkpoint, components)
    batches = chosen.batches(settings, tokenizer, batch_size)
    amax = observe(modules, specs, batches, algorithm=algorithm, percentile=percentile, progress=progress)
    return Scales(
        amax=amax,
        algorithm=algorithm_name(algorithm, percentile),
        samples=len(chosen),
        set_hash=chosen.hash,
        synthetic=chosen.synthetic,
        without_caption=chosen.without_caption,
        model=checkpoint.revision,
    )


def algorithm_name(algorithm: str, percentile: float = 99.99) -> str:
    """As recorded in ``scales.json``."""
    return f"percentile-{percentile:g}" if algorithm == "percentile" else algorithm


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
