import time
from datetime import timedelta
from typing import Any

import pytest

from gradcam_worker.errors import InvalidJob, InvalidQuery
from gradcam_worker.ledger.ledger import Ledger, Tenant
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.ids import new_id, utc_now
from gradcam_worker.schemas.job import Job, Target
from gradcam_worker.schemas.listing import JobQuery
from gradcam_worker.schemas.shard import Row, Shard
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger

WORKER = WorkerRef(id="gpu-1:7", device="cpu")
ACME, OTHER = Tenant("acme"), Tenant("other")


@pytest.fixture(params=["memory", "redis"])
def ledger(request: pytest.FixtureRequest, settings: Settings) -> Ledger:
    return MemoryLedger() if request.param == "memory" else RedisLedger(settings)


def enter(ledger: Ledger, job: Job, tenant: Tenant | None = None, **changes: object) -> str:
    return ledger.submit(job.model_copy(update={"id": new_id(), **changes}), tenant=tenant).id


def listed(ledger: Ledger, tenant: str | None = None, **conditions: object) -> list[str]:
    """The ids of all pages, in order."""
    ids, cursor = list[str](), None
    while True:
        page = ledger.list_jobs(JobQuery.parse(**conditions, cursor=cursor), tenant)
        assert len(page.jobs) <= int(str(conditions.get("limit", 50)))
        ids += [document.id for document in page.jobs]
        cursor = page.cursor
        if cursor is None:
            return ids


def finish(ledger: Ledger, job_id: str, status: str, **changes: Any) -> StatusDocument:
    return ledger.finish(ledger.claim(ledger.read(job_id), WORKER).document, status=status, **changes)


def test_jobs_are_listed_newest_first_page_by_page_while_others_come_in(ledger: Ledger, job: Job) -> None:
    assert ledger.list_jobs(JobQuery()).jobs == ()
    ids = [enter(ledger, job) for _ in range(7)]
    first = ledger.list_jobs(JobQuery(limit=3))
    assert [document.id for document in first.jobs] == ids[:3:-1]
    assert first.jobs[0] == ledger.read(ids[-1])
    later = enter(ledger, job)
    second = ledger.list_jobs(JobQuery(limit=3, cursor=first.cursor))
    third = ledger.list_jobs(JobQuery(limit=3, cursor=second.cursor))
    assert [document.id for document in second.jobs + third.jobs] == ids[3::-1]
    assert third.cursor is None
    assert listed(ledger, limit=1) == [later, *ids[::-1]]


def test_a_tenant_lists_its_own_jobs_and_who_is_none_lists_all(ledger: Ledger, job: Job) -> None:
    acmes, others, nobodys = enter(ledger, job, ACME), enter(ledger, job, OTHER), enter(ledger, job)
    assert listed(ledger, "acme") == [acmes]
    assert listed(ledger, "other") == [others]
    assert listed(ledger, "") == [nobodys]
    assert listed(ledger) == [nobodys, others, acmes]
    assert listed(ledger, "unknown") == []


def test_jobs_are_listed_by_state_network_label_and_time(ledger: Ledger, job: Job) -> None:
    before = enter(ledger, job, ACME, metadata={"customer": "41", "sum": "a=b"})
    moment = ledger.read(before).created_at
    vgg = enter(ledger, job, ACME, network="vgg16", metadata={"customer": "42"})
    done, failed, canceled, waits, runs = (
        enter(ledger, job, ACME, metadata={"customer": "42"}) for _ in range(5)
    )
    finish(ledger, done, "succeeded")
    finish(ledger, failed, "failed")
    ledger.cancel(canceled)
    ledger.postpone(ledger.claim(ledger.read(waits), WORKER).document, delay_s=60)
    ledger.claim(ledger.read(runs), WORKER)
    for status, ids in {
        "succeeded": [done],
        "failed": [failed],
        "canceled": [canceled],
        "retrying": [waits],
        "running": [runs],
        "queued": [vgg, before],
        "expired": [],
    }.items():
        assert listed(ledger, "acme", status=status) == listed(ledger, status=status) == ids
    assert listed(ledger, network="vgg16") == [vgg]
    assert listed(ledger, "acme", label="sum=a=b") == listed(ledger, label="customer=41") == [before]
    assert listed(ledger, label="customer=42", status="queued") == [vgg]
    assert listed(ledger, label="customer=42", network="vgg16", status="running") == []
    assert listed(ledger, label="customer=43") == listed(ledger, label="customer=") == []
    assert listed(ledger, created_after=moment, limit=2) == [runs, waits, canceled, failed, done, vgg]
    assert listed(ledger, created_after=utc_now() + timedelta(hours=1)) == []
    ledger.retry(failed)
    assert listed(ledger, status="failed") == []
    assert listed(ledger, status="queued") == [failed, vgg, before]


