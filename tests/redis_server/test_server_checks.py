"""How Redis is set up, as each process and `gradcam doctor` find it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.observability.definitions import REDIS_CHECKS
from gradcam_worker.observability.prometheus import Metrics
from gradcam_worker.operations import doctor, servers
from gradcam_worker.redis_server import server_checks
from gradcam_worker.redis_server.server_checks import CHECKS, ServerMonitor, check_info
from gradcam_worker.runtime.processes import preflight
from gradcam_worker.settings import Settings

PASSWORD = "planted-password"  # of a server that lives for a test
REMOTE = "redis://redis.internal:6379/0"
WELL = {
    "redis_version": "7.4.1",
    "role": "master",
    "connected_slaves": 0,
    "aof_enabled": 1,
    "aof_last_write_status": "ok",
    "maxmemory": 1000,
    "maxmemory_policy": "noeviction",
    "used_memory": 100,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    """A Valkey of its own, which a test may set up, and whose user `few` may do next to nothing."""
    folder = tmp_path_factory.mktemp("checked")
    with (
        servers.valkey(folder) as running,
        redis.Redis(port=running.port, decode_responses=True) as connection,
    ):
        yield connection


def settings_of(server: redis.Redis, user: str = "") -> Settings:
    return Settings(broker_url=f"redis://{user}127.0.0.1:{server.get_connection_kwargs()['port']}/0")


def evicts(server: redis.Redis, policy: str, maxmemory: str) -> Settings:
    server.config_set("maxmemory", maxmemory)
    server.config_set("maxmemory-policy", policy)
    return settings_of(server)


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
def test_a_redis_that_forgets_accepted_jobs_stops_a_worker_and_says_what_to_set(
    policy: str, server: redis.Redis
) -> None:
    settings = evicts(server, policy, "100mb")
    why = rf"{policy} and maxmemory 104,857,600.*accepted jobs\. Set maxmemory-policy noeviction"
    with pytest.raises(InvalidSettings, match=f"^GRADCAM_BROKER_URL: .*{why}"):
        preflight.check(settings, stores=False)
    apart = Settings(broker_url="redis://127.0.0.1:1/0", ledger_url=settings.broker_url)
    with pytest.raises(InvalidSettings, match=f"^GRADCAM_LEDGER_URL: .*{why}"):
        preflight.check(apart, stores=False)


@pytest.mark.parametrize(
    ("check", "reported", "severity", "why"),
    [
        ("eviction", {}, "ok", "evicts nothing"),
        ("eviction", {"maxmemory": 0}, "ok", "evicts nothing"),
        (
            "eviction",
            {"maxmemory": 0, "maxmemory_policy": "allkeys-lru"},
            "warning",
            "only while maxmemory is 0",
        ),
        ("eviction", {"maxmemory_policy": "volatile-ttl"}, "warning", "idempotency keys before their time"),
        ("eviction", {"maxmemory_policy": "allkeys-lru"}, "error", "evicts accepted jobs"),
        ("persistence", {}, "ok", "survive its restart"),
        (
            "persistence",
            {"aof_enabled": 0},
            "warning",
            "a restart forgets what is in no snapshot.*appendonly yes",
        ),
        (
            "persistence",
            {"aof_enabled": 0, "connected_slaves": 2},
            "note",
            "one of its 2 replicas is promoted",
        ),
        ("persistence", {"aof_last_write_status": "err"}, "error", "cannot write its append-only file"),
        ("persistence", {"aof_last_bgrewrite_status": "err"}, "warning", "could not rewrite"),
        ("persistence", {"rdb_last_bgsave_status": "err"}, "warning", "could not write its last snapshot"),
        ("replication", {"connected_slaves": 1}, "ok", "a primary, with 1 replica"),
        ("replication", {"role": "slave", "master_host": "a", "master_port": 1}, "error", "replica of a:1"),
        ("memory", {"used_memory": 800}, "ok", "80% of maxmemory 1,000"),
        ("memory", {"used_memory": 900}, "warning", "when that is full it accepts no jobs"),
        ("memory", {"used_memory": 900, "mem_not_counted_for_evict": 200}, "ok", "70%"),
        ("memory", {"maxmemory": 0, "total_system_memory": 300}, "ok", "no maxmemory"),
        ("memory", {"maxmemory": 0, "total_system_memory": 150}, "warning", "67% of its machine's memory"),
        ("version", {}, "ok", "Redis 7.4.1"),
        ("version", {"redis_version": "7.2.4", "valkey_version": "9.1.0"}, "ok", "Valkey 9.1.0"),
        ("version", {"redis_version": "6.2.14"}, "warning", "never tested"),
    ],
)
def test_each_check_says_what_is_wrong_and_what_to_do(
    check: str, reported: dict[str, Any], severity: str, why: str
) -> None:
    by_name = {one.name: one for one in check_info(REMOTE, WELL | reported)}
    assert (*by_name,) == CHECKS == REDIS_CHECKS
    found = by_name[check]
    assert found.severity == severity
    assert bool(found.fix) == (not found.well)
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(str(found))


@pytest.mark.parametrize(
    "reported",
    [
        {},
        {"maxmemory": "5.00GiB", "used_memory": "n/a", "aof_enabled": 1, "connected_slaves": {"of": "many"}},
    ],
    ids=["left out", "no numbers"],
)
def test_a_managed_server_that_reports_little_passes(reported: dict[str, Any]) -> None:
    assert all(check.well for check in check_info(REMOTE, {"redis_version": "7.2.4"} | reported))


def test_a_server_of_this_machine_may_keep_everything_in_memory() -> None:
    for host in ("127.0.0.1", "localhost", "[::1]"):
        found = {one.name: one for one in check_info(f"redis://{host}:6379/0", WELL | {"aof_enabled": 0})}
        assert found["persistence"].severity == "note"


def test_what_changes_while_a_process_runs_is_found_and_told_again_only_where_jobs_are_lost(
    server: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = evicts(server, "noeviction", "100mb")
    monitor, metrics = ServerMonitor(settings), Metrics()
    metrics.set_redis_checks(monitor.is_failing)

    def lines_of_rounds(count: int = 2) -> list[tuple[str, str]]:
        caplog.clear()
        for _ in range(count):
            monitor.run_round()
        return [(record.levelname, record.getMessage().split()[0]) for record in caplog.records]

    def gauge() -> bytes:
        name = b'gradcam_redis_check_failing{check="eviction"} '
        return metrics.scrape().partition(name)[2][:1]

    assert lines_of_rounds() == [("INFO", "redis_noted")], "it writes no file, and is on this machine"
    assert (monitor.last_problem(), gauge()) == (None, b"0")
    evicts(server, "allkeys-lru", "100mb")
    assert lines_of_rounds() == [("ERROR", "redis_unfit")] * 2
    assert "accepted jobs" in (monitor.last_problem() or "")
    assert gauge() == b"1"
    evicts(server, "volatile-lru", "100mb")
    assert lines_of_rounds(server_checks.WARN_EVERY + 1) == [("WARNING", "redis_at_risk")] * 2
    assert (monitor.last_problem(), gauge()) == (None, b"1")
    assert "Set maxmemory-policy noeviction" in caplog.text
    evicts(server, "noeviction", "100mb")
    assert lines_of_rounds() == [("INFO", "redis_check_passed")]
    assert gauge() == b"0"


def test_a_replica_makes_a_process_unready_and_starts_it(server: redis.Redis, tmp_path: Path) -> None:
    evicts(server, "noeviction", "0")
    with servers.valkey(tmp_path) as other, redis.Redis(port=other.port, decode_responses=True) as replica:
        port = server.get_connection_kwargs()["port"]
        replica.replicaof("127.0.0.1", port)
        end = time.monotonic() + 20
        while replica.info("replication")["master_link_status"] != "up":
            assert time.monotonic() < end
            time.sleep(0.05)
        settings = settings_of(replica)
        preflight.check(settings, stores=False)  # it may be promoted
        monitor = ServerMonitor(settings)
        monitor.run_round()
        assert f"is a replica of 127.0.0.1:{port}" in (monitor.last_problem() or "")
        failed = [one.what for one in doctor._check_redis(settings) if not one.well]
        assert failed == ["redis replication"]
        assert server.info("replication")["connected_slaves"] == 1


@pytest.mark.parametrize("refused", ["-info", "without"])
def test_whoever_may_not_ask_is_told_so_once_and_starts(
    refused: str, server: redis.Redis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    options = ["--rename-command", "INFO", ""] if refused == "without" else []
    with (
        servers.valkey(tmp_path, *options) as other,
        redis.Redis(port=other.port, decode_responses=True) as admin,
    ):
        admin.acl_setuser(
            "few",
            enabled=True,
            passwords=[f"+{PASSWORD}"],
            commands=["+@all", *([refused] if not options else [])],
            keys=["*"],
        )
        settings = settings_of(admin, f"few:{PASSWORD}@")
        assert "its user needs the permission +info" in preflight.check_redis(settings)
        (finding,) = doctor._check_redis(settings)
        assert finding.well
        monitor = ServerMonitor(settings)
        monitor.run_round()
        monitor.run_round()
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert PASSWORD not in caplog.text + finding.detail
