"""Checks of the eviction policy: the servers of broker and ledger must not evict keys when memory is full.

What a policy costs depends on which keys have a time to live. Queues, unacknowledged messages and jobs that
are not final have none: only `allkeys-*` evicts them, and accepted jobs are lost. Documents of final jobs,
their idempotency keys and records of backfills have one, so `volatile-*` evicts them: no accepted job is
lost, but an idempotency key may no longer prevent a second run, and a result may be forgotten before it was
read. (Records of running backfills are written again each second.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.redis_server.client import RedisClients
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger
from gradcam_worker.text.urls import without_secrets

log = EventLogger("gradcam")

CHECK_INTERVAL_S = 60.0  # a policy can be changed while a worker runs
FIX = (
    "Set maxmemory-policy noeviction there: `CONFIG SET maxmemory-policy noeviction`, redis.conf, or the "
    "parameters of a managed one. See deploy/redis/redis.conf."
)


@dataclass(frozen=True)
class EvictionPolicy:
    """What one server does when its memory is full."""

    setting: str  # the setting that names the server
    server: str  # its URL, without secrets
    name: str | None  # such as noeviction; None: the server does not report it
    maxmemory: int  # bytes; 0: no limit, so that memory is never full

    @property
    def evicts(self) -> bool:
        """Whether the policy evicts keys when a limit is reached."""
        return self.name not in {None, "noeviction"}

    @property
    def loses_jobs(self) -> bool:
        """Whether accepted jobs are evicted with the current limit."""
        return self.evicts and self.maxmemory > 0 and not str(self.name).startswith("volatile-")

    @property
    def is_safe(self) -> bool:
        """Whether nothing is evicted with the current limit."""
        return not self.evicts or not self.maxmemory

    def __str__(self) -> str:
        """The consequence, as a sentence."""
        if self.name is None:
            return f"{self.server} does not report its maxmemory-policy: its user needs the permission +info."
        policy = f"{self.server} has maxmemory-policy {self.name}"
        if not self.evicts:
            return f"{policy}: it evicts nothing"
        if not self.maxmemory:
            return f"{policy}, which is harmless only while maxmemory is 0."
        what = "accepted jobs" if self.loses_jobs else "final jobs and idempotency keys before their time"
        return f"{policy} and maxmemory {self.maxmemory:,}: when that is full it evicts {what}."


class EvictionMonitor:
    """Checks the eviction policies of broker and ledger, once a minute while its loop runs."""

    def __init__(self, settings: Settings, *, timeout_s: float = 5) -> None:
        """Connect to nothing yet.

        Args:
            settings: The URLs of broker and ledger are read from it.
            timeout_s: The maximum time for one answer.
        """
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
        self._last_problem: str | None = None
        self.loop = BackgroundLoop("eviction", self.run_round, CHECK_INTERVAL_S)

    def read_policies(self) -> Iterator[EvictionPolicy]:
        """Read the policy of each server.

        Yields:
            The policies. A server that cannot be reached is left out: its users report that.
        """
        for setting, server, clients in self._servers:
            try:
                memory = clients.read_memory_info()
            except LedgerUnavailable as error:
                log.debug("eviction_policy_unreadable", setting=setting, error=error)
                continue
            name = memory.get("maxmemory_policy")
            yield EvictionPolicy(
                setting, server, str(name) if name else None, int(memory.get("maxmemory", 0))
            )

    def last_problem(self) -> str | None:
        """The policies that lose accepted jobs, as sentences, by the last check; None: no such policy."""
        return self._last_problem

    def run_round(self) -> None:
        """Check once, and log policies that evict keys."""
        problems = []
        for policy in self.read_policies():
            if policy.loses_jobs:
                problems.append(str(policy))
                log.error("eviction_loses_jobs", setting=policy.setting, reason=f"{policy} {FIX}")
            elif not policy.is_safe:
                log.warning("eviction_loses_results", setting=policy.setting, reason=f"{policy} {FIX}")
        self._last_problem = " ".join(problems) or None
