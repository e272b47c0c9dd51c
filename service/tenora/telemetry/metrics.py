"""Prometheus metrics: the `vllm:*` names that routers, autoscalers and dashboards read already, and our own `tenora_*`.

Engine gauges and counters are read from the engine's last heartbeat when a scrape comes; request timings are observed
by the API. No adapter or tenant is a label of a histogram.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_TOKENS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Stats(Protocol):
    """What is read of the engine's statistics (`tenora.engine.messages.EngineStats`)."""

    @property
    def running(self) -> int: ...  # noqa: D102 - the fields are documented where they are defined
    @property
    def waiting(self) -> int: ...  # noqa: D102
    @property
    def kv_blocks_total(self) -> int: ...  # noqa: D102
    @property
    def kv_blocks_used(self) -> int: ...  # noqa: D102
    @property
    def prefix_queries(self) -> int: ...  # noqa: D102
    @property
    def prefix_hits(self) -> int: ...  # noqa: D102
    @property
    def preemptions(self) -> int: ...  # noqa: D102
    @property
    def prompt_tokens(self) -> int: ...  # noqa: D102
    @property
    def generation_tokens(self) -> int: ...  # noqa: D102
    @property
    def adapter_slots(self) -> int: ...  # noqa: D102
    @property
    def adapters_resident(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def adapters_running(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def adapters_waiting(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def adapter_loads(self) -> int: ...  # noqa: D102
    @property
    def adapter_load_seconds(self) -> float: ...  # noqa: D102
    @property
    def adapter_load_failures(self) -> int: ...  # noqa: D102
    @property
    def adapter_evictions(self) -> int: ...  # noqa: D102
    @property
    def training_runs(self) -> int: ...  # noqa: D102
    @property
    def trained_tokens(self) -> int: ...  # noqa: D102


class Metrics:
    """All metrics of one server, in a registry of their own.

    Args:
        model: the base's id, the value of the label `model_name`.
        stats: gives the engine's latest statistics.
        last_step: gives the Unix time of the engine's last heartbeat.
        leases_lost: gives the number of jobs that another process took from this one.
        worker_up: gives whether a worker is there; None where none is meant to be, which has no such metric.
        cache: gives how the KV cache is laid out and what else the engine settled at its start, by name.
    """

    def __init__(
        self,
        model: str,
        *,
        stats: Callable[[], Stats],
        last_step: Callable[[], float],
        leases_lost: Callable[[], int],
        worker_up: Callable[[], bool | None],
        cache: Callable[[], Mapping[str, int]],
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library does not annotate it
        self.registry = CollectorRegistry()
        self._model = model
        self.registry.register(_EngineCollector(model, stats, last_step, cache))
        self.registry.register(_JobCollector(leases_lost, worker_up))
        ProcessCollector(registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets).labels(model)

        self.first_token = histogram("vllm:time_to_first_token_seconds", "Request to first token.", _SECONDS)
        self.per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between tokens.", _TOKEN_SECONDS
        )
        self.latency = histogram("vllm:e2e_request_latency_seconds", "Request to last token.", _SECONDS)
        self.queue = histogram(
            "vllm:request_queue_time_seconds", "Waiting before the engine starts on a request.", _SECONDS
        )
        self.prefill = histogram("vllm:request_prefill_time_seconds", "Start of the prefill to first token.", _SECONDS)
        self.decode = histogram("vllm:request_decode_time_seconds", "First token to last token.", _SECONDS)
        self.prompt_tokens = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.generation_tokens = histogram("vllm:request_generation_tokens", "Generated tokens of a request.", _TOKENS)
        self._success = Counter(
            "vllm:request_success",
            "Requests that ended as they should.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort"):
            self._success.labels(model, reason)
        self._rejected = Counter(
            "tenora_rejected",
            "Requests that were refused or failed, by error code.",
            ["reason"],
            registry=self.registry,
        )
        self._refused = Counter(
            "tenora_refused_actions",
            "Actions that a key was not allowed to do.",
            ["action"],
            registry=self.registry,
        )
        self._jobs = Gauge(
            "tenora_jobs", "Fine-tuning jobs of all tenants, by status.", ["state"], registry=self.registry
        )
        self.draining = Gauge(
            "tenora_draining", "1 while the server refuses new requests to shut down.", registry=self.registry
        )

    def rejected(self, reason: str) -> None:
        """Count a request that was answered with an error; `reason` is the error's code, a small fixed set."""
        self._rejected.labels(reason).inc()

    def refused(self, action: str) -> None:
        """Count an action that a key may not do; `action` is one of a small fixed set."""
        self._refused.labels(action).inc()

    def finished(self, reason: str) -> None:
        """Count a choice that ended: stop, length, or abort if the client left."""
        self._success.labels(self._model, reason).inc()

    def render(self, jobs: Mapping[str, int]) -> bytes:
        """The text exposition that Prometheus scrapes. `jobs` counts them by status, every status named."""
        for status, count in jobs.items():
            self._jobs.labels(status).set(count)
        return generate_latest(self.registry)

    def timer(self) -> RequestTimer:
        """Start timing a generation request."""
        return RequestTimer(self)


@dataclass(slots=True)
class RequestTimer:
    """Times one request from its arrival; `token` at each piece of output, `finish` once at the end."""

    metrics: Metrics
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0

    def token(self, queue_seconds: float | None = None) -> None:
        """Note that output arrived. `queue_seconds`: how long the engine had let the request wait."""
        self.last = time.monotonic()
        if self.first is None:
            self.first = self.last
            waited = queue_seconds or 0.0
            self.metrics.first_token.observe(self.last - self.started)
            self.metrics.queue.observe(waited)
            self.metrics.prefill.observe(max(0.0, self.last - self.started - waited))

    def finish(self, prompt_tokens: int, generation_tokens: int, reasons: Iterable[str]) -> None:
        """Note the end. `generation_tokens` counts all choices; `reasons` has one finish reason for each."""
        now = time.monotonic()
        for reason in reasons:
            self.metrics.finished(reason)
        self.metrics.latency.observe(now - self.started)
        self.metrics.prompt_tokens.observe(prompt_tokens)
        self.metrics.generation_tokens.observe(generation_tokens)
        if self.first is not None:
            self.metrics.decode.observe(self.last - self.first)
            if generation_tokens > 1:
                self.metrics.per_token.observe((self.last - self.first) / (generation_tokens - 1))


@dataclass(slots=True, eq=False)  # the registry keeps collectors in a dict
class _EngineCollector(Collector):
    """Reads the engine's statistics at each scrape."""

    model: str
    stats: Callable[[], Stats]
    last_step: Callable[[], float]
    cache: Callable[[], Mapping[str, int]]

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        model = {"model_name": self.model}
        used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        yield _gauge("vllm:num_requests_running", "Sequences in the running batch.", stats.running, model)
        yield _gauge("vllm:num_requests_waiting", "Sequences waiting for room.", stats.waiting, model)
        yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", used, model)
        yield _counter("vllm:prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens, model)
        yield _counter("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens, model)
        yield _counter("vllm:num_preemptions", "Sequences put back to wait for KV blocks.", stats.preemptions, model)
        yield _counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries, model
        )
        yield _counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits, model)
        settled = {name: str(value) for name, value in self.cache().items()}
        cache = {**settled, "num_gpu_blocks": str(stats.kv_blocks_total), **model}
        yield _gauge("vllm:cache_config_info", "How the KV cache is laid out.", 1, cache)
        # One series: routers read the newest value and split the labels. Digests, not names: names are tenants' own.
        adapters = {
            "max_lora": str(stats.adapter_slots),
            "running_lora_adapters": ",".join(digest[:12] for digest in stats.adapters_running),
            "waiting_lora_adapters": ",".join(digest[:12] for digest in stats.adapters_waiting),
        }
        yield _gauge(
            "vllm:lora_requests_info", "Adapters in use now; the value is the Unix time.", time.time(), adapters
        )
        yield _gauge("tenora_adapters_resident", "Adapter versions on the device.", len(stats.adapters_resident))
        yield _counter("tenora_adapter_loads", "Adapter versions loaded to the device.", stats.adapter_loads)
        yield _counter("tenora_adapter_evictions", "Adapter versions that gave up their slot.", stats.adapter_evictions)
        yield _counter("tenora_adapter_load_failures", "Adapter loads that failed.", stats.adapter_load_failures)
        load = SummaryMetricFamily("tenora_adapter_load_seconds", "Time to load an adapter version.")
        load.add_metric([], count_value=stats.adapter_loads, sum_value=stats.adapter_load_seconds)
        yield load
        yield _gauge("tenora_training_runs", "Fine-tuning runs in the engine now.", stats.training_runs)
        yield _counter("tenora_train_tokens", "Tokens trained on.", stats.trained_tokens)
        yield _gauge(
            "tenora_engine_last_step_timestamp_seconds", "Last heartbeat of the engine's loop.", self.last_step()
        )


@dataclass(slots=True, eq=False)
class _JobCollector(Collector):
    """Reads at each scrape what the jobs' worker has counted, and whether it is there."""

    leases_lost: Callable[[], int]
    worker_up: Callable[[], bool | None]

    def collect(self) -> Iterator[Metric]:
        yield _counter(
            "tenora_job_lease_lost", "Jobs that another process took, their lease having run out.", self.leases_lost()
        )
        if (up := self.worker_up()) is not None:
            yield _gauge("tenora_worker_up", "1 while a worker is there to take jobs.", up)


def _gauge(name: str, text: str, value: float, labels: Mapping[str, str] | None = None) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels or {}))
    family.add_metric(list((labels or {}).values()), value)
    return family


def _counter(name: str, text: str, value: float, labels: Mapping[str, str] | None = None) -> Metric:
    family = CounterMetricFamily(name, text, labels=list(labels or {}))
    family.add_metric(list((labels or {}).values()), value)
    return family
