"""Prometheus metrics of a service: seconds of each stage, requests by outcome."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import CapabilityError
from .serving.chat_service import ChatService
from .serving.service import Service

if TYPE_CHECKING:
    from prometheus_client.core import Metric

NOW = ("running", "waiting")
"""The counts that rise and fall."""


class Collector:
    """A Prometheus collector of ``service`` and its model: ``REGISTRY.register(Collector(service))``.

    Of several services by name, ``Collector({"nano": service})``, every metric has the label ``model``.

    Gives ``ivl_export_stage_seconds`` (sum and count by stage), ``ivl_export_requests_total`` by outcome, and
    ``ivl_export_requests_now`` that are running and waiting.

    Raises:
        CapabilityError: prometheus_client is not installed.
    """

    def __init__(self, service: Service | ChatService | Mapping[str, Service | ChatService]) -> None:
        self._services = service if isinstance(service, Mapping) else {"": service}
        self._model = ["model"] if isinstance(service, Mapping) else []
        self._core = _prometheus()

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are now."""
        stages = self._core.SummaryMetricFamily(
            "ivl_export_stage_seconds", "Wall time of each stage.", labels=[*self._model, "stage"]
        )
        ended = self._core.CounterMetricFamily(
            "ivl_export_requests", "Requests by how they ended.", labels=[*self._model, "outcome"]
        )
        now = self._core.GaugeMetricFamily(
            "ivl_export_requests_now", "Requests in the service.", labels=[*self._model, "state"]
        )
        for name, service in self._services.items():
            model = [name] if self._model else []
            for stage, timing in service.model.timings.items():
                stages.add_metric([*model, stage], timing.calls, timing.seconds)
            for state, count in asdict(service.counts).items():
                (now if state in NOW else ended).add_metric([*model, state], count)
        yield from (stages, ended, now)


def exposition(service: Service | ChatService) -> bytes:
    """The page that Prometheus reads, of ``service`` alone; CapabilityError as :class:`Collector`."""
    collector = Collector(service)
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(collector)
    page: bytes = generate_latest(registry)
    return page


def _prometheus() -> Any:
    try:
        from prometheus_client import core
    except ImportError as error:
        raise CapabilityError(
            "prometheus_client is not installed.", str(error), "Install it: pip install 'ivl-export[serve]'"
        ) from error
    return core
