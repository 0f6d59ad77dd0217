"""A ledger is exported and imported whole, and an import overwrites nothing that is newer."""

import json
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest

from gradcam_worker.errors import InvalidExport, WorkerLost
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.ledger.redis import transfer
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.ledger.redis.transfer import ImportCounts, LedgerImport, export_ledger
from gradcam_worker.ledger.redis.transfer_scripts import ExportJobs
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job, Target, Webhook
from gradcam_worker.schemas.listing import JobQuery
from gradcam_worker.schemas.shard import Row, Shard
from gradcam_worker.schemas.status import NetworkRef, Problem, StatusDocument, WorkerRef
from gradcam_worker.settings import Settings

WORKER = WorkerRef(id="gpu-1:7", device="cpu")
HOOK = Webhook(url="https://app.example/hook", events=("job.succeeded", "job.failed"))
# Statistics, presence, and what the reaper or a delivery process writes anew.
NOT_EXPORTED = ("ended:", "workers", "sinks", "claimed", "reaper", "rested:")


@pytest.fixture
def there(settings: Settings) -> RedisLedger:
    """Another ledger, which has nothing."""
    return RedisLedger(settings.model_copy(update={"key_prefix": f"{settings.key_prefix}there:"}))


@pytest.fixture
def here(settings: Settings) -> RedisLedger:
    return RedisLedger(settings)


@pytest.fixture
def make(job: Job) -> Callable[..., Job]:
    numbers = count()

    def make_job(**fields: Any) -> Job:
        return job.model_copy(update={"id": new_id(), "metadata": {"number": str(next(numbers))}, **fields})

    return make_job


def make_shard() -> Shard:
    return Shard(
        id=new_id(),
        backfill=new_id(),
        index=0,
        key="00000000-0123456789abcdef",
        first=0,
        rows=(Row(uri="s3://in/1.png"),),
        network="vgg16",
        target=Target(top_n=1),
        output="s3://out/set",
    )


def lines_of(ledger: RedisLedger) -> list[str]:
    return [json.dumps(record) for record in export_ledger(ledger.server)]


def import_into(
    ledger: RedisLedger,
    lines: Sequence[str],
    *,
    dry_run: bool = False,
    publish: Callable[[Sequence[str], str], None] = lambda ids, route: None,
) -> ImportCounts:
    importer = LedgerImport(ledger.server, publish, lease_s=30, retention_s=3600, dry_run=dry_run)
    return importer.run(lines)


def snapshot(ledger: RedisLedger) -> dict[str, Any]:
    """All keys with their content, without times that depend on the moment."""
    server: Any = ledger.server.redis
    found: dict[str, Any] = {}
    for key in map(str, server.scan_iter(f"{ledger.server.prefix}*")):
        name = key.removeprefix(ledger.server.prefix)
        if name.startswith((*NOT_EXPORTED, "there:")):
            continue
        kind, content = server.type(key), None
        if kind == "zset":
            content = sorted(server.zrange(key, 0, -1))
            if name.startswith(("listed:", "turn:", "dead", "retrying", "expiring")):
                content = server.zrange(key, 0, -1, withscores=True)
        elif kind == "hash":
            content = server.hgetall(key)
            content.pop("rung", None)
            if name.startswith("job:"):
                content["idempotency"] = content["idempotency"].removeprefix(ledger.server.prefix)
        elif kind == "list":
            content = server.lrange(key, 0, -1)
        else:
            content = server.get(key) if kind == "string" else server.smembers(key)
        found[name] = (content, server.pttl(key) > 0)
    return found


def fail(ledger: RedisLedger, document: StatusDocument) -> StatusDocument:
    problem = Problem.of(WorkerLost("It died."), stage="explain", attempt=1)
    return ledger.finish(ledger.claim(document, WORKER).document, status="failed", error=problem)


