import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import pytest

from gradcam_worker.client import poller
from gradcam_worker.client.async_client import CALLS_AT_ONCE, AsyncGradcamClient
from gradcam_worker.client.client import REDIS_RETRIES, GradcamClient
from gradcam_worker.errors import InvalidJob, LedgerUnavailable, UnknownJob, WaitTimeout
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, RecordingPublisher

FIELDS: dict[str, Any] = {"image": "s3://in/pier.jpg", "network": "vgg16", "target": {"top_n": 2}}
WAIT_S = 30.0
WORKER = WorkerRef(id="w", device="cpu")


@pytest.fixture
def ledger(settings: Settings) -> RedisLedger:
    return RedisLedger(settings)


@pytest.fixture
def client(settings: Settings) -> Iterator[AsyncGradcamClient]:
    """A face of one client: each event loop may use it."""
    with GradcamClient(settings=settings, publish=RecordingPublisher()) as client:
        yield AsyncGradcamClient(client=client)


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at a job unless told to."""
    for name in ("RECHECK_S", "POLL_FIRST_S", "POLL_LAST_S"):
        monkeypatch.setattr(poller, name, 3600.0)


def subscribed(ledger: RedisLedger, job_id: str) -> bool:
    channel = f"{ledger.server.prefix}changed:{job_id}"
    return bool(dict(ledger.server.redis.pubsub_numsub(channel))[channel])


async def waits_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        await asyncio.sleep(0.005)


@pytest.mark.usefixtures("blind")
def test_a_job_is_submitted_followed_and_waited_for(client: AsyncGradcamClient, ledger: RedisLedger) -> None:
    async def app() -> None:
        job_id = await client.submit(**FIELDS)
        waiter = asyncio.create_task(client.wait(job_id, WAIT_S))
        shown = []
        async for document in client.stream(job_id, WAIT_S):
            shown.append(document.status)
            if not document.final:
                await client.cancel(job_id)
        assert shown == ["queued", "canceled"]
        assert (await waiter).status == "canceled"
        assert (await client.status(job_id)).status == "canceled"
        assert (await client.statuses([job_id, new_id()])).keys() == {job_id}
        await waits_until(lambda: not subscribed(ledger, job_id), "the end of the subscription")

    asyncio.run(app())


def test_what_is_wrong_is_raised_where_it_is_awaited(client: AsyncGradcamClient) -> None:
    async def app() -> None:
        with pytest.raises(InvalidJob, match="top_m"):
            await client.submit(**FIELDS, top_m=3)  # type: ignore[call-overload]
        with pytest.raises(UnknownJob):
            await client.wait(new_id())
        with pytest.raises(WaitTimeout, match=r"is still queued after 0\.05 s\. No worker lives"):
            await client.wait(await client.submit(**FIELDS), 0.05)

    asyncio.run(app())


def test_a_thousand_wait_over_one_connection_and_hold_no_thread(
    client: AsyncGradcamClient, ledger: RedisLedger
) -> None:
    async def app() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4, "of-the-loop"))
        jobs = [Job.parse(FIELDS) for _ in range(1000)]
        ids = await client.submit_many(jobs)
        waiters = [asyncio.create_task(client.wait(job_id, WAIT_S)) for job_id in ids]
        await waits_until(lambda: subscribed(ledger, ids[-1]), "the last subscription")
        channels = [one["sub"] for one in ledger.server.redis.client_list(_type="pubsub")]
        assert [one for one in channels if one != "0"] == ["1000"]
        names = [thread.name for thread in threading.enumerate()]
        assert len([name for name in names if name.startswith("gradcam-client")]) <= CALLS_AT_ONCE
        ours = ("of-the-loop", "gradcam-client")
        assert len([name for name in names if not name.startswith(ours)]) <= others + 1
        for job_id in ids:
            ledger.cancel(job_id)
        documents = await asyncio.gather(*waiters)
        assert [document.id for document in documents] == ids

    others = threading.active_count()
    asyncio.run(app())


class Away(MemoryLedger):
    """A ledger that answers to nobody until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.back = threading.Event()

    def submit_many(self, jobs: Sequence[Any], **options: Any) -> Any:
        self.back.wait(WAIT_S)
        return super().submit_many(jobs, **options)


def test_a_ledger_that_is_away_holds_up_nobody_else_of_the_event_loop() -> None:
    ledger = Away()

    async def app() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1, "of-the-app"))
        inner = GradcamClient(settings=Settings(), ledger=ledger, publish=RecordingPublisher())
        async with AsyncGradcamClient(client=inner) as client:
            submits = [asyncio.create_task(client.submit(**FIELDS)) for _ in range(50)]
            await asyncio.sleep(0)
            assert await asyncio.to_thread(lambda: "unrelated") == "unrelated"
            assert not [one for one in submits if one.done()]
            ledger.back.set()
            assert len(set(await asyncio.gather(*submits))) == 50

    asyncio.run(app())


