"""Several tenants wait: whose job a message is used for."""

import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from gradcam_worker.ledger.ledger import ClaimOutcome, Entry, Ledger, Tenant
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger

WORKER = WorkerRef(id="gpu-1:7", device="cpu")
LEASE_S = 0.05
ACME, OTHER, BIG = Tenant("acme"), Tenant("other"), Tenant("big", share=3)


@pytest.fixture(params=["memory", "redis"])
def ledger(request: pytest.FixtureRequest, settings: Settings) -> Ledger:
    if request.param == "memory":
        return MemoryLedger(lease_s=LEASE_S)
    return RedisLedger(settings.model_copy(update={"lease_s": LEASE_S}))


@dataclass
class Queue:
    """The messages of one route, and what a worker does with each: see `JobHandler`."""

    ledger: Ledger
    job: Job
    messages: list[str] = field(default_factory=list)
    tenants: dict[str, str] = field(default_factory=dict)  # of each job
    entered: int = 0

    def submit(self, tenant: Tenant | None = None, number: int = 1) -> list[str]:
        jobs = [self.job.model_copy(update={"id": self.next_id()}) for _ in range(number)]
        self.ledger.submit_many(jobs, tenant=tenant)
        self.messages += [job.id for job in jobs]
        self.tenants |= {job.id: tenant.name if tenant else "" for job in jobs}
        return [job.id for job in jobs]

    def next_id(self) -> str:
        self.entered += 1
        return f"019b0000-0000-7000-8000-{self.entered:012x}"  # in the order of their arrival

    def receive(self, index: int = 0) -> StatusDocument | None:
        """Handle a message; return the running document, if it was used for one."""
        document = self.ledger.read(self.messages.pop(index))
        claim = self.ledger.claim(document, WORKER)
        if claim.outcome is ClaimOutcome.CLAIMED:
            return claim.document
        other = claim.other or self.ledger.find_turn("normal")
        while isinstance(other, Entry):
            claim = self.ledger.claim(other.document, WORKER, in_turn=False)
            if claim.outcome is ClaimOutcome.CLAIMED:
                return claim.document
            other = self.ledger.find_turn("normal")
        return None

    def order(self, number: int | None = None) -> str:
        """The tenants of the jobs that the next messages are used for."""
        received = [self.receive() for _ in range(len(self.messages) if number is None else number)]
        return "".join((self.tenants[one.id] or "-")[0] for one in received if one)


@pytest.fixture
def queue(ledger: Ledger, job: Job) -> Queue:
    return Queue(ledger, job)


def test_one_tenant_alone_is_served_in_order_and_so_is_nobody(queue: Queue) -> None:
    for tenant in (ACME, None):
        ids = queue.submit(tenant, 5)
        assert [one.id for one in (queue.receive() for _ in ids) if one] == ids


def test_two_tenants_take_turns_however_many_messages_one_has_before_the_other(queue: Queue) -> None:
    queue.submit(ACME, 8)
    queue.submit(OTHER, 3)
    assert queue.order() == "aoaoao" + "aaaaa"
    assert queue.ledger.count_jobs() == (0, 11)


def test_each_tenants_jobs_are_taken_in_order(queue: Queue) -> None:
    acmes, others = queue.submit(ACME, 6), queue.submit(OTHER, 4)
    taken = [one.id for one in (queue.receive() for _ in range(10)) if one]
    assert [job_id for job_id in taken if job_id in acmes] == acmes
    assert [job_id for job_id in taken if job_id in others] == others


def test_turns_are_weighted_by_the_shares(queue: Queue) -> None:
    queue.submit(ACME, 60)
    queue.submit(BIG, 60)
    queue.order(40)  # the head start of either
    assert Counter(queue.order(40)) == {"b": 30, "a": 10}


def test_who_comes_late_has_a_head_start_and_no_more(queue: Queue) -> None:
    queue.submit(ACME, 80)
    queue.order(60)
    queue.submit(OTHER, 50)
    order = queue.order(32 + 20)
    assert order.startswith("o" * 32)
    assert Counter(order[32:]) == {"a": 10, "o": 10}


def test_who_has_one_job_at_a_time_has_no_more_turns_than_who_has_many(queue: Queue) -> None:
    queue.submit(ACME, 110)
    queue.order(60)
    order = ""
    while len(order) < 80:
        if not order or order[-1] == "o":
            queue.submit(OTHER)
        order += queue.order(1)
    assert Counter(order[:32]) == {"o": 32}
    assert abs(order[32:].count("o") - order[32:].count("a")) <= 2


def test_who_rests_and_comes_back_again_and_again_gains_nothing_over_time(queue: Queue) -> None:
    queue.submit(ACME, 150)
    order = queue.order(50)
    for _ in range(5):
        queue.submit(OTHER, 15)
        order += queue.order(25)
    counts = Counter(order[50:])
    assert counts["o"] <= counts["a"] + 32


