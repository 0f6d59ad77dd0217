"""One key, one job: whoever races, whatever reply is lost, and however long ago it was."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
import pytest

from gradcam_worker.client.calls import REDIS_RETRIES
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import IdempotencyConflict, InvalidJob, LedgerUnavailable
from gradcam_worker.execution.handler import Disposition, JobHandler
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import RecordingPublisher, fake_services

IMAGE = cv2.imencode(".png", np.full((20, 20, 3), (0, 0, 255), np.uint8))[1].tobytes()
FIELDS: dict[str, Any] = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}
PROCESSES, KEYS = 4, 30
FOR_EVER = 1_000_000  # replies
PATIENCE_S = 60  # for processes to start on a busy machine

# Submits one job for each key, in an order of its own, as soon as everybody is ready.
RACER = """
import json, random, sys
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.settings import Settings
settings, fields, keys = Settings.from_environment(), json.loads(sys.argv[1]), int(sys.argv[2])
client = GradcamClient(settings=settings)
redis = RedisLedger(settings, timeout_s=90).server.redis
order = list(range(keys))
random.Random(sys.argv[3]).shuffle(order)
redis.rpush("ready", 1)
assert redis.blpop(["go"], 60)
print(json.dumps({str(key): client.submit(idempotency_key=f"key-{key}", **fields) for key in order}))
"""


@pytest.fixture
def ledger(settings: Settings) -> RedisLedger:
    return RedisLedger(settings)


@pytest.fixture
def client(settings: Settings) -> GradcamClient:
    return GradcamClient(settings=settings, publish=RecordingPublisher())


@pytest.fixture
def handler(settings: Settings, ledger: RedisLedger) -> JobHandler:
    """A worker's handler with the real ledger; images and network are doubles."""
    worker = WorkerRef(id="w", device="cpu")
    leases, breaker = LeaseManager(ledger, "w", 15), CircuitBreaker(lambda: None)
    return JobHandler(settings, ledger, fake_services({"s3://in/a.png": IMAGE}), worker, leases, breaker)


def jobs_in(ledger: RedisLedger) -> set[str]:
    """The ids of all jobs that the ledger has."""
    prefix = f"{ledger.server.prefix}job:"  # which may hold what a pattern would read in its own way
    names = map(str, ledger.server.redis.scan_iter())
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def test_processes_that_race_with_one_key_get_one_job_and_it_runs_once(
    settings: Settings, ledger: RedisLedger, handler: JobHandler
) -> None:
    redis, arguments = ledger.server.redis, [json.dumps(FIELDS), str(KEYS)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", RACER, *arguments, str(number)],
            stdout=subprocess.PIPE,
            env={**os.environ, **settings.to_environment()},
        )
        for number in range(PROCESSES)
    ]
    for _ in racers:
        assert RedisLedger(settings, timeout_s=90).server.redis.blpop(["ready"], PATIENCE_S)
    redis.rpush("go", *range(PROCESSES))
    answers = [json.loads(racer.communicate(timeout=PATIENCE_S)[0]) for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * PROCESSES
    first = answers[0]
    assert all(answer == first for answer in answers), "everybody was told the same ids"
    assert set(first.values()) == jobs_in(ledger)
    assert len(set(first.values())) == KEYS
    assert ledger.count_jobs() == (KEYS, 0)
    ends = [handler.handle({"id": job_id}, job_id) for answer in answers for job_id in answer.values()]
    assert ends == [Disposition.FINISHED] * KEYS + [Disposition.DROP] * (len(ends) - KEYS), (
        "each was published, and one of each ran"
    )
    documents = ledger.read_many(list(first.values())).values()
    assert {(one.status, one.attempt) for one in documents} == {("succeeded", 1)}


def test_a_key_is_good_as_long_as_its_job_is_known_and_for_no_other_job(
    ledger: RedisLedger, client: GradcamClient, handler: JobHandler
) -> None:
    job_id = client.submit(idempotency_key="k", **FIELDS)
    handler.handle({"id": job_id}, job_id)
    assert client.submit(idempotency_key="k", **FIELDS) == job_id, "after it has ended, too"
    with pytest.raises(IdempotencyConflict, match=f"'k' belongs to a different job, {job_id}"):
        client.submit(idempotency_key="k", **FIELDS | {"target": {"top_n": 2}})
    assert jobs_in(ledger) == {job_id}


def test_the_key_of_a_job_that_failed_leads_to_it_and_nothing_runs_again(
    client: GradcamClient, handler: JobHandler
) -> None:
    missing = FIELDS | {"image": "s3://in/none.png"}
    job_id = client.submit(idempotency_key="k", **missing)
    handler.handle({"id": job_id}, job_id)
    failed = client.status(job_id)
    assert failed.status == "failed"
    assert client.submit(idempotency_key="k", **missing) == job_id
    assert handler.handle({"id": job_id}, job_id) == Disposition.DROP
    assert client.status(job_id) == failed


def test_a_key_that_outlives_its_job_leads_to_a_new_one(ledger: RedisLedger, client: GradcamClient) -> None:
    first = client.submit(idempotency_key="k", **FIELDS)
    ledger.server.redis.delete(f"{ledger.server.prefix}job:{first}")
    second = client.submit(idempotency_key="k", **FIELDS)
    assert second != first
    assert client.submit(idempotency_key="k", **FIELDS) == second


@pytest.mark.parametrize("submitted_by", ["client", "message"])
def test_any_text_of_256_characters_is_a_key_and_no_two_are_the_same(
    submitted_by: str, ledger: RedisLedger, client: GradcamClient, handler: JobHandler
) -> None:
    keys = ["k" * 256, "k" * 255, "k", "K", "k ", "k\0", "k\0\0", "k\n", "k:", "{k}", "*", "😀" * 256]
    keys += ["\u00e9", "e\u0301", "\u202ek", "null", "'", '"', "\\", "%00", "../k", "job:k"]

    def submit(key: str) -> str:
        if submitted_by == "client":
            return client.submit(idempotency_key=key, **FIELDS)
        job = Job.parse({"idempotency_key": key, **FIELDS})
        handler.handle(json.loads(json.dumps(job.model_dump(mode="json"))), job.id)
        return ledger.submit(job).id

    ids = [submit(key) for key in keys]
    assert [submit(key) for key in keys] == ids
    assert len(set(ids)) == len(keys)
    assert jobs_in(ledger) == set(ids)


@pytest.mark.parametrize("key", ["k" * 257, "\ud800", 7, ["k"]])
def test_what_is_no_key_is_refused_by_its_name(
    client: GradcamClient, ledger: RedisLedger, key: object
) -> None:
    with pytest.raises(InvalidJob, match="idempotency_key: "):
        client.submit(idempotency_key=key, **FIELDS)  # type: ignore[call-overload]
    assert not jobs_in(ledger)


def test_an_empty_key_is_no_key(client: GradcamClient) -> None:
    assert client.submit(idempotency_key="", **FIELDS) != client.submit(idempotency_key="", **FIELDS)


def test_one_key_below_two_prefixes_is_two_jobs(settings: Settings) -> None:
    others = settings.model_copy(update={"key_prefix": f"other {settings.key_prefix}"})
    both = [GradcamClient(settings=one, publish=RecordingPublisher()) for one in (settings, others)]
    ids = [client.submit(idempotency_key="k", **FIELDS) for client in both]
    assert len(set(ids)) == 2
    assert [client.submit(idempotency_key="k", **FIELDS) for client in both] == ids


class Forgetful:
    """Stands before a Redis and passes everything on, but for the first replies to a script: it hangs up."""

    def __init__(self, target: int, losses: int) -> None:
        self.losses = losses
        self.lost = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                caller, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=[caller], daemon=True).start()

    def _pass_on(self, caller: socket.socket) -> None:
        """One question, one reply, again and again."""
        server = socket.create_connection(("127.0.0.1", self._target))
        with caller, server, contextlib.suppress(OSError):
            while asked := caller.recv(1_000_000):
                server.sendall(asked)
                reply = server.recv(1_000_000)
                if b"EVALSHA" in asked and not reply.startswith(b"-") and self.lost < self.losses:
                    self.lost += 1  # it has been done, and nobody will hear of it
                    return
                caller.sendall(reply)


