"""How much waits in the ledger and in its outbox, and for how long: one question, answered by the server."""

from gradcam_worker.ledger.redis.client import RedisServer
from gradcam_worker.ledger.redis.scripts import ReadDepths
from gradcam_worker.ledger.redis.store import REMEMBERED_LEASES
from gradcam_worker.observability.queue_depths import QueueDepths
from gradcam_worker.schemas.shard import ROUTES

SCANNED = (
    10_000  # recipients whose events are looked at for the oldest: a few milliseconds of the server's time
)


def read_depths(server: RedisServer, lease_s: float) -> QueueDepths:
    """Ask the ledger's server: one round trip. Raises LedgerUnavailable."""
    found = server.run(
        ReadDepths(remembered_ms=int(REMEMBERED_LEASES * lease_s * 1000), scanned=SCANNED, routes=ROUTES)
    )
    retrying, running, dead, events, event_ms, workers, *routes = map(int, found)
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
