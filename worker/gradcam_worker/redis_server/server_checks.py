"""Checks that the servers of broker and ledger are set up as the promises about accepted jobs need it.

eviction     what is forgotten when memory is full. Queues, unacknowledged messages and jobs that are
             not final have no time to live: only `allkeys-*` evicts them, and accepted jobs are lost.
             Documents of final jobs, their idempotency keys and records of backfills have one, so
             `volatile-*` evicts them: an idempotency key may no longer prevent a second run, and a result
             may be forgotten before it was read. (Those of running backfills are written again each second.)
persistence  whether what was accepted survives a restart of the server, and whether it can still be written
replication  whether it is a primary: a replica is not written to
memory       how much is left until it refuses writes
version      whether it is one that this version was tested with

Every field is read from INFO. A server that leaves one out, as some managed ones do, or writes it in its own
way, passes its check.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Literal
from urllib.parse import urlsplit

from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.redis_server.client import NO_DISK, RedisClients
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger
from gradcam_worker.text.urls import without_secrets
from gradcam_worker.text.visible import counted

log = EventLogger("gradcam")

CHECK_INTERVAL_S = 60.0  # all of it can change while a worker runs
WARN_EVERY = 60  # checks that find the same: an hour
CHECKS = ("eviction", "persistence", "replication", "memory", "version")
FULL = 0.85  # of maxmemory: what is left is for the jobs that come until somebody reads the warning
HALF = 0.5  # of the machine's memory: rewriting the append-only file may need as much again
OLDEST = (7, 0)  # major and minor version: users.acl has selectors
CONF = "See deploy/redis/redis.conf."
FIX_EVICTION = (
    "Set maxmemory-policy noeviction there and on each of its replicas: `CONFIG SET maxmemory-policy "
    f"noeviction`, redis.conf, or the parameters of a managed one. {CONF}"
)
FIX_DISK = "Is its disk full, or read-only? Its log says why."
Severity = Literal["ok", "note", "warning", "error"]
WRITE_FAILURES: tuple[tuple[str, Severity, str], ...] = (  # a field of INFO that is not ok
    (
        "aof_last_write_status",
        "error",
        "cannot write its append-only file: it refuses writes, so no job is accepted",
    ),
    (
        "rdb_last_bgsave_status",
        "warning",
        "could not write its last snapshot: it refuses writes if stop-writes-on-bgsave-error is on",
    ),
    ("aof_last_bgrewrite_status", "warning", "could not rewrite its append-only file, which grows"),
)


@dataclass(frozen=True)
class ServerCheck:
    """The result of one check of one server."""

    name: str  # one of CHECKS
    detail: str  # what was found, and what it means
    fix: str = ""
    severity: Severity = "ok"  # error: accepted jobs are lost, or nothing can be written
    setting: str = ""  # that names the server
    is_permanent: bool = False  # an operator has to correct it: no worker starts meanwhile

    @property
    def well(self) -> bool:
        """Whether nothing has to be done."""
        return self.severity in {"ok", "note"}

    def __str__(self) -> str:
        """What was found, and what to do."""
        return f"{self.detail} {self.fix}".rstrip()


def check_info(server: str, info: Mapping[str, Any]) -> list[ServerCheck]:
    """Check what a server reports.

    Args:
        server: Its URL, without secrets.
        info: Its INFO; empty: it does not report it.

    Returns:
        A result for each of CHECKS; only the first where nothing is reported.
    """
    if not info:
        detail = f"{server} does not report its maxmemory-policy: its user needs the permission +info."
        return [ServerCheck("eviction", detail, severity="note")]
    checks: list[Callable[[str, Mapping[str, Any]], ServerCheck]] = [
        _check_eviction,
        _check_persistence,
        _check_replication,
        _check_memory,
        _check_version,
    ]
    return [check(server, info) for check in checks]


def _check_eviction(server: str, info: Mapping[str, Any]) -> ServerCheck:
    name, maxmemory = str(info.get("maxmemory_policy") or ""), _number(info, "maxmemory")
    if not name:
        detail = f"{server} does not report its maxmemory-policy: make sure that it is noeviction."
        return ServerCheck("eviction", detail, severity="note")
    policy = f"{server} has maxmemory-policy {name}"
    if name == "noeviction":
        return ServerCheck("eviction", f"{policy}: it evicts nothing")
    if not maxmemory:
        detail = f"{policy}, which is harmless only while maxmemory is 0."
        return ServerCheck("eviction", detail, FIX_EVICTION, "warning")
    loses_jobs = not name.startswith("volatile-")
    what = "accepted jobs" if loses_jobs else "final jobs and idempotency keys before their time"
    detail = f"{policy} and maxmemory {maxmemory:,}: when that is full it evicts {what}."
    severity: Severity = "error" if loses_jobs else "warning"
    return ServerCheck("eviction", detail, FIX_EVICTION, severity, is_permanent=loses_jobs)


def _check_persistence(server: str, info: Mapping[str, Any]) -> ServerCheck:
    for field, severity, problem in WRITE_FAILURES:
        if info.get(field, "ok") != "ok" and (info.get("aof_enabled") or not field.startswith("aof")):
            return ServerCheck("persistence", f"{server} {problem}.", FIX_DISK, severity)
    if "aof_enabled" not in info:
        detail = f"{server} does not report whether it writes an append-only file"
        return ServerCheck("persistence", detail, severity="note")
    if info["aof_enabled"]:
        detail = f"{server} writes an append-only file: accepted jobs survive its restart"
        return ServerCheck("persistence", detail)
    changes = counted(_number(info, "rdb_changes_since_last_save"), "change")
    detail = f"{server} writes no append-only file: a restart forgets what is in no snapshot ({changes} now)"
    if replicas := _number(info, "connected_slaves"):
        detail += f", unless one of its {replicas} replicas is promoted"
    elif _is_this_machine(server):
        detail += ". That is for development: it is on this machine"
    else:
        detail += ", jobs that were accepted among it."
        return ServerCheck("persistence", detail, f"Set appendonly yes. {CONF}", "warning")
    return ServerCheck("persistence", detail, severity="note")


def _check_replication(server: str, info: Mapping[str, Any]) -> ServerCheck:
    if info.get("role", "master") != "master":
        primary = f"{info.get('master_host', 'an unknown host')}:{info.get('master_port', '?')}"
        detail = f"{server} is a replica of {primary}: it must not be written to."
        fix = "Name the primary, or an address that follows it."
        return ServerCheck("replication", detail, fix, "error")
    replicas = counted(_number(info, "connected_slaves"), "replica")
    return ServerCheck("replication", f"{server} is a primary, with {replicas}")


def _check_memory(server: str, info: Mapping[str, Any]) -> ServerCheck:
    used = _number(info, "used_memory") - _number(info, "mem_not_counted_for_evict")
    limit, machine = _number(info, "maxmemory"), _number(info, "total_system_memory")
    if limit:
        detail = f"{server} uses {used / limit:.0%} of maxmemory {limit:,}"
        if used < FULL * limit:
            return ServerCheck("memory", detail)
        fix = "Raise maxmemory, lower GRADCAM_RETENTION_S, or find out who submits so much: `gradcam top`."
        return ServerCheck("memory", f"{detail}: when that is full it accepts no jobs.", fix, "warning")
    detail = f"{server} uses {used:,} bytes and has no maxmemory"
    if not machine or used < HALF * machine:
        return ServerCheck("memory", detail)
    detail += (
        f": that is {used / machine:.0%} of its machine's memory. When that is full, the system ends it."
    )
    fix = f"Set maxmemory to half of what the machine has, or use a larger one. {CONF}"
    return ServerCheck("memory", detail, fix, "warning")


def _check_version(server: str, info: Mapping[str, Any]) -> ServerCheck:
    version, valkey = str(info.get("redis_version", "")), str(info.get("valkey_version", ""))
    shown = f"Valkey {valkey}" if valkey else f"Redis {version}" if version else "of an unknown version"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    detail = f"{server} is {shown}"
    if numbers and numbers < OLDEST:
        fix = "Use Redis 7 or later, or Valkey."
        return ServerCheck("version", f"{detail}: this version was never tested with it.", fix, "warning")
    return ServerCheck("version", detail)


def _number(info: Mapping[str, Any], field: str) -> int:
    """A number of INFO; 0 where the server leaves it out, or writes it in its own way."""
    try:
        return int(info.get(field, 0))
    except (TypeError, ValueError):
        return 0


def _is_this_machine(server: str) -> bool:
    host = urlsplit(server).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host in {"", "localhost"}


class ServerMonitor:
    """Checks the servers of broker and ledger: when its loop starts, and once a minute while it runs."""

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
        self._found: dict[tuple[str, str], ServerCheck] = {}  # what is not ok, by setting and check
        self._rounds: dict[tuple[str, str], int] = {}  # how often it was found
        self.loop = BackgroundLoop("redis-checks", self.run_round, CHECK_INTERVAL_S, immediately=True)

    def read_checks(self) -> Iterator[ServerCheck]:
        """Check each server.

        Yields:
            The results. A server that cannot be reached is left out: its users report that.
        """
        for setting, server, clients in self._servers:
            try:
                info = clients.read_info()
            except LedgerUnavailable as error:
                if str(error.__cause__).startswith(NO_DISK):
                    yield ServerCheck("persistence", str(error), FIX_DISK, "error", setting)
                    continue
                log.debug("redis_checks_impossible", setting=setting, error=error)
                continue
            finally:
                clients.close()  # else it would be idle for a minute
            for check in check_info(server, info):
                yield replace(check, setting=setting)

    def last_problem(self) -> str | None:
        """What loses jobs or refuses writes, as sentences, by the last checks; None: nothing does."""
        return " ".join(one.detail for one in [*self._found.values()] if one.severity == "error") or None

    def is_failing(self, name: str) -> bool:
        """Whether a check, one of CHECKS, was not well when it was last made."""
        return any(not one.well for one in [*self._found.values()] if one.name == name)

    def run_round(self) -> None:
        """Check once, and log what is wrong: an error each time, a warning at first and then every hour."""
        for check in self.read_checks():
            key = (check.setting, check.name)
            before = self._found.get(key)
            if before and check.severity != before.severity:
                self._rounds.pop(key, None)
            if check.severity == "ok":
                if self._found.pop(key, None):
                    log.info(
                        "redis_check_passed", check=check.name, setting=check.setting, detail=check.detail
                    )
                continue
            self._found[key] = check
            self._log(check, self._rounds.get(key, 0))
            self._rounds[key] = self._rounds.get(key, 0) + 1

    @staticmethod
    def _log(check: ServerCheck, rounds: int) -> None:
        if check.severity == "error":
            log.error("redis_unfit", check=check.name, setting=check.setting, reason=check)
        elif check.severity == "warning" and rounds % WARN_EVERY == 0:
            log.warning("redis_at_risk", check=check.name, setting=check.setting, reason=check)
        elif not rounds:
            log.info("redis_noted", check=check.name, setting=check.setting, reason=check)