def test_nobodys_jobs_have_a_turn_too_also_those_that_came_before_there_were_tenants(queue: Queue) -> None:
    before = queue.submit(None, 4)
    queue.submit(ACME, 4)
    after = queue.submit(None, 2)
    order = [one.id for one in (queue.receive() for _ in range(10)) if one]
    assert "".join((queue.tenants[job_id] or "-")[0] for job_id in order) == "-a-a-a-a--"
    assert [job_id for job_id in order if not queue.tenants[job_id]] == before + after


def test_a_message_whose_job_is_not_queued_is_used_for_the_turn(queue: Queue) -> None:
    acmes = queue.submit(ACME, 3)
    others = queue.submit(OTHER, 3)
    queue.ledger.cancel(acmes[0])
    queue.ledger.cancel(others[1])
    running = [one.id for one in (queue.receive() for _ in range(6)) if one]
    assert sorted(running) == sorted({*acmes, *others} - {acmes[0], others[1]})


def test_a_job_that_is_queued_again_waits_for_its_turn_again(queue: Queue) -> None:
    queue.submit(ACME, 4)
    queue.submit(OTHER, 4)
    first = queue.receive()
    assert first
    queue.ledger.requeue_unfinished(first.id, 1)
    queue.messages.append(first.id)
    assert queue.order() == "oaoaoaoa"
    assert queue.ledger.count_jobs() == (0, 8)


def test_a_job_whose_worker_died_is_claimed_for_its_own_message_and_never_named(queue: Queue) -> None:
    (suspect,) = queue.submit(ACME)
    assert queue.receive()
    queue.ledger.renew_leases("gpu-1:7", "", {suspect: 1})
    end = time.monotonic() + 20
    while not queue.ledger.expire_lease(suspect):
        assert time.monotonic() < end
        time.sleep(0.01)
    others = queue.submit(OTHER, 2)
    named = queue.ledger.find_turn("normal")
    assert named
    assert named.document.id == others[0]
    queue.messages.append(suspect)
    assert queue.receive(2)
    assert queue.ledger.read(suspect).attempt == 2
    assert queue.order() == "oo"
    assert queue.ledger.find_turn("normal") is None


def test_priorities_have_turns_of_their_own(ledger: Ledger, job: Job) -> None:
    high = job.model_copy(update={"id": new_id(), "priority": "high"})
    ledger.submit(job, tenant=ACME)
    document = ledger.submit(high, tenant=OTHER)
    assert ledger.claim(document, WORKER).outcome is ClaimOutcome.CLAIMED
    assert ledger.find_turn("high") is None
    found = ledger.find_turn("normal")
    assert found
    assert (found.document.id, found.tenant.name, found.route) == (job.id, "acme", "normal")


def test_a_fresh_claim_names_the_job_whose_turn_it_is(queue: Queue) -> None:
    ledger, job = queue.ledger, queue.job
    queue.submit(ACME, 2)
    (others,) = queue.submit(OTHER)
    entered = ledger.submit(job, tenant=ACME)
    assert queue.order(1) == "a"
    claimed = ledger.claim_fresh(job, entered.created_at, WORKER)
    assert isinstance(claimed, Entry)
    assert claimed.document.id == others
    assert ledger.read(job.id) == entered


