"""gradcam_worker.observability.queue_depths."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class QueueDepths:
    """What waits, by the ledger's own count and clock."""

    queued: Mapping[str, int]  # priority -> jobs, or shards
    oldest_s: Mapping[
        str, float
    ]  # priority -> since when the first of them has waited; 0 where there is none
    retrying: int
    running: int
    dead: int  # failed, and kept for replay
    events: int  # that are next for their recipient: a job's webhook, the database
    oldest_event_s: float
    workers: int  # that live
