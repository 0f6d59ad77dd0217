import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from gradcam_worker.client.client import GradcamClient
from gradcam_worker.client.waiting import poller
from gradcam_worker.client.waiting import waiter as watch
from gradcam_worker.client.waiting.poller import StatusPoller, StatusUpdate
from gradcam_worker.client.waiting.waiter import Subscription
from gradcam_worker.errors import LedgerUnavailable, UnknownJob, WaitTimeout
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.ledger.redis import pubsub
from gradcam_worker.ledger.redis.pubsub import RedisJobUpdates
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, RecordingPublisher

FIELDS: dict[str, Any] = {"image": "s3://in/pier.jpg", "network": "vgg16", "target": {"top_n": 2}}
WORKER = WorkerRef(id="w", device="cpu")
NEVER_S = 3600.0  # longer than any test may take
WAIT_S = 30.0


@pytest.fixture
def ledger(settings: Settings) -> RedisLedger:
    return RedisLedger(settings)


@pytest.fixture
def client(settings: Settings) -> Iterator[GradcamClient]:
    with GradcamClient(settings=settings, publish=RecordingPublisher()) as client:
        yield client


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at a job unless told to."""
    for name in ("RECHECK_S", "POLL_FIRST_S", "POLL_LAST_S"):
        monkeypatch.setattr(poller, name, NEVER_S)


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    """Threads to wait in."""
    with ThreadPoolExecutor(128) as pool:
        yield pool


def subscribed(ledger: RedisLedger, job_id: str) -> bool:
    channel = f"{ledger.server.prefix}changed:{job_id}"
    return bool(dict(ledger.server.redis.pubsub_numsub(channel))[channel])


def waits_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.002)


def begin(ledger: RedisLedger, job_id: str) -> StatusDocument:
    return ledger.claim(ledger.read(job_id), WORKER).document


def watching() -> int:
    return [thread.name for thread in threading.enumerate()].count("gradcam-poller")


def waiting(beside: ThreadPoolExecutor, client: GradcamClient, job_id: str) -> "Future[StatusDocument]":
    return beside.submit(client.wait, job_id, WAIT_S)


@pytest.mark.usefixtures("blind")
def test_who_waits_is_told_and_does_not_look(
    client: GradcamClient, ledger: RedisLedger, beside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    read_many = RedisLedger.read_many

    def look(self: RedisLedger, ids: Sequence[str], tenant: str | None = None) -> dict[str, StatusDocument]:
        found = read_many(self, ids, tenant)
        looks.append(threading.current_thread().name)
        return found

    monkeypatch.setattr(RedisLedger, "read_many", look)
    job_id = client.submit(**FIELDS)
    waiter = waiting(beside, client, job_id)
    waits_until(lambda: "gradcam-poller" in looks, "the look that follows the subscription")
    document = ledger.finish(begin(ledger, job_id), status="failed")
    assert waiter.result(WAIT_S) == document
    waits_until(lambda: not subscribed(ledger, job_id), "the end of the subscription")


@pytest.mark.usefixtures("blind")
def test_what_happens_before_the_subscription_has_begun_is_not_missed(
    client: GradcamClient, ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = client.submit(**FIELDS)
    subscribe = RedisJobUpdates.subscribe

    def too_late(self: RedisJobUpdates, begun: set[str], ended: set[str]) -> None:
        ledger.cancel(job_id)
        subscribe(self, begun, ended)

    monkeypatch.setattr(RedisJobUpdates, "subscribe", too_late)
    assert client.wait(job_id, WAIT_S).status == "canceled"


def test_a_message_that_is_lost_is_made_up_for(
    client: GradcamClient, ledger: RedisLedger, beside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "RECHECK_S", 0.05)
    heard = RedisJobUpdates.poll
    monkeypatch.setattr(RedisJobUpdates, "poll", lambda self: (heard(self)[0], set()))
    job_id = client.submit(**FIELDS)
    waiter = waiting(beside, client, job_id)
    waits_until(lambda: subscribed(ledger, job_id), "the subscription")
    ledger.cancel(job_id)
    assert waiter.result(WAIT_S).status == "canceled"


def test_a_connection_that_is_cut_is_made_anew(
    client: GradcamClient, ledger: RedisLedger, beside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = client.submit(**FIELDS)
    waiter = waiting(beside, client, job_id)
    for _ in range(3):
        waits_until(lambda: subscribed(ledger, job_id), "a subscription")
        ledger.server.redis.client_kill_filter(_type="pubsub")
    waits_until(lambda: subscribed(ledger, job_id), "a subscription")
    monkeypatch.setattr(poller, "RECHECK_S", NEVER_S)
    ledger.cancel(job_id)
    assert waiter.result(WAIT_S).status == "canceled"


def test_a_server_that_has_gone_silent_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with servers.valkey(tmp_path) as server, redis.Redis(port=server.port, decode_responses=True) as admin:
        told = RedisJobUpdates(admin, "p:")
        told.subscribe({"a"}, set())
        waits_until(lambda: told.poll()[0] == {"a"}, "the subscription")
        told._next_ping_s = 0
        told.poll()
        assert told._awaits_pong
        waits_until(lambda: told.poll() and not told._awaits_pong, "the answer")
        assert told.fileno() is not None
        monkeypatch.setattr(pubsub, "PING_INTERVAL_S", 0.05)
        told._next_ping_s = 0
        admin.client_pause(60_000)

        def silent() -> bool:
            try:
                told.poll()
            except LedgerUnavailable:
                return True
            return False

        waits_until(silent, "the discovery")
        assert told.fileno() is None, "it is closed"


def test_where_it_may_not_be_told_it_is_looked_at(
    settings: Settings, ledger: RedisLedger, beside: ThreadPoolExecutor
) -> None:
    """As with a managed Redis that knows no channels, or users of before."""
    ledger.server.redis.acl_setuser(
        "deaf", enabled=True, nopass=True, keys=["*"], commands=["+@all"], reset_channels=True
    )
    url = settings.broker_url.replace("//", "//deaf:x@")
    with GradcamClient(url, settings=settings, publish=RecordingPublisher()) as client:
        job_id = client.submit(**FIELDS)
        waiter = waiting(beside, client, job_id)
        assert client.cancel(job_id).status == "canceled", "nor is telling it a reason to fail"
        assert waiter.result(WAIT_S).status == "canceled"
    assert not subscribed(ledger, job_id)


def test_many_wait_over_one_connection(
    client: GradcamClient, ledger: RedisLedger, beside: ThreadPoolExecutor
) -> None:
    before, ids = watching(), [client.submit(**FIELDS) for _ in range(100)]
    waiters = [waiting(beside, client, job_id) for job_id in ids]
    waits_until(lambda: all(subscribed(ledger, job_id) for job_id in ids), "all subscriptions")
    channels = [one["sub"] for one in ledger.server.redis.client_list(_type="pubsub")]
    assert [one for one in channels if one != "0"] == ["100"]
    assert watching() <= before + 1
    for job_id in ids:
        ledger.cancel(job_id)
    assert {waiter.result(WAIT_S).id for waiter in waiters} == set(ids)


def test_several_may_wait_for_one_job(
    client: GradcamClient, ledger: RedisLedger, beside: ThreadPoolExecutor
) -> None:
    job_id = client.submit(**FIELDS)
    impatient = beside.submit(client.wait, job_id, 0.1)
    waiters = [waiting(beside, client, job_id) for _ in range(3)]
    with pytest.raises(WaitTimeout, match=r"is still queued after 0\.1 s"):
        impatient.result(WAIT_S)
    ledger.cancel(job_id)
    assert [waiter.result(WAIT_S).status for waiter in waiters] == ["canceled"] * 3


def test_who_waits_in_vain_is_told_whether_a_worker_lives(
    client: GradcamClient, ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = client.submit(**FIELDS)

    def told() -> str:
        with pytest.raises(WaitTimeout) as caught:
            client.wait(job_id, 0.01)
        assert str(caught.value).startswith(f"Job {job_id} is still queued after 0.01 s.")
        return str(caught.value).partition(" s. ")[2]

    assert told() == "No worker lives that would take it. 1 job queued, 0 running."
    ledger.renew_leases("w:1", '{"trouble": "The storage failed 3 times."}', {})
    assert told() == (
        "1 worker alive, but taking no jobs just now: The storage failed 3 times. 1 job queued, 0 running."
    )
    ledger.renew_leases("w:2", '{"trouble": null}', {})
    ledger.renew_leases("w:3", '{"trouble": null}', {})
    assert told() == "2 workers alive and taking jobs. 1 job queued, 0 running."

    def away(_: object) -> None:
        message = "Its user may not look."
        raise LedgerUnavailable(message)

    monkeypatch.setattr(RedisLedger, "find_workers", away)
    assert told() == "", "what is known is said, and no more"


@pytest.mark.usefixtures("blind")
def test_a_stream_shows_how_a_job_is_then_each_change_and_ends_with_the_last(
    client: GradcamClient, ledger: RedisLedger
) -> None:
    job_id = client.submit(**FIELDS)
    shown = []
    for document in client.stream(job_id, WAIT_S):
        shown.append((document.status, document.stage))
        if document.status == "queued":
            begin(ledger, job_id)
        elif document.stage == "fetch":
            ledger.advance(document, stage="explain")
        elif document.stage == "explain":
            ledger.finish(document, status="failed")
    assert shown == [("queued", None), ("running", "fetch"), ("running", "explain"), ("failed", None)]
    assert [document.status for document in client.stream(job_id)] == ["failed"], "as it is, and that is all"


def test_who_reads_a_stream_slowly_gets_what_is_newest(client: GradcamClient, ledger: RedisLedger) -> None:
    job_id = client.submit(**FIELDS)
    stream = client.stream(job_id, WAIT_S)
    shown = [next(stream)]
    document = begin(ledger, job_id)
    for number in range(50):
        document = ledger.advance(document, stage=f"explain {number}")
    ledger.finish(document, status="failed")
    shown += stream
    revisions = [one.revision for one in shown]
    assert revisions == sorted(set(revisions))
    assert len(shown) < 52
    assert shown[-1].status == "failed"


def test_a_stream_that_is_left_is_told_nothing_more(client: GradcamClient, ledger: RedisLedger) -> None:
    job_id = client.submit(**FIELDS)
    stream = client.stream(job_id, 0.05)
    with pytest.raises(WaitTimeout):
        list(stream)
    waits_until(lambda: not subscribed(ledger, job_id), "the end of the subscription")


def test_a_job_that_is_forgotten_while_it_is_waited_for_is_unknown(
    client: GradcamClient, ledger: RedisLedger, beside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "RECHECK_S", 0.05)
    job_id = client.submit(**FIELDS)
    waiter = waiting(beside, client, job_id)
    waits_until(lambda: subscribed(ledger, job_id), "the subscription")
    ledger.server.redis.delete(f"{ledger.server.prefix}job:{job_id}")
    with pytest.raises(UnknownJob, match=job_id):
        waiter.result(WAIT_S)
    for wrong in (new_id(), "no id"):
        with pytest.raises(UnknownJob):
            next(iter(client.stream(wrong)))


def test_one_document_that_cannot_be_read_spoils_no_other(
    client: GradcamClient, ledger: RedisLedger, beside: ThreadPoolExecutor
) -> None:
    bad, good = client.submit(**FIELDS), client.submit(**FIELDS)
    waiters = [waiting(beside, client, job_id) for job_id in (bad, good)]
    waits_until(lambda: subscribed(ledger, bad) and subscribed(ledger, good), "both subscriptions")
    ledger.server.redis.hset(f"{ledger.server.prefix}job:{bad}", "document", "{}")
    ledger.server.redis.publish(f"{ledger.server.prefix}changed:{bad}", "2")
    with pytest.raises(ValueError, match="StatusDocument"):
        waiters[0].result(WAIT_S)
    ledger.cancel(good)
    assert waiters[1].result(WAIT_S).status == "canceled"


def test_closing_a_client_ends_all_waiting_and_it_can_be_used_again(
    client: GradcamClient, ledger: RedisLedger, beside: ThreadPoolExecutor
) -> None:
    job_id = client.submit(**FIELDS)
    waiter = waiting(beside, client, job_id)
    waits_until(lambda: subscribed(ledger, job_id), "the subscription")
    client.close()
    with pytest.raises(LedgerUnavailable, match="client was closed"):
        waiter.result(WAIT_S)
    waits_until(lambda: not subscribed(ledger, job_id), "the end of the subscription")
    waiter = waiting(beside, client, job_id)
    waits_until(lambda: subscribed(ledger, job_id), "the next subscription")
    client.cancel(job_id)
    assert waiter.result(WAIT_S).status == "canceled"


def test_the_thread_ends_some_time_after_the_last_wait(
    client: GradcamClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "IDLE_BEFORE_END_S", 0)

    for _ in range(2):
        with pytest.raises(WaitTimeout):
            client.wait(client.submit(**FIELDS), 0.02)
        waits_until(lambda: not client.waiter._poller._thread, "the end of the thread")


FORKING = """
import os, signal, sys, threading
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.settings import Settings

