"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from tenfold.engine.request import Usage
from tenfold.server.backend import Engine

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)  # seconds
PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Metrics:
    """Counts since the start, and the engine at this moment."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineStats(engine))
        self.open = self._gauge("http_requests_open", "HTTP requests that are not answered yet")
        self.refused = self._counter("requests_refused", "Requests that found the queue full")
        self.responses = Counter("tenfold_http_responses", "HTTP answers", ["status"], registry=self._registry)
        self._answers = self._counter("answers", "Answers given, to the end or not")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._cached = self._counter("cached_tokens", "Tokens of prompts that the prefix cache had")
        self._completion = self._counter("completion_tokens", "Tokens of answers")
        self._drafted = self._counter("drafted_tokens", "Tokens proposed by multi-token prediction")
        self._accepted = self._counter("accepted_tokens", "Proposed tokens that were right")
        self._first = self._histogram("first_token_seconds", "From a request to its first token", FIRST_TOKEN)
        self._each = self._histogram("token_seconds", "Per token after the first, mean of an answer", PER_TOKEN)

    def watch(self, answers: int) -> Watch:
        """Follows the answers to a request."""
        return Watch(self, answers)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(f"tenfold_{name}", help, registry=self._registry)

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"tenfold_{name}", help, registry=self._registry)

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"tenfold_{name}", help, buckets=buckets, registry=self._registry)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def answer(self, usage: Usage, seconds_per_token: float | None) -> None:
        self._answers.inc()
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        self._completion.inc(usage.completion_tokens)
        self._drafted.inc(usage.drafted_tokens)
        self._accepted.inc(usage.accepted_tokens)
        if seconds_per_token is not None:
            self._each.observe(seconds_per_token)


class Watch:
    """The times of the answers to one request."""

    def __init__(self, metrics: Metrics, answers: int) -> None:
        self._metrics, self._began = metrics, time.perf_counter()
        self._firsts: list[float | None] = [None] * answers
        self._lasts = [0.0] * answers
        self._later = [0] * answers  # tokens that came after those of the first update

    def tokens(self, choice: int, count: int) -> None:
        if not count:
            return
        now = self._lasts[choice] = time.perf_counter()
        if self._firsts[choice] is None:
            self._firsts[choice] = now
            self._metrics.first_token(now - self._began)
        else:
            self._later[choice] += count

    def done(self, usages: Sequence[Usage]) -> None:
        for usage, first, last, later in zip(usages, self._firsts, self._lasts, self._later, strict=True):
            self._metrics.answer(usage, (last - first) / later if first is not None and later else None)


class _EngineStats:
    """Asks the engine when it is asked itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        gauges = [
            ("tenfold_requests_running", "Requests in the batch", stats.running),
            ("tenfold_requests_waiting", "Requests in the queue", stats.waiting),
            (
                "tenfold_cache_bytes_used",
                "Bytes of pages and states in use, cached prefixes included",
                stats.memory_used,
            ),
            ("tenfold_cache_bytes_total", "Bytes of pages and states", stats.memory_total),
        ]
        for name, help, value in gauges:
            yield GaugeMetricFamily(name, help, value)