def test_nothing_is_left_of_the_turns_when_nobody_waits(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(settings)
    queue = Queue(ledger, job)
    queue.submit(ACME, 3)
    queue.submit(OTHER, 2)
    queue.submit(None, 2)
    queue.order()
    keys = [str(key).removeprefix(settings.key_prefix) for key in ledger.server.redis.scan_iter()]
    assert not [key for key in keys if key.startswith(("turn", "rested"))]


def test_jobs_that_a_worker_of_an_earlier_version_took_are_passed(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(settings)
    queue = Queue(ledger, job)
    acmes = queue.submit(ACME, 5)
    others = queue.submit(OTHER, 2)
    for job_id in acmes[:3]:  # it knows nothing of turns
        for name in ("document", "place"):
            held = str(ledger.server.redis.hget(f"{settings.key_prefix}job:{job_id}", name))
            held = held.replace("queued:normal", "running").replace('"queued"', '"running"')
            ledger.server.redis.hset(f"{settings.key_prefix}job:{job_id}", name, held)
    running = [one.id for one in (queue.receive() for _ in range(7)) if one]
    assert sorted(running) == sorted(acmes[3:] + others)


def test_a_passed_over_job_is_lost_only_where_the_queue_is_empty(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(settings)
    queue = Queue(ledger, job)
    queue.submit(ACME, 3)
    (others,) = queue.submit(OTHER)
    queue.order(3)
    (left,) = [one for one in queue.tenants if ledger.read(one).status == "queued"]
    assert left != others

    def lost(*, queue_is_empty: bool) -> list[str]:
        return ledger.find_unpublished("normal", queue_is_empty=queue_is_empty, lost_after_s=-0.001, limit=10)

    assert lost(queue_is_empty=False) == []
    assert lost(queue_is_empty=True) == [left]


CRASHES = 0.2  # of the steps of a worker


class Crash(Exception):
    """A worker is killed between two steps."""


def claim_for(ledger: Ledger, message: str, crashes: Callable[[], bool]) -> str | None:
    """Claim a job for a message, as `JobHandler` does; None: no job waits. Raises Crash."""
    other: Entry | None = None
    while True:
        document = other.document if other else ledger.read(message)
        claim = ledger.claim(document, WORKER, in_turn=other is None)
        if claim.outcome is ClaimOutcome.CLAIMED:
            return document.id
        if crashes():
            raise Crash
        if claim.outcome is ClaimOutcome.CHANGED:
            other = None
            continue
        other = claim.other or ledger.find_turn("normal")
        if other is None:
            return None


def test_many_threads_that_crash_between_any_two_steps_claim_every_job_once(
    settings: Settings, job: Job
) -> None:
    ledger = RedisLedger(settings)
    queue = Queue(ledger, job)
    for _ in range(6):
        queue.submit(ACME, 15)
        queue.submit(OTHER, 5)
        queue.submit(None, 5)
    messages, claimed, lock = deque(queue.messages), list[str](), threading.Lock()

    def work(seed: int) -> None:
        draw = random.Random(seed)  # noqa: S311  # no secret
        while messages:
            with lock:
                message = messages.popleft() if messages else None
            if message is None:
                return
            try:
                job_id = claim_for(ledger, message, lambda: draw.random() < CRASHES)
            except Crash:
                messages.append(message)  # it is delivered again
            else:
                claimed.extend([job_id] if job_id else [])

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(queue.tenants)
    assert ledger.count_jobs() == (0, len(claimed))


class Pair:
    """The same steps in the ledger in Redis and in the model, which is the one in memory."""

    def __init__(self, settings: Settings, job: Job) -> None:
        prefix = f"{settings.key_prefix}{new_id()}:"
        ticks = count(1.0)
        ledger = RedisLedger(settings.model_copy(update={"key_prefix": prefix}))
        self.server = ledger.server
        self.queues = [
            Queue(ledger, job),
            Queue(MemoryLedger(clock=lambda: next(ticks)), job),
        ]
        self.running = list[str]()

    def step(self, kind: str, tenant: Tenant | None, number: int) -> None:
        ours, models = (getattr(self, f"_{kind}")(queue, tenant, number) for queue in self.queues)
        assert ours == models, kind
        if kind == "receive" and ours:
            self.running.append(ours)

    def _submit(self, queue: Queue, tenant: Tenant | None, number: int) -> object:
        return queue.submit(tenant, 1 + number % 3)

    def _receive(self, queue: Queue, _: Tenant | None, number: int) -> str | None:
        received = queue.messages and queue.receive(number % len(queue.messages))
        return received.id if received else None

    def _lose(self, queue: Queue, _: Tenant | None, number: int) -> object:
        return queue.messages and queue.messages.pop(number % len(queue.messages))

    def _cancel(self, queue: Queue, _: Tenant | None, number: int) -> object:
        job_id = [*queue.tenants][number % len(queue.tenants)] if queue.tenants else None
        return job_id and queue.ledger.cancel(job_id).status

    def _requeue(self, queue: Queue, _: Tenant | None, number: int) -> object:
        job_id = self.running[number % len(self.running)] if self.running else None
        if not job_id or not queue.ledger.requeue_unfinished(job_id, queue.ledger.read(job_id).attempt):
            return None
        queue.messages.append(job_id)
        return job_id

    def drain(self) -> None:
        """Receive everything; what has lost its message is published by the reaper, as the queue is empty."""
        for queue in self.queues:
            while queue.ledger.count_jobs()[0]:
                while queue.messages:
                    queue.receive()
                queue.messages = queue.ledger.find_unpublished(
                    "normal", queue_is_empty=True, lost_after_s=-1e9, limit=1000
                )


STEPS = st.tuples(
    st.sampled_from(["submit", "submit", "receive", "receive", "receive", "cancel", "requeue", "lose"]),
    st.sampled_from([ACME, OTHER, BIG, None]),
    st.integers(0, 20),
)


@given(steps=st.lists(STEPS, max_size=50))
@examples(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_redis_takes_the_turns_of_the_model_and_no_job_is_forgotten_or_taken_twice(
    steps: list[tuple[str, Tenant | None, int]], settings: Settings, job: Job
) -> None:
    pair = Pair(settings, job)
    for step in steps:
        pair.step(*step)
    pair.drain()
    assert not [*pair.server.redis.scan_iter(f"{pair.server.prefix}turn*")]
