"""Which backfills run: in a real Valkey."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from gradcam_worker.backfill import registry
from gradcam_worker.backfill.registry import BackfillLease, RedisBackfillRegistry
from gradcam_worker.errors import BackfillConflict, BackfillRunning
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.operations.top import Dashboard
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.settings import Settings

OUTPUT = "s3://results/photos"
NUMBER, OTHER = "01a216d4-0523-773f-a799-60224947ae4d", "01a216d4-0523-773f-a799-60224947ae4e"
USERS = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def backfills(settings: Settings) -> RedisBackfillRegistry:
    return RedisBackfillRegistry(RedisLedger(settings).server)


def lease(backfills: RedisBackfillRegistry, output: str = OUTPUT, **facts: Any) -> BackfillLease:
    return BackfillLease(backfills, output, lambda: {"backfill": "b"} | facts, lambda: ("shard-1", "shard-2"))


def test_an_output_is_one_backfills_at_a_time(backfills: RedisBackfillRegistry) -> None:
    with (
        lease(backfills),
        pytest.raises(BackfillRunning, match=r"^The .* run by process \d+ on .+: wait for it"),
        lease(backfills),
    ):
        pass
    with (
        lease(backfills),
        pytest.raises(BackfillConflict, match=r"Another backfill of .* is run by process"),
        lease(backfills, backfill="other"),
    ):
        pass
    with lease(backfills) as later:
        assert later.previous is not None
        assert (later.previous.facts["backfill"], later.previous.shards) == ("b", ("shard-1", "shard-2"))


def test_one_that_was_killed_on_this_machine_is_waited_for(
    backfills: RedisBackfillRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "LEASE_S", 0.5)
    monkeypatch.setattr(registry, "RENEWAL_INTERVAL_S", 0.1)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: gone.pid)
        assert lease(backfills).renew(enter=True).is_owner
    with lease(backfills) as later:
        assert later.status.is_owner


def test_one_that_was_killed_is_followed_and_finds_out(
    backfills: RedisBackfillRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "RENEWAL_INTERVAL_S", 3600)  # it is not renewed
    with lease(backfills) as killed:
        monkeypatch.setattr(registry, "LEASE_S", 0.001)
        time.sleep(0.01)
        with lease(backfills) as later:
            later.check()
            killed.renew()
            with pytest.raises(BackfillRunning, match="run by process"):
                killed.check()
        killed.renew()
        assert not killed.status.is_owner, "not even when the other has left"


def test_all_that_run_are_counted(backfills: RedisBackfillRegistry) -> None:
    with lease(backfills) as first, lease(backfills, "s3://results/others"):
        assert first.renew().running == 2
    with lease(backfills) as alone:
        assert alone.renew().running == 1


def test_whoever_wants_it_to_end_is_heard_once(
    backfills: RedisBackfillRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "RENEWAL_INTERVAL_S", 0.01)
    assert backfills.request_cancel(OUTPUT) is None
    with lease(backfills, done=7) as running:
        assert not running.status.cancel_requested
        found = backfills.request_cancel(OUTPUT + "/")
        assert found is not None
        assert found.is_running
        assert found.facts.items() >= {"done": 7}.items()
        wait_for(lambda: running.status.cancel_requested)
    left = backfills.request_cancel(OUTPUT)
    assert left is not None
    assert not left.is_running
    with lease(backfills) as again:
        assert not again.renew().cancel_requested


def test_a_lease_is_renewed_by_a_thread_of_its_own_with_how_far_it_is(
    backfills: RedisBackfillRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "RENEWAL_INTERVAL_S", 0.01)
    counted = iter(range(10**9))
    with BackfillLease(backfills, OUTPUT, lambda: {"done": next(counted)}, tuple) as one:
        threads = [thread.name for thread in threading.enumerate()]
        wait_for(lambda: (found := backfills.find(OUTPUT)) is not None and found.facts["done"] > 3)
        assert one.status.is_owner
        assert "backfill-lease" in threads
    assert "backfill-lease" not in [thread.name for thread in threading.enumerate()]


def test_a_registry_out_of_reach_ends_no_backfill_that_runs(
    settings: Settings, backfills: RedisBackfillRegistry, free_port: int
) -> None:
    away = RedisBackfillRegistry(
        RedisLedger(settings.model_copy(update={"ledger_url": f"redis://127.0.0.1:{free_port}"})).server
    )
    with lease(backfills) as one:
        one.registry = away
    assert one.status.is_owner


def shard_of(one: BackfillLease, **changes: Any) -> Shard:
    fields = {
        "backfill": NUMBER,
        "index": 0,
        "key": "00000000-0123456789abcdef",
        "first": 0,
        "rows": [{"uri": "s3://in/a.png"}],
        "network": "vgg16",
        "target": {"top_n": 1},
        "output": OUTPUT,
        "token": one.token,
    }
    return Shard.model_validate({**fields, **changes})


def test_only_a_shard_that_shows_its_backfills_token_is_admitted(backfills: RedisBackfillRegistry) -> None:
    with lease(backfills, backfill=NUMBER) as one:
        good = shard_of(one)
        assert backfills.admits(good)
        assert backfills.admits(shard_of(one, output=f"{OUTPUT}/"))
        for changes in ({"token": ""}, {"token": "x"}, {"backfill": OTHER}, {"output": "s3://results/other"}):
            assert not backfills.admits(shard_of(one, **changes)), changes
        assert one.token not in f"{good!r} {one!r} {one.facts()}"
    assert backfills.admits(good), "nobody runs it, and what is in flight comes to its end"


def test_a_token_is_its_backfills_whoever_goes_on_with_it_and_no_other_ones(
    settings: Settings, backfills: RedisBackfillRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "RENEWAL_INTERVAL_S", 3600)
    with lease(backfills, backfill=NUMBER) as first:
        in_flight = shard_of(first)
        with redis.Redis.from_url(settings.broker_url) as server:
            names: Any = server.keys(f"{settings.key_prefix}backfill*")
            server.delete(*names)  # a server that was started anew
            assert not backfills.admits(in_flight)
            first.renew()
            assert backfills.admits(in_flight)
    with lease(backfills, backfill=NUMBER) as again:
        assert again.token == first.token
    with lease(backfills, backfill=OTHER) as other:
        assert other.token != first.token
        assert not backfills.admits(in_flight)


def test_one_that_an_older_version_runs_has_no_token_and_gets_one_from_who_goes_on(
    settings: Settings, backfills: RedisBackfillRegistry
) -> None:
    with lease(backfills, backfill=NUMBER) as old:
        with redis.Redis.from_url(settings.broker_url) as server:
            names: Any = server.keys(f"{settings.key_prefix}backfill:*")
            server.hdel(names[0], "token")
        assert backfills.admits(shard_of(old, token=""))
        assert not backfills.admits(shard_of(old))
    with lease(backfills, backfill=NUMBER) as new:
        assert backfills.admits(shard_of(new))
        assert not backfills.admits(shard_of(new, token=""))


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[RedisLedger, redis.Redis]]:
    """The ledger of whoever may only submit, as `deploy/redis` has it, and a connection that may do all."""
    text = USERS.read_text()
    for name in ("SUBMITTER", "WORKER"):
        text = text.replace(f"SHA256-OF-THE-{name}S-PASSWORD", hashlib.sha256(b"secret").hexdigest())
    (tmp_path / "users.acl").write_text(f"{text}user admin on >secret ~* &* +@all\n")
    with servers.valkey(tmp_path, "--aclfile", str(tmp_path / "users.acl")) as server:
        url = f"redis://gradcam-submitter:secret@127.0.0.1:{server.port}/0"
        with redis.Redis(port=server.port, username="admin", password="secret") as admin:
            yield RedisLedger(Settings(broker_url=url)), admin


def test_whoever_may_only_submit_may_do_all_that_a_backfill_does(
    guarded: tuple[RedisLedger, redis.Redis],
) -> None:
    submitter, admin = guarded
    admin.hset("gradcam:workers", "gpu-1:7", f"{time.time() * 1000:.0f} well")
    with lease(RedisBackfillRegistry(submitter.server)) as one:
        shard = shard_of(one)
        assert submitter.submit(shard).status == "queued"
        assert submitter.read_many([shard.id])[shard.id].status == "queued"
        assert submitter.cancel(shard.id).status == "canceled"
        assert submitter.find_workers() == {"gpu-1:7": "well"}
        submitter.drop_dead_letter(shard.id)
        assert RedisBackfillRegistry(submitter.server).request_cancel(OUTPUT)
        assert one.renew().cancel_requested
    port = admin.get_connection_kwargs()["port"]
    dashboard = Dashboard(Settings(broker_url=f"redis://gradcam-worker:secret@127.0.0.1:{port}/0"))
    assert dashboard.snapshot().shards_ended["canceled"] == 1
    assert not admin.acl_log(), "nothing was denied"
    admin.hset("gradcam:workers", "gpu-2:8", "1 of long ago, which it may not forget")
    assert submitter.find_workers() == {"gpu-1:7": "well"}
