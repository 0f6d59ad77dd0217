"""Puts messages into the queues, with redis alone: a client needs neither Celery nor kombu.

The format is in docs/how-to/other-languages.md.
"""

import base64
import json
import uuid
from collections.abc import Iterable
from datetime import datetime
from itertools import islice

from gradcam_worker.broker import envelope
from gradcam_worker.errors import BrokerUnavailable
from gradcam_worker.ledger.ledger import QueuedMessage
from gradcam_worker.redis_server.async_client import AsyncRedisClients
from gradcam_worker.redis_server.client import RedisClients
from gradcam_worker.resilience.blocking import blocking
from gradcam_worker.resilience.outages import Outage
from gradcam_worker.schemas.work import ROUTE, Work, terms_of
from gradcam_worker.settings import Settings

# Names on the wire.
EXPLAIN = "gradcam.explain"
EXPLAIN_SHARD = "gradcam.explain_shard"
ENTERED_AT = envelope.ENTERED_AT
INTERACTIVE = "gradcam.interactive"
BULK = "gradcam.bulk"
SHARDS = "gradcam.shards"
TASKS = {INTERACTIVE: EXPLAIN, BULK: EXPLAIN, SHARDS: EXPLAIN_SHARD}  # each queue's only task
QUEUES = (*TASKS,)  # in the order in which a worker receives
# Priority -> queue, and its number there. On Redis the smallest number is served first.
ROUTES = {
    "high": (INTERACTIVE, 0),
    "normal": (INTERACTIVE, 3),
    "low": (INTERACTIVE, 6),
    "bulk": (BULK, 9),
    ROUTE: (SHARDS, 9),
}
SEPARATOR = "\x06\x16"  # kombu's, between a queue's name and a priority's number

MAX_BATCH = 500  # messages in one round trip


class Publisher:
    """Puts messages into the queues, in the format of Celery (protocol 2).

    It does not use Celery: kombu's pools belong to the whole process, so that an application's own Celery
    would share them, and they outlive a fork.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        timeout_s: float = 10,
        connect: type[RedisClients] = RedisClients,
        outage: Outage | None = None,
    ) -> None:
        """Nothing is connected yet.

        Args:
            settings: The broker's address and the prefix of its keys.
            timeout_s: How long one answer may take. No call is retried.
            connect: Makes the clients of the broker.
            outage: Is told of calls that fail; None: the caller reports outages.
        """
        self._settings, self._timeout_s, self._outage = settings, timeout_s, outage
        self._prefix = settings.key_prefix
        self._clients = connect(
            settings, settings.broker_url, BrokerUnavailable, timeout_s=timeout_s, retries=0, outage=outage
        )
        self.close, self.read_mode = self._clients.close, self._clients.read_mode

    def for_asyncio(self) -> "Publisher":
        """The same, for event loops: `publish` and `republish` must be awaited there."""
        return Publisher(
            self._settings, timeout_s=self._timeout_s, connect=AsyncRedisClients, outage=self._outage
        )

    @blocking
    async def publish(self, jobs: Iterable[tuple[Work, datetime | None]]) -> None:
        """Publish jobs in order.

        Args:
            jobs: The jobs, each with the time at which it was entered in the ledger, if that is known. The
                time saves the worker a query: see `Ledger.claim_fresh`.

        Raises:
            BrokerUnavailable: Some of the messages may have been published.
        """
        await self._push(self.write_message(job, entered_at) for job, entered_at in jobs)

    def write_message(self, job: Work, entered_at: datetime | None) -> QueuedMessage:
        """Write the message of a job, and publish nothing: see `Ledger.enter_many`.

        Args:
            job: The job.
            entered_at: See `publish`.

        Returns:
            The message, and the key of its queue.
        """
        route = terms_of(job).route
        return QueuedMessage(self._key(route), _message(job.id, route, job.to_json(), entered_at))

    @blocking
    async def republish(self, job_ids: Iterable[str], priority: str) -> None:
        """Publish jobs that are in the ledger: their ids are sufficient. Raises BrokerUnavailable."""
        key = self._key(priority)
        await self._push(
            QueuedMessage(key, _message(job_id, priority, json.dumps({"id": job_id}), entered_at=None))
            for job_id in job_ids
        )

    async def _push(self, messages: Iterable[QueuedMessage]) -> None:
        remaining = iter(messages)
        while batch := list(islice(remaining, MAX_BATCH)):
            queued: dict[str, list[str]] = {}
            for key, text in batch:
                queued.setdefault(key, []).append(text)
            await self._clients.ask_each([("LPUSH", key, *texts) for key, texts in queued.items()])

    @blocking
    async def queue_length(self, priority: str) -> int:
        """Return the number of messages that wait with a priority. Raises BrokerUnavailable."""
        (length,) = await self._clients.ask_each([("LLEN", self._key(priority))])
        return int(length)

    @blocking
    async def any_waiting(self) -> bool:
        """Whether any queue has a message. Raises BrokerUnavailable."""
        return any(await self._clients.ask_each([("LLEN", self._key(priority)) for priority in ROUTES]))

    def _key(self, priority: str) -> str:
        queue, number = ROUTES[priority]
        return f"{self._prefix}{queue}{SEPARATOR}{number}" if number else f"{self._prefix}{queue}"


def _message(job_id: str, priority: str, payload: str, entered_at: datetime | None) -> str:
    """Return a message of Celery's protocol 2 in kombu's envelope, as Redis holds it. `payload` is JSON."""
    queue, number = ROUTES[priority]
    no_following_tasks = '{"callbacks": null, "errbacks": null, "chain": null, "chord": null}'
    body = base64.b64encode(f"[[{payload}], {{}}, {no_following_tasks}]".encode()).decode()
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
