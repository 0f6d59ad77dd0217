"""The one door to Prometheus: counts what an `Observer` is told, and looks up the rest when it is read.

Which metrics there are stands in `gradcam_worker.observability.definitions`.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gradcam_worker import __version__
from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.observability.definitions import (
    BY_NAME,
    CODES,
    METRICS,
    OTHER,
    PREFIX,
    STAGES,
    Defined,
    happens,
)
from gradcam_worker.observability.events import Observer
from gradcam_worker.observability.gpu import DeviceUse
from gradcam_worker.observability.queue_depths import QueueDepths

log = logging.getLogger("gradcam")

FRESH_S = 5.0  # that the ledger's answer is good for, whoever asks, however often
PATIENCE_S = 1.0  # that a scrape waits for another one's question, which may hang: threads are few
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
KINDS: Mapping[str, Callable[..., Any]] = {"counter": Counter, "histogram": Histogram, "gauge": Gauge}


class Metrics(Observer):
    """Counts, in a registry of its own. Threads share it."""

    def __init__(self, starts: int = 1) -> None:
        """Everything is at zero, every label's every value there from the start."""
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge for each counter
        self._registry = CollectorRegistry()
        self._made: dict[str, Any] = {}
        self._series: dict[tuple[str, ...], Any] = {}  # metric and the values of its labels
        for one in METRICS:
            if one.of == "process":
                self._define(one)
        ProcessCollector(registry=self._registry)
        self._at("worker_starts_total").inc(starts)
        self._at("build_info", __version__).set(1)

    def _define(self, one: Defined) -> None:
        more: dict[str, Any] = {"buckets": one.buckets} if one.buckets else {}
        made = KINDS[one.kind](PREFIX + one.name, one.help, [*one.labels], registry=self._registry, **more)
        self._made[one.name] = made
        for values in itertools.product(*one.labels.values()):
            if one.name != "jobs_total" or happens(*values):
                self._at(one.name, *values)  # 0 from the start, so that its first time is an increase

    def _at(self, name: str, *values: str) -> Any:
        found = self._series.get((name, *values))
        if found is None:
            found = self._made[name].labels(*values) if values else self._made[name]
            self._series[name, *values] = found
        return found

    def scrape(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)

    def look_up(self, name: str, look: Callable[[], float]) -> None:
        """A gauge is what `look` says when it is read."""
        self._made[name].set_function(look)

    def ask_ledger(self, ask: Callable[[], QueueDepths]) -> None:
        """The ledger's gauges are what `ask` says, which may raise LedgerUnavailable."""

        def look() -> list[Metric]:
            try:
                return _of_ledger(ask())
            except LedgerUnavailable as error:
                log.debug("metrics of the ledger: %s", error)  # the leases' thread has said it aloud
                return []

        self._registry.register(_Gauges(look, lambda: FRESH_S))

    def ask_device(self, ask: Callable[[], DeviceUse]) -> None:
        """The device's gauges are what `ask` says."""
        self._registry.register(_Gauges(lambda: _of_device(ask()), lambda: 0))

    def job_ended(self, status: str, code: str) -> None:
        """See `Observer.job_ended`."""
        self._at("jobs_total", status, code if code in CODES else OTHER).inc()

    def attempt_ended(self, outcome: str) -> None:
        """See `Observer.attempt_ended`."""
        self._at("job_attempts_total", outcome).inc()
        if outcome == "dropped":
            self._at("messages_dropped_total").inc()

    def in_flight(self, change: int, *, shard: bool) -> None:
        """See `Observer.in_flight`."""
        self._at("shards_in_flight" if shard else "jobs_in_flight").inc(change)

    def staged(self, metrics: Mapping[str, float]) -> None:
        """See `Observer.staged`."""
        for stage in STAGES:
            if (seconds := metrics.get(f"{stage}_s")) is not None:
                self._at("job_stage_seconds", stage).observe(seconds)

    def rows_ended(self, explained: int, failed: int) -> None:
        """See `Observer.rows_ended`."""
        self._at("shard_rows_total", "explained").inc(explained)
        self._at("shard_rows_total", "failed").inc(failed)

    def leases_renewed(self, count: int) -> None:
        """See `Observer.leases_renewed`."""
        self._at("lease_renewals_total").inc(count)

    def lease_lost(self) -> None:
        """See `Observer.lease_lost`."""
        self._at("leases_lost_total").inc()

    def reaped(self, reason: str) -> None:
        """See `Observer.reaped`."""
        self._at("jobs_reaped_total", reason).inc()

    def republished(self) -> None:
        """See `Observer.republished`."""
        self._at("messages_republished_total").inc()

    def delivered(self, outcome: str, count: int = 1) -> None:
        """See `Observer.delivered`."""
        self._at("events_delivered_total", outcome).inc(count)

    def loaded(self, seconds: float, *, well: bool) -> None:
        """See `Observer.loaded`."""
        self._at("network_loads_total", "loaded" if well else "failed").inc()
        if well:
            self._at("network_load_seconds").observe(seconds)

    def computed(self, images: int, seconds: float) -> None:
        """See `Observer.computed`."""
        self._at("batch_images").observe(images)
        self._at("batch_seconds").observe(seconds)

    def image_read(self, size: int) -> None:
        """See `Observer.image_read`."""
        self._at("image_bytes_total").inc(size)

    def artifact_written(self, size: int) -> None:
        """See `Observer.artifact_written`."""
        self._at("artifact_bytes_total").inc(size)


class _Gauges(Collector):
    """Asks somebody who may not answer, one question at a time; absent where there is no answer.

    What is known stays good for `fresh_s`. Whoever comes while another one asks waits for that answer, but
    not for long: one scrape at most hangs where a server, a resolver or a driver does.
    """

    def __init__(self, look: Callable[[], list[Metric]], fresh_s: Callable[[], float]) -> None:
        self._look, self._fresh_s, self._door = look, fresh_s, threading.Lock()
        self._asked_s, self._known = float("-inf"), list[Metric]()

    def describe(self) -> Iterable[Metric]:
        return ()  # or it would be asked when it is registered

    def collect(self) -> Iterable[Metric]:
        if not self._door.acquire(timeout=PATIENCE_S):
            return []
        try:
            if time.monotonic() - self._asked_s >= self._fresh_s():
                self._known = self._look()
                self._asked_s = time.monotonic()
            return self._known
        finally:
            self._door.release()


def _of_ledger(found: QueueDepths) -> list[Metric]:
    return [
        _by_priority("queue_jobs", found.queued),
        _by_priority("queue_oldest_seconds", found.oldest_s),
        _gauge("retrying_jobs", found.retrying),
        _gauge("running_jobs", found.running),
        _gauge("dead_jobs", found.dead),
        _gauge("outbox_events", found.events),
        _gauge("outbox_oldest_seconds", found.oldest_event_s),
        _gauge("workers_alive", found.workers),
    ]


def _of_device(found: DeviceUse) -> list[Metric]:
    said = {"device_memory_bytes": found.memory_bytes, "device_utilization_ratio": found.utilization}
    return [_gauge(name, value) for name, value in said.items() if value is not None]


def _gauge(name: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, BY_NAME[name].help, value=value)


def _by_priority(name: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, BY_NAME[name].help, labels=[*BY_NAME[name].labels])
    for priority, value in values.items():
        family.add_metric([priority], value)
    return family
