"""The only module that uses the Prometheus client: counts an `Observer`'s events, reads gauges when scraped.

The metrics are defined in `gradcam_worker.observability.definitions`.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from gradcam_worker import __version__
from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.observability.definitions import (
    BY_NAME,
    CODES,
    MAX_NETWORKS,
    MAX_TENANTS,
    METRICS,
    OPERATIONS,
    OTHER,
    OTHERS,
    PREFIX,
    STAGES,
    MetricDefinition,
    can_occur,
)
from gradcam_worker.observability.events import EndedJob, Observer
from gradcam_worker.observability.gpu import DeviceUse
from gradcam_worker.observability.queue_depths import QueueDepths, TenantUse
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

LEDGER_CACHE_S = 5.0  # how long a reading of the ledger is reused, however many scrapers there are
LOCK_TIMEOUT_S = 1.0  # for another scrape's reading, which may hang: the server has few threads
CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
PROCESS = "process"  # label of every sample of a host's processes
SUPERVISOR = "supervisor"  # its value for the supervisor itself
KINDS: Mapping[str, Callable[..., Any]] = {"counter": Counter, "histogram": Histogram, "gauge": Gauge}


class Metrics(Observer):
    """All metrics of a process, in a registry of its own. Thread-safe."""

    def __init__(self, starts: int = 1, role: str = "worker") -> None:
        """Create every series of the process's metrics, at zero.

        Args:
            starts: How often the worker of this device was started.
            role: Of this process: it shows the metrics that such a process has.
        """
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge for each counter
        self._registry = CollectorRegistry()
        self._collectors: dict[str, Any] = {}
        self._series: dict[tuple[str, ...], Any] = {}  # metric and the values of its labels
        self._networks = {OTHERS}  # values of that label
        for metric in METRICS:
            if metric.source == "process":
                self._register(metric, self._registry if role in metric.roles else None)
        ProcessCollector(registry=self._registry)
        self._at("worker_starts_total").inc(starts)
        self._at("build_info", __version__).set(1)

    def _register(self, metric: MetricDefinition, registry: CollectorRegistry | None) -> None:
        """Create the series of a metric. Without a registry it is counted, and not shown."""
        options: dict[str, Any] = {"buckets": metric.buckets} if metric.buckets else {}
        self._collectors[metric.name] = KINDS[metric.kind](
            PREFIX + metric.name, metric.help, [*metric.labels], registry=registry, **options
        )
        for values in itertools.product(*metric.labels.values()):
            if metric.name != "jobs_total" or can_occur(*values):
                self._at(metric.name, *values)  # from 0, so that `increase()` sees its first event

    def _at(self, name: str, *values: str) -> Any:
        """The series of a metric with these values of its labels."""
        series = self._series.get((name, *values))
        if series is None:
            series = self._collectors[name].labels(*values) if values else self._collectors[name]
            self._series[name, *values] = series
        return series

    def scrape(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)

    def set_gauge(self, name: str, read: Callable[[], float]) -> None:
        """Let each scrape read the gauge `name` from `read`."""
        self._collectors[name].set_function(read)

    def set_redis_checks(self, is_failing: Callable[[str], bool]) -> None:
        """Let each scrape read from `is_failing` which checks of Redis fail."""
        for check in BY_NAME["redis_check_failing"].labels["check"]:
            self._at("redis_check_failing", check).set_function(partial(is_failing, check))

    def set_ledger_gauges(self, read: Callable[[], QueueDepths]) -> None:
        """Let scrapes read the ledger's gauges from `read`.

        They are absent while it raises LedgerUnavailable.
        """
        self._registry.register(_ledger_collector(read))

    def set_device_gauges(self, read: Callable[[], DeviceUse]) -> None:
        """Let scrapes read the GPU's gauges from `read`."""
        self._registry.register(_CachedGauges(lambda: _device_gauges(read()), lambda: 0))

    def request_answered(self, operation: str, status: int, took_s: float | None) -> None:
        """Count a request to the HTTP API; `took_s`: until its answer began, None: it waited for a job."""
        known = operation if operation in OPERATIONS else OTHER
        self._at("http_requests_total", known, f"{status // 100}xx").inc()
        if took_s is not None:
            self._at("http_request_seconds", known).observe(took_s)

    def job_finished(self, status: str, code: str) -> None:
        """See `Observer.job_finished`."""
        self._at("jobs_total", status, code if code in CODES else OTHER).inc()

    def job_ended(self, job: EndedJob) -> None:
        """See `Observer.job_ended`."""
        network = self._network_label(job.network)
        self._at("network_jobs_total", network, job.status).inc()
        self._at("network_device_seconds_total", network).inc(job.device_s)
        if job.status != "canceled":
            self._at("job_seconds", network, job.priority).observe(job.age_s)

    def _network_label(self, network: str | None) -> str:
        if network and len(self._networks) <= MAX_NETWORKS:
            self._networks.add(network)
        return network if network in self._networks else OTHERS

    def message_handled(self, outcome: str) -> None:
        """See `Observer.message_handled`."""
        self._at("job_attempts_total", outcome).inc()
        if outcome == "dropped":
            self._at("messages_dropped_total").inc()

    def in_flight_changed(self, change: int, *, shard: bool) -> None:
        """See `Observer.in_flight_changed`."""
        self._at("shards_in_flight" if shard else "jobs_in_flight").inc(change)

    def stages_measured(self, metrics: Mapping[str, float]) -> None:
        """See `Observer.stages_measured`."""
        for stage in STAGES:
            if (seconds := metrics.get(f"{stage}_s")) is not None:
                self._at("job_stage_seconds", stage).observe(seconds)

    def shard_finished(self, explained: int, failed: int) -> None:
        """See `Observer.shard_finished`."""
        self._at("shard_rows_total", "explained").inc(explained)
        self._at("shard_rows_total", "failed").inc(failed)

    def leases_renewed(self, count: int) -> None:
        """See `Observer.leases_renewed`."""
        self._at("lease_renewals_total").inc(count)

    def lease_lost(self) -> None:
        """See `Observer.lease_lost`."""
        self._at("leases_lost_total").inc()

    def job_reaped(self, reason: str) -> None:
        """See `Observer.job_reaped`."""
        self._at("jobs_reaped_total", reason).inc()

    def message_republished(self) -> None:
        """See `Observer.message_republished`."""
        self._at("messages_republished_total").inc()

    def events_delivered(self, outcome: str, count: int = 1) -> None:
        """See `Observer.events_delivered`."""
        self._at("events_delivered_total", outcome).inc(count)

    def engine_requests_resent(self, count: int) -> None:
        """See `Observer.engine_requests_resent`."""
        self._at("engine_requests_resent_total").inc(count)

    def pixel_pool_waited(self, seconds: float) -> None:
        """See `Observer.pixel_pool_waited`."""
        self._at("pixel_pool_wait_seconds_total").inc(seconds)

    def network_loaded(self, seconds: float, *, succeeded: bool) -> None:
        """See `Observer.network_loaded`."""
        self._at("network_loads_total", "loaded" if succeeded else "failed").inc()
        if succeeded:
            self._at("network_load_seconds").observe(seconds)

    def batch_computed(self, images: int, seconds: float) -> None:
        """See `Observer.batch_computed`."""
        self._at("batch_images").observe(images)
        self._at("batch_seconds").observe(seconds)

    def image_read(self, size: int) -> None:
        """See `Observer.image_read`."""
        self._at("image_bytes_total").inc(size)

    def artifact_written(self, size: int) -> None:
        """See `Observer.artifact_written`."""
        self._at("artifact_bytes_total").inc(size)


