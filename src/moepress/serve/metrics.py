"""Figures for Prometheus, at /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import nn

from moepress.serve.engine import Engine
from moepress.store.statistics import statistics

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The figures of one server.

    Args:
        engine: whose state is read when somebody asks.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_OfEngine(engine))
        self.registry.register(_OfStore(engine.stepper.model))
        self.requests = Counter(
            "moepress_requests", "Answered requests.", ["path", "status"], registry=self.registry
        )
        self.left = Counter(
            "moepress_clients_left", "Requests whose client left.", registry=self.registry
        )
        self.first = Histogram(
            "moepress_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "moepress_request_seconds",
            "From the arrival of a request to the end of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware that counts answers by endpoint and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted)


class _OfEngine:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self.engine
        yield GaugeMetricFamily("moepress_answers_running", "Being computed.", engine.running)
        yield GaugeMetricFamily("moepress_answers_waiting", "Waiting.", engine.waiting)
        yield GaugeMetricFamily("moepress_healthy", "1: as /health says.", not engine.trouble())
        yield CounterMetricFamily("moepress_prompt_tokens", "Computed.", engine.prefilled)
        yield CounterMetricFamily(
            "moepress_prompt_tokens_reused", "Had been computed before.", engine.reused
        )
        yield CounterMetricFamily("moepress_generated_tokens", "Generated.", engine.generated)


class _OfStore:
    """Experts from disk; nothing where all of them are in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def collect(self) -> Iterator[Metric]:
        found = statistics(self.model)
        if found is None:
            return
        now = found.counts
        for name, help_text, value in (
            ("expert_uses", "Experts that calls of a layer needed.", now.uses),
            ("expert_hits", "Of these, in memory already.", now.hits),
            ("expert_read_bytes", "Read from the folder.", now.bytes_read),
            ("expert_wait_seconds", "Spent waiting for reads.", now.seconds_waited),
        ):
            yield CounterMetricFamily(f"moepress_{name}", help_text, value)
        yield GaugeMetricFamily("moepress_expert_held_bytes", "In memory.", now.bytes_held)
