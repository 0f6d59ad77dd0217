"""A lock with two modes: many jobs at once, or a single one under suspicion."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gradcam_worker.errors import WorkerUnfit


class ExclusiveGate:
    """Gives a job under which a worker died the process to itself, so that it takes no others with it.

    A job that waits to be alone enters before those that come later, or it would wait for ever.
    """

    def __init__(self) -> None:
        """No job is in the process."""
        self._jobs: set[str] = set()
        self._alone = False  # a job is, or waits to be
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def enter(self, job_id: str, *, alone: bool = False) -> Iterator[bool]:
        """Within it, the job is in the process.

        Args:
            job_id: of the job.
            alone: wait until all others have left, and keep others out.

        Yields:
            Whether it entered. False: the job is in the process already, by another message.

        Raises:
            WorkerUnfit: the gate is closed.
        """
        with self._changed:
            free = self._enter(job_id, alone=alone)
        try:
            yield free
        finally:
            if free:
                with self._changed:
                    self._jobs.discard(job_id)
                    self._alone = self._alone and not alone
                    self._changed.notify_all()

    def close(self) -> None:
        """Let no job in any more, not even one that waits already."""
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
        self._changed.notify_all()  # a second message for it need not wait for its end
        return True

    def _wait(self) -> None:
        self._check_open()
        self._changed.wait()
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            message = "This worker stops: it begins nothing new."
            raise WorkerUnfit(message)
