"""The metrics and health of a whole host, where its devices have an engine process and job processes.

Each process serves its own at a Unix socket. The supervisor, which is never busy and outlives them, serves
one port: it asks them all, and joins their answers.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path

from gradcam_worker.observability import health
from gradcam_worker.observability.health import Health
from gradcam_worker.runtime.telemetry import depths_reader
from gradcam_worker.settings import Settings

ANSWER_TIMEOUT_S = 2.0  # of a process
NO_TURN_S = 30.0  # without a turn of the supervisor's loop: it does not supervise any more
NO_ANSWER = "does not answer"


@dataclass(frozen=True)
class HostProcess:
    """A process of this host."""

    name: str  # "engine-0", "jobs-0-1": its device's number, and its own
    device: int
    is_engine: bool
    socket: Path  # where it serves its metrics and health
    count_starts: Callable[[], int]


class HostTelemetry(Health):
    """The metrics and health of the processes of a host."""

    def __init__(self, processes: Sequence[HostProcess]) -> None:
        """Serve nothing yet.

        Args:
            processes: The processes. They need not run.
        """
        super().__init__()
        self._processes = processes
        self._turned_s = time.monotonic()
        self._stopping = threading.Event()
        # Each thread of the server may wait for all of them at once. Threads are made when they are needed.
        self._pool = ThreadPoolExecutor(health.THREADS * len(processes), thread_name_prefix="ask")
        self.live["supervisor"] = self._idle_reason

    def serve(self, settings: Settings) -> None:
        """Serve at the port of the settings until the process ends. Raises InvalidSettings."""
        from gradcam_worker.observability.prometheus import CONTENT_TYPE, HostMetrics, ProcessScrape

        metrics = HostMetrics(depths_reader(settings))

        def scrape() -> bytes:
            asked = self._ask("/metrics")
            ledger = metrics.ledger_gauges()  # meanwhile
            return metrics.render(
                (
                    ProcessScrape(
                        process.name,
                        process.is_engine,
                        process.count_starts(),
                        answer[1] if answer and answer[0] == HTTPStatus.OK else None,
                    )
                    for process, answer in asked()
                ),
                ledger,
            )

        health.serve((settings.metrics_host, settings.metrics_port), self, scrape, CONTENT_TYPE)

    def turned(self) -> None:
        """Note that the supervisor's loop has turned."""
        self._turned_s = time.monotonic()

    def stopping(self) -> None:
        """Note that the host takes no new work."""
        self._stopping.set()

    def _idle_reason(self) -> str | None:
        idle_s = time.monotonic() - self._turned_s
        return f"has not supervised for {idle_s:.0f} s" if idle_s > NO_TURN_S else None

    def problems(self, path: str) -> dict[str, str] | None:
        """Return what is wrong, by process; see `Health.problems`.

        The host is ready, and has started, if that is true of a device's engine process and of one of its job
        processes: others of them may be about to be started again.
        """
        if path not in {"/ready", "/startup"}:
            return super().problems(path)
        if path == "/ready" and self._stopping.is_set():
            return {"supervisor": "is stopping"}
        found = {process: _problem(answer) for process, answer in self._ask(path)()}
        well = [process for process, problem in found.items() if problem is None]
        engines = {process.device for process in well if process.is_engine}
        if any(process.device in engines for process in well if not process.is_engine):
            return {}
        return {process.name: problem for process, problem in found.items() if problem}

    def _ask(self, path: str) -> Callable[[], Iterator[tuple[HostProcess, tuple[int, bytes] | None]]]:
        """Ask all processes at once. Returns what waits for their answers: None of one that gives none."""
        end_s = time.monotonic() + ANSWER_TIMEOUT_S
        asked = [
            (process, self._pool.submit(health.ask, process.socket, path, ANSWER_TIMEOUT_S))
            for process in self._processes
        ]
        return partial(_answers, asked, end_s)


def _answers(
    asked: Sequence[tuple[HostProcess, "Future[tuple[int, bytes]]"]], end_s: float
) -> Iterator[tuple[HostProcess, tuple[int, bytes] | None]]:
    for process, future in asked:
        try:
            yield process, future.result(max(end_s - time.monotonic(), 0))
        except (OSError, HTTPException):  # also TimeoutError
            yield process, None


def _problem(answer: tuple[int, bytes] | None) -> str | None:
    """What a process says is wrong with it, in a sentence; None if nothing."""
    if answer is None:
        return NO_ANSWER
    status, body = answer
    if status == HTTPStatus.OK:
        return None
    try:
        why: Mapping[str, object] = json.loads(body)["why"]
        return "; ".join(f"{name}: {problem}" for name, problem in why.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"answers {status}"