signal.alarm(60)
url, prefix, first, second = sys.argv[1:]
client = GradcamClient(url, settings=Settings(key_prefix=prefix))
waiter = threading.Thread(target=lambda: print(client.wait(first, 30).status, flush=True))
waiter.start()
sys.stdin.readline()  # it is subscribed
held, forked = threading.Event(), threading.Event()

def use():  # as any thread may that reads, just then
    with client._ledger.server.redis.connection_pool._lock:
        held.set()
        forked.wait()

threading.Thread(target=use).start()
held.wait()
child = os.fork()
forked.set()
if not child:
    signal.alarm(60)  # it is not inherited
    print(client.wait(second, 30).status, flush=True)
    os._exit(0)
waiter.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_waits_for_itself_and_its_parent_goes_on(
    client: GradcamClient, ledger: RedisLedger, settings: Settings
) -> None:
    ids = [client.submit(**FIELDS) for _ in range(2)]
    known = [settings.broker_url, settings.key_prefix, *ids]
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", FORKING, *known]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        waits_until(lambda: subscribed(ledger, ids[0]), "the wait of the parent")
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        waits_until(lambda: subscribed(ledger, ids[1]), "the wait of the child")
        assert subscribed(ledger, ids[0]), "the child has not hung up for its parent"
        ledger.cancel(ids[1])
        ledger.cancel(ids[0])
        said, complaints = process.communicate(timeout=WAIT_S)
    assert (said.split(), complaints) == (["canceled", "canceled", "0"], "")


