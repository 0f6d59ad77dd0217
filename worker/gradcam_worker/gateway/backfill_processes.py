"""The processes of the backfills that this gateway has started."""

from pathlib import Path
from subprocess import Popen

from gradcam_worker.errors import ServerBusy
from gradcam_worker.runtime import parent_watch
from gradcam_worker.settings import Settings

MAX_RUNNING = 4  # of one gateway process: each is a process of 150 MB


class BackfillProcesses:
    """Starts and stops them."""

    def __init__(self) -> None:
        """There are none yet."""
        self._running: list[Popen[bytes]] = []

    def start(self, command: list[str], settings: Settings, log_file: Path) -> Popen[bytes]:
        """Start a backfill. Raises ServerBusy where MAX_RUNNING run."""
        for ended in [one for one in self._running if one.poll() is not None]:
            parent_watch.stop(ended)  # which closes what is still open of it
            self._running.remove(ended)
        if len(self._running) >= MAX_RUNNING:
            message = f"{MAX_RUNNING} backfills run in this process; one of them must end before."
            raise ServerBusy(message)
        process = parent_watch.spawn(command, log=log_file, environment=settings.to_environment())
        self._running.append(process)
        return process

    def close(self) -> None:
        """Stop all; they can be resumed."""
        for process in self._running:
            parent_watch.stop(process)
