import asyncio
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import pytest
import redis

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.client.calls import REDIS_RETRIES
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.client.waiting import poller
from gradcam_worker.errors import InvalidJob, LedgerUnavailable, UnknownJob, WaitTimeout
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.redis_server.async_client import Addresses
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


def fail(ledger: RedisLedger, job_id: str) -> None:
    ledger.finish(ledger.claim(ledger.read(job_id), WORKER).document, status="failed")


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
        jobs = [Job.parse(FIELDS) for _ in range(1000)]
        ids = await client.submit_many(jobs)
        waiters = [asyncio.create_task(client.wait(job_id, WAIT_S)) for job_id in ids]

        def channels() -> list[str]:
            """The number of channels of each connection that has any."""
            found = ledger.server.redis.client_list(_type="pubsub")
            return [one["sub"] for one in found if one["sub"] != "0"]

        await waits_until(lambda: channels() == ["1000"], "the last subscription, on one connection")
        new = {one.name for one in threading.enumerate() if one not in others}
        assert {name for name in new if not name.startswith("gradcam-client")} == {"gradcam-poller"}
        for job_id in ids:
            ledger.cancel(job_id)
        documents = await asyncio.gather(*waiters)
        assert [document.id for document in documents] == ids

    others = threading.enumerate()
    asyncio.run(app())


class Refusing(ThreadPoolExecutor):
    """The default executor of an app that wants it for itself."""

    def submit(self, call: Any, /, *args: Any, **options: Any) -> Any:
        pytest.fail(f"{call} was put into the executor of the app")


def test_nothing_waits_in_the_executor_of_the_event_loop(settings: Settings, ledger: RedisLedger) -> None:
    by_name = settings.changed(broker_url=settings.broker_url.replace("127.0.0.1", "localhost"))

    async def app() -> None:
        asyncio.get_running_loop().set_default_executor(Refusing())
        async with AsyncGradcamClient(settings=by_name) as client:
            job_id = await client.submit(**FIELDS)
            fail(ledger, job_id)
            assert (await client.wait(job_id, WAIT_S)).status == "failed"
            assert (await client.retry(job_id)).status == "queued"
            assert (await client.cancel(job_id)).status == "canceled"
            assert (await client.statuses([job_id])).keys() == {job_id}

    asyncio.run(app())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that gives up soon."""
    monkeypatch.setattr("gradcam_worker.client.client.TIMEOUT_S", 0.2)
    monkeypatch.setattr("gradcam_worker.client.calls.REDIS_RETRIES", replace(REDIS_RETRIES, total_s=0.5))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("away", ["silent", "closed"])
def test_a_redis_that_is_away_holds_up_nothing_else_of_the_event_loop(
    settings: Settings, silent_port: int, free_port: int, away: str
) -> None:
    url = f"redis://localhost:{silent_port if away == 'silent' else free_port}/0"

    async def app() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1, "of-the-app"))
        async with AsyncGradcamClient(url, settings=settings) as client:
            submits = [asyncio.create_task(client.submit(**FIELDS)) for _ in range(200)]
            await asyncio.sleep(0)
            threads = {thread.name for thread in threading.enumerate() if thread not in before}
            assert await asyncio.to_thread(lambda: "unrelated") == "unrelated"
            assert not [one for one in submits if one.done()]
            assert threads <= {"gradcam-resolver"}
            ended = await asyncio.gather(*submits, return_exceptions=True)
        assert {type(one) for one in ended} == {LedgerUnavailable}
        for error in ended:
            assert isinstance(error, LedgerUnavailable)
            assert str(error).endswith("was not accepted.")
            assert (error.retryable, error.in_doubt) == (True, ())

    before = threading.enumerate()
    asyncio.run(app())


def test_what_cannot_be_reached_is_told_as_by_the_blocking_client(settings: Settings, free_port: int) -> None:
    host = settings.broker_url.removeprefix("redis://").removesuffix("/0")
    urls = {f"redis://me:wrong@{host}/0": False, f"redis://{host}/99": False}
    urls["redis://nobody.invalid:6379/0"] = True

    async def submitted(url: str) -> LedgerUnavailable:
        async with AsyncGradcamClient(url, settings=settings) as client:
            with pytest.raises(LedgerUnavailable) as caught:
                await client.submit(**FIELDS)
            return caught.value

    for url, retryable in urls.items():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("gradcam_worker.client.calls.REDIS_RETRIES", replace(REDIS_RETRIES, total_s=0))
            error = asyncio.run(submitted(url))
            with pytest.raises(LedgerUnavailable) as caught, GradcamClient(url, settings=settings) as client:
                client.submit(**FIELDS)
        assert str(error).endswith("was not accepted.")
        assert (error.retryable, caught.value.retryable) == (retryable, retryable), url
        ids = re.compile("job [0-9a-f-]+", re.IGNORECASE)
        assert ids.sub("", str(error)) == ids.sub("", str(caught.value))


def test_more_tasks_than_connections_wait_for_their_turn(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcam_worker.redis_server.async_client.MAX_CONNECTIONS", 2)
    server = redis.Redis.from_url(settings.broker_url)
    others = len(server.client_list())

    async def app() -> None:
        async with AsyncGradcamClient(settings=settings) as client:
            job_id = await client.submit(**FIELDS)
            found = await asyncio.gather(*[client.status(job_id) for _ in range(600)])
            assert {one.id for one in found} == {job_id}
            assert len(server.client_list()) <= others + 4, "two of the ledger, two of the queues"
        assert len(server.client_list()) == others

    asyncio.run(app())


@pytest.mark.usefixtures("hasty")
def test_a_task_that_waits_in_vain_for_a_connection_is_told_what_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcam_worker.redis_server.async_client.MAX_CONNECTIONS", 1)
    monkeypatch.setattr("gradcam_worker.client.calls.REDIS_RETRIES", replace(REDIS_RETRIES, total_s=0))

    async def app() -> None:
        async with AsyncGradcamClient(settings=settings) as client:
            ledger: Any = client.calls._ledger
            pool = (await ledger.server._clients._find_client()).connection_pool
            held = await pool.get_connection()
            in_use = r"all 1 connections of this process were in use for 0\.3 s.* was not accepted\.$"
            with pytest.raises(LedgerUnavailable, match=in_use):
                await client.submit(**FIELDS)
            await pool.release(held)
            assert await client.submit(**FIELDS)

    asyncio.run(app())


def test_a_call_that_is_cancelled_leaves_nothing_behind_for_the_next(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcam_worker.redis_server.async_client.MAX_CONNECTIONS", 1)
    server = redis.Redis.from_url(settings.broker_url)

    async def app() -> None:
        async with AsyncGradcamClient(settings=settings) as client:
            ids = [await client.submit(**FIELDS) for _ in range(2)]
            for steps in range(0, 60, 2):
                server.client_pause(60_000, all=False)  # ms, of what may write
                call = asyncio.create_task(client.submit(**FIELDS))
                for _ in range(steps):
                    await asyncio.sleep(0)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                server.client_unpause()
                assert (await client.status(ids[1])).id == ids[1]

    try:
        asyncio.run(app())
    finally:
        server.client_unpause()


FORKING = """
import asyncio, os, signal, sys
from gradcam_worker import AsyncGradcamClient
from gradcam_worker.settings import Settings

