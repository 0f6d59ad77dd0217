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
class Office:
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
def office() -> Office:
    return Office()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_job_has_to_tell_is_written_only_while_the_ledger_answers(office: Office, job: Job) -> None:
    asked = [0]

    def catch_up() -> None:
        asked[0] += 1

    office.ledger.failure = LedgerUnavailable("gone")
    office.leases = LeaseManager(office.ledger, ME.id, 0.03)
    with office.leases.hold(office.claim(job), Deadline(60), catch_up):
        office.leases.loop.start()
        try:
            wait_for(lambda: office.ledger.asked > 3)
            assert asked[0] <= 1
            office.ledger.failure = None
            wait_for(lambda: asked[0] > 3)
        finally:
            assert office.leases.loop.stop(WAIT_S)
    office.leases.catch_up()
    assert not office.leases._behind


def test_a_job_is_renewed_as_long_as_it_is_held_and_no_longer(office: Office, job: Job) -> None:
    document = office.claim(job)
    with office.leases.hold(document, Deadline(60)):
        assert office.leases.jobs() == {job.id: 1}
        for _ in range(5):
            office.passes(10)
            office.leases.renew()
        assert office.lost() == []
    assert office.leases.jobs() == {}
    office.leases.renew()
    office.passes(LEASE_S)
    assert office.lost() == [job.id]


def test_one_beat_says_how_the_worker_is(office: Office) -> None:
    office.leases.renew()
    assert office.ledger.find_workers() == {"me": "well"}


def test_a_job_that_somebody_else_has_by_now_is_stopped(office: Office, job: Job) -> None:
    deadline = Deadline(60)
    with office.leases.hold(office.claim(job), deadline):
        office.passes(LEASE_S + 1)
        assert office.ledger.expire_lease(job.id)
        office.ledger.claim(office.ledger.read(job.id), WorkerRef(id="other", device="cpu"))
        deadline.check("explain")  # it has not heard of it yet
        office.leases.renew()
        with pytest.raises(AttemptFenced, match=r"Attempt 1 .* was overtaken"):
            deadline.check("explain")


def test_a_job_that_somebody_wants_stopped_is_stopped(office: Office, job: Job) -> None:
    deadline = Deadline(60)
    with office.leases.hold(office.claim(job), deadline):
        office.ledger.cancel(job.id)
        office.leases.renew()
        with pytest.raises(JobCanceled):
            deadline.check("explain")
    assert not deadline.left_s(), "whatever it waits for, it waits no longer"


def test_a_job_waits_while_nobody_knows_whose_it_is_and_goes_on_when_it_is_still_its_own(job: Job) -> None:
    office = Office(lease_s=1)
    deadline, passed = Deadline(60), threading.Event()

    def work() -> None:
        deadline.check("upload")
        passed.set()

    with office.leases.hold(office.claim(job), deadline):
        office.ledger.failure = LedgerUnavailable("gone")
        with pytest.raises(LedgerUnavailable):
            office.leases.renew()
        time.sleep(1.1)  # its lease is over, by its own clock
        thread = threading.Thread(target=work)
        thread.start()
        assert not passed.wait(0.5)
        office.ledger.failure = None
        office.leases.renew()
        assert passed.wait(WAIT_S)
        thread.join()


def test_a_job_that_waited_while_another_worker_took_it_goes_no_further(job: Job) -> None:
    office = Office(lease_s=1)
    deadline, ended = Deadline(60), list[Exception]()

    def work() -> None:
        try:
            deadline.check("upload")
        except AttemptFenced as error:
            ended.append(error)

    with office.leases.hold(office.claim(job), deadline):
        time.sleep(1.1)
        thread = threading.Thread(target=work)
        thread.start()
        office.passes(2)
        assert office.ledger.expire_lease(job.id)
        office.leases.renew()
        thread.join(WAIT_S)
    assert len(ended) == 1


def test_a_job_does_not_wait_longer_than_it_may_run(job: Job) -> None:
    office = Office(lease_s=1)
    deadline = Deadline(1.3)
    with office.leases.hold(office.claim(job), deadline):
        time.sleep(1.1)
        with pytest.raises(JobTimeout):
            deadline.check("upload")


def test_all_that_runs_can_be_let_go(office: Office, job: Job) -> None:
    deadline = Deadline(60)
    with office.leases.hold(office.claim(job), deadline):
        assert office.leases.release_all() == {job.id: 1}
        with pytest.raises(AttemptFenced, match="handed back"):
            deadline.check("explain")


@pytest.mark.parametrize(
    "failure", [LedgerUnavailable("gone"), ValueError("nonsense"), SystemExit("nonsense")]
)
def test_it_goes_on_renewing_whatever_happens_and_says_it_once(
    job: Job, failure: BaseException, caplog: Any
) -> None:
    office = Office(lease_s=1)
    with office.leases.hold(office.claim(job), Deadline(60)):
        office.ledger.failure = failure
        office.leases.loop.start()
        wait_for(lambda: office.ledger.asked > 2)
        assert office.ledger.find_workers() == {}
        office.ledger.failure = None
        wait_for(lambda: office.ledger.find_workers() == {"me": "well"})
        assert office.leases.loop.stop(WAIT_S)
    if isinstance(failure, LedgerUnavailable):
        assert caplog.text.count("no lease can be renewed: gone") == 1
    else:
        assert "nonsense" in caplog.text
