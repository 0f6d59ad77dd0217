"""The queue as an operator should run it: encrypted, with two users that may do little, and strangers."""

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.exceptions

import gradcam_worker
from gradcam_worker.backfill.registry import RedisBackfillRegistry
from gradcam_worker.broker import app, publisher
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.gateway.access.api_keys import ApiKey, ApiKeys
from gradcam_worker.gateway.access.caller import Access
from gradcam_worker.gateway.access.tenants import TenantPolicy, Tenants
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.operations.doctor import run_checks
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.listing import JobQuery
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy" / "redis"
PASSWORDS = {
    "admin": "planted-of-the-admin",
    "submitter": "planted-of-the-submitter",
    "worker": "planted-of-the-worker",
}
NETWORK = "efficientnet_lite0"
WORKER = WorkerRef(id="w", device="cpu")
WAIT_S = 180
FORBIDDEN = [  # to whoever may only submit
    "FLUSHALL",
    "FLUSHDB",
    "KEYS *",
    "SCAN 0",
    "RANDOMKEY",
    "DBSIZE",
    "CONFIG GET *",
    "CONFIG SET dir /tmp",
    "ACL LIST",
    "ACL SETUSER default on nopass ~* +@all",
    "CLIENT LIST",
    "CLIENT KILL TYPE normal",
    "MONITOR",
    "SHUTDOWN",
    "MODULE LIST",
    "REPLICAOF NO ONE",
    "SAVE",
    "SCRIPT FLUSH",
    "FUNCTION LIST",
    "EVAL return(1) 0",
    "GET other",
    "SET other x",
    "LRANGE gradcam:gradcam.interactive 0 -1",  # other people's jobs
    "RPOP gradcam:gradcam.interactive",
    "BRPOP gradcam:gradcam.interactive 1",
    "DEL gradcam:gradcam.interactive",
    "DEL gradcam:job:1",
    "UNLINK gradcam:job:1",
    "RENAME gradcam:job:1 gradcam:job:2",
    "HGETALL gradcam:job:1",
    "ZRANGE gradcam:queued:normal 0 -1",  # other people's ids
    "ZRANGE gradcam:running 0 -1",
    "ZADD gradcam:running 0 x",
    "ZADD gradcam:dead 0 x",
    "SADD gradcam:sinks x",
    "HGET gradcam:unacked x",
    "HSET gradcam:workers x y",
    "HSET gradcam:api_keys x y",  # a key of one's own
    "HSET gradcam:tenants x y",
    "HGETALL gradcam:api_keys",
    "DEL gradcam:rate:x",
    "SET gradcam:reaper x",
    "LRANGE gradcam:events:x 0 -1",
    "LRANGE gradcam:unreadable 0 -1",
    "PUBLISH gradcam:/0.celery.pidbox {}",  # commands to workers
    "SUBSCRIBE gradcam:/0.celery.pidbox",
]


