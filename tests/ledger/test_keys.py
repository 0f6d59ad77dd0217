"""What every test that uses Redis is held to, `_keys_expire` of tests/conftest.py, finds what it should."""

from collections.abc import Callable

import pytest

from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.settings import Settings

WORKER = WorkerRef(id="gpu-1:7", device="cpu")


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_only_a_job_that_has_not_ended_and_its_idempotency_key_may_stay(
    status: str, job: Job, settings: Settings, find_keys_that_stay: Callable[[str], list[str]]
) -> None:
    ledger = RedisLedger(settings)
    server, url = ledger.server.redis, settings.broker_url
    document = ledger.submit(job.model_copy(update={"idempotency_key": "k"}))
    ours = [key for key in map(str, server.scan_iter()) if key.startswith(settings.key_prefix)]
    lasting = [key for key in ours if key.removeprefix(settings.key_prefix).startswith(("job:", "idem"))]
    assert len(lasting) == 2
    assert not find_keys_that_stay(url), "neither may go before the job has ended"

    ledger.finish(ledger.claim(document, WORKER).document, status=status)
    assert not find_keys_that_stay(url), "both have a time to live"
    for key in lasting:
        server.persist(key)
    assert sorted(find_keys_that_stay(url)) == sorted(lasting)

    server.set(f"{settings.key_prefix}new", "what nobody has thought of")
    assert f"{settings.key_prefix}new" in find_keys_that_stay(url)
    server.delete(*lasting, f"{settings.key_prefix}new")


def test_events_may_stay_as_long_as_they_are_to_be_delivered(
    job: Job, settings: Settings, find_keys_that_stay: Callable[[str], list[str]]
) -> None:
    ledger = RedisLedger(settings)
    server = ledger.server.redis
    server.sadd(f"{settings.key_prefix}sinks", "sql")
    server.expire(f"{settings.key_prefix}sinks", 60)
    ledger.submit(job)
    assert not find_keys_that_stay(settings.broker_url)
    server.hdel(f"{settings.key_prefix}waiting", f"{job.id}:sql")
    assert find_keys_that_stay(settings.broker_url) == [f"{settings.key_prefix}events:{job.id}:sql"]
    server.delete(f"{settings.key_prefix}events:{job.id}:sql")
