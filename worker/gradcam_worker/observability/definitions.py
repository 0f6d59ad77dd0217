"""Every metric of a worker process, defined once: name, help, labels with all their values, buckets.

What cannot be known just then, because the ledger is out of reach or there is no GPU, is absent, not zero.
Labels have few values, all known beforehand: the name of a network, as a job writes it, is none of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gradcam_worker import __version__, errors
from gradcam_worker.schemas.shard import ROUTES

PREFIX = "gradcam_"
OTHER = "other"  # the code of an error that a later version has and this one does not know

STAGES = ("queue", "fetch", "decode", "load", "batch_wait", "explain", "measure", "render", "upload")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600)
LONG_SECONDS = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


# of those that a status document can hold
_CODES = {one.code for one in errors.all_errors() if not issubclass(one, errors.LocalError)}
CODES = (*sorted({"", *_CODES}), OTHER)  # '': none, it has succeeded


@dataclass(frozen=True)
class Defined:
    """One metric."""

    kind: str  # counter, histogram or gauge
    name: str  # after the prefix
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # label -> all its values
    buckets: tuple[float, ...] = ()
    of: str = "process"  # who is asked: process, device or ledger


METRICS = (
    Defined(
        "counter",
        "jobs_total",
        "Jobs, and shards of backfills, that this process has made final. (A job that is cancelled while it "
        "waits is final by its client's hand, and in no worker's count.)",
        {"state": ("succeeded", "failed", "canceled", "expired"), "code": CODES},
    ),
    Defined(
        "counter",
        "job_attempts_total",
        "Messages by what became of them: done, later (tried again), dropped, returned to the queue.",
        {"outcome": ("done", "later", "dropped", "returned")},
    ),
    Defined("counter", "shard_rows_total", "Rows of finished shards.", {"outcome": ("explained", "failed")}),
    Defined("counter", "lease_renewals_total", "Leases renewed: about one a second for each job in hand."),
    Defined(
        "counter", "leases_lost_total", "Attempts that had to stop because another one had the job by then."
    ),
    Defined(
        "counter",
        "jobs_reaped_total",
        "Jobs put right: their worker was lost, their pause was over (due), or they expired in the queue.",
        {"reason": ("lost", "due", "expired")},
    ),
    Defined("counter", "messages_republished_total", "Queued jobs whose message was not to be found."),
    Defined(
        "counter", "messages_dropped_total", "Messages with nothing to say: duplicates, and of final jobs."
    ),
    Defined("counter", "worker_starts_total", "Starts of the worker on this device since its supervisor's."),
    Defined(
        "counter",
        "events_delivered_total",
        "Tries to tell somebody: delivered, failed (tried again, or left), parked until they are replayed.",
        {"outcome": ("delivered", "failed", "parked")},
    ),
    Defined("counter", "network_loads_total", "Networks loaded.", {"outcome": ("loaded", "failed")}),
    Defined("counter", "image_bytes_total", "Bytes of images read."),
    Defined("counter", "artifact_bytes_total", "Bytes of artifacts, manifests and datasets stored."),
    Defined(
        "histogram",
        "job_stage_seconds",
        "Seconds that attempts at jobs of one image spent in each stage. Queue: before the attempt; "
        "batch_wait: for the device; explain: the pass it was in, whole.",
        {"stage": STAGES},
        SECONDS,
    ),
    Defined("histogram", "batch_images", "Images in a pass of the device.", buckets=IMAGES),
    Defined("histogram", "batch_seconds", "Seconds that a pass took.", buckets=SECONDS),
    Defined("histogram", "network_load_seconds", "Seconds to load and warm a network.", buckets=LONG_SECONDS),
    Defined("gauge", "jobs_in_flight", "Jobs of one image that are run now."),
    Defined("gauge", "shards_in_flight", "Shards that are run now."),
    Defined("gauge", "breaker_open", "1: storage fails, and no jobs are taken until it is back."),
    Defined("gauge", "ready", "1: /ready says yes."),
    Defined("gauge", "networks_resident", "Networks in memory."),
    Defined("gauge", "build_info", "1, with the version as its label.", {"version": (__version__,)}),
    Defined("gauge", "device_memory_bytes", "Memory of the GPU in use, whoever uses it.", of="device"),
    Defined(
        "gauge",
        "device_utilization_ratio",
        "How busy the GPU was in the last moment.",
        of="device",
    ),
    Defined("gauge", "queue_jobs", "Queued jobs, or shards.", {"priority": ROUTES}, of="ledger"),
    Defined(
        "gauge",
        "queue_oldest_seconds",
        "How long the first of them has been queued; 0: there is none.",
        {"priority": ROUTES},
        of="ledger",
    ),
    Defined("gauge", "retrying_jobs", "Jobs that wait for their next attempt.", of="ledger"),
    Defined("gauge", "running_jobs", "Jobs and shards that are run now, by whomever.", of="ledger"),
    Defined("gauge", "dead_jobs", "Failed jobs that are kept for replay.", of="ledger"),
    Defined(
        "gauge",
        "outbox_events",
        "Events to be told next: one for each webhook of a job, or job in the database, that has any.",
        of="ledger",
    ),
    Defined(
        "gauge", "outbox_oldest_seconds", "How long the oldest of them has waited; 0: none.", of="ledger"
    ),
    Defined("gauge", "workers_alive", "Worker processes that live, on all machines.", of="ledger"),
)
ONE_CODE = {"succeeded": "", "canceled": errors.JobCanceled.code, "expired": errors.JobExpired.code}
BY_NAME = {one.name: one for one in METRICS}


def happens(state: str, code: str) -> bool:
    """Whether jobs end so."""
    return code == ONE_CODE[state] if state in ONE_CODE else code != ""
