"""What submitters and workers must agree on: task names, queues, priorities, the Celery app.

The queue is only a doorbell. A message carries the job, but what has become of the job is written
in the ledger, so a message that comes twice costs nothing.
"""

import ssl
from datetime import datetime, timedelta
from typing import Any

import kombu.exceptions
from celery import Celery
from kombu import Queue
from kombu.transport import redis

from worker.contract import Delivery, Job
from worker.errors import BrokerUnavailable
from worker.settings import Settings, without_secrets

EXPLAIN = "gradcam.explain"
DELIVER = "gradcam.deliver"
ENTERED_AT = "gradcam_entered_at"  # a message's own header

INTERACTIVE = "gradcam.interactive"
BULK = "gradcam.bulk"
STATUS = "gradcam.status"
QUEUES = (INTERACTIVE, STATUS, BULK)  # in the order in which a worker looks

# Priorities are names on the wire. On Redis the smallest number is served first.
ROUTES = {"high": (INTERACTIVE, 0), "normal": (INTERACTIVE, 3), "low": (INTERACTIVE, 6), "bulk": (BULK, 9)}


class Channel(redis.Channel):  # type: ignore[misc]  # kombu ships no types
    """Kombu's channel, with one Redis client for as long as its pool of connections lives.

    As it comes, it makes a client anew for each message that it receives and for each that it
    acknowledges: a sixth of the CPU time of a worker whose jobs do nothing. And when a broker that
    restarts has closed it, it fails with an AttributeError, over which the worker ends.
    """

    _kept: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous)
        if self._kept is None or self._kept.connection_pool is not self.pool:
            self._kept = super()._create_client()
        return self._kept

    def _get_pool(self, asynchronous: bool = False) -> Any:
        if not (self.connection and self.connection.client):
            message = "The channel is closed."
            raise ConnectionError(message)
        return super()._get_pool(asynchronous)


class Transport(redis.Transport):  # type: ignore[misc]
    """Kombu's Redis, by our channel."""

    Channel = Channel


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
        worker_eta_task_limit=256,  # waiting retries held in memory
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport=f"{__name__}:{Transport.__name__}",
        # With a transport named, kombu no longer sees from the URL that it is to be TLS. Verified, which
        # kombu does not do by itself, but the ledger does.
        broker_use_ssl={"ssl_cert_reqs": ssl.CERT_REQUIRED}
        if settings.broker_url.casefold().startswith("rediss:")
        else None,
        broker_connection_timeout=3,
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_channel_error_retry=True,  # or Redis out of memory would end the worker
        broker_pool_limit=settings.threads + 2,
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
        },
    )
    return app


def publish(app: Celery, job: Job, *, delay_s: float = 0, entered_at: datetime | None = None) -> None:
    """Ring the doorbell for a job, now or in `delay_s` seconds. Raises BrokerUnavailable.

    `entered_at`, when the job was entered in the ledger, saves its worker a look there: see `Ledger.take`.
    """
    queue, priority = ROUTES[job.priority]
    payload = job.model_dump(mode="json")
    headers = {ENTERED_AT: entered_at.isoformat()} if entered_at else None
    _send(
        app,
        EXPLAIN,
        payload,
        queue=queue,
        priority=priority,
        delay_s=delay_s,
        task_id=job.id,
        headers=headers,
    )


def publish_delivery(app: Celery, delivery: Delivery, *, delay_s: float = 0) -> None:
    """Hand an event to whichever worker delivers it. Raises BrokerUnavailable."""
    _send(app, DELIVER, delivery.model_dump(mode="json"), queue=STATUS, delay_s=delay_s)


def _send(
    app: Celery,
    task: str,
    payload: object,
    *,
    queue: str,
    delay_s: float,
    priority: int = 0,
    task_id: str | None = None,
    headers: dict[str, str] | None = None,
) -> None:
    try:
        app.send_task(
            task,
            args=[payload],
            queue=queue,
            priority=priority,
            task_id=task_id,
            countdown=delay_s or None,
            headers=headers,
            argsrepr=f"<{task_id or task}>",  # else the headers, and logs, repeat the job with its URLs
            kwargsrepr="",
            retry_policy={"max_retries": 1, "interval_start": 0.1, "interval_max": 1},
        )
    except (kombu.exceptions.OperationalError, OSError) as error:
        place = without_secrets(app.conf.broker_url)
        message = f"The broker at {place} cannot be reached ({error})."
        raise BrokerUnavailable(message) from error
