import base64
import json
import ssl
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
import trustme

from gradcam_worker.broker import app as broker
from gradcam_worker.broker import publisher
from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import BrokerUnavailable, InvalidSettings, LedgerUnavailable
from gradcam_worker.operations.doctor import run_checks
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings


def test_the_app_keeps_what_it_can_keep(settings: Settings) -> None:
    conf = broker.make_app(settings).conf
    assert conf.task_acks_late
    assert not conf.task_acks_on_failure_or_timeout
    assert conf.accept_content == ["json"]
    assert conf.task_ignore_result
    assert conf.broker_transport_options["socket_timeout"] == 10
    assert "retry_on_timeout" not in conf.broker_transport_options


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_an_encrypted_broker_is_verified_and_a_plain_one_is_plain(
    scheme: str, valkey: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis.Redis, "ping", lambda _: True)  # nobody there speaks TLS
    url = valkey.replace("redis:", f"{scheme}:")
    with broker.make_app(Settings(broker_url=url)).connection_for_write() as connection:
        for pool in (connection.default_channel.pool, connection.default_channel.async_pool):
            made = pool.make_connection()
            assert isinstance(made, redis.SSLConnection) == (scheme == "rediss")
            assert getattr(made, "cert_reqs", ssl.CERT_REQUIRED) == ssl.CERT_REQUIRED


def test_a_channel_keeps_its_client_until_its_connections_are_gone(settings: Settings) -> None:
    with broker.make_app(settings).connection_for_write() as connection:
        channel = connection.default_channel
        with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
            assert first is second
        channel._disconnect_pools()
        with channel.conn_or_acquire() as after:
            assert after is not first
            assert after.ping()


def test_a_channel_of_a_closed_connection_fails_as_connections_do(settings: Settings) -> None:
    connection = broker.make_app(settings).connection_for_write()
    channel, errors = connection.default_channel, connection.connection_errors
    connection.release()
    with pytest.raises(errors, match="The channel is closed"), channel.conn_or_acquire():
        pass


@pytest.mark.parametrize("priority", ["high", "normal", "low", "bulk"])
def test_a_published_job_lies_where_celery_would_have_put_it_and_as_it_would_have_written_it(
    priority: str, settings: Settings, job: Job
) -> None:
    job = job.model_copy(update={"priority": priority})
    app, (queue, number) = broker.make_app(settings), publisher.ROUTES[priority]
    Publisher(settings).publish([(job, None)])
    named: dict[str, Any] = {"task_id": job.id, "argsrepr": f"<{job.id}>", "kwargsrepr": ""}
    sent = [job.model_dump(mode="json")]
    app.send_task("gradcam.explain", sent, queue=queue, priority=number, **named)
    key = f"{settings.key_prefix}{queue}\x06\x16{number}" if number else settings.key_prefix + queue
    found: Any = redis.Redis.from_url(settings.broker_url).lrange(key, 0, -1)
    celerys, ours = map(json.loads, found)
    for part in ("headers", "properties"):  # what it writes besides says nothing: None, and who sent it
        assert ours[part].pop("delivery_tag", 1) != celerys[part].pop("delivery_tag", 2)
        celerys[part] = {name: celerys[part][name] for name in ours[part]}
    for message in (celerys, ours):
        message["body"] = json.loads(base64.b64decode(message["body"]))
    assert ours == celerys


def test_interactive_jobs_are_served_before_bulk(settings: Settings) -> None:
    numbers = [publisher.ROUTES[priority][1] for priority in ("high", "normal", "low", "bulk")]
    assert numbers == sorted(numbers), "on Redis the smallest is served first"
    assert publisher.QUEUES.index(publisher.INTERACTIVE) < publisher.QUEUES.index(publisher.BULK)
    assert broker.make_app(settings).conf.broker_transport_options["queue_order_strategy"] == "priority"


