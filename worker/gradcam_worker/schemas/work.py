"""What a worker does: a job or a shard, their routes, and what the ledger needs to know of either."""

from dataclasses import dataclass
from datetime import datetime
from typing import get_args

from pydantic import ValidationError

from gradcam_worker.errors import InvalidJob
from gradcam_worker.schemas.job import Job, Priority, Webhook
from gradcam_worker.schemas.model import describe
from gradcam_worker.schemas.shard import Shard

ROUTE = "shard"  # the route of shards: their own queue, after the queues of all priorities
ROUTES = (*get_args(Priority), ROUTE)

Work = Job | Shard


@dataclass(frozen=True)
class Terms:
    """What the ledger needs to know of a job or a shard."""

    route: str  # a job's priority, or `ROUTE`
    max_attempts: int
    metadata: dict[str, str]  # of the status document
    idempotency_key: str | None = None
    expires_at: datetime | None = None  # None: never
    traceparent: str | None = None  # None: it begins a new trace
    webhooks: tuple[Webhook, ...] = ()


def terms_of(work: Work) -> Terms:
    """Get the terms of a job or a shard. A shard has no idempotency key, no expiry and no webhooks."""
    if isinstance(work, Shard):
        return Terms(ROUTE, work.max_attempts, {"backfill": work.backfill, "shard": str(work.index)})
    return Terms(
        work.priority,
        work.max_attempts,
        work.metadata,
        work.idempotency_key,
        work.expires_at,
        work.traceparent,
        work.webhooks,
    )


def parse(payload: object) -> Work:
    """Parse JSON data.

    Args:
        payload: The decoded JSON.

    Returns:
        The job or shard.

    Raises:
        InvalidJob: It is neither. The message names each wrong field, and why.
    """
    if not isinstance(payload, dict) or payload.get("schema") != "gradcam.shard/v1":
        return Job.parse(payload)
    try:
        return Shard.model_validate(payload)
    except ValidationError as error:
        message = f"This is not a shard: {describe(error)}."
        raise InvalidJob(message) from error
