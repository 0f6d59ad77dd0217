"""The ledger's counts of waiting and running work: gradcam_worker.observability.queue_depths.QueueDepths."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TenantUse:
    """What a tenant has queued, and what its jobs that ended today (UTC) have used."""

    queued: int
    jobs_today: int
    device_s_today: float


@dataclass(frozen=True)
class QueueDepths:
    """Numbers of jobs, events and workers, with ages in seconds, by the ledger's clock."""

    queued: Mapping[str, int]  # priority -> jobs, or shards
    oldest_s: Mapping[str, float]  # priority -> age of the oldest queued job or shard; 0 if none is queued
    retrying: int
    running: int
    dead: int  # failed, and kept for replay
    events: int  # the next ones of their recipient: a job's webhook, or the database
    oldest_event_s: float
    workers: int  # alive
    tenants: Mapping[str, TenantUse] = field(default_factory=dict)  # name -> use