def test_a_broker_out_of_reach_is_one_error_without_its_password(job: Job) -> None:
    unreachable = Publisher(Settings(broker_url="redis://user:planted@127.0.0.1:1/0"))
    with pytest.raises(BrokerUnavailable, match=r"redis://127\.0\.0\.1:1/0 cannot be reached") as caught:
        unreachable.publish([(job, None)])
    assert "planted" not in str(caught.value)


def test_a_broker_that_accepts_but_never_answers_is_one_error_too(job: Job, silent_port: int) -> None:
    silent = Publisher(Settings(broker_url=f"redis://127.0.0.1:{silent_port}/0"), timeout_s=0.3)
    with pytest.raises(BrokerUnavailable):
        silent.publish([(job, None)])


@pytest.fixture
def encrypted_settings(settings: Settings, encrypted: Callable[[int], Any]) -> Callable[[str], Settings]:
    """Settings for the real Valkey behind TLS, by a name of its host; its port is new each time."""

    def make(host: str) -> Settings:
        server = encrypted(urlsplit(settings.broker_url).port or 0)
        url = f"rediss://{host}:{server.port}/0"
        return settings.model_copy(update={"broker_url": url, "redis_ca": server.ca})

    return make


def test_client_ledger_broker_and_doctor_reach_an_encrypted_server(
    encrypted_settings: Callable[[str], Settings], job: Job
) -> None:
    settings = encrypted_settings("localhost")
    client = GradcamClient(settings=settings)
    assert client.status(client.submit(job)).status == "queued"
    assert Publisher(settings).queue_length("normal") == 1
    assert [(found.what, found.well) for found in islice(run_checks(settings), 2)] == [
        ("broker", True),
        ("ledger", True),
    ]


def test_whom_the_system_trusts_is_trusted_where_no_authority_is_named(
    encrypted_settings: Callable[[str], Settings], monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    settings = encrypted_settings("localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(settings.redis_ca))
    client = GradcamClient(settings=settings.model_copy(update={"redis_ca": None}))
    assert client.status(client.submit(job)).status == "queued"


@pytest.mark.parametrize(
    ("host", "trusted", "why"),
    [
        ("localhost", "another", "certificate verify failed"),
        ("localhost", None, "certificate verify failed"),
        ("127.0.0.1", "its own", "certificate is not valid for '127.0.0.1'"),
    ],
)
def test_a_server_for_which_nobody_vouches_is_refused(
    host: str,
    trusted: str | None,
    why: str,
    encrypted_settings: Callable[[str], Settings],
    tmp_path: Path,
    job: Job,
) -> None:
    settings = encrypted_settings(host)
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "another.pem"))
    authority = {"another": tmp_path / "another.pem", "its own": settings.redis_ca, None: None}[trusted]
    settings = settings.model_copy(update={"redis_ca": authority})
    with pytest.raises(LedgerUnavailable, match=why):
        GradcamClient(settings=settings).submit(job)
    with pytest.raises(BrokerUnavailable, match=why):
        Publisher(settings).publish([(job, None)])


def test_an_authority_that_is_not_there_is_an_impossible_setting() -> None:
    with pytest.raises(InvalidSettings, match=r"^GRADCAM_REDIS_CA: '/nowhere/ca\.pem' is not a file"):
        Settings.from_environment({"GRADCAM_REDIS_CA": "/nowhere/ca.pem"})


def test_messages_are_counted_by_their_priority(settings: Settings, job: Job) -> None:
    one = Publisher(settings)
    one.publish([(job, None)])
    one.republish([job.id], "bulk")
    counts = {priority: one.queue_length(priority) for priority in publisher.ROUTES}
    assert counts == {"high": 0, "normal": 1, "low": 0, "bulk": 1, "shard": 0}


def test_a_node_that_takes_no_writes_any_more_is_a_lost_connection(settings: Settings) -> None:
    with broker.make_app(settings).connection_for_write() as connection:
        assert redis.ReadOnlyError in connection.connection_errors
