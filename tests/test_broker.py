import json
import ssl

import pytest
import redis

from worker import broker
from worker.contract import Job
from worker.errors import BrokerUnavailable
from worker.settings import Settings


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
def test_a_published_job_lies_in_the_queue_of_its_priority_as_plain_json(
    priority: str, settings: Settings, job: Job
) -> None:
    job = job.model_copy(update={"priority": priority})
    broker.publish(broker.make_app(settings), job)
    connection = redis.Redis.from_url(settings.broker_url)
    queue, number = broker.ROUTES[job.priority]
    suffix = f"\x06\x16{number}" if number else ""
    message = json.loads(connection.lpop(f"{settings.key_prefix}{queue}{suffix}") or "{}")  # type: ignore[arg-type]
    assert message["headers"]["task"] == "gradcam.explain"
    assert message["headers"]["id"] == job.id
    assert message["content-type"] == "application/json"


def test_interactive_jobs_are_served_before_bulk(settings: Settings) -> None:
    numbers = [broker.ROUTES[priority][1] for priority in ("high", "normal", "low", "bulk")]
    assert numbers == sorted(numbers), "on Redis the smallest is served first"
    assert broker.QUEUES.index(broker.INTERACTIVE) < broker.QUEUES.index(broker.BULK)
    assert broker.make_app(settings).conf.broker_transport_options["queue_order_strategy"] == "priority"


def test_a_broker_out_of_reach_is_one_error_without_its_password(job: Job) -> None:
    app = broker.make_app(Settings(broker_url="redis://user:planted@127.0.0.1:1/0"))
    with pytest.raises(BrokerUnavailable, match=r"redis://127\.0\.0\.1:1/0 cannot be reached") as caught:
        broker.publish(app, job)
    assert "planted" not in str(caught.value)


def test_a_broker_that_accepts_but_never_answers_is_one_error_too(job: Job, silent_port: int) -> None:
    app = broker.make_app(Settings(broker_url=f"redis://127.0.0.1:{silent_port}/0"))
    app.conf.broker_transport_options["socket_timeout"] = 0.3
    with pytest.raises(BrokerUnavailable):
        broker.publish(app, job)
