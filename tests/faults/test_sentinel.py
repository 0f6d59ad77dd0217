"""Real Sentinels: queue, ledger, clients and worker follow the master that they choose."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterator

import pytest

from devtools.faults import sentinel
from devtools.faults.cluster import START_S, suspended, wait_for
from devtools.faults.replicas import MASTER, PASSWORD, SENTINEL_PASSWORD, ReplicatedServer, settings_of
from devtools.faults.verdict import Verdict
from gradcam_worker.broker import app as broker
from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import InvalidSettings, LedgerUnavailable
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.runtime.processes import preflight
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

ASKS_AGAIN_S = 0.1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicatedServer]:
    with ReplicatedServer(tmp_path_factory.mktemp("replicas")) as server:
        yield server


def new_job() -> Job:
    fields = {"image": "s3://photos/1.jpg", "network": "vgg16", "target": {"top_n": 1}}
    return Job.parse({"id": str(uuid.uuid4()), **fields})


def submit_by_each(client: GradcamClient, asyncio_client: AsyncGradcamClient) -> list[str]:
    """Submit a job by each client, as often as it takes."""

    async def submit() -> str:
        while True:
            try:
                return (await asyncio_client.submit(new_job())).id
            except LedgerUnavailable:
                await asyncio.sleep(ASKS_AGAIN_S)

    while True:
        try:
            return [client.submit(new_job()), asyncio.run(submit())]
        except LedgerUnavailable:
            time.sleep(ASKS_AGAIN_S)


def test_queue_ledger_and_clients_follow_the_master(server: ReplicatedServer) -> None:
    settings = settings_of(server)
    publisher, asyncio_client = Publisher(settings), AsyncGradcamClient(settings=settings)
    with (
        contextlib.closing(GradcamClient(settings=settings)) as client,
        contextlib.closing(broker.make_app(settings).connection_for_write()) as connection,
    ):
        submit_by_each(client, asyncio_client)
        channel, former = connection.default_channel, server.master

        # The hardest case: the former master still answers and takes writes. Only the Sentinels know better.
        with server.partition(), contextlib.closing(server.master.connect()) as master:

            def have_moved() -> bool:
                ids = submit_by_each(client, asyncio_client)
                return all(master.exists(f"{settings.key_prefix}job:{job_id}") for job_id in ids)

            wait_for(have_moved, START_S, "both clients write to the new master")
            with channel.conn_or_acquire() as consumers:
                assert consumers.config_get("port") == {"port": str(server.master.port)}
            assert publisher.queue_length("normal") == len(master.keys(f"{settings.key_prefix}job:*"))
            with contextlib.closing(former.connect()) as isolated:
                assert isolated.info("replication")["role"] == "master"
    publisher.close()


def test_a_job_is_not_accepted_by_submitting_it_again_while_a_replica_lacks_it(
    server: ReplicatedServer,
) -> None:
    settings, job = settings_of(server).model_copy(update={"submit_replicas": 2}), new_job()
    replica = next(one for one in server.replicas if one is not server.master)
    with suspended(replica.pid):
        for _ in range(2):  # each by a connection of its own
            with pytest.raises(LedgerUnavailable, match="has 1 replicas that follow"):
                RedisLedger(settings, retries=0).submit(job)
    assert RedisLedger(settings, retries=0).submit(job).id == job.id


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (MASTER, "another", "the Sentinels know no master named 'another': check the na"),
        (
            SENTINEL_PASSWORD,
            "wrong",
            "refuses access .*: check GRADCAM_SENTINEL_USER and GRADCAM_SENTINEL_PAS",
        ),
        (
            SENTINEL_PASSWORD,
            "",
            "refuses access .no password is set.: check GRADCAM_SENTINEL_USER and GRADCAM_SENTINEL_PAS",
        ),
        (
            f":{PASSWORD}@",
            ":wrong@",
            "refuses access .*: check the user, the password and the database of its",
        ),
    ],
)
def test_a_process_says_at_start_which_name_or_password_is_wrong(
    server: ReplicatedServer, old: str, new: str, why: str
) -> None:
    given = {name: str(value).replace(old, new) for name, value in server.settings().items()}
    with pytest.raises(InvalidSettings, match=f"^GRADCAM_BROKER_URL: .*{why}"):
        preflight.check_broker(Settings(**given))


def test_a_url_that_leads_to_a_sentinel_itself_is_refused_with_what_to_write(
    server: ReplicatedServer,
) -> None:
    url = f"redis://:{SENTINEL_PASSWORD}@127.0.0.1:{server.sentinels[0]}/0"
    with pytest.raises(InvalidSettings, match=r"is a Redis Sentinel: the URL of its master must look like"):
        preflight.check_broker(Settings(broker_url=url))


def test_a_job_that_was_accepted_with_a_replica_survives_its_master_and_the_worker_comes_back(
    kept: Callable[[Verdict], Verdict],
) -> None:
    # `scripts/faults sentinel` asks for 10 s, of a machine that has time.
    verdict = kept(sentinel.attack(1, seed=1, modes=["wait"], faults=["kill"], back_s=START_S))
    assert verdict.faults == 1
