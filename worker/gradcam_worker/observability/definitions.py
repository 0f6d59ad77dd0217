"""Every metric of a worker process, defined once: name, help, labels with all their values, buckets.

A value that is unknown, because the ledger is unreachable or there is no GPU, is absent, not zero. Labels
have few values, known beforehand but for two, which are bounded: networks that this worker knows, the first
MAX_NETWORKS that jobs name, and the MAX_TENANTS tenants with most jobs today. All others are OTHERS together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gradcam_worker import __version__, errors
from gradcam_worker.schemas.work import ROUTE, ROUTES

PREFIX = "gradcam_"
OTHER = "other"  # in place of an error code that only a later version knows
OTHERS = "(others)"  # of networks and tenants: neither can have this name
MAX_NETWORKS, MAX_TENANTS = 32, 20  # that have series of their own
ANY: tuple[str, ...] = ()  # values of a label that are not known beforehand

STAGES = ("queue", "fetch", "decode", "load", "batch_wait", "explain", "measure", "render", "upload")
DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600)
LOAD_BUCKETS = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
AGE_BUCKETS = (0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900, 3600)  # of a job when it becomes final
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# Processes that compute; and the one that shows what all processes of a host would show alike.
COMPUTES = ("worker", "engine")
ONCE = ("worker", "supervisor")

REDIS_CHECKS = ("eviction", "persistence", "replication", "memory", "version")

OPERATIONS = (  # of the HTTP API, by their operationId in its OpenAPI document
    "submit_job",
    "list_jobs",
    "read_job",
    "cancel_job",
    "retry_job",
    "job_events",
    "job_result",
    "job_viewer",
    "create_upload",
    "list_networks",
    "list_workers",
    "submit_backfill",
    "list_backfills",
    "read_backfill",
    "cancel_backfill",
    "live",
    "ready",
    "metrics",
    OTHER,
)

PRIORITIES = tuple(route for route in ROUTES if route != ROUTE)

# Error codes that a status document can hold; '' for a job that succeeded.
_CODES = {error.code for error in errors.all_errors() if not issubclass(error, errors.LocalError)}
CODES = (*sorted({"", *_CODES}), OTHER)


@dataclass(frozen=True)
class MetricDefinition:
    """One metric."""

    kind: str  # counter, histogram or gauge
    name: str  # without the prefix
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # label -> all its values
    buckets: tuple[float, ...] = ()
    source: str = "process"  # where its value is read: process, device, ledger or supervisor
    roles: tuple[str, ...] = ("worker", "jobs")  # the processes that have it, see `settings.Settings.role`


METRICS = (
    MetricDefinition(
        "counter",
        "jobs_total",
        "Jobs, and shards of backfills, that this process made final. (A job that is cancelled while it "
        "waits is made final by its client, so no worker counts it.)",
        {"state": ("succeeded", "failed", "canceled", "expired"), "code": CODES},
    ),
    MetricDefinition(
        "histogram",
        "job_seconds",
        "Seconds from when a job of one image was accepted until this process made it succeeded or failed, "
        "with all its attempts and pauses.",
        {"network": ANY, "priority": PRIORITIES},
        AGE_BUCKETS,
    ),
    MetricDefinition(
        "counter",
        "network_jobs_total",
        "Jobs of one image that this process ended, by network.",
        {"network": ANY, "state": ("succeeded", "failed", "canceled")},
    ),
    MetricDefinition(
        "counter",
        "network_device_seconds_total",
        "Seconds of the device that they used: each its equal shares of its passes.",
        {"network": ANY},
    ),
    MetricDefinition(
        "counter",
        "job_attempts_total",
        "Messages by outcome: done, later (retried), dropped, returned to the queue.",
        {"outcome": ("done", "later", "dropped", "returned")},
    ),
    MetricDefinition(
        "counter", "shard_rows_total", "Rows of finished shards.", {"outcome": ("explained", "failed")}
    ),
    MetricDefinition(
        "counter", "lease_renewals_total", "Leases renewed: about one a second for each running job."
    ),
    MetricDefinition(
        "counter", "leases_lost_total", "Attempts that had to stop because their lease was lost."
    ),
    MetricDefinition(
        "counter",
        "jobs_reaped_total",
        "Jobs moved on by the reaper: worker lost, due for the next attempt, or expired in the queue.",
        {"reason": ("lost", "due", "expired")},
    ),
    MetricDefinition(
        "counter",
        "messages_republished_total",
        "Messages published again for queued jobs whose message was lost.",
    ),
    MetricDefinition(
        "counter", "messages_dropped_total", "Messages without work: duplicates, and those of final jobs."
    ),
    MetricDefinition(
        "counter",
        "worker_starts_total",
        "Starts of this device's worker process, or with GRADCAM_JOB_PROCESSES of each process, since its "
        "supervisor started.",
        roles=("worker",),  # of the others the supervisor shows them, also while they are down
    ),
    MetricDefinition(
        "counter",
        "events_delivered_total",
        "Deliveries of events: delivered, failed (retried, or dropped), parked until they are replayed.",
        {"outcome": ("delivered", "failed", "parked")},
    ),
    MetricDefinition(
        "counter",
        "network_loads_total",
        "Networks loaded.",
        {"outcome": ("loaded", "failed")},
        roles=COMPUTES,
    ),
    MetricDefinition("counter", "image_bytes_total", "Bytes of images read."),
    MetricDefinition("counter", "artifact_bytes_total", "Bytes of artifacts, manifests and datasets stored."),
    MetricDefinition(
        "histogram",
        "job_stage_seconds",
        "Seconds that attempts at jobs of one image spent in each stage. Queue: before the attempt; "
        "batch_wait: waiting for the device; explain: computing the whole batch.",
        {"stage": STAGES},
        DURATION_BUCKETS,
    ),
    MetricDefinition(
        "histogram",
        "batch_images",
        "Images in a batch that the device computed.",
        buckets=BATCH_SIZE_BUCKETS,
        roles=COMPUTES,
    ),
    MetricDefinition(
        "histogram",
        "batch_seconds",
        "Seconds to compute a batch.",
        buckets=DURATION_BUCKETS,
        roles=COMPUTES,
    ),
    MetricDefinition(
        "histogram",
        "network_load_seconds",
        "Seconds to load and warm up a network.",
        buckets=LOAD_BUCKETS,
        roles=COMPUTES,
    ),
    MetricDefinition("gauge", "jobs_in_flight", "Jobs of one image that are running."),
    MetricDefinition("gauge", "shards_in_flight", "Shards that are running."),
    MetricDefinition(
        "gauge",
        "breaker_open",
        "1: the circuit breaker is open: storage fails, and no jobs are taken until it recovers.",
    ),
    MetricDefinition("gauge", "ready", "1: /ready answers 200."),
    MetricDefinition(
        "gauge",
        "redis_check_failing",
        "1: Redis is not set up as accepted jobs need it, by check: `gradcam doctor` says what to do.",
        {"check": REDIS_CHECKS},
        roles=("worker", "jobs", "gateway"),
    ),
    MetricDefinition("gauge", "networks_resident", "Networks in memory.", roles=COMPUTES),
    MetricDefinition(
        "gauge",
        "build_info",
        "1, with the version as its label.",
        {"version": (__version__,)},
        roles=("worker", "engine", "jobs", "supervisor", "gateway"),
    ),
    MetricDefinition(
        "counter",
        "http_requests_total",
        "Requests to the HTTP API, by operation and the first digit of the status.",
        {"operation": OPERATIONS, "status": ("2xx", "3xx", "4xx", "5xx")},
        roles=("gateway",),
    ),
    MetricDefinition(
        "histogram",
        "http_request_seconds",
        "Seconds from a request to the HTTP API to the beginning of its answer, without those that waited "
        "for a job (Prefer: wait).",
        {"operation": OPERATIONS},
        DURATION_BUCKETS,
        roles=("gateway",),
    ),
    MetricDefinition(
        "gauge",
        "http_open_requests",
        "Requests to the HTTP API that wait for a job, and event streams.",
        roles=("gateway",),
    ),
    MetricDefinition(
        "counter",
        "engine_requests_resent_total",
        "Requests that an engine process did not answer before it ended, and that its successor got.",
        roles=("jobs",),
    ),
    MetricDefinition(
        "gauge",
        "engine_requests_in_flight",
        "Requests that the engine process has not answered yet.",
        roles=("jobs",),
    ),
    MetricDefinition(
        "gauge",
        "pixel_pool_free_bytes",
        "Free memory for the pixels of requests, of GRADCAM_ENGINE_POOL_BYTES.",
        roles=("jobs",),
    ),
    MetricDefinition(
        "counter",
        "pixel_pool_wait_seconds_total",
        "Seconds that requests waited for that memory, all together.",
        roles=("jobs",),
    ),
    MetricDefinition(
        "gauge",
        "process_up",
        "1: the process answered this scrape; 0: its other metrics are absent.",
        source="supervisor",
        roles=("supervisor",),
    ),
    MetricDefinition(
        "counter",
        "engine_restarts_total",
        "Starts of an engine process after its first, also those that SIGHUP asked for.",
        source="supervisor",
        roles=("supervisor",),
    ),
    MetricDefinition(
        "gauge",
        "device_memory_bytes",
        "Memory of the GPU in use, by any process.",
        source="device",
        roles=COMPUTES,
    ),
    MetricDefinition(
        "gauge",
        "device_utilization_ratio",
        "Share of the driver's last sample in which the GPU was busy.",
        source="device",
        roles=COMPUTES,
    ),
    MetricDefinition(
        "gauge", "queue_jobs", "Queued jobs, or shards.", {"priority": ROUTES}, source="ledger", roles=ONCE
    ),
    MetricDefinition(
        "gauge",
        "queue_oldest_seconds",
        "How long the oldest of them has been queued; 0: none is queued.",
        {"priority": ROUTES},
        source="ledger",
        roles=ONCE,
    ),
    MetricDefinition(
        "gauge",
        "tenant_queue_jobs",
        "Queued jobs of a tenant.",
        {"tenant": ANY},
        source="ledger",
        roles=ONCE,
    ),
    MetricDefinition(
        "gauge",
        "tenant_today_jobs",
        "Jobs of a tenant that ended today (UTC).",
        {"tenant": ANY},
        source="ledger",
        roles=ONCE,
    ),
    MetricDefinition(
        "gauge",
        "tenant_today_device_seconds",
        "Seconds of the device that these jobs used.",
        {"tenant": ANY},
        source="ledger",
        roles=ONCE,
    ),
    MetricDefinition(
        "gauge", "retrying_jobs", "Jobs waiting for their next attempt.", source="ledger", roles=ONCE
    ),
    MetricDefinition(
        "gauge",
        "running_jobs",
        "Jobs and shards that are running, on all workers.",
        source="ledger",
        roles=ONCE,
    ),
    MetricDefinition("gauge", "dead_jobs", "Failed jobs kept for replay.", source="ledger", roles=ONCE),
    MetricDefinition(
        "gauge",
        "outbox_events",
        "Events to be delivered next: one for each job's webhook, or job in the database, that has any.",
        source="ledger",
        roles=ONCE,
    ),
    MetricDefinition(
        "gauge",
        "outbox_oldest_seconds",
        "How long the oldest of them has waited; 0: none.",
        source="ledger",
        roles=ONCE,
    ),
    MetricDefinition(
        "gauge",
        "workers_alive",
        "Worker processes that are alive, on all machines.",
        source="ledger",
        roles=ONCE,
    ),
)
_CODE_OF_STATE = {"succeeded": "", "canceled": errors.JobCanceled.code, "expired": errors.JobExpired.code}
BY_NAME = {metric.name: metric for metric in METRICS}


def can_occur(state: str, code: str) -> bool:
    """Return whether a job in this final state can have this error code."""
    return code == _CODE_OF_STATE[state] if state in _CODE_OF_STATE else code != ""