@pytest.fixture
def forgetful(valkey: str, request: pytest.FixtureRequest) -> Iterator[Forgetful]:
    proxy = Forgetful(int(urlsplit(valkey).port or 0), request.param)
    yield proxy
    proxy.close()


def through(proxy: Forgetful, settings: Settings) -> GradcamClient:
    """A client that knows the ledger by this proxy alone."""
    url = f"redis://127.0.0.1:{proxy.port}/0"
    return GradcamClient(
        settings=settings.model_copy(update={"ledger_url": url}), publish=RecordingPublisher()
    )


@pytest.mark.parametrize("forgetful", [1, 2], indirect=True)
@pytest.mark.parametrize("key", ["k", None])
def test_a_submission_whose_reply_is_lost_is_sent_again_and_is_one_job(
    forgetful: Forgetful, settings: Settings, ledger: RedisLedger, handler: JobHandler, key: str | None
) -> None:
    job_id = through(forgetful, settings).submit(idempotency_key=key, **FIELDS)
    assert forgetful.lost == forgetful.losses
    assert jobs_in(ledger) == {job_id}
    assert [handler.handle({"id": job_id}, job_id) for _ in range(3)] == [
        Disposition.FINISHED,
        Disposition.DROP,
        Disposition.DROP,
    ]
    assert ledger.read(job_id).attempt == 1


@pytest.mark.parametrize("forgetful", [FOR_EVER], indirect=True)
def test_whoever_never_hears_submits_again_and_gets_the_job_that_was_made(
    forgetful: Forgetful, settings: Settings, ledger: RedisLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcam_worker.client.calls.REDIS_RETRIES", replace(REDIS_RETRIES, total_s=0.3))
    client, job = through(forgetful, settings), Job.parse(FIELDS)
    with pytest.raises(LedgerUnavailable, match="was accepted is not known"):
        client.submit(idempotency_key="k", **FIELDS)
    forgetful.losses = 0
    (made,) = jobs_in(ledger)
    assert client.submit(idempotency_key="k", **FIELDS) == made
    forgetful.losses = FOR_EVER
    with pytest.raises(LedgerUnavailable) as caught:
        client.submit(job)
    assert caught.value.in_doubt == (job.id,)
    forgetful.losses = 0
    assert client.submit(job) == job.id, "by its id, too"
    assert jobs_in(ledger) == {made, job.id}
    assert ledger.count_jobs() == (2, 0)
