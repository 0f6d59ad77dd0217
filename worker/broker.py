"""What submitters and workers must agree on: task names, queues, priorities, the Celery app.

The queue is only a doorbell. A message carries the job, but what has become of the job is written
in the ledger, so a message that comes twice costs nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import kombu.exceptions
import redis.exceptions as redis_errors
from celery import Celery
from kombu import Queue

from worker import envelope, shard
from worker.channel import Transport
from worker.contract import Job
from worker.errors import BrokerUnavailable
from worker.settings import Settings, without_secrets

EXPLAIN = "gradcam.explain"
EXPLAIN_SHARD = "gradcam.explain_shard"
ENTERED_AT = envelope.ENTERED_AT

INTERACTIVE = "gradcam.interactive"
BULK = "gradcam.bulk"
SHARDS = "gradcam.shards"
QUEUES = (INTERACTIVE, BULK, SHARDS)  # in the order in which a worker looks

# Priorities are names on the wire. On Redis the smallest number is served first.
ROUTES = {"high": (INTERACTIVE, 0), "normal": (INTERACTIVE, 3), "low": (INTERACTIVE, 6), "bulk": (BULK, 9)}
ROUTES[shard.ROUTE] = (SHARDS, 9)


def make_app(settings: Settings, *, timeout_s: float = 10) -> Celery:
    """The Celery app, configured to lose nothing it can keep (reasons beside each line).

    `timeout_s` is how long a half-open broker is waited for.
    """
    app = Celery("gradcam", broker=settings.broker_url, set_as_current=False)
    app.conf.update(
        task_queues=[Queue(name) for name in QUEUES],
        task_default_queue=INTERACTIVE,
        task_serializer="json",  # never pickle: a message is a stranger's input
        accept_content=["json"],
        task_ignore_result=True,  # the ledger holds the results
        task_acks_late=True,  # a message leaves the queue when its job has come to an end
        task_acks_on_failure_or_timeout=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport=f"{Transport.__module__}:{Transport.__name__}",
        # With a transport named, kombu no longer sees from the URL that it is to be TLS. Verified, which
        # kombu does not do by itself, but the ledger does.
        broker_use_ssl=settings.redis_tls(settings.broker_url) or None,
        broker_connection_timeout=3,
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_channel_error_retry=True,  # or Redis out of memory would end the worker
        broker_pool_limit=settings.threads + settings.shards + 2,
        broker_pool_acquire_timeout=5,
        broker_transport_options={
            "global_keyprefix": settings.key_prefix,  # else `unacked` is shared by a whole database
            "visibility_timeout": timedelta(seconds=settings.visibility_timeout_s).total_seconds(),
            # Ten looks for overdue messages within one visibility timeout, each by one worker.
            "unacked_restore_interval": max(settings.visibility_timeout_s / 10, 0.5),
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 30,
            "queue_order_strategy": "priority",
            "priority_steps": sorted({number for _, number in ROUTES.values()}),
            "socket_timeout": timeout_s,  # a half-open broker must not block for ever
            "socket_connect_timeout": min(timeout_s, 3),
            "socket_keepalive": True,
            "health_check_interval": 15,
            "max_message_bytes": settings.max_message_bytes,
            "most_in_hand": {SHARDS: settings.shards},  # the other threads are for who comes before them
        },
    )
    return app


def publish(app: Celery, job: Job, *, entered_at: datetime | None = None) -> None:
    """Ring the doorbell for a job. Raises BrokerUnavailable.

    `entered_at`, when the job was entered in the ledger, saves its worker a look there: see `Ledger.take`.
    """
    headers = {ENTERED_AT: entered_at.isoformat()} if entered_at else None
    _send(app, job.model_dump(mode="json"), job.id, job.priority, headers)


def ring(app: Celery, job_id: str, priority: str) -> None:
    """Ring again for a job that the ledger has: its id is enough. Raises BrokerUnavailable."""
    _send(app, {"id": job_id}, job_id, priority, None)


def _send(
    app: Celery, payload: dict[str, Any], job_id: str, priority: str, headers: dict[str, str] | None
) -> None:
    queue, number = ROUTES[priority]
    with _reaching(app):
        app.send_task(
            EXPLAIN_SHARD if priority == shard.ROUTE else EXPLAIN,
            args=[payload],
            queue=queue,
            priority=number,
            task_id=job_id,
            headers=headers,
            argsrepr=f"<{job_id}>",  # else the headers, and logs, repeat the job with its URLs
            kwargsrepr="",
            retry_policy={"max_retries": 1, "interval_start": 0.1, "interval_max": 1},
        )


def waiting(app: Celery, priority: str) -> int:
    """How many messages wait in the queue of a priority. Raises BrokerUnavailable."""
    queue, number = ROUTES[priority]
    with _reaching(app), app.connection_or_acquire() as connection:
        return int(connection.default_channel.waiting(queue, number))


def answers(app: Celery) -> bool:
    """Whether the broker can be talked to at all."""
    try:
        with app.connection_for_write(connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=5)
            connection.default_channel.client.ping()
    except (kombu.exceptions.OperationalError, redis_errors.RedisError, OSError):
        return False
    return True


@contextmanager
def _reaching(app: Celery) -> Iterator[None]:
    try:
        yield
    except (kombu.exceptions.OperationalError, redis_errors.RedisError, OSError) as error:
        place = without_secrets(app.conf.broker_url)
        message = f"The broker at {place} cannot be reached ({error})."
        raise BrokerUnavailable(message) from error
