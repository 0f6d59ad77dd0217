"""Tenants take turns at real workers, with a small network; also where one of these is killed."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from devtools.faults import tiny_network
from devtools.processes import children
from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument

pytestmark = [pytest.mark.live]

WAIT_S = 120
SLOTS = 4 + 2  # jobs that a stage's worker runs at once: its threads, and those of shards
ACME, OTHER = Tenant("acme"), Tenant("other", share=2)


class Service:
    """A stage, and the jobs of each tenant."""

    def __init__(self, stage: Any) -> None:
        self.stage = stage
        self.ledger, self.publisher = RedisLedger(stage.settings), Publisher(stage.settings)
        self.ids = dict[str, list[str]]()

    def submit(self, tenant: Tenant | None, number: int) -> None:
        fields = {"image": "s3://photos/coffee.jpg", "network": tiny_network.NETWORK, "target": {"top_n": 1}}
        jobs = [Job.parse({**fields, "artifacts": [{"kind": "heatmap"}]}) for _ in range(number)]
        entered = self.ledger.submit_many(jobs, tenant=tenant)
        self.publisher.publish(
            (job, one.created_at if isinstance(one, StatusDocument) else None)
            for job, one in zip(jobs, entered, strict=True)
        )
        self.ids.setdefault(tenant.name if tenant else "", []).extend(job.id for job in jobs)

    def documents(self, tenant: str) -> list[StatusDocument]:
        return list(self.ledger.read_many(self.ids[tenant]).values())

    def ended(self, *tenants: str) -> int:
        return sum(one.final for tenant in tenants or self.ids for one in self.documents(tenant))


@pytest.fixture
def service(make_stage: Callable[..., Any], request: pytest.FixtureRequest) -> Iterator[Service]:
    service = Service(make_stage(request.node.name[:30]))
    yield service
    service.publisher.close()


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.2)  # each look reads and parses every job


def test_a_tenant_with_few_jobs_does_not_wait_for_another_with_many(service: Service) -> None:
    service.submit(ACME, 400)
    with service.stage.worker("worker", tiny=True):
        wait_for(service.ended, "the first jobs' end")
        service.submit(OTHER, 6)
        wait_for(lambda: service.ended("other") == 6, "the end of the jobs of the second tenant")
        others = service.documents("other")
        acmes = [one for one in service.documents("acme") if one.completed_at]
    assert {one.status for one in others} == {"succeeded"}
    begun, end = min(one.created_at for one in others), max(one.updated_at for one in others)
    between = sum(begun < one.updated_at < end for one in acmes)
    assert between <= 6 + 3 * SLOTS, "its turns, and what was running at the beginning and at the end"
    usage = service.ledger.read_usage("other", 1)[0]
    assert (usage.jobs, usage.device_s > 0) == (6, True)


def test_no_job_is_lost_or_run_twice_where_a_worker_is_killed_among_turns(service: Service) -> None:
    for _ in range(5):
        service.submit(ACME, 20)
        service.submit(OTHER, 6)
        service.submit(None, 6)
    with service.stage.worker("one", tiny=True) as one, service.stage.worker("two", tiny=True):
        wait_for(lambda: service.ended() > 10, "the first jobs' end")
        [supervisor] = children(one.pid)
        for pid in children(supervisor):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: service.ended() == 5 * 32, "the end of all jobs")
    documents = [one for tenant in service.ids for one in service.documents(tenant)]
    assert {one.status for one in documents} == {"succeeded"}
    assert sum(one.attempt for one in documents) <= len(documents) + SLOTS, "what it had in hand runs again"
    prefix = service.stage.settings.key_prefix
    assert not [*service.ledger.server.redis.scan_iter(f"{prefix}turn*")]
    assert service.ledger.read_usage("acme", 1)[0].jobs == 100
