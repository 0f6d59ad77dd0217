"""Who is told what happens in a worker process, as it happens: this one keeps nothing of it.

`gradcam_worker.observability.prometheus` counts it. Whoever tells does not wait and is not told of an error:
a call must cost next to
nothing and raise nothing.
"""

from collections.abc import Mapping


class Observer:
    """Hears everything, and does nothing."""

    def job_ended(self, status: str, code: str) -> None:
        """A job has become final, and why where it has not succeeded: the code of an error, or ''."""

    def attempt_ended(self, outcome: str) -> None:
        """A message was handled: the value of a `gradcam_worker.execution.handler.Disposition`."""

    def in_flight(self, change: int, *, shard: bool) -> None:
        """So many more jobs, or shards, are run than before: 1 or -1."""

    def staged(self, metrics: Mapping[str, float]) -> None:
        """What an attempt at a job of one image has measured: `fetch_s` and the like, in seconds."""

    def rows_ended(self, explained: int, failed: int) -> None:
        """A shard has ended well, with so many rows."""

    def leases_renewed(self, count: int) -> None:
        """This worker goes on with so many jobs."""

    def lease_lost(self) -> None:
        """An attempt has to stop, because the job is another's by now."""

    def reaped(self, reason: str) -> None:
        """A job was put right: `lost` with its worker, `due` again, or `expired`."""

    def republished(self) -> None:
        """A queued job had no message any more, and has one again."""

    def delivered(self, outcome: str, count: int = 1) -> None:
        """Events were `delivered`, `failed` (again later, or left) or `parked`."""

    def loaded(self, seconds: float, *, well: bool) -> None:
        """A network was loaded and warmed, or could not be."""

    def computed(self, images: int, seconds: float) -> None:
        """The device has done a pass over so many images."""

    def image_read(self, size: int) -> None:
        """An image of so many bytes was read."""

    def artifact_written(self, size: int) -> None:
        """An object of so many bytes was stored."""


SILENT = Observer()
