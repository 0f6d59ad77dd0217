"""The processes of the backfills that this gateway has started."""

from pathlib import Path
from subprocess import Popen
from threading import Lock

from gradcam_worker.errors import ServerBusy
from gradcam_worker.runtime import parent_watch
from gradcam_worker.settings import Settings

MAX_RUNNING = 4  # of one gateway process: each is a process of 150 MB
MAX_RUNNING_OF_TENANT = 2  # so that no tenant holds them all


class BackfillProcesses:
    """Starts and stops them."""

    def __init__(self) -> None:
        """There are none yet."""
        self._running: dict[Popen[bytes], str | None] = {}  # with the tenant of each
        self._lock = Lock()  # requests start them in several threads

    def start(
        self, command: list[str], settings: Settings, log_file: Path, tenant: str | None
    ) -> Popen[bytes]:
        """Start a backfill. Raises ServerBusy where as many run as may, of all or of a tenant."""
        with self._lock:
            for ended in [one for one in self._running if one.poll() is not None]:
                parent_watch.stop(ended)  # which closes what is still open of it
                del self._running[ended]
            own = [*self._running.values()].count(tenant) if tenant is not None else 0
            if len(self._running) >= MAX_RUNNING or own >= MAX_RUNNING_OF_TENANT:
                running = len(self._running) if own < MAX_RUNNING_OF_TENANT else own
                message = f"{running} backfills run in this process; one of them must end before."
                raise ServerBusy(message)
            process = parent_watch.spawn(command, log=log_file, environment=settings.to_environment())
            self._running[process] = tenant
            return process

    def close(self) -> None:
        """Stop all; they can be resumed."""
        for process in self._running:
            parent_watch.stop(process)