class Shaky(MemoryLedger):
    """A ledger that is out of reach now and then."""

    out = False

    def read_many(self, ids: Any, tenant: str | None = None) -> dict[str, StatusDocument]:
        if self.out:
            message = "The ledger cannot be reached."
            raise LedgerUnavailable(message)
        return super().read_many(ids, tenant)


def test_a_ledger_that_comes_back_in_time_is_waited_for(
    beside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "POLL_LAST_S", 0.02)
    ledger = Shaky()
    with GradcamClient(settings=Settings(), ledger=ledger, publish=RecordingPublisher()) as client:
        job_id = client.submit(**FIELDS)
        ledger.out = True  # already at the first look
        waiter = waiting(beside, client, job_id)
        with pytest.raises(LedgerUnavailable, match=r"in vain, for \d\.\d s: it may have ended"):
            client.wait(job_id, 0.2)
        ledger.out = False
        with pytest.raises(WaitTimeout, match=r"is still queued after 0\.2 s"):
            client.wait(job_id, 0.2)
        client.cancel(job_id)
        assert waiter.result(WAIT_S).status == "canceled"


def test_one_that_does_not_come_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "POLL_LAST_S", 0.02)
    monkeypatch.setattr(watch, "MAX_OUTAGE_S", 0.1)
    ledger = Shaky()
    with GradcamClient(settings=Settings(), ledger=ledger, publish=RecordingPublisher()) as client:
        stream = client.stream(client.submit(**FIELDS))  # it has no end of its own
        assert next(stream).status == "queued"
        ledger.out = True
        with pytest.raises(LedgerUnavailable, match=r"in vain.* The ledger cannot be reached"):
            next(stream)