def fill(ledger: RedisLedger, make: Callable[..., Job], settings: Settings) -> dict[str, str]:
    """Jobs in each state, with all that can hang on them. Returns their ids."""
    outbox = RedisOutbox(ledger.server, retention_s=3600)
    outbox.open_sink("sql")
    acme = Tenant("acme", share=2)
    for name in ("tenants", "api_keys"):
        ledger.server.redis.hset(f"{ledger.server.prefix}{name}", "acme", f'{{"of": "{name}"}}')
    ids = {}

    def enter(name: str, tenant: Tenant | None = None, **fields: Any) -> StatusDocument:
        document = ledger.submit(make(**fields), tenant=tenant)
        ids[name] = document.id
        return document

    enter("queued", priority="high", webhooks=(HOOK,))
    enter("tenants", acme, idempotency_key="theirs")
    enter("nobodys")
    running = ledger.claim(enter("running", priority="low", idempotency_key="mine"), WORKER, in_turn=False)
    ledger.cancel(running.document.id)
    claimed = ledger.claim(enter("retrying", priority="low"), WORKER, in_turn=False).document
    ledger.postpone(claimed, delay_s=600)
    failed = enter("failed", priority="low", webhooks=(HOOK,))
    fail(ledger, failed)
    done = enter("succeeded", acme, priority="bulk", idempotency_key="done", webhooks=(HOOK,))
    network = NetworkRef(name=make().network, layer="top", weights_sha256=None)
    held = ledger.claim(done, WORKER, in_turn=False).document
    ledger.finish(held, status="succeeded", network=network)
    ledger.cancel(enter("canceled", priority="bulk").id)
    (delivery,) = [
        one
        for one in outbox.claim_deliveries(9, lease_s=60, limits={}, others_limit=9)
        if one.document.id == ids["failed"] or one.document.id == ids["succeeded"]
    ]
    outbox.park(delivery)
    outbox.disable("https://gone.example/hook")
    return ids


def test_an_import_into_an_empty_ledger_makes_the_same_one(
    here: RedisLedger, there: RedisLedger, make: Callable[..., Job], settings: Settings
) -> None:
    ids = fill(here, make, settings)
    published: list[tuple[str, list[str]]] = []
    exported = lines_of(here)
    assert import_into(there, exported, dry_run=True).added == len(ids)
    assert snapshot(there) == {}
    counts = import_into(there, exported, publish=lambda new, route: published.append((route, sorted(new))))
    assert (counts.added, counts.published, counts.kept, counts.unreadable) == (len(ids), 3, 0, 0)
    assert sorted(published) == [
        ("high", [ids["queued"]]),
        ("normal", sorted([ids["tenants"], ids["nobodys"]])),
    ]
    for scope in ("", "acme"):  # what it asked for is not kept after its end, and it has no result
        for key in map(str, here.server.redis.scan_iter(f"{here.server.prefix}listed:{scope}:network:*")):
            here.server.redis.zrem(key, ids["canceled"])
    was, became = snapshot(here), snapshot(there)
    assert became.keys() == was.keys()
    assert [name for name in was if was[name] != became[name]] == []
    listed = {one.id for one in there.list_jobs(JobQuery(network="efficientnet_lite0")).jobs}
    assert listed == {*ids.values()} - {ids["canceled"]}

    again = import_into(there, lines_of(here))
    assert (again.added, again.updated, again.kept, again.fields) == (0, 0, len(ids), 1)
    assert snapshot(there) == became


def test_a_worker_that_lives_ends_its_job_in_the_imported_ledger(
    here: RedisLedger, make: Callable[..., Job]
) -> None:
    held = here.claim(here.submit(make()), WORKER).document
    exported = lines_of(here)
    held = here.advance(held, stage="explain")
    here.server.redis.delete(*map(str, here.server.redis.scan_iter(f"{here.server.prefix}*")))
    assert import_into(here, exported).added == 1
    assert not here.renew_leases(WORKER.id, "{}", {held.id: held.attempt}).lost
    assert here.finish(held, status="succeeded").status == "succeeded"
    assert here.count_jobs() == (0, 0)


def test_what_is_newer_stays_and_what_is_older_is_updated(
    here: RedisLedger, there: RedisLedger, make: Callable[..., Job]
) -> None:
    older, newer, ended, both = (make() for _ in range(4))
    for ledger in (here, there):
        for one in (older, newer, ended, both):
            ledger.submit(one)
    entered = here.read(both.id)
    there.server.redis.hset(f"{there.server.prefix}job:{both.id}", "document", entered.to_json())
    here.finish(here.claim(here.read(older.id), WORKER).document, status="succeeded")
    there.claim(there.read(newer.id), WORKER)
    there.cancel(ended.id)
    here.claim(here.read(ended.id), WORKER)
    counts = import_into(there, lines_of(here))
    assert (counts.added, counts.updated, counts.kept) == (0, 1, 3)
    states = [there.read(one.id).status for one in (older, newer, ended, both)]
    assert states == ["succeeded", "running", "canceled", "queued"]
    assert there.count_jobs() == (1, 1)
    assert [one.id for one in there.list_jobs(JobQuery(status="succeeded")).jobs] == [older.id]
    assert there.server.redis.pttl(f"{there.server.prefix}job:{older.id}") > 0


