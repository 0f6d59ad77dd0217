"""Leases in a ledger in memory, whose clock the tests control."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from gradcam_worker.errors import AttemptFenced, JobCanceled, JobTimeout, LedgerUnavailable
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.ledger.ledger import ClaimOutcome, LeaseRenewal
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.testing import MemoryLedger

LEASE_S = 15.0
WAIT_S = 20
WORKER = WorkerRef(id="w", device="cpu")


class FailingLedger(MemoryLedger):
    """A ledger whose renewals can fail with any error."""

    failure: BaseException | None = None
    renewals = 0

    def renew_leases(self, worker: str, health: str, held: Mapping[str, int]) -> LeaseRenewal:
        self.renewals += 1
        if self.failure:
            raise self.failure
        return super().renew_leases(worker, health, held)


@dataclass
class Harness:
    """A lease manager, and a ledger with its own clock."""

    lease_s: float = LEASE_S
    now: list[float] = field(default_factory=lambda: [1000.0])

    def __post_init__(self) -> None:
        self.ledger = FailingLedger(lease_s=self.lease_s, clock=lambda: self.now[0])
        self.leases = LeaseManager(self.ledger, WORKER.id, self.lease_s, lambda: "well")

    def claim(self, job: Job) -> StatusDocument:
        document = self.ledger.submit(job)
        claim = self.ledger.claim(document, WORKER)
        assert claim.outcome is ClaimOutcome.CLAIMED
        return claim.document

    def advance_clock(self, seconds: float) -> None:
        self.now[0] += seconds

    def expired(self) -> list[str]:
        return self.ledger.find_overdue(10).expired_leases


@pytest.fixture
def harness() -> Harness:
    return Harness()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_pending_progress_is_written_only_while_the_ledger_can_be_reached(harness: Harness, job: Job) -> None:
    writes = [0]

    def write_pending() -> None:
        writes[0] += 1

    harness.ledger.failure = LedgerUnavailable("gone")
    harness.leases = LeaseManager(harness.ledger, WORKER.id, 0.03)
    with harness.leases.hold(harness.claim(job), Deadline(60), write_pending):
        harness.leases.loop.start()
        try:
            wait_for(lambda: harness.ledger.renewals > 3)
            assert writes[0] <= 1
            harness.ledger.failure = None
            wait_for(lambda: writes[0] > 3)
        finally:
            assert harness.leases.loop.stop(WAIT_S)
    harness.leases.write_progress()
    assert not harness.leases._progress_writers


def test_a_lease_is_renewed_as_long_as_its_block_lasts(harness: Harness, job: Job) -> None:
    document = harness.claim(job)
    with harness.leases.hold(document, Deadline(60)):
        assert harness.leases.jobs() == {job.id: 1}
        for _ in range(5):
            harness.advance_clock(10)
            harness.leases.renew()
        assert harness.expired() == []
    assert harness.leases.jobs() == {}
    harness.leases.renew()
    harness.advance_clock(LEASE_S)
    assert harness.expired() == [job.id]


def test_a_renewal_reports_the_health_of_the_worker(harness: Harness) -> None:
    harness.leases.renew()
    assert harness.ledger.find_workers() == {"w": "well"}


def test_a_job_that_another_worker_claimed_is_stopped(harness: Harness, job: Job) -> None:
    deadline = Deadline(60)
    with harness.leases.hold(harness.claim(job), deadline):
        harness.advance_clock(LEASE_S + 1)
        assert harness.ledger.expire_lease(job.id)
        harness.ledger.claim(harness.ledger.read(job.id), WorkerRef(id="other", device="cpu"))
        deadline.check("explain")  # the worker does not know yet
        harness.leases.renew()
        with pytest.raises(AttemptFenced, match=r"Attempt 1 .* was overtaken"):
            deadline.check("explain")


def test_a_job_whose_cancellation_was_requested_is_stopped(harness: Harness, job: Job) -> None:
    deadline = Deadline(60)
    with harness.leases.hold(harness.claim(job), deadline):
        harness.ledger.cancel(job.id)
        harness.leases.renew()
        with pytest.raises(JobCanceled):
            deadline.check("explain")
    assert not deadline.left_s(), "nothing waits for this deadline any more"


def test_a_job_waits_after_its_lease_expired_and_continues_when_it_is_renewed(job: Job) -> None:
    harness = Harness(lease_s=1)
    deadline, passed = Deadline(60), threading.Event()

    def work() -> None:
        deadline.check("upload")
        passed.set()

    with harness.leases.hold(harness.claim(job), deadline):
        harness.ledger.failure = LedgerUnavailable("gone")
        with pytest.raises(LedgerUnavailable):
            harness.leases.renew()
        time.sleep(1.1)  # the lease expires by the clock of the worker
        thread = threading.Thread(target=work)
        thread.start()
        assert not passed.wait(0.5)
        harness.ledger.failure = None
        harness.leases.renew()
        assert passed.wait(WAIT_S)
        thread.join()


def test_a_job_that_waited_and_lost_its_lease_stops(job: Job) -> None:
    harness = Harness(lease_s=1)
    deadline, errors = Deadline(60), list[Exception]()

    def work() -> None:
        try:
            deadline.check("upload")
        except AttemptFenced as error:
            errors.append(error)

    with harness.leases.hold(harness.claim(job), deadline):
        time.sleep(1.1)
        thread = threading.Thread(target=work)
        thread.start()
        harness.advance_clock(2)
        assert harness.ledger.expire_lease(job.id)
        harness.leases.renew()
        thread.join(WAIT_S)
    assert len(errors) == 1


def test_a_job_with_an_expired_lease_waits_until_its_deadline_only(job: Job) -> None:
    harness = Harness(lease_s=1)
    deadline = Deadline(1.3)
    with harness.leases.hold(harness.claim(job), deadline):
        time.sleep(1.1)
        with pytest.raises(JobTimeout):
            deadline.check("upload")


def test_all_jobs_can_be_released(harness: Harness, job: Job) -> None:
    deadline = Deadline(60)
    with harness.leases.hold(harness.claim(job), deadline):
        assert harness.leases.release_all() == {job.id: 1}
        with pytest.raises(AttemptFenced, match="requeued"):
            deadline.check("explain")


@pytest.mark.parametrize(
    "failure", [LedgerUnavailable("gone"), ValueError("nonsense"), SystemExit("nonsense")]
)
def test_renewals_continue_after_any_error_and_an_outage_is_logged_once(
    job: Job, failure: BaseException, caplog: Any
) -> None:
    harness = Harness(lease_s=1)
    with harness.leases.hold(harness.claim(job), Deadline(60)):
        harness.ledger.failure = failure
        harness.leases.loop.start()
        wait_for(lambda: harness.ledger.renewals > 2)
        assert harness.ledger.find_workers() == {}
        harness.ledger.failure = None
        wait_for(lambda: harness.ledger.find_workers() == {"w": "well"})
        assert harness.leases.loop.stop(WAIT_S)
    if isinstance(failure, LedgerUnavailable):
        assert caplog.text.count("no lease can be renewed: gone") == 1
    else:
        assert "nonsense" in caplog.text
