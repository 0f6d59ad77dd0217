"""The events of a worker process that metrics count: `Observer` names them and does nothing.

`gradcam_worker.observability.prometheus.Metrics` counts them. A method is called in the middle of the work:
it must be fast, must not block, and must not raise.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EndedJob:
    """A job of one image that became final."""

    network: str | None  # None: this worker knows no such network
    priority: str
    status: str
    age_s: float  # since it was accepted
    device_s: float  # that it used


class Observer:
    """Receives every event, and does nothing."""

    def job_finished(self, status: str, code: str) -> None:
        """A job became final with this status; `code` is that of its error, or ''."""

    def job_ended(self, job: EndedJob) -> None:
        """An attempt in this process made a job of one image final."""

    def message_handled(self, outcome: str) -> None:
        """A message was handled: the value of a `gradcam_worker.execution.handler.Disposition`."""

    def in_flight_changed(self, change: int, *, shard: bool) -> None:
        """A job or a shard was started (1) or is no longer run (-1)."""

    def stages_measured(self, metrics: Mapping[str, float]) -> None:
        """An attempt at a job of one image ended; `metrics` has `fetch_s` and the like, in seconds."""

    def shard_finished(self, explained: int, failed: int) -> None:
        """A shard succeeded, with these numbers of rows."""

    def leases_renewed(self, count: int) -> None:
        """This worker renewed `count` leases."""

    def lease_lost(self) -> None:
        """An attempt has to stop, because its lease expired and another attempt may have the job."""

    def job_reaped(self, reason: str) -> None:
        """The reaper moved a job on: `lost` with its worker, `due` for its next attempt, or `expired`."""

    def message_republished(self) -> None:
        """A queued job whose message was lost got a new one."""

    def events_delivered(self, outcome: str, count: int = 1) -> None:
        """Events were `delivered`, `failed` (and are retried, or dropped) or `parked`."""

    def network_loaded(self, seconds: float, *, succeeded: bool) -> None:
        """A network was loaded and warmed up, or could not be."""

    def batch_computed(self, images: int, seconds: float) -> None:
        """The device explained a batch of images."""

    def engine_requests_resent(self, count: int) -> None:
        """An engine process ended, and `count` requests that it did not answer are sent to its successor."""

    def pixel_pool_waited(self, seconds: float) -> None:
        """A request waited for the memory that its pixels are handed over in."""

    def image_read(self, size: int) -> None:
        """An image of `size` bytes was read."""

    def artifact_written(self, size: int) -> None:
        """An object of `size` bytes was stored."""


NULL_OBSERVER = Observer()