def test_a_ledger_that_comes_back_without_the_job_says_so(
    beside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poller, "POLL_LAST_S", 0.02)
    ledger = Shaky()
    with GradcamClient(settings=Settings(), ledger=ledger, publish=RecordingPublisher()) as client:
        job_id = client.submit(**FIELDS)
        ledger.out = True
        waiter = waiting(beside, client, job_id)
        with pytest.raises(LedgerUnavailable):
            client.wait(job_id, 0.1)
        monkeypatch.setattr(ledger, "read_many", lambda *_: {})
        with pytest.raises(UnknownJob, match=job_id):
            waiter.result(WAIT_S)


def test_who_is_refused_from_the_start_is_told_at_once_and_who_was_let_in_waits(job: Job) -> None:
    refused = LedgerUnavailable("Wrong password.", retryable=False)
    listener = Subscription(job.id, lambda: None)
    listener.notify(refused)
    with pytest.raises(LedgerUnavailable, match="Wrong password") as told:
        listener.pop()
    assert not told.value.retryable
    listener.notify(MemoryLedger().submit(job))
    assert listener.pop()
    listener.notify(refused)
    assert not listener.pop(), "a password may be about to change"


def test_a_final_document_is_news_though_a_restored_ledger_counts_from_before(job: Job) -> None:
    before = MemoryLedger().submit(job)
    listener = Subscription(job.id, lambda: None)
    listener.notify(before.model_copy(update={"revision": 7}))
    assert listener.pop()
    listener.notify(before.model_copy(update={"revision": 3}))
    assert not listener.pop()
    final = before.model_copy(update={"revision": 4, "status": "canceled"})
    listener.notify(final)
    assert listener.pop() == final


