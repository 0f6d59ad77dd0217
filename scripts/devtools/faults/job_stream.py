"""Jobs that come one after the other, from a client in a thread of its own, while they are attacked."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from devtools.faults.cluster import Cluster
from gradcam_worker.schemas.job import Job


@dataclass
class JobStream:
    """Submits the jobs of a cluster in a thread."""

    cluster: Cluster
    unfinished: Callable[[], int]
    jobs: int  # at least
    ahead: int  # never more than these are unfinished
    endless: bool = False  # it goes on until `join`
    make: Callable[[int], Job] | None = None  # number -> job; None: the cluster's own; may be changed
    submit: Callable[[Job], object] | None = None  # None: the cluster's own client
    every_s: float = 0.0  # pause between two of them; may be changed while it runs
    first: int = 0  # number of the first
    made: list[Job] = field(default_factory=list)
    error: Exception | None = None

    def __enter__(self) -> Self:
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def join(self) -> None:
        """Wait until all are submitted. Raises what came in between."""
        self.endless = False
        self._thread.join()
        if self.error:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._left.is_set() and (self.endless or len(self.made) < self.jobs):
                if self.unfinished() >= self.ahead:
                    time.sleep(0.01)
                    continue
                job = (self.make or self.cluster.job)(self.first + len(self.made))
                self.cluster.submit(job, self.submit)
                self.made.append(job)
                self._left.wait(self.every_s)
        except Exception as error:  # noqa: BLE001  # raised in `join`, by the thread that can do something
            self.error = error