@dataclass(frozen=True)
class ProcessScrape:
    """What one process of a host answered."""

    process: str  # value of the label `process`
    is_engine: bool
    starts: int
    text: bytes | None  # of its /metrics; None: it did not answer


class HostMetrics:
    """The metrics of all processes of a host: one scrape, each sample with the label `process`.

    The gauges of the ledger have no such label: they are the same for all, and are read here, once.
    """

    def __init__(self, read_depths: Callable[[], QueueDepths]) -> None:
        """Create the supervisor's own metrics.

        Args:
            read_depths: Reads the ledger's gauges, or raises LedgerUnavailable.
        """
        self._own = Metrics(role=SUPERVISOR)
        self._ledger = _ledger_collector(read_depths)

    def ledger_gauges(self) -> Sequence[Metric]:
        """Read the ledger's gauges. This may take as long as the ledger takes to answer."""
        return [*self._ledger.collect()]

    def render(self, scrapes: Iterable[ProcessScrape], ledger: Sequence[Metric]) -> bytes:
        """Return the metrics of all processes, and the supervisor's own, in Prometheus' text format.

        Args:
            scrapes: What each process answered. One whose answer is no metrics is shown as down.
            ledger: The ledger's gauges.
        """
        families: dict[str, Metric] = {}
        _add(families, SUPERVISOR, _parse(self._own.scrape()))
        labels = [PROCESS]
        up, starts, restarts = (
            family(PREFIX + name, BY_NAME[name].help, labels=labels)
            for family, name in (
                (GaugeMetricFamily, "process_up"),
                (CounterMetricFamily, "worker_starts_total"),
                (CounterMetricFamily, "engine_restarts_total"),
            )
        )
        for scrape in scrapes:
            answered = scrape.text is not None
            try:
                _add(families, scrape.process, _parse(scrape.text or b""))
            except Exception as error:  # noqa: BLE001  # whatever a process sends, the others are shown
                log.warning("process_metrics_refused", process=scrape.process, error=error)
                answered = False
            up.add_metric([scrape.process], answered)
            starts.add_metric([scrape.process], scrape.starts)
            if scrape.is_engine:
                restarts.add_metric([scrape.process], max(scrape.starts - 1, 0))
        return prometheus_client.generate_latest(
            _Families([*families.values(), up, starts, restarts, *ledger])
        )


