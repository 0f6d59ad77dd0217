"""The lengths and ages of the queues in the ledger and its outbox, read in one round trip."""

from gradcam_worker.ledger.redis.scripts import ReadDepths
from gradcam_worker.ledger.redis.store import WORKER_TTL_LEASES
from gradcam_worker.observability.queue_depths import QueueDepths
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.schemas.work import ROUTES

MAX_SCANNED_RECIPIENTS = 10_000  # in search of the oldest event: a few milliseconds of the server's time


def read_depths(server: RedisServer, lease_s: float) -> QueueDepths:
    """Read the lengths and ages of all queues.

    Args:
        server: The ledger's server.
        lease_s: The duration of a lease: workers that have renewed none for longer are not counted.

    Returns:
        The lengths, and ages in seconds.

    Raises:
        LedgerUnavailable: The ledger cannot be reached.
    """
    numbers = server.run(
        ReadDepths(
            worker_ttl_ms=int(WORKER_TTL_LEASES * lease_s * 1000),
            max_scanned=MAX_SCANNED_RECIPIENTS,
            routes=ROUTES,
        )
    )
    retrying, running, dead, events, event_ms, workers, *routes = map(int, numbers)
    return QueueDepths(
        queued=dict(zip(ROUTES, routes[::2], strict=True)),
        oldest_s={route: ms / 1000 for route, ms in zip(ROUTES, routes[1::2], strict=True)},
        retrying=retrying,
        running=running,
        dead=dead,
        events=events,
        oldest_event_s=event_ms / 1000,
        workers=workers,
    )