class Gone:
    """Who waited in an event loop that is closed by now."""

    unchecked_owner: str | None = None

    def __init__(self, job_id: str) -> None:
        self.job_id, self.told = job_id, 0

    def notify(self, _: StatusUpdate) -> None:
        self.told += 1
        message = "Event loop is closed"
        raise RuntimeError(message)

    end = notify


def test_who_is_gone_is_told_once_and_keeps_nothing_from_the_others(job: Job) -> None:
    ledger, woken = MemoryLedger(), threading.Event()
    ledger.submit(job)
    watching, gone, listener = StatusPoller(ledger), Gone(job.id), Subscription(job.id, woken.set)
    watching.add(gone)
    waits_until(lambda: gone.told, "the first look")
    watching.add(listener)
    assert woken.wait(WAIT_S)
    ledger.cancel(job.id)
    waits_until(lambda: (taken := listener.pop()) and taken.final, "the end of the job")
    watching.close()
    assert gone.told == 1


def test_a_tenant_learns_nothing_of_a_foreign_job_when_the_first_look_fails(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = MemoryLedger()
    ledger.submit(job, tenant=Tenant("acme"))
    read, fails = ledger.read, iter([True, False])

    def look(job_id: str, tenant: str | None = None) -> StatusDocument:
        if next(fails, False):
            raise LedgerUnavailable
        return read(job_id, tenant)

    with GradcamClient(ledger=ledger, publish=RecordingPublisher()) as client:
        for name, seen in (("other", False), ("acme", True)):
            fails = iter([True, False])
            monkeypatch.setattr(ledger, "read", look)
            stream = client.as_tenant(Tenant(name)).stream(job.id, WAIT_S)
            if seen:
                assert next(stream).id == job.id
            else:
                with pytest.raises(UnknownJob):
                    next(stream)
