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
class Graveyard:
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
def yard(monkeypatch: pytest.MonkeyPatch) -> Graveyard:
    monkeypatch.setattr(reaper, "RENEWAL_INTERVAL_S", 0)
    return Graveyard()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_retry_is_republished_when_its_pause_is_over_and_not_before(yard: Graveyard) -> None:
    document = yard.claim(priority="low")
    yard.ledger.advance(document, status="retrying", delay_s=30)
    one = yard.reaper()
    yard.now[0] += 29
    one.run_round()
    assert (yard.republished, yard.read(document).status) == ([], "retrying")
    yard.now[0] += 2
    one.run_round()
    assert (yard.republished, yard.read(document).status) == ([(document.id, "low")], "queued")
    one.run_round()
    assert len(yard.republished) == 1


def test_a_job_whose_lease_ran_out_is_queued_again_under_suspicion(yard: Graveyard) -> None:
    document = yard.claim()
    one = yard.reaper()
    yard.now[0] += LEASE_S - 1
    one.run_round()
    assert yard.read(document).status == "running"
    yard.now[0] += 2
    one.run_round()
    after = yard.read(document)
    assert yard.republished == [(document.id, "normal")]
    assert (after.status, after.attempt, state_machine.is_suspected(after)) == ("queued", 1, True)


def test_a_job_that_was_lost_as_often_as_it_may_is_parked_and_republished_no_more(yard: Graveyard) -> None:
    document = yard.claim(max_attempts=1)
    yard.now[0] += LEASE_S + 1
    yard.reaper().run_round()
    after = yard.read(document)
    assert after.error is not None
    assert (after.status, after.error.code, yard.republished) == ("failed", "max_attempts_exceeded", [])
    assert [job_id for job_id, _ in yard.ledger.find_dead_letters()] == [document.id]


def test_a_job_that_expires_in_the_queue_or_in_a_pause_ends_expired(yard: Graveyard) -> None:
    expires_at = utc_now() + timedelta(seconds=60)
    waits, pauses = yard.submit(expires_at=expires_at), yard.claim(expires_at=expires_at)
    yard.ledger.advance(pauses, status="retrying", delay_s=300)
    yard.reaper().run_round()
    assert yard.read(waits).status == "queued"
    yard.now[0] += 61
    yard.reaper().run_round()
    assert [yard.read(one).status for one in (waits, pauses)] == ["expired", "expired"]


@pytest.mark.parametrize(("priority", "messages"), [("bulk", 0), ("high", 0), ("high", 3)])
def test_a_job_whose_message_was_lost_is_published_again(
    yard: Graveyard, priority: str, messages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "LOST_MESSAGES_INTERVAL_S", 0)
    yard.messages = {priority: messages}
    document, one = yard.submit(priority=priority), yard.reaper()
    yard.now[0] += LOST_AFTER_S - 1
    one.run_round()
    assert yard.republished == []
    yard.now[0] += 2
    one.run_round()
    if messages:
        assert yard.republished == [], "it may be among those that wait"
        yard.claim(priority=priority)
        yard.now[0] += LOST_AFTER_S + 1
        yard.claim(priority=priority)  # published later, and taken
        one.run_round()
    assert (document.id, priority) in yard.republished
    assert yard.read(document).status == "queued"
    republished = len(yard.republished)
    one.run_round()
    assert len(yard.republished) == republished, "not again before it had time to be found"


def test_what_cannot_be_published_is_found_again(yard: Graveyard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaper, "LOST_MESSAGES_INTERVAL_S", 0)
    document, one = yard.claim(), yard.reaper()
    yard.now[0] += LEASE_S + 1
    yard.broker_away = True
    with pytest.raises(BrokerUnavailable):
        one.run_round()
    assert yard.read(document).status == "queued"
    yard.broker_away = False
    one.run_round()
    assert yard.republished == []
    yard.now[0] += LOST_AFTER_S + 1
    one.run_round()
    assert yard.republished == [(document.id, "normal")]


def test_one_worker_reaps_and_another_takes_over_when_it_is_gone(yard: Graveyard) -> None:
    first, second = yard.reaper("first"), yard.reaper("second")
    first.run_round()
    document = yard.claim()
    yard.ledger.advance(document, status="retrying", delay_s=0)
    second.run_round()
    assert yard.read(document).status == "retrying", "that is for the first"
    yard.now[0] += reaper.LEADER_LEASE_S + 0.1
    second.run_round()
    assert yard.read(document).status == "queued"


def test_a_record_that_cannot_be_read_keeps_no_other_waiting(yard: Graveyard, caplog: Any) -> None:
    bad, good = yard.claim(), yard.claim()
    yard.ledger.unreadable = bad.id
    yard.now[0] += LEASE_S + 1
    yard.reaper().run_round()
    assert [yard.read(one).status for one in (bad, good)] == ["running", "queued"]
    assert f"job_recovery_failed job_id={bad.id}" in caplog.text


def test_when_the_ledger_is_back_everybody_has_the_time_to_renew(
    yard: Graveyard, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "ROUND_INTERVAL_S", 0.05)
    document = yard.claim()
    yard.ledger.away = True
    yard.now[0] += 3600
    loop = yard.reaper(lease_s=1).loop
    loop.start()
    wait_for(lambda: "no job can be recovered: gone" in caplog.text)
    yard.ledger.away = False
    wait_for(lambda: yard.read(document).status == "queued")
    assert loop.stop(WAIT_S)
    assert caplog.text.count("no job can be recovered") == 1, "an outage is said once"
    assert yard.ledger.lost_s - yard.ledger.led_s >= 1