def options(folder: Path) -> list[str]:
    """What `redis.conf` and `users.acl` say, for a server whose files are in a folder."""
    users = (DEPLOY / "users.acl").read_text()
    for name, password in PASSWORDS.items():
        digest = hashlib.sha256(password.encode()).hexdigest()
        users = users.replace(f"SHA256-OF-THE-{name.upper()}S-PASSWORD", digest)
    everything = f"user admin on >{PASSWORDS['admin']} ~* &* +@all"  # for the tests to look from outside
    (folder / "users.acl").write_text(f"{users}{everything}\n")
    text = (DEPLOY / "redis.conf").read_text().replace("/etc/redis/users.acl", str(folder / "users.acl"))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    return [word for name, value in lines for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A Valkey as `deploy/redis` says."""
    folder = tmp_path_factory.mktemp("users")
    with servers.valkey(folder, *options(folder)) as server:
        yield server.port


def url(port: int, name: str) -> str:
    return f"redis://gradcam-{name}:{PASSWORDS[name]}@127.0.0.1:{port}/0"


def admins_url(port: int) -> str:
    return f"redis://admin:{PASSWORDS['admin']}@127.0.0.1:{port}/0"


@pytest.fixture
def admin(port: int) -> Iterator[redis.Redis]:
    """Whoever may do everything, to look from outside; what was denied before is forgotten."""
    with redis.Redis(port=port, username="admin", password=PASSWORDS["admin"]) as connection:
        connection.acl_log_reset()
        yield connection


def safe_url(port: int, name: str) -> str:
    return f"rediss://gradcam-{name}:{PASSWORDS[name]}@localhost:{port}/0"


def test_nobody_comes_in_without_a_password(port: int) -> None:
    with redis.Redis(port=port) as anybody, pytest.raises(redis.exceptions.AuthenticationError):
        anybody.ping()


def test_as_it_is_shipped_the_list_of_users_lets_no_server_start(tmp_path: Path) -> None:
    shipped = ["--aclfile", str(DEPLOY / "users.acl")]
    with pytest.raises(Exception, match=r"(?i)acl"), servers.valkey(tmp_path, *shipped):
        pass


@pytest.mark.parametrize("command", FORBIDDEN)
def test_who_may_only_submit_may_not(port: int, command: str) -> None:
    with redis.Redis.from_url(url(port, "submitter")) as submitter:
        with pytest.raises(redis.exceptions.NoPermissionError):
            submitter.execute_command(*command.split())
        digest = submitter.script_load("return redis.call(unpack(ARGV))")
        with pytest.raises(redis.exceptions.ResponseError, match=r"(?i)acl|permission|not allowed|noperm"):
            submitter.evalsha(str(digest), 0, *command.split())


@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL",
        "KEYS *",
        "SCAN 0",
        "CONFIG GET *",
        "ACL LIST",
        "MONITOR",
        "SHUTDOWN",
        "SCRIPT FLUSH",
        "GET other",
        "DEL other",
        "PUBLISH other {}",
    ],
)
def test_who_may_only_work_may_not(port: int, command: str) -> None:
    with (
        redis.Redis.from_url(url(port, "worker")) as connection,
        pytest.raises(redis.exceptions.NoPermissionError),
    ):
        connection.execute_command(*command.split())


def test_whoever_works_may_do_all_that_the_ledger_does() -> None:
    """Also what no test happens to do."""
    needed: set[str] = set()
    package = Path(gradcam_worker.__file__).parent
    for path in {*package.rglob("*.lua")} - {*(package / "gateway").rglob("*.lua")}:
        needed |= {name.lower() for name in re.findall(r"redis\.p?call\('([A-Z]+)'", path.read_text())}
    for name in ("store.py", "outbox.py"):
        text = (package / "ledger" / "redis" / name).read_text()
        needed |= set(re.findall(r"(?:redis|pipeline)\.([a-z]+)\(", text))
    needed -= {"call", "close", "execute", "pcall", "pipeline"}  # not Redis's
    users = (DEPLOY / "users.acl").read_text().splitlines()
    allowed = set(re.findall(r"\+([a-z|]+)", next(line for line in users if "gradcam-worker" in line)))
    assert len(needed) > 20
    assert not needed - allowed


def test_whoever_may_only_submit_may_do_all_that_a_client_does(port: int, admin: redis.Redis) -> None:
    client = GradcamClient(settings=Settings(broker_url=url(port, "submitter"), key_prefix="gradcam:"))
    events = ["job.queued", "job.canceled"]
    fields: dict[str, Any] = {
        "image": "s3://photos/coffee.jpg",
        "network": NETWORK,
        "target": {"top_n": 1},
        "expires_at": "2199-01-01T00:00:00Z",
        "webhooks": [{"url": "https://app/hook", "events": events}],
    }
    admin.sadd("gradcam:sinks", "sql")
    try:
        for priority in ("high", "normal", "low", "bulk"):
            key = new_id()
            ids = {client.submit(**fields, priority=priority, idempotency_key=key) for _ in range(2)}
            job_id = ids.pop()
            assert not ids
            admin.zadd("gradcam:parked", {f"{job_id}:sql sql": 1})  # who could not be told of this job before
            stream = client.stream(job_id, WAIT_S)
            assert next(stream).status == "queued"
            assert client.cancel(job_id).status == "canceled"
            assert [document.status for document in stream] == ["canceled"]
            assert client.statuses([job_id])[job_id].status == "canceled"
        settings = Settings(broker_url=url(port, "submitter"), key_prefix="gradcam:")
        worker = RedisLedger(settings.model_copy(update={"broker_url": url(port, "worker")}))
        retried = client.submit(**fields, idempotency_key=new_id())
        worker.finish(worker.claim(worker.read(retried), WORKER).document, status="failed")
        assert client.retry(retried).status == "queued"
        assert client.cancel(retried).status == "canceled"
        ledger = RedisLedger(settings)
        tenants = [("acme", Tenant("acme")), ("other", Tenant("other", share=2)), (None, None)]
        for name, tenant in tenants * 2:
            entered = ledger.submit(Job(**{**fields, "metadata": {"customer": "42"}}), tenant=tenant)
            found = ledger.list_jobs(JobQuery(status="queued", label="customer=42"), name)
            assert entered in found.jobs
            assert ledger.cancel(entered.id, name).final
        assert ledger.read_usage("acme", 1)[0].jobs == 2
        registry, place = RedisBackfillRegistry(RedisLedger(settings).server), "s3://results/cams"
        assert registry.renew(place, "me", {}, [], "token", enter=True).is_owner
        assert registry.request_cancel(place)
        registry.release(place, "me", {}, [])
        findings = islice(run_checks(Settings(broker_url=url(port, "submitter"))), 2)
        assert [found.well for found in findings] == [True, True], "the doctor finds broker and ledger well"
        assert not admin.acl_log(), "nothing was denied"
    finally:
        names: Any = admin.keys("gradcam:*")
        admin.delete(*names)


@pytest.mark.parametrize("user", ["submitter", "worker"])
def test_whoever_submits_may_wait_for_replicas(user: str, port: int, admin: redis.Redis) -> None:
    settings = Settings(broker_url=url(port, user), key_prefix="gradcam:", submit_replicas=1)
    job = Job.parse({"image": "s3://photos/coffee.jpg", "network": NETWORK, "target": {"top_n": 1}})
    try:
        with pytest.raises(
            LedgerUnavailable, match="has 0 replicas that follow, and GRADCAM_SUBMIT_REPLICAS"
        ):
            RedisLedger(settings, retries=0).submit(job)
        assert not admin.acl_log(), "nothing was denied"
    finally:
        names: Any = admin.keys("gradcam:*")
        admin.delete(*names)


def test_whoever_may_only_submit_may_serve_the_http_api(port: int, admin: redis.Redis) -> None:
    settings = Settings(broker_url=url(port, "submitter"), key_prefix="gradcam:")
    operator = RedisServer(settings.model_copy(update={"broker_url": url(port, "worker")}))
    policy = TenantPolicy.make(name="acme", output="s3://results/acme", jobs_per_day=9)
    key, record = ApiKey.make("acme")
    access = Access(settings, RedisServer(settings), loopback=True)

    async def ask() -> None:
        assert (await access.authenticate(None, host="localhost")).policy is None
        Tenants(operator).store(policy)
        ApiKeys(operator).store(record)
        caller = await access.authenticate(f"Bearer {key}")
        await access.admit(caller)
        for _ in range(2):
            await access.admit_jobs(caller, 1, "k")

    try:
        asyncio.run(ask())
        assert not admin.acl_log(), "nothing was denied"
    finally:
        names: Any = admin.keys("gradcam:*")
        admin.delete(*names)


def test_with_the_rights_of_earlier_versions_jobs_are_entered_and_changed_but_not_listed(
    port: int, admin: redis.Redis
) -> None:
    lines = (DEPLOY / "users.acl").read_text().splitlines()
    rights = re.findall(r"\([^)]*\)|\S+", next(line for line in lines if "gradcam-submitter" in line))[3:]
    new = re.compile("gradcam:(listed|usage|turn)")
    old = [right for right in rights if not right.startswith("#") and not new.search(right)]
    assert len(old) == len(rights) - 4
    execute: Any = admin.execute_command
    execute("ACL", "SETUSER", "earlier", "reset", ">planted-earlier", *old)
    settings = Settings(
        broker_url=f"redis://earlier:planted-earlier@127.0.0.1:{port}/0", key_prefix="gradcam:"
    )
    try:
        ledger = RedisLedger(settings)
        fields = {"image": "s3://photos/coffee.jpg", "network": NETWORK, "target": {"top_n": 1}}
        for tenant in (Tenant("acme"), None):
            job = Job.parse(fields)
            assert ledger.submit(job, tenant=tenant).status == "queued"
            assert ledger.cancel(job.id).status == "canceled"
            assert ledger.read(job.id, "acme" if tenant else "").final
        with pytest.raises(LedgerUnavailable):
            ledger.list_jobs(JobQuery())
    finally:
        execute("ACL", "DELUSER", "earlier")
        names: Any = admin.keys("gradcam:*")
        admin.delete(*names)
        admin.acl_log_reset()


@pytest.fixture(scope="module")
def guarded(make_stage: Callable[..., Any], encrypted: Callable[[int], Any], port: int) -> Iterator[Any]:
    """A stage whose queue is the guarded one, encrypted, and a worker that is its user `gradcam-worker`."""
    stage, door = make_stage("guarded", lost_after_s=5), encrypted(port)
    stage.door = door.port
    changes = {"broker_url": safe_url(door.port, "worker"), "redis_ca": door.ca}
    stage.settings = stage.settings.model_copy(update=changes)
    with stage.worker("worker", tiny=True):
        yield stage


@pytest.fixture
def client(guarded: Any) -> GradcamClient:
    return GradcamClient(safe_url(guarded.door, "submitter"), settings=guarded.settings)


@pytest.mark.live
def test_a_job_is_submitted_worked_and_cancelled_by_two_users(
    client: GradcamClient, guarded: Any, public_server: Any, answer: Any, admin: redis.Redis
) -> None:
    hook = {"url": public_server.url("/guarded", answer(204)), "events": ["job.started", "job.succeeded"]}
    job: dict[str, Any] = {
        "image": "s3://photos/coffee.jpg",
        "network": NETWORK,
        "target": {"top_n": 1},
        "webhooks": [hook],
    }
    ids = [client.submit(**job, priority=name) for name in ("high", "normal", "low", "bulk")]
    assert [client.wait(one, WAIT_S).status for one in ids] == ["succeeded"] * 4
    key = new_id()
    again = {client.submit(**job, idempotency_key=key) for _ in range(2)}
    assert len(again) == 1
    assert client.wait(again.pop(), WAIT_S).status == "succeeded"

    photo = guarded.s3.client.get_object(Bucket="photos", Key="coffee.jpg")["Body"].read()
    slow = public_server.url("/guarded-slow", answer(200, photo, before=lambda: time.sleep(2)))
    running = client.submit(**{**job, "image": slow})
    waits_until(lambda: client.status(running).status == "running", "the start of the slow job")
    client.cancel(running)
    assert client.wait(running, WAIT_S).status == "canceled"
    broken = client.submit(**{**job, "image": public_server.url("/guarded-bad", answer(500))}, max_attempts=2)
    assert client.wait(broken, WAIT_S).status == "failed", "also after a second attempt"
    waits_until(lambda: not admin.exists("gradcam:outbox"), "the delivery of all news")
    assert [path for path, _ in public_server.received].count("/guarded") >= 10
    assert not admin.llen("gradcam:unreadable")
    assert not admin.acl_log(), "nothing was denied"
    assert "planted" not in guarded.log("worker")


def waits_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.05)


def test_a_wrong_password_is_one_error_that_does_not_show_it(port: int) -> None:
    client = GradcamClient(f"redis://gradcam-submitter:planted-and-wrong@127.0.0.1:{port}/0")
    with pytest.raises(LedgerUnavailable, match="invalid username-password pair") as caught:
        client.status(new_id())
    assert "planted" not in str(caught.value)


@pytest.mark.live
def test_a_worker_survives_what_a_stranger_may_send_and_answers_where_it_can(
    client: GradcamClient, guarded: Any, port: int, admin: redis.Redis
) -> None:
    queue = f"gradcam:{publisher.INTERACTIVE}"
    nameless = [b"garbage", b"[" * 100_000, b"7", b"\xff" * 3_000_000, b"{}"]
    named, oversized = new_id(), new_id()
    with redis.Redis.from_url(url(port, "submitter")) as stranger:
        for item in nameless:
            stranger.lpush(queue, item)
        stranger.lpush(queue, json.dumps({"headers": {"id": named}, "secret": "planted"}))
        stranger.lpush(queue, json.dumps({"body": "x" * 3_000_000, "headers": {"id": oversized}}))
    with (
        redis.Redis.from_url(url(port, "submitter"), retry=None) as stranger,
        pytest.raises((redis.exceptions.RedisError, OSError)),
    ):
        stranger.lpush(queue, b"x" * 50_000_000)  # `proto-max-bulk-len`
    job_id = client.submit(image="s3://photos/coffee.jpg", network=NETWORK, target={"top_n": 1})
    assert client.wait(job_id, WAIT_S).status == "succeeded"
    asking = app.make_app(guarded.settings.model_copy(update={"broker_url": admins_url(port)}))
    asking.conf.broker_transport = None
    asking.control.cancel_consumer(publisher.INTERACTIVE)
    asking.control.shutdown()
    (answer,) = asking.control.ping(timeout=WAIT_S, limit=1)
    assert [*answer.values()] == [{"ok": "pong"}]
    job_id = client.submit(image="s3://photos/coffee.jpg", network=NETWORK, target={"top_n": 1})
    assert client.wait(job_id, WAIT_S).status == "succeeded"
    for message_id, why in ((named, "headers and properties"), (oversized, "GRADCAM_MAX_MESSAGE_BYTES")):
        error = client.wait(message_id, WAIT_S).error
        assert error is not None
        assert error.code == "invalid_job"
        assert why in error.detail
    items: Any = admin.lrange("gradcam:unreadable", 0, -1)
    assert [json.loads(item)["bytes"] for item in reversed(items)] == [len(item) for item in nameless]
    log = guarded.log("worker")
    assert log.count('remote_command_ignored reason="cancel_consumer is none of those') == 1
    assert "worker_process_ended" not in log
    assert "planted" not in log
