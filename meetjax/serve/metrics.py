"""Counts for Prometheus: of requests by route and status, of times, and of what the engine is doing."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
NOW = ("slots", "active", "queued", "prefix_bytes", "step_seconds")
"""Fields of the engine's Stats that are a state; the others only grow."""


class Metrics:
    """The counts of one app. stats: reads the engine's."""

    def __init__(self, stats: Callable[[], Any]):
        self.registry = CollectorRegistry()
        self.requests = Counter("meetjax_requests", "Requests answered", ("route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "meetjax_request_seconds", "From request to last byte", ("route",), buckets=SECONDS, registry=self.registry
        )
        self.first = Histogram("meetjax_first_token_seconds", "From request to first token", buckets=SECONDS, registry=self.registry)
        self.prompt = Counter("meetjax_prompt_tokens", "Prompt tokens of answered requests", registry=self.registry)
        self.new = Counter("meetjax_completion_tokens", "Tokens of answers", registry=self.registry)
        self.registry.register(_Engine(stats))

    def observe(self, route: str, status: int, seconds: float, facts: dict[str, Any]) -> None:
        """One request that has ended."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)
        self.prompt.inc(facts.get("prompt_tokens", 0))
        self.new.inc(facts.get("completion_tokens", 0))
        if (first := facts.get("first_token_seconds")) is not None:
            self.first.observe(first)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine(Collector):
    """Stats of the engine, read when asked for."""

    def __init__(self, stats: Callable[[], Any]):
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        for name, value in dataclasses.asdict(self.stats()).items():
            family = GaugeMetricFamily if name in NOW else CounterMetricFamily
            yield family(f"meetjax_engine_{name}", f"Engine: {name.replace('_', ' ')}", value=value)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the facts that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": when, "level": record.levelname.lower(), "event": record.getMessage(), **getattr(record, "facts", {})}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
