"""Prometheus metrics of one app: vLLM's names under our prefix and, so that dashboards fit, under vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from astrai_rs.engine import Engine

PREFIXES = ("astrai", "vllm")

_GAUGES = {
    "num_requests_running": "Samples in the running batch.",
    "num_requests_waiting": "Samples that wait for a place in a step.",
}
_COUNTERS = {
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "prompt_tokens_total": "Prompt tokens computed or found.",
    "generation_tokens_total": "Tokens generated.",
    "preemptions": "Samples whose blocks were taken and that were computed again.",
}
_NAMES = {"preemptions": "num_preemptions"}

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.5, 5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_LENGTHS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """What `/metrics` shows: the engine's own figures as of now, and latencies as users see them."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name
        self.num_finished = 0
        """Samples that have ended by themselves."""
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._first_token = self._histograms(
            "time_to_first_token_seconds", "Until the first token.", _FIRST_TOKEN
        )
        self._between = self._histograms(
            "inter_token_latency_seconds", "Between two tokens.", _BETWEEN_TOKENS
        )
        self._end_to_end = self._histograms("e2e_request_latency_seconds", "Of a whole sample.", _REQUEST)
        self._prompt_lengths = self._histograms("request_prompt_tokens", "Length of prompts.", _LENGTHS)
        self._output_lengths = self._histograms("request_generation_tokens", "Length of outputs.", _LENGTHS)
        self._success = [
            Counter(
                f"{prefix}:request_success",
                "Samples that ended by themselves.",
                ["model_name", "finished_reason"],
                registry=self._registry,
            )
            for prefix in PREFIXES
        ]

    def _histograms(self, name: str, text: str, buckets: tuple[float, ...]) -> list[Histogram]:
        return [
            Histogram(
                f"{prefix}:{name}", text, ["model_name"], buckets=buckets, registry=self._registry
            ).labels(self._model_name)
            for prefix in PREFIXES
        ]

    def token(self, seconds: float, *, first: bool) -> None:
        """A token has come, so long after the request or after the token before."""
        for histogram in self._first_token if first else self._between:
            histogram.observe(seconds)

    def finished(self, reason: str, seconds: float, lengths: tuple[int, int]) -> None:
        """A sample is complete; `lengths` are its prompt's and its output's, in tokens."""
        self.num_finished += 1
        for counter in self._success:
            counter.labels(self._model_name, reason).inc()
        figures = (
            (self._end_to_end, seconds),
            (self._prompt_lengths, lengths[0]),
            (self._output_lengths, lengths[1]),
        )
        for histograms, value in figures:
            for histogram in histograms:
                histogram.observe(value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry need not collect to know the names."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The engine's figures, for the registry."""
        stats = self._engine.stats()
        for prefix in PREFIXES:
            for key, text in _GAUGES.items():
                yield self._gauge(f"{prefix}:{key}", text, stats[key])
            usage = stats["kv_blocks_used"] / max(1, stats["kv_blocks_total"])
            yield self._gauge(
                f"{prefix}:kv_cache_usage_perc", "Share of the cache that is held; 1 is all.", usage
            )
            for key, text in _COUNTERS.items():
                counter = CounterMetricFamily(f"{prefix}:{_NAMES.get(key, key)}", text, labels=["model_name"])
                counter.add_metric([self._model_name], stats[key])
                yield counter

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([self._model_name], value)
        return gauge
