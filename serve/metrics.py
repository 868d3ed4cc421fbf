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
        self._registry.register(Collector({n: one.service for n, one in models.by_name.items()}))

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