class _Families(Collector):
    """Metrics that were read already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _parse(text: bytes) -> list[Metric]:
    return [*text_string_to_metric_families(text.decode())]


def _add(families: dict[str, Metric], process: str, found: Iterable[Metric]) -> None:
    """Add the samples of a process, labelled with its name, to those of the others."""
    for family in found:
        joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        if joined.type == family.type:  # else it is of another version, and its samples mean something else
            joined.samples += [
                sample._replace(labels={**sample.labels, PROCESS: process}) for sample in family.samples
            ]


class _CachedGauges(Collector):
    """Gauges that are read from a server or a driver, which may hang; absent where they cannot be read.

    One scrape at a time reads them, and the values are reused for `cache_s`. Another scrape waits for that
    reading up to LOCK_TIMEOUT_S, so at most one thread hangs.
    """

    def __init__(self, read: Callable[[], list[Metric]], cache_s: Callable[[], float]) -> None:
        self._read, self._cache_s, self._lock = read, cache_s, threading.Lock()
        self._read_at_s, self._gauges = float("-inf"), list[Metric]()

    def describe(self) -> Iterable[Metric]:
        return ()  # without this method, `register` would call `collect`

    def collect(self) -> Iterable[Metric]:
        if not self._lock.acquire(timeout=LOCK_TIMEOUT_S):
            return []
        try:
            if time.monotonic() - self._read_at_s >= self._cache_s():
                self._gauges = self._read()
                self._read_at_s = time.monotonic()
            return self._gauges
        finally:
            self._lock.release()


def _ledger_collector(read: Callable[[], QueueDepths]) -> _CachedGauges:
    def read_gauges() -> list[Metric]:
        try:
            return _ledger_gauges(read())
        except LedgerUnavailable as error:
            log.debug("ledger_metrics_failed", error=error)  # the leases' thread logs it as a warning
            return []

    return _CachedGauges(read_gauges, lambda: LEDGER_CACHE_S)


def _ledger_gauges(depths: QueueDepths) -> list[Metric]:
    return [
        _labelled_gauge("queue_jobs", depths.queued),
        _labelled_gauge("queue_oldest_seconds", depths.oldest_s),
        *_tenant_gauges(depths.tenants),
        _gauge("retrying_jobs", depths.retrying),
        _gauge("running_jobs", depths.running),
        _gauge("dead_jobs", depths.dead),
        _gauge("outbox_events", depths.events),
        _gauge("outbox_oldest_seconds", depths.oldest_event_s),
        _gauge("workers_alive", depths.workers),
    ]


def _device_gauges(use: DeviceUse) -> list[Metric]:
    values = {"device_memory_bytes": use.memory_bytes, "device_utilization_ratio": use.utilization}
    return [_gauge(name, value) for name, value in values.items() if value is not None]


def _gauge(name: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, BY_NAME[name].help, value=value)


def _tenant_gauges(tenants: Mapping[str, TenantUse]) -> list[Metric]:
    """Gauges of the tenants that use most, and of all others together."""
    by_use = sorted(tenants, key=lambda name: (-tenants[name].jobs_today, -tenants[name].queued, name))
    shown = {name: [tenants[name]] for name in by_use[:MAX_TENANTS]}
    if others := [tenants[name] for name in by_use[MAX_TENANTS:]]:
        shown[OTHERS] = others
    values: dict[str, Callable[[TenantUse], float]] = {
        "tenant_queue_jobs": lambda use: use.queued,
        "tenant_today_jobs": lambda use: use.jobs_today,
        "tenant_today_device_seconds": lambda use: use.device_s_today,
    }
    return [
        _labelled_gauge(metric, {name: sum(map(read, uses)) for name, uses in shown.items()})
        for metric, read in values.items()
    ]


def _labelled_gauge(name: str, values: Mapping[str, float]) -> Metric:
    """A gauge with one label: value of the label -> value."""
    family = GaugeMetricFamily(PREFIX + name, BY_NAME[name].help, labels=[*BY_NAME[name].labels])
    for label, value in values.items():
        family.add_metric([label], value)
    return family
