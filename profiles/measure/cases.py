"""Tasks to be timed, and cases, which are timed tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...models.registry import families
from .timing import Measurement, StopRule, measure

Kind = Literal["component", "chained", "host", "baseline"]
"""A component's engine alone; a call of the runtime's model; the host's work; the torch modules."""

Clock = Literal["host clock", "CUDA events"]
GRAPHS = ", CUDA graph"
"""Suffix of a backend's name if its calls are replayed."""


@dataclass(frozen=True)
class EngineCalls:
    """``count`` calls of a component's engine at ``sizes`` inside one timed call."""

    component: str
    sizes: dict[str, int]
    count: int


@dataclass(frozen=True)
class Floor:
    """The least milliseconds of one timed call at the measured ceilings, and which of them decides.

    All products at their type's ceiling or all bytes at the copying ceiling, whichever takes longer; calls
    one after another.
    """

    ms: float
    bound: Literal["compute", "memory"]
    compute_ms: float
    memory_ms: float


@dataclass(frozen=True)
class Case:
    """One timed call.

    Args:
        name: a component, or a chained call (``encode_image InternVL-C``).
        kind: see :data:`Kind`.
        batch: images or texts of one call.
        sizes: the dynamic axes; for chained calls their counterparts (``tokens`` of a text).
        items: how many ``unit`` one call handles.
        unit: the unit of throughput.
        boundary: extent of the timed call.
        measurement: samples and statistics.
        stages_ms: chained calls: mean milliseconds a call by stage, over all samples. Components by name;
            the rest of the mean is the chain itself.
        backend, precision: backend and type (``onnxruntime``, ``fp8``; ``torch``, ``bf16``).
        clock: host clock or CUDA events.
        calls: engine calls in it; empty where none was recorded.
        floor: see :class:`Floor`; None where the work was not counted or no ceiling was measured.
    """

    name: str
    kind: Kind
    batch: int
    sizes: dict[str, int]
    items: int
    unit: str
    boundary: str
    measurement: Measurement
    stages_ms: dict[str, float]
    backend: str = ""
    precision: str = ""
    clock: Clock = "host clock"
    calls: tuple[EngineCalls, ...] = ()
    floor: Floor | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Its key among the cases of a profile."""
        sizes = tuple(sorted(self.sizes.items()))
        return self.kind, self.name, self.batch, sizes, self.backend, self.precision, self.clock

    @property
    def call(self) -> str:
        """Its name, and whether it was replayed from a CUDA graph."""
        return self.name + (GRAPHS if self.backend.endswith(GRAPHS) else "")

    @property
    def per_second(self) -> float:
        """Items per second."""
        return self.measurement.throughput(self.items)

    @property
    def mean_ms(self) -> float:
        """Mean over all samples: the sum of :attr:`stages_ms` and the chain's own time."""
        return sum(self.measurement.samples_ns) / len(self.measurement.samples_ns) / 1e6

    @property
    def components_ms(self) -> float:
        """Chained calls: the components' share of :attr:`mean_ms`."""
        engines = {component.name for family in families() for component in family.components}
        return sum(ms for stage, ms in self.stages_ms.items() if stage in engines)

    @property
    def rest_ms(self) -> float:
        """Chained calls: :attr:`mean_ms` without the components, the chain's own time."""
        return self.mean_ms - self.components_ms

    @property
    def of_floor(self) -> float | None:
        """The floor's share of the median time: 1 is as fast as the ceilings allow. None without a floor."""
        return None if self.floor is None else self.floor.ms / self.measurement.summary.p50_ms

    def to_json(self) -> dict[str, Any]:
        """Plain data with the derived figures."""
        data = {
            **vars(self),
            "calls": [vars(call) for call in self.calls],
            "floor": None if self.floor is None else vars(self.floor),
            "of_floor": self.of_floor,
            "per_second": self.per_second,
            "measurement": self.measurement.to_json(),
        }
        if self.kind == "chained":
            data |= {"mean_ms": self.mean_ms, "components_ms": self.components_ms}
        return data


@dataclass(frozen=True)
class Task:
    """A case to be timed; ``prepare`` makes its inputs and returns the call.

    ``timer`` turns the call into one that returns its nanoseconds; None: the host's clock is used.
    """

    name: str
    kind: Kind
    batch: int
    sizes: dict[str, int]
    items: int
    unit: str
    boundary: str
    prepare: Callable[[], Callable[[], object]]
    backend: str = ""
    precision: str = ""
    timer: Callable[[Callable[[], object]], Callable[[], int]] | None = None

    @classmethod
    def component(
        cls,
        kind: Kind,
        name: str,
        unit: str,
        sizes: dict[str, int],
        boundary: str,
        prepare: Callable[[], Callable[[], object]],
    ) -> Task:
        """One call of component ``name`` at ``sizes``; ``unit`` is that of its rows, or ``tokens``."""
        items = sizes["batch"] * (sizes["text"] if unit == "tokens" else 1)
        return cls(name, kind, sizes["batch"], sizes, items, unit, boundary, prepare)

    def time(
        self,
        rule: StopRule,
        stages: Callable[[], dict[str, float]] | None = None,
        record: Callable[[Callable[[], object]], tuple[EngineCalls, ...]] | None = None,
    ) -> Case:
        """Measure it.

        Args:
            rule: when to stop.
            stages: seconds by stage so far, of a chained call.
            record: makes the call once and says which engine calls were in it; None: a component's is itself.
        """
        call = self.prepare()
        own = () if self.kind in ("chained", "host") else (EngineCalls(self.name, self.sizes, 1),)
        calls = own if record is None else record(call)
        before: dict[str, float] = {}
        remember = None if stages is None else lambda: before.update(stages())
        sample = None if self.timer is None else self.timer(call)
        measurement = measure(call, rule, after_warmup=remember, sample=sample)
        spent = {} if stages is None else {k: s - before.get(k, 0.0) for k, s in stages().items()}
        scale = 1e3 / len(measurement.samples_ns)
        return Case(
            self.name, self.kind, self.batch, self.sizes, self.items, self.unit, self.boundary, measurement,
            {stage: seconds * scale for stage, seconds in spent.items() if seconds > 0},
            self.backend, self.precision, "host clock" if self.timer is None else "CUDA events", calls,
        )  # fmt: skip

    def of(self, backend: str, precision: str) -> Task:
        """This task, computed by ``backend`` in ``precision``."""
        return replace(self, backend=backend, precision=precision)
