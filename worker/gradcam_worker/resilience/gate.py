"""Who works in this process: many jobs at once, or a single one under suspicion."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gradcam_worker.errors import WorkerUnfit


class ExclusiveGate:
    """A job under which a worker died gets the process to itself, so that it takes no others with it.

    Who waits to be alone is let in before those who come later, or it would wait for ever.
    """

    def __init__(self) -> None:
        """Nobody is here."""
        self._jobs: set[str] = set()
        self._alone = False  # somebody is, or waits to be
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def enter(self, job_id: str, *, alone: bool = False) -> Iterator[bool]:
        """Wait for a place; whether the job was not here already, in which case it has none.

        Raises WorkerUnfit when nobody is let in any more.
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
        """Let nobody in any more, not even those who wait already."""
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
        self._changed.notify_all()  # whoever waits with a second message for it need not wait for its end
        return True

    def _wait(self) -> None:
        self._check_open()
        self._changed.wait()
        self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            message = "This worker stops: it begins nothing new."
            raise WorkerUnfit(message)