def test_a_job_that_was_submitted_again_under_its_key_runs_once(
    here: RedisLedger, there: RedisLedger, make: Callable[..., Job]
) -> None:
    waits, done = make(idempotency_key="waits"), make(idempotency_key="done")
    here.submit(waits)
    here.finish(here.claim(here.submit(done), WORKER).document, status="succeeded")
    again = there.submit(make(idempotency_key="waits", metadata=waits.metadata))
    there.submit(make(idempotency_key="done", metadata=done.metadata))
    counts = import_into(there, lines_of(here))
    assert (counts.superseded, counts.added) == (1, 1)
    assert there.read_many([waits.id, done.id]).keys() == {done.id}, "a result does no harm"
    same = make(idempotency_key="waits", metadata=waits.metadata)
    assert there.submit(same).id == again.id


def test_a_failed_job_that_was_retried_leaves_its_dead_letter(
    here: RedisLedger, there: RedisLedger, make: Callable[..., Job]
) -> None:
    one = make(max_attempts=1)
    failed = fail(here, here.submit(one))
    import_into(there, lines_of(here))
    here.claim(here.retry(one.id), WORKER)
    assert failed.attempt == 1
    assert import_into(there, lines_of(here)).updated == 1
    assert there.find_dead_letters() == []
    assert there.count_jobs() == (0, 1)
    assert there.server.redis.pttl(f"{there.server.prefix}job:{one.id}") == -1


def test_shards_that_wait_are_exported_and_those_that_ended_are_not(
    here: RedisLedger, there: RedisLedger
) -> None:
    waits, done = make_shard(), make_shard()
    here.submit(waits)
    here.finish(here.claim(here.submit(done), WORKER).document, status="succeeded")
    published: list[str] = []
    import_into(there, lines_of(here), publish=lambda ids, route: published.extend((route, *ids)))
    assert published == ["shard", waits.id]
    assert there.read_many([waits.id, done.id]).keys() == {waits.id}


def test_every_job_is_read_however_many_have_one_score(
    here: RedisLedger, make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BATCH", 1)  # pages of ten
    key = f"{here.server.prefix}listed::all"
    here.server.redis.zadd(key, {f"{number:02}": number // 7 for number in range(60)})
    assert [*transfer._read_ids(here.server, "listed::all")] == [f"{number:02}" for number in range(60)]
    here.server.redis.zadd(key, {f"{number:02}": 3 for number in range(60)})
    assert sorted(transfer._read_ids(here.server, "listed::all")) == [f"{number:02}" for number in range(60)]
    here.server.redis.delete(key)


def test_all_webhooks_of_a_job_are_looked_for() -> None:
    (at_most,) = (one.max_length for one in Job.model_fields["webhooks"].metadata)
    assert f"local MAX_WEBHOOKS = {at_most}\n" in ExportJobs.source


def test_what_has_ended_too_long_ago_is_left_out(
    here: RedisLedger, there: RedisLedger, make: Callable[..., Job]
) -> None:
    here.finish(here.claim(here.submit(make()), WORKER).document, status="succeeded")
    header, *rest = lines_of(here)
    old = json.loads(header)
    old["now_ms"] -= 400 * 86_400_000
    counts = import_into(there, [json.dumps(old), *rest])
    assert (counts.expired, counts.added) == (1, 0)


def test_a_damaged_export_is_used_as_far_as_it_goes_and_refused(
    here: RedisLedger, there: RedisLedger, make: Callable[..., Job]
) -> None:
    for _ in range(3):
        here.submit(make())
    lines = lines_of(here)
    jobs = [number for number, line in enumerate(lines) if line.startswith('{"job"')]
    lines[jobs[1]] = lines[jobs[1]][:50]
    with pytest.raises(
        InvalidExport, match=rf"1 of its lines cannot be read \(line {jobs[1] + 1}: JSON.*2 jobs"
    ):
        import_into(there, lines)
    with pytest.raises(InvalidExport, match="ends before its last line"):
        import_into(there, lines[: jobs[1]])
    assert sum(there.count_jobs()) == 2


@pytest.mark.parametrize("first", ["", "no JSON", "[]", '{"schema": "gradcam.ledger/v2", "now_ms": 1}'])
def test_what_is_no_export_is_refused(first: str, there: RedisLedger) -> None:
    with pytest.raises(InvalidExport, match="first line is not the header"):
        import_into(there, [first])
