"""Jobs that come one after the other, from a client in a thread of its own, while they are attacked."""

import threading
import time
from collections.abc import Callable
from typing import Self

from devtools.faults.cluster import Cluster
from gradcam_worker.schemas.job import Job


class Stream:
    """Submits the jobs of a cluster in a thread, never more than `ahead` of those that are done."""

    def __init__(
        self,
        cluster: Cluster,
        unfinished: Callable[[], int],
        *,
        jobs: int,
        ahead: int,
        until: threading.Event | None = None,
        make: Callable[[int], Job] | None = None,
        every_s: float = 0.0,
        first: int = 0,
    ) -> None:
        """At least `jobs`; where there is `until`, on and on until it is set. `make`: number -> job.

        `every_s` is the pause between two of them, `first` the number of the first.
        """
        self._cluster, self._unfinished, self._jobs, self._ahead = cluster, unfinished, jobs, ahead
        self._until, self._make, self._first = until, make or cluster.job, first
        self.every_s = every_s  # may be changed while it runs
        self._stopped = threading.Event()
        self.made: list[Job] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def join(self) -> None:
        """Wait until all are submitted. Raises what came in between."""
        self._thread.join()
        if self.error:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._stopped.is_set() and self._more():
                if self._unfinished() >= self._ahead:
                    time.sleep(0.01)
                    continue
                job = self._make(self._first + len(self.made))
                self._cluster.submit(job)
                self.made.append(job)
                self._stopped.wait(self.every_s)
        except Exception as error:  # noqa: BLE001  # raised in `join`, by the thread that can do something
            self.error = error

    def _more(self) -> bool:
        return len(self.made) < self._jobs or (self._until is not None and not self._until.is_set())