signal.alarm(60)
client = AsyncGradcamClient(sys.argv[1], settings=Settings(key_prefix=sys.argv[2]))

async def work():
    job_id = await client.submit(image="s3://in/a.jpg", network="vgg16", target={"top_n": 1})
    await client.cancel(job_id)
    return (await client.wait(job_id, 30)).status

async def parent():
    before = await work()
    child = os.fork()
    if not child:
        os._exit(7)
    os.waitpid(child, 0)
    return before, await work()

os.write(1, f"{asyncio.run(work())} ".encode())
child = os.fork()  # after use, as a web server with workers does
os.write(1, " ".join([*asyncio.run(parent()), ""]).encode())
if child:
    os.waitpid(child, 0)
"""


def test_a_client_may_be_made_and_used_before_a_fork(settings: Settings) -> None:
    command = [sys.executable, "-W", "error", "-c", FORKING, settings.broker_url, settings.key_prefix]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["canceled"] * 5, "")


def test_connections_end_with_their_event_loop(client: AsyncGradcamClient, settings: Settings) -> None:
    server = redis.Redis.from_url(settings.broker_url)
    others = len(server.client_list())
    for _ in range(3):
        asyncio.run(client.statuses([]))
        asyncio.run(client.statuses([new_id()]))
    assert len(server.client_list()) == others, "closed by asyncio.run, though the client was not"
    loop = asyncio.new_event_loop()
    loop.run_until_complete(client.statuses([new_id()]))
    loop.run_until_complete(client.close())
    loop.close()
    assert asyncio.run(client.statuses([new_id()])) == {}
    assert len(server.client_list()) == others


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


def test_the_client_of_a_tenant_finds_no_other_jobs(client: AsyncGradcamClient) -> None:
    async def app() -> None:
        acme, other = client.as_tenant(Tenant("acme")), client.as_tenant(Tenant("other"))
        job_id = await acme.submit(**FIELDS, idempotency_key="k")
        assert await other.submit(**FIELDS, idempotency_key="k") != job_id
        for call in (other.status, other.cancel, other.retry, other.wait, other.result):
            with pytest.raises(UnknownJob):
                await call(job_id)
        assert await other.statuses([job_id]) == {}
        assert [one.id async for one in acme.list()] == [job_id]
        assert (await acme.cancel(job_id)).status == "canceled"
        assert (await acme.wait(job_id, WAIT_S)).final
        assert (await client.status(job_id)).final, "nobody's client finds all"

    asyncio.run(app())


def test_a_name_is_found_again_after_no_thread_could_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses, start = Addresses(), threading.Thread.start

    def refuse(_: threading.Thread) -> None:
        message = "can't start new thread"
        raise RuntimeError(message)

    async def find() -> list[str]:
        async with asyncio.timeout(30):
            return await addresses.find("localhost", 6379)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(OSError, match="new thread"):
        asyncio.run(find())
    monkeypatch.setattr(threading.Thread, "start", start)
    assert asyncio.run(find())
