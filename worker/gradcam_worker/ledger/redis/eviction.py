"""Whether Redis forgets what it was given when its memory is full: a queue and a ledger may not.

What a policy costs follows from which keys have a time to live. Queues, unacknowledged messages and jobs
that have not ended have none: only `allkeys-*` takes them, and an accepted job is lost then. Documents of
ended jobs, their idempotency keys and records of backfills have one, so that `volatile-*` takes those:
nothing accepted is lost, but a key no longer keeps a job from being run twice, and an end may be forgotten
before it was read. (Records of running backfills are written anew each second.)
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.ledger.redis.client import RedisClients
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets

log = logging.getLogger("gradcam")

EVERY_S = 60.0  # between two looks of a worker
FIX = (
    "Set maxmemory-policy noeviction there: `CONFIG SET maxmemory-policy noeviction`, redis.conf, or the "
    "parameters of a managed one. See deploy/redis/redis.conf."
)


@dataclass(frozen=True)
class Policy:
    """What one server does when its memory is full. `name` is None where it does not say."""

    setting: str  # which names the server
    server: str  # fit to be shown
    name: str | None
    maxmemory: int  # bytes; 0: no limit, and so never full

    @property
    def evicts(self) -> bool:
        """It would forget something, if it had a limit."""
        return self.name not in {None, "noeviction"}

    @property
    def loses_jobs(self) -> bool:
        """It forgets accepted jobs."""
        return self.evicts and self.maxmemory > 0 and not str(self.name).startswith("volatile-")

    @property
    def well(self) -> bool:
        """Nothing is forgotten as it is set up now."""
        return not self.evicts or not self.maxmemory

    def __str__(self) -> str:
        """What it means, as a sentence without the setting."""
        if self.name is None:
            return f"{self.server} does not say what it forgets when it is full: its user needs +info."
        said = f"{self.server} has maxmemory-policy {self.name}"
        if not self.evicts:
            return f"{said}: it forgets nothing"
        if not self.maxmemory:
            return f"{said}, which does no harm only as long as maxmemory is 0."
        what = "ended jobs and idempotency keys before their time"
        if self.loses_jobs:
            what = "accepted jobs"
        return f"{said} and maxmemory {self.maxmemory:,}: when that is full it forgets {what}."


class Eviction:
    """Looks at the servers of broker and ledger."""

    def __init__(self, settings: Settings, *, timeout_s: float = 5) -> None:
        """Nothing is connected yet."""
        urls = {settings.broker_url: "GRADCAM_BROKER_URL"}
        urls.setdefault(settings.ledger, "GRADCAM_LEDGER_URL")
        self._servers = [
            (
                name,
                without_secrets(url),
                RedisClients(settings, url, LedgerUnavailable, timeout_s=timeout_s, retries=0),
            )
            for url, name in urls.items()
        ]
        self._trouble: str | None = None
        self.loop = BackgroundLoop("eviction", self.round, EVERY_S)  # a policy can be changed at any time

    def look(self) -> Iterator[Policy]:
        """What each does; one that is away is left out, since whoever needs it says so."""
        for setting, server, clients in self._servers:
            try:
                said = clients.memory()
            except LedgerUnavailable as error:
                log.debug("%s", error)
                continue
            name = said.get("maxmemory_policy")
            yield Policy(setting, server, str(name) if name else None, int(said.get("maxmemory", 0)))

    def trouble(self) -> str | None:
        """What loses accepted jobs, as of the last look."""
        return self._trouble

    def round(self) -> None:
        """Look once, and say what is wrong."""
        lost = []
        for one in self.look():
            if one.loses_jobs:
                lost.append(str(one))
                log.error("%s: %s %s", one.setting, one, FIX)
            elif not one.well:
                log.warning("%s: %s %s", one.setting, one, FIX)
        self._trouble = " ".join(lost) or None