def test_who_waited_for_a_thread_does_not_wait_for_the_ledger_as_long_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gradcam_worker.client.async_client.CALLS_AT_ONCE", 2)
    monkeypatch.setattr("gradcam_worker.client.client.REDIS_RETRIES", replace(REDIS_RETRIES, total_s=0.5))
    tries: Counter[str] = Counter()

    class Gone(MemoryLedger):
        def submit_many(self, jobs: Sequence[Any], **_: Any) -> Any:
            tries[jobs[0].id] += 1
            message = "The ledger cannot be reached."
            raise LedgerUnavailable(message)

    async def app() -> None:
        inner = GradcamClient(settings=Settings(), ledger=Gone(), publish=RecordingPublisher())
        jobs = [Job.parse(FIELDS) for _ in range(12)]
        async with AsyncGradcamClient(client=inner) as client:
            ended = await asyncio.gather(*map(client.submit, jobs), return_exceptions=True)
        assert {type(one) for one in ended} == {LedgerUnavailable}
        assert 1 <= tries[jobs[-1].id] < tries[jobs[0].id]

    asyncio.run(app())


def test_the_context_of_whoever_awaits_a_call_is_that_of_its_thread() -> None:
    said: ContextVar[str] = ContextVar("said")
    heard: list[str] = []
    inner = GradcamClient(
        settings=Settings(), ledger=MemoryLedger(), publish=lambda _: heard.append(said.get())
    )

    async def app() -> None:
        said.set("this request")
        async with AsyncGradcamClient(client=inner) as client:
            await client.submit(**FIELDS)
            await client.close()
            await client.submit(**FIELDS)

    asyncio.run(app())
    assert heard == ["this request"] * 2, "closed, it is used again"


@pytest.mark.parametrize("leave", ["cancel", "break"])
def test_who_leaves_is_told_nothing_more(client: AsyncGradcamClient, ledger: RedisLedger, leave: str) -> None:
    async def follow(job_id: str) -> None:
        async with aclosing(client.stream(job_id)) as stream:
            async for document in stream:
                if document.status == "running":
                    break

    async def app() -> None:
        job_id = await client.submit(**FIELDS)
        stays = asyncio.create_task(client.wait(job_id, WAIT_S))
        await waits_until(lambda: subscribed(ledger, job_id), "the subscription")
        leaves = asyncio.create_task(follow(job_id))
        watched = client.client.waiter._poller._watched[job_id].subscribers
        await waits_until(lambda: len(watched) == 2, "the second listener")
        if leave == "cancel":
            leaves.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaves
        else:
            ledger.claim(ledger.read(job_id), WORKER)
            await leaves
        assert len(watched) == 1, "at once"
        stays.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stays
        assert not watched
        await waits_until(lambda: not subscribed(ledger, job_id), "the end of the subscription")

    asyncio.run(app())


def test_one_client_serves_several_event_loops(client: AsyncGradcamClient) -> None:
    async def app() -> str:
        job_id = await client.submit(**FIELDS)
        waiter = asyncio.create_task(client.wait(job_id, WAIT_S))
        await asyncio.sleep(0.01)
        await client.cancel(job_id)
        return str((await waiter).status)

    def run(coroutine: Coroutine[Any, Any, str]) -> str:
        return asyncio.run(coroutine)

    assert run(app()) == "canceled", "one after the other"
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, [app() for _ in range(8)])) == ["canceled"] * 8, "and at once"


def test_it_is_closed_when_it_is_left(settings: Settings, ledger: RedisLedger) -> None:
    async def app() -> None:
        async with AsyncGradcamClient(settings.broker_url, settings=settings) as client:
            job_id = await client.submit(**FIELDS)
            waiter = asyncio.create_task(client.wait(job_id, WAIT_S))
            await waits_until(lambda: subscribed(ledger, job_id), "the subscription")
        with pytest.raises(LedgerUnavailable, match="client was closed"):
            await waiter
        assert not subscribed(ledger, job_id)

    asyncio.run(app())


def test_a_ledger_that_cannot_push_is_looked_at() -> None:
    async def app() -> None:
        sync = GradcamClient(settings=Settings(), ledger=MemoryLedger(), publish=RecordingPublisher())
        async with AsyncGradcamClient(client=sync) as client:
            job_id = await client.submit(**FIELDS)
            waiter = asyncio.create_task(client.wait(job_id, WAIT_S))
            await asyncio.sleep(0.01)
            await client.cancel(job_id)
            assert (await waiter).status == "canceled"

    asyncio.run(app())
