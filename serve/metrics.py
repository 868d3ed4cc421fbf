"""Prometheus metrics of a server. Labels are routes and names of models here, never a client's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ..runtime.metrics import Collector
from .models import Models

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_COSINES = (0.5, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 1.0)
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Histograms of requests, counts of tokens, and what the models of a server count by themselves."""

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "ivl_export_request_seconds", "Time of a request, from its first byte to its answer.",
            ("route", "model", "status"), buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._first = Histogram(
            "ivl_export_first_token_seconds", "Time until a stream's first event.",
            ("model",), buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._tokens = Counter(
            "ivl_export_tokens", "Positions of prompts, of prompts' parts that a cache held, of answers.",
            ("model", "kind"), registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Admissions(models))
        self._cosines = Histogram(
            "ivl_export_shadow_cosine", "Cosine of an embedding and the shadow bundle's.",
            ("mode",), buckets=_COSINES, registry=self._registry,
        )  # fmt: skip
        self._top_1 = Counter(
            "ivl_export_shadow_top1", "Images whose likeliest label the shadow bundle finds, too, or not.",
            ("same",), registry=self._registry,
        )  # fmt: skip
        self._failed = Counter(
            "ivl_export_shadow_failed", "Comparisons that failed.", ("error",), registry=self._registry
        )
        self._services: Collector | None = None
        self.follow(models)

    def follow(self, models: Models) -> None:
        """Read the services that ``models`` have now."""
        if self._services is not None:
            self._registry.unregister(self._services)
        self._services = Collector({name: one.service for name, one in models.by_name.items()})
        self._registry.register(self._services)

    def cosine(self, mode: str, value: float) -> None:
        """An embedding was compared with the shadow bundle's."""
        self._cosines.labels(mode).observe(value)

    def top_1(self, same: bool) -> None:
        """A likeliest label was compared."""
        self._top_1.labels("yes" if same else "no").inc()

    def shadow_failed(self, error: str) -> None:
        """A comparison failed."""
        self._failed.labels(error).inc()

    def request(self, route: str, model: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, model, str(status)).observe(seconds)

    def first(self, model: str, seconds: float) -> None:
        """A stream's first event is there."""
        self._first.labels(model).observe(seconds)

    def tokens(self, model: str, usage: Mapping[str, Any]) -> None:
        """An answer has this ``usage``."""
        self._tokens.labels(model, "prompt").inc(usage["prompt_tokens"])
        if new := usage.get("completion_tokens"):
            self._tokens.labels(model, "completion").inc(new)
        if cached := usage.get("prompt_tokens_details", {}).get("cached_tokens"):
            self._tokens.labels(model, "cached").inc(cached)

    def page(self) -> bytes:
        """What Prometheus reads."""
        text: bytes = generate_latest(self._registry)
        return text


class _Admissions:
    """Items held and requests refused, by model."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """The numbers as they are now."""
        held = GaugeMetricFamily("ivl_export_items", "Items that run or wait.", labels=["model"])
        capacity = GaugeMetricFamily("ivl_export_items_most", "Items that may be.", labels=["model"])
        refused = CounterMetricFamily("ivl_export_refused", "Requests answered with 429.", labels=["model"])
        for name, served in self._models.by_name.items():
            held.add_metric([name], served.admission.held)
            capacity.add_metric([name], served.admission.capacity)
            refused.add_metric([name], served.admission.refused)
        yield from (held, capacity, refused)
