"""Puts messages into the queues, with redis alone: a client needs neither Celery nor kombu.

The format is in docs/how-to/other-languages.md.
"""

import base64
import json
import uuid
from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from typing import Any

from gradcam_worker.broker import envelope
from gradcam_worker.errors import BrokerUnavailable
from gradcam_worker.ledger.redis.client import RedisClients
from gradcam_worker.schemas.work import ROUTE, Work, terms_of
from gradcam_worker.settings import Settings

# The names on the wire.
EXPLAIN = "gradcam.explain"
EXPLAIN_SHARD = "gradcam.explain_shard"
ENTERED_AT = envelope.ENTERED_AT
INTERACTIVE = "gradcam.interactive"
BULK = "gradcam.bulk"
SHARDS = "gradcam.shards"
TASKS = {INTERACTIVE: EXPLAIN, BULK: EXPLAIN, SHARDS: EXPLAIN_SHARD}  # each queue's only task
QUEUES = (*TASKS,)  # in the order in which a worker looks
# Priority -> queue, and its number there. On Redis the smallest number is served first.
ROUTES = {
    "high": (INTERACTIVE, 0),
    "normal": (INTERACTIVE, 3),
    "low": (INTERACTIVE, 6),
    "bulk": (BULK, 9),
    ROUTE: (SHARDS, 9),
}
SEPARATOR = "\x06\x16"  # kombu's, between a queue's name and a priority's number

BATCH = 500  # messages in one round trip


class Publisher:
    """Puts messages into the queues, written as Celery writes them (protocol 2).

    Not by Celery: kombu's pools belong to the whole process, to an app's own Celery too, and outlive a fork.
    """

    def __init__(self, settings: Settings, *, timeout_s: float = 10) -> None:
        """Nothing is connected yet. `timeout_s` is how long one answer may take; nothing is tried again."""
        self._prefix = settings.key_prefix
        self._clients = RedisClients(
            settings, settings.broker_url, BrokerUnavailable, timeout_s=timeout_s, retries=0
        )
        self.close, self.read_mode = self._clients.close, self._clients.read_mode

    def publish(self, jobs: Iterable[tuple[Work, datetime | None]]) -> None:
        """Publish jobs, in order, each with the moment at which it was entered in the ledger.

        That moment, where it is known, saves its worker a look there: see `Ledger.claim_fresh`.
        Raises BrokerUnavailable: some of the messages may have come through.
        """
        routed = ((terms_of(job).route, job, at) for job, at in jobs)
        self._push((route, _message(job.id, route, job.to_json(), at)) for route, job, at in routed)

    def republish(self, job_ids: Iterable[str], priority: str) -> None:
        """Publish jobs that the ledger has: their ids are enough. Raises BrokerUnavailable."""
        self._push(
            (priority, _message(one, priority, json.dumps({"id": one}), entered_at=None)) for one in job_ids
        )

    def _push(self, messages: Iterable[tuple[str, str]]) -> None:
        left = iter(messages)
        while batch := list(islice(left, BATCH)):
            queued: dict[str, list[str]] = {}
            for priority, text in batch:
                queued.setdefault(priority, []).append(text)
            self._send(queued)

    def _send(self, queued: dict[str, list[str]]) -> None:
        with (
            self._clients.translate_errors(),
            self._clients.get_client().pipeline(transaction=False) as pipeline,
        ):
            for priority, texts in queued.items():
                pipeline.lpush(self._key(priority), *texts)
            pipeline.execute()

    def queue_length(self, priority: str) -> int:
        """How many messages wait in the queue of a priority. Raises BrokerUnavailable."""
        with self._clients.translate_errors():
            found: Any = self._clients.get_client().llen(self._key(priority))
        return int(found)

    def any_waiting(self) -> bool:
        """Whether there is a message in any queue. Raises BrokerUnavailable."""
        with (
            self._clients.translate_errors(),
            self._clients.get_client().pipeline(transaction=False) as pipeline,
        ):
            for priority in ROUTES:
                pipeline.llen(self._key(priority))
            return any(pipeline.execute())

    def _key(self, priority: str) -> str:
        queue, number = ROUTES[priority]
        return f"{self._prefix}{queue}{SEPARATOR}{number}" if number else f"{self._prefix}{queue}"


def _message(job_id: str, priority: str, payload: str, entered_at: datetime | None) -> str:
    """A message of Celery's protocol 2 in kombu's envelope, as it lies in Redis. `payload` is JSON."""
    queue, number = ROUTES[priority]
    follow = '{"callbacks": null, "errbacks": null, "chain": null, "chord": null}'
    body = base64.b64encode(f"[[{payload}], {{}}, {follow}]".encode()).decode()
    headers = {
        "lang": "py",
        "task": TASKS[queue],
        "id": job_id,
        "root_id": job_id,
        "parent_id": None,
        "group": None,
        "argsrepr": f"<{job_id}>",  # else logs would repeat the job with its URLs
        "kwargsrepr": "",
    }
    if entered_at:
        headers[ENTERED_AT] = entered_at.isoformat()
    message = {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {
            "correlation_id": job_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": number,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }
    return json.dumps(message)
