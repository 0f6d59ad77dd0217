"""Leases over a ledger in memory, with a clock of the test's own."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from gradcam_worker.errors import AttemptFenced, JobCanceled, JobTimeout, LedgerUnavailable
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.ledger.ledger import ClaimOutcome, Renewed
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.testing import MemoryLedger

LEASE_S = 15.0
WAIT_S = 20
ME = WorkerRef(id="me", device="cpu")


class Away(MemoryLedger):
    """A ledger that can be out of reach, or answer what nobody foresaw."""

    failure: BaseException | None = None
    asked = 0

    def renew_leases(self, worker: str, health: str, held: Mapping[str, int]) -> Renewed:
        self.asked += 1
        if self.failure:
            raise self.failure
        return super().renew_leases(worker, health, held)


@dataclass
class Harness:
    """A worker's leases, and the seconds that its ledger has seen."""

    lease_s: float = LEASE_S
    now: list[float] = field(default_factory=lambda: [1000.0])

    def __post_init__(self) -> None:
        self.ledger = Away(lease_s=self.lease_s, clock=lambda: self.now[0])
        self.leases = LeaseManager(self.ledger, ME.id, self.lease_s, lambda: "well")

    def claim(self, job: Job) -> StatusDocument:
        document = self.ledger.submit(job)
        claim = self.ledger.claim(document, ME)
        assert claim.outcome is ClaimOutcome.CLAIMED
        return claim.document

    def passes(self, seconds: float) -> None:
        self.now[0] += seconds

    def lost(self) -> list[str]:
        return self.ledger.find_overdue(10).expired_leases


@pytest.fixture
def harness() -> Harness:
    return Harness()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_job_has_to_tell_is_written_only_while_the_ledger_answers(harness: Harness, job: Job) -> None:
    asked = [0]

    def write_stage() -> None:
        asked[0] += 1

    harness.ledger.failure = LedgerUnavailable("gone")
    harness.leases = LeaseManager(harness.ledger, ME.id, 0.03)
    with harness.leases.hold(harness.claim(job), Deadline(60), write_stage):
        harness.leases.loop.start()
        try:
            wait_for(lambda: harness.ledger.asked > 3)
            assert asked[0] <= 1
            harness.ledger.failure = None
            wait_for(lambda: asked[0] > 3)
        finally:
            assert harness.leases.loop.stop(WAIT_S)
    harness.leases.write_stages()
    assert not harness.leases._stage_writers


def test_a_job_is_renewed_as_long_as_it_is_held_and_no_longer(harness: Harness, job: Job) -> None:
    document = harness.claim(job)
    with harness.leases.hold(document, Deadline(60)):
        assert harness.leases.jobs() == {job.id: 1}
        for _ in range(5):
            harness.passes(10)
            harness.leases.renew()
        assert harness.lost() == []
    assert harness.leases.jobs() == {}
    harness.leases.renew()
    harness.passes(LEASE_S)
    assert harness.lost() == [job.id]


def test_a_renewal_says_how_the_worker_is(harness: Harness) -> None:
    harness.leases.renew()
    assert harness.ledger.find_workers() == {"me": "well"}


def test_a_job_that_somebody_else_has_by_now_is_stopped(harness: Harness, job: Job) -> None:
    deadline = Deadline(60)
    with harness.leases.hold(harness.claim(job), deadline):
        harness.passes(LEASE_S + 1)
        assert harness.ledger.expire_lease(job.id)
        harness.ledger.claim(harness.ledger.read(job.id), WorkerRef(id="other", device="cpu"))
        deadline.check("explain")  # it has not heard of it yet
        harness.leases.renew()
        with pytest.raises(AttemptFenced, match=r"Attempt 1 .* was overtaken"):
            deadline.check("explain")


def test_a_job_that_somebody_wants_stopped_is_stopped(harness: Harness, job: Job) -> None:
    deadline = Deadline(60)
    with harness.leases.hold(harness.claim(job), deadline):
        harness.ledger.cancel(job.id)
        harness.leases.renew()
        with pytest.raises(JobCanceled):
            deadline.check("explain")
    assert not deadline.left_s(), "whatever it waits for, it waits no longer"


def test_a_job_waits_while_nobody_knows_whose_it_is_and_goes_on_when_it_is_still_its_own(job: Job) -> None:
    harness = Harness(lease_s=1)
    deadline, passed = Deadline(60), threading.Event()

    def work() -> None:
        deadline.check("upload")
        passed.set()

    with harness.leases.hold(harness.claim(job), deadline):
        harness.ledger.failure = LedgerUnavailable("gone")
        with pytest.raises(LedgerUnavailable):
            harness.leases.renew()
        time.sleep(1.1)  # its lease is over, by its own clock
        thread = threading.Thread(target=work)
        thread.start()
        assert not passed.wait(0.5)
        harness.ledger.failure = None
        harness.leases.renew()
        assert passed.wait(WAIT_S)
        thread.join()


def test_a_job_that_waited_while_another_worker_took_it_goes_no_further(job: Job) -> None:
    harness = Harness(lease_s=1)
    deadline, ended = Deadline(60), list[Exception]()

    def work() -> None:
        try:
            deadline.check("upload")
        except AttemptFenced as error:
            ended.append(error)

    with harness.leases.hold(harness.claim(job), deadline):
        time.sleep(1.1)
        thread = threading.Thread(target=work)
        thread.start()
        harness.passes(2)
        assert harness.ledger.expire_lease(job.id)
        harness.leases.renew()
        thread.join(WAIT_S)
    assert len(ended) == 1


def test_a_job_does_not_wait_longer_than_it_may_run(job: Job) -> None:
    harness = Harness(lease_s=1)
    deadline = Deadline(1.3)
    with harness.leases.hold(harness.claim(job), deadline):
        time.sleep(1.1)
        with pytest.raises(JobTimeout):
            deadline.check("upload")


def test_all_that_runs_can_be_let_go(harness: Harness, job: Job) -> None:
    deadline = Deadline(60)
    with harness.leases.hold(harness.claim(job), deadline):
        assert harness.leases.release_all() == {job.id: 1}
        with pytest.raises(AttemptFenced, match="handed back"):
            deadline.check("explain")


@pytest.mark.parametrize(
    "failure", [LedgerUnavailable("gone"), ValueError("nonsense"), SystemExit("nonsense")]
)
def test_it_goes_on_renewing_whatever_happens_and_says_it_once(
    job: Job, failure: BaseException, caplog: Any
) -> None:
    harness = Harness(lease_s=1)
    with harness.leases.hold(harness.claim(job), Deadline(60)):
        harness.ledger.failure = failure
        harness.leases.loop.start()
        wait_for(lambda: harness.ledger.asked > 2)
        assert harness.ledger.find_workers() == {}
        harness.ledger.failure = None
        wait_for(lambda: harness.ledger.find_workers() == {"me": "well"})
        assert harness.leases.loop.stop(WAIT_S)
    if isinstance(failure, LedgerUnavailable):
        assert caplog.text.count("no lease can be renewed: gone") == 1
    else:
        assert "nonsense" in caplog.text