def test_a_shard_is_not_listed(ledger: Ledger) -> None:
    row = Row(uri="s3://in/1.jpg")
    shard = Shard(
        backfill=new_id(),
        index=0,
        key="00000000-0123456789abcdef",
        first=0,
        rows=(row,),
        network="vgg16",
        target=Target(top_n=1),
        output="s3://out/x",
    )
    ledger.claim(ledger.submit(shard), WORKER)
    assert listed(ledger) == listed(ledger, status="running") == []


def test_of_a_message_that_is_no_job_the_failure_is_listed(ledger: Ledger) -> None:
    job_id = new_id()
    ledger.refuse(job_id, {}, InvalidJob("no job"))
    assert listed(ledger, status="failed") == [job_id]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", "lost"),
        ("label", "customer"),
        ("limit", 0),
        ("limit", 201),
        ("cursor", "no cursor"),
        ("cursor", "é"),
        ("cursor", "MTI"[:2]),
        ("created_after", "yesterday"),
        ("colour", "red"),
    ],
)
def test_a_condition_that_is_invalid_is_named(field: str, value: object) -> None:
    with pytest.raises(InvalidQuery, match=f"listed so: {field}"):
        JobQuery.parse(**{field: value})


def test_a_list_forgets_jobs_whose_records_are_gone(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(settings.model_copy(update={"retention_s": 0.001, "idempotency_retention_s": 0.001}))
    server, prefix = ledger.server.redis, settings.key_prefix
    gone = [enter(ledger, job, ACME) for _ in range(20)]
    for job_id in gone:
        server.delete(f"{prefix}job:{job_id}")
    time.sleep(0.01)
    kept = [enter(ledger, job, ACME) for _ in range(13)]  # with the last, it is tidied up
    assert server.zcard(f"{prefix}listed:acme:all") == len(kept)
    server.delete(f"{prefix}job:{kept.pop()}")
    assert listed(ledger, "acme") == kept[::-1]
    assert server.zcard(f"{prefix}listed:acme:all") == len(kept), "and what a list has found"


def test_a_page_is_a_bounded_amount_of_work(
    settings: Settings, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcam_worker.ledger.redis.store.MAX_SCANNED_JOBS", 3)
    ledger = RedisLedger(settings)
    ids = [enter(ledger, job) for _ in range(2)]
    for _ in range(7):
        enter(ledger, job, ACME)
    page = ledger.list_jobs(JobQuery(), "")
    assert (page.jobs, page.cursor is not None) == ((), True)
    assert listed(ledger, "") == ids[::-1]


def test_the_time_on_the_device_is_counted_for_each_tenant_and_day(ledger: Ledger, job: Job) -> None:
    metrics = {"explain_s": 3.0, "device_s": 1.5}
    finish(ledger, enter(ledger, job, ACME), "succeeded", metrics=metrics)
    finish(ledger, enter(ledger, job, ACME), "failed", metrics={"explain_s": 9.0, "device_s": 0.25})
    for _ in range(4):  # shares of a fast device's pass
        finish(ledger, enter(ledger, job, OTHER), "succeeded", metrics={"device_s": 0.00025})
    ledger.cancel(enter(ledger, job, ACME))
    enter(ledger, job, ACME)
    finish(ledger, enter(ledger, job), "succeeded", metrics=metrics)
    today, yesterday = ledger.read_usage("acme", 2)
    assert (today.jobs, today.device_s) == (3, 1.75)
    assert (yesterday.jobs, yesterday.device_s) == (0, 0)
    assert today.day - yesterday.day == timedelta(days=1)
    (others,) = ledger.read_usage("other", 1)
    assert (others.jobs, round(others.device_s, 6)) == (4, 0.001)


def test_a_list_lasts_for_a_week_longer_than_the_latest_job_that_entered_it(
    settings: Settings, job: Job
) -> None:
    ledger = RedisLedger(settings)
    server, prefix = ledger.server.redis, settings.key_prefix
    enter(ledger, job, ACME, metadata={"customer": "42"})
    lists = [str(key) for key in server.keys(f"{prefix}listed:*")]
    for key in lists:
        server.pexpire(key, 60_000)  # a minute is left of the first job's
    enter(ledger, job, ACME, metadata={"customer": "42"})
    assert {key for key in lists if server.pttl(key) < settings.retention_s * 1000} == set()
