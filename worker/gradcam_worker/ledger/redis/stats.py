"""The lengths and ages of the queues in the ledger and its outbox, and what tenants have queued and used."""

from gradcam_worker.ledger.ledger import latest_days
from gradcam_worker.ledger.redis.scripts import ReadDepths
from gradcam_worker.ledger.redis.store import EPOCH, WORKER_TTL_LEASES
from gradcam_worker.observability.queue_depths import QueueDepths, TenantUse
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.schemas.work import ROUTE, ROUTES

MAX_SCANNED_RECIPIENTS = 10_000  # in search of the oldest event: a few milliseconds of the server's time
MAX_TENANTS_READ = 500  # by name: each costs five commands


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
        tenants=_read_tenants(server),
    )


def _read_tenants(server: RedisServer) -> dict[str, TenantUse]:
    """Read what each tenant uses: two round trips, or one where there is no tenant."""
    redis, p = server.redis, server.prefix
    priorities = [route for route in ROUTES if route != ROUTE]
    (today,) = latest_days(1)
    with server.translate_errors():
        with redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(f"{p}tenants")
            for route in priorities:
                pipe.zrange(f"{p}turns:{route}", 0, MAX_TENANTS_READ)
            registered, *waiting = pipe.execute()
        names = sorted({*registered}.union(*waiting) - {""})[:MAX_TENANTS_READ]
        with redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hmget(f"{p}usage:{name}:{(today - EPOCH).days}", "jobs", "device_us")
                for route in priorities:
                    pipe.zcard(f"{p}turn:{route}:{name}")
            answers = iter(pipe.execute() if names else ())
    uses = {}
    for name in names:
        jobs, device_us = next(answers)
        queued = sum(next(answers) for _ in priorities)
        uses[name] = TenantUse(queued, int(jobs or 0), int(device_us or 0) / 1e6)
    return uses
