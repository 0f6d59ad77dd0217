"""A lock with two modes: many jobs at once, or one job alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gradcam_worker.errors import WorkerUnfit


class ExclusiveGate:
    """Runs a job under which a worker died alone in its process: should it die again, no other job is lost.

    A job that waits to be alone enters before those that come later; else it would wait for ever.
    """

    def __init__(self) -> None:
        """The gate is open, and no job has entered."""
        self._jobs: set[str] = set()
        self._alone = False  # a job is alone, or waits to be
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def enter(self, job_id: str, *, alone: bool = False) -> Iterator[bool]:
        """Hold the gate for a job within the block.

        Args:
            job_id: The id of the job.
            alone: Whether to wait until all other jobs have left, and to keep new ones out.

        Yields:
            Whether the job entered. False: it is in the process already, by another message.

        Raises:
            WorkerUnfit: The gate is closed.
        """
        with self._changed:
            entered = self._enter(job_id, alone=alone)
        try:
            yield entered
        finally:
            if entered:
                with self._changed:
                    self._jobs.discard(job_id)
                    self._alone = self._alone and not alone
                    self._changed.notify_all()

    def close(self) -> None:
        """Admit no more jobs, not even those that wait already."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _enter(self, job_id: str, *, alone: bool) -> bool:
        while self._alone and job_id not in self._jobs:
            self._wait()
        if job_id in self._jobs:
            return False
        self._check_open()
        self._alone = alone
        while alone and self._jobs:
            self._wait()
        self._jobs.add(job_id)
        self._changed.notify_all()  # a second message for this job need not wait until it ends
        return True

    def _wait(self) -> None:
        self._check_open()
        self._changed.wait()
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            message = "This worker stops: it begins nothing new."
            raise WorkerUnfit(message)
