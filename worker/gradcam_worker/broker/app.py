"""The Celery app of a worker.

A queue message is only a notification. It carries the job, but the job's state is in the ledger, so a message
that is delivered twice is harmless.
"""

from datetime import timedelta
from typing import TYPE_CHECKING

import redis

from gradcam_worker.broker.publisher import INTERACTIVE, QUEUES, ROUTES, SHARDS, TASKS
from gradcam_worker.redis_server import sentinel
from gradcam_worker.settings import Settings

if TYPE_CHECKING:  # a client publishes without Celery, which the base install does not have
    from celery import Celery


def make_app(settings: Settings, *, timeout_s: float = 10) -> "Celery":
    """Return the Celery app, configured to lose no message that it can keep.

    Args:
        settings: The worker's settings.
        timeout_s: How long one answer of the broker may take: its connection may be half open.
    """
    from celery import Celery
    from kombu import Queue

    from gradcam_worker.broker.transport import Transport

    finder = sentinel.finder_for(settings, settings.broker_url)
    url = finder.server_url if finder else settings.broker_url
    app = Celery("gradcam", broker=url, set_as_current=False)
    app.conf.update(
        task_queues=[Queue(name) for name in QUEUES],
        task_default_queue=INTERACTIVE,
        task_serializer="json",  # never pickle: messages are untrusted
        accept_content=["json"],
        task_ignore_result=True,  # the ledger holds the results
        task_acks_late=True,  # a message leaves the queue when its job has finished
        task_acks_on_failure_or_timeout=False,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_transport=f"{Transport.__module__}:{Transport.__name__}",
        # Where a transport is named, kombu does not recognise TLS by the URL. The certificate is verified,
        # as the ledger's client does and kombu by default does not.
        broker_use_ssl=settings.redis_tls(settings.broker_url) or None,
        broker_connection_timeout=3,
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_channel_error_retry=True,  # else Redis out of memory would end the worker
        broker_pool_limit=settings.threads + settings.shards + 2,
        broker_pool_acquire_timeout=5,
        broker_transport_options={
            "global_keyprefix": settings.key_prefix,  # else `unacked` is shared by a whole database
            "visibility_timeout": timedelta(seconds=settings.visibility_timeout_s).total_seconds(),
            # Overdue messages are searched for ten times per visibility timeout, each time by one worker.
            "unacked_restore_interval": max(settings.visibility_timeout_s / 10, 0.5),
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 30,
            "queue_order_strategy": "priority",
            "priority_steps": sorted({number for _, number in ROUTES.values()}),
            "socket_timeout": timeout_s,  # a half-open connection must not block for ever
            "socket_connect_timeout": min(timeout_s, 3),
            "socket_keepalive": True,
            "health_check_interval": 15,
            "max_message_bytes": settings.max_message_bytes,
            "tasks": TASKS,
            "finder": finder,
            "watched_lists": [*dict.fromkeys(ROUTES.values())],
            "unacknowledged_limits": {SHARDS: settings.shards},  # the other threads are for jobs
        },
    )
    return app


def is_reachable(app: "Celery") -> bool:
    """Whether the broker answers."""
    from kombu.exceptions import OperationalError

    try:
        with app.connection_for_write(connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=5)
            connection.default_channel.client.ping()
    except (OperationalError, redis.RedisError, OSError):
        return False
    return True
