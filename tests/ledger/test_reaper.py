"""The reaper over a ledger in memory, with a clock of the test's own."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.ledger import reaper, state_machine
from gradcam_worker.ledger.reaper import Reaper
from gradcam_worker.schemas.ids import new_id, utc_now
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.testing import MemoryLedger

LEASE_S, LOST_AFTER_S = 15.0, 20.0
WAIT_S = 20
WORKER = WorkerRef(id="w:1", device="cpu")


class Ledger(MemoryLedger):
    """A ledger that can be out of reach, and notes when it was asked who leads and when a job was lost."""

    away: bool = False
    unreadable: str = ""
    led_s: float = 0.0
    lost_s: float = 0.0

    def try_lead(self, worker: str, seconds: float) -> bool:
        if self.away:
            message = "gone"
            raise LedgerUnavailable(message)
        self.led_s = self.led_s or time.monotonic()
        return super().try_lead(worker, seconds)

    def expire_lease(self, job_id: str) -> str | None:
        if job_id == self.unreadable:
            message = "this version cannot read it"
            raise ValueError(message)
        self.lost_s = time.monotonic()
        return super().expire_lease(job_id)


@dataclass
class Setup:
    """A ledger, the seconds it has seen, a broker, and reapers."""

    now: list[float] = field(default_factory=lambda: [time.time()])
    republished: list[tuple[str, str]] = field(default_factory=list)  # job id, priority
    messages: dict[str, int] = field(default_factory=dict)  # priority -> in the queue
    broker_away: bool = False

    def __post_init__(self) -> None:
        self.ledger = Ledger(lease_s=LEASE_S, clock=lambda: self.now[0])

    def reaper(self, name: str = "reaper", *, lease_s: float = LEASE_S) -> Reaper:
        def count_messages(route: str) -> int:
            self.check()
            return self.messages.get(route, 0)

        return Reaper(
            self.ledger, name, self.publish, count_messages, lease_s=lease_s, lost_after_s=LOST_AFTER_S
        )

    def check(self) -> None:
        if self.broker_away:
            message = "gone"
            raise BrokerUnavailable(message)

    def publish(self, job_id: str, route: str) -> None:
        self.check()
        self.republished.append((job_id, route))

    def submit(self, **fields: Any) -> StatusDocument:
        wish = {"image": "s3://in/a.png", "network": "vgg16", "target": {"top_n": 1}}
        return self.ledger.submit(Job.parse({**wish, "id": new_id(), **fields}))

    def claim(self, **fields: Any) -> StatusDocument:
        return self.ledger.claim(self.submit(**fields), WORKER).document

    def read(self, document: StatusDocument) -> StatusDocument:
        return self.ledger.read(document.id)


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(reaper, "RENEWAL_INTERVAL_S", 0)
    return Setup()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_retry_is_republished_when_its_pause_is_over_and_not_before(setup: Setup) -> None:
    document = setup.claim(priority="low")
    setup.ledger.postpone(document, delay_s=30)
    one = setup.reaper()
    setup.now[0] += 29
    one.run_round()
    assert (setup.republished, setup.read(document).status) == ([], "retrying")
    setup.now[0] += 2
    one.run_round()
    assert (setup.republished, setup.read(document).status) == ([(document.id, "low")], "queued")
    one.run_round()
    assert len(setup.republished) == 1


def test_a_job_whose_lease_expired_is_queued_as_suspected(setup: Setup) -> None:
    document = setup.claim()
    one = setup.reaper()
    setup.now[0] += LEASE_S - 1
    one.run_round()
    assert setup.read(document).status == "running"
    setup.now[0] += 2
    one.run_round()
    after = setup.read(document)
    assert setup.republished == [(document.id, "normal")]
    assert (after.status, after.attempt, state_machine.is_suspected(after)) == ("queued", 1, True)


def test_a_job_that_was_lost_in_its_last_attempt_fails_and_is_not_republished(setup: Setup) -> None:
    document = setup.claim(max_attempts=1)
    setup.now[0] += LEASE_S + 1
    setup.reaper().run_round()
    after = setup.read(document)
    assert after.error is not None
    assert (after.status, after.error.code, setup.republished) == ("failed", "max_attempts_exceeded", [])
    assert [job_id for job_id, _ in setup.ledger.find_dead_letters()] == [document.id]


def test_a_job_that_expires_in_the_queue_or_in_a_pause_ends_expired(setup: Setup) -> None:
    expires_at = utc_now() + timedelta(seconds=60)
    waits, pauses = setup.submit(expires_at=expires_at), setup.claim(expires_at=expires_at)
    setup.ledger.postpone(pauses, delay_s=300)
    setup.reaper().run_round()
    assert setup.read(waits).status == "queued"
    setup.now[0] += 61
    setup.reaper().run_round()
    assert [setup.read(one).status for one in (waits, pauses)] == ["expired", "expired"]


@pytest.mark.parametrize(("priority", "messages"), [("bulk", 0), ("high", 0), ("high", 3)])
def test_a_job_whose_message_was_lost_is_published_again(
    setup: Setup, priority: str, messages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "LOST_MESSAGES_INTERVAL_S", 0)
    setup.messages = {priority: messages}
    document, one = setup.submit(priority=priority), setup.reaper()
    setup.now[0] += LOST_AFTER_S - 1
    one.run_round()
    assert setup.republished == []
    setup.now[0] += 2
    one.run_round()
    if messages:
        assert setup.republished == [], "it may be among those that wait"
        setup.claim(priority=priority)
        setup.now[0] += LOST_AFTER_S + 1
        setup.claim(priority=priority)  # published later, and taken
        one.run_round()
    assert (document.id, priority) in setup.republished
    assert setup.read(document).status == "queued"
    republished = len(setup.republished)
    one.run_round()
    assert len(setup.republished) == republished, "not again before it had time to be found"


def test_a_job_that_could_not_be_published_is_found_again(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "LOST_MESSAGES_INTERVAL_S", 0)
    document, one = setup.claim(), setup.reaper()
    setup.now[0] += LEASE_S + 1
    setup.broker_away = True
    with pytest.raises(BrokerUnavailable):
        one.run_round()
    assert setup.read(document).status == "queued"
    setup.broker_away = False
    one.run_round()
    assert setup.republished == []
    setup.now[0] += LOST_AFTER_S + 1
    one.run_round()
    assert setup.republished == [(document.id, "normal")]


def test_one_worker_reaps_and_another_takes_over_when_it_is_gone(setup: Setup) -> None:
    first, second = setup.reaper("first"), setup.reaper("second")
    first.run_round()
    document = setup.claim()
    setup.ledger.postpone(document, delay_s=0)
    second.run_round()
    assert setup.read(document).status == "retrying", "that is for the first"
    setup.now[0] += reaper.LEADER_LEASE_S + 0.1
    second.run_round()
    assert setup.read(document).status == "queued"


def test_a_record_that_cannot_be_read_does_not_delay_others(setup: Setup, caplog: Any) -> None:
    bad, good = setup.claim(), setup.claim()
    setup.ledger.unreadable = bad.id
    setup.now[0] += LEASE_S + 1
    setup.reaper().run_round()
    assert [setup.read(one).status for one in (bad, good)] == ["running", "queued"]
    assert f"job_recovery_failed job_id={bad.id}" in caplog.text


def test_after_an_outage_of_the_ledger_workers_have_time_to_renew_leases(
    setup: Setup, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "ROUND_INTERVAL_S", 0.05)
    document = setup.claim()
    setup.ledger.away = True
    setup.now[0] += 3600
    loop = setup.reaper(lease_s=1).loop
    loop.start()
    wait_for(lambda: "no job can be recovered: gone" in caplog.text)
    setup.ledger.away = False
    wait_for(lambda: setup.read(document).status == "queued")
    assert loop.stop(WAIT_S)
    assert caplog.text.count("no job can be recovered") == 1, "an outage is said once"
    assert setup.ledger.lost_s - setup.ledger.led_s >= 1
