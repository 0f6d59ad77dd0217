import pytest

from gradcam_worker.errors import IdempotencyConflict, InvalidSettings, UnknownJob
from gradcam_worker.ledger.ledger import Ledger, Tenant
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger

WORKER = WorkerRef(id="gpu-1:7", device="cpu")
ACME, OTHER = Tenant("acme"), Tenant("other", share=2)


@pytest.fixture(params=["memory", "redis"])
def ledger(request: pytest.FixtureRequest, settings: Settings) -> Ledger:
    return MemoryLedger() if request.param == "memory" else RedisLedger(settings)


def test_a_job_of_a_tenant_does_not_exist_for_another(ledger: Ledger, job: Job) -> None:
    document = ledger.submit(job, tenant=ACME)
    assert ledger.read(job.id, "acme") == ledger.read(job.id) == document
    assert ledger.read_job(job.id, "acme") == ledger.read_job(job.id) == job
    messages = set()
    for tenant in ("other", ""):
        for call in (ledger.read, ledger.cancel, ledger.retry):
            with pytest.raises(UnknownJob) as refused:
                call(job.id, tenant)
            messages.add(str(refused.value))
        assert ledger.read_job(job.id, tenant) is None
        assert ledger.read_many([job.id], tenant) == {}
    with pytest.raises(UnknownJob) as unknown:
        ledger.read(new_id(), "acme")
    assert len({message.replace(job.id, "") for message in messages}) == 1
    assert len(messages.pop()) == len(str(unknown.value))
    assert ledger.read(job.id) == document


def test_a_tenant_cancels_and_retries_its_job_in_every_state(ledger: Ledger, job: Job) -> None:
    running = ledger.claim(ledger.submit(job, tenant=ACME), WORKER).document
    ledger.finish(running, status="failed")
    assert ledger.retry(job.id, "acme").status == "queued"
    assert ledger.cancel(job.id, "acme").status == "canceled"
    assert ledger.read(job.id, "acme").final
    with pytest.raises(UnknownJob):
        ledger.read(job.id, "other")


def test_two_tenants_may_use_the_same_idempotency_key(ledger: Ledger, job: Job) -> None:
    def submit(tenant: Tenant | None, network: str = job.network) -> str:
        update = {"id": new_id(), "idempotency_key": "k", "network": network}
        return ledger.submit(job.model_copy(update=update), tenant=tenant).id

    ids = {tenant: submit(tenant) for tenant in (ACME, OTHER, None)}
    assert len(set(ids.values())) == 3
    assert {tenant: submit(tenant) for tenant in (ACME, OTHER, None)} == ids
    with pytest.raises(IdempotencyConflict, match=ids[ACME]):
        submit(ACME, "vgg16")


@pytest.mark.parametrize("owner", [OTHER, None])
def test_the_id_of_a_job_of_somebody_else_is_a_conflict_also_for_an_equal_job(
    ledger: Ledger, job: Job, owner: Tenant | None
) -> None:
    ledger.submit(job, tenant=owner)
    later = job.model_copy(update={"id": new_id()})
    entered = ledger.submit_many([job, later], tenant=ACME)
    assert [type(one) for one in entered] == [IdempotencyConflict]
    with pytest.raises(UnknownJob):
        ledger.read(later.id)
    assert ledger.submit(job).id == job.id, "who submits for no tenant finds the jobs of all"


@pytest.mark.parametrize("name", ["Acme", "a:b", "-a", "a" * 64, "a b", "a\n"])
def test_a_name_that_cannot_be_a_part_of_a_key_is_refused(name: str) -> None:
    with pytest.raises(InvalidSettings, match="is not the name of a tenant"):
        Tenant(name)


@pytest.mark.parametrize("share", [0, -1, float("nan"), float("inf"), 2000])
def test_a_share_that_is_no_positive_number_is_refused(share: float) -> None:
    with pytest.raises(InvalidSettings, match="share"):
        Tenant("acme", share)
