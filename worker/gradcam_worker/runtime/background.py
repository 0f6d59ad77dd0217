"""The background loops that need no device: reaper, outbox dispatcher, upkeep of the status database.

Several processes can run them, and share the work.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from gradcam_worker import extras
from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.delivery.dispatcher import LEASE_S, Deliver, OutboxDispatcher
from gradcam_worker.delivery.webhooks import message_id
from gradcam_worker.errors import InvalidSettings, StatusUnavailable
from gradcam_worker.ledger.outbox import Delivery
from gradcam_worker.ledger.reaper import Reaper
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.observability.tracing import NO_TRACES, Traces
from gradcam_worker.resilience.background_loop import BackgroundLoop, stop_all
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.schemas.status import StatusEvent
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger

if TYPE_CHECKING:
    from gradcam_worker.delivery.sql import SqlStatus

log = EventLogger("gradcam")

SQL_SINK = "sql"  # its name in the outbox
DATABASE_UPKEEP_INTERVAL_S = 60.0
STOP_TIMEOUT_S = 5.0  # of all loops together; longer than a renewal or most deliveries take

Send = Callable[[str, str | None, StatusEvent, str], None]


def build(
    settings: Settings,
    publisher: Publisher,
    ledger: RedisLedger,
    send: Send,
    worker_id: str,
    observer: Observer = NULL_OBSERVER,
    spans: Traces = NO_TRACES,
    outages: Outages | None = None,
) -> list[BackgroundLoop]:
    """Build the loops. None is started.

    Args:
        settings: The settings of this process.
        publisher: Publishes lost jobs again.
        ledger: Holds the jobs, and the outbox of their events.
        send: Sends a webhook, as `Webhooks.send` does.
        worker_id: The name of this process.
        observer: Counts what the loops do.
        spans: Traces of deliveries.
        outages: Logs the outages of this process.

    Raises:
        InvalidSettings: The database of `GRADCAM_STATUS_SQL_URL` cannot be used.
    """
    outages = outages or Outages()
    reaper = Reaper(
        ledger,
        worker_id,
        lambda job_id, route: publisher.republish([job_id], route),
        publisher.queue_length,
        lease_s=settings.lease_s,
        lost_after_s=settings.lost_after_s,
        observer=observer,
        outages=outages,
    )
    outbox = RedisOutbox(ledger.server, retention_s=settings.retention_s)

    def to_webhook(delivery: Delivery, event: StatusEvent) -> None:
        if delivery.webhook:
            hook = delivery.webhook
            send(hook.url, hook.secret_ref, event, message_id(delivery.document))

    loops = [reaper.loop]
    sinks: dict[str, Deliver] = {}
    database = _database(settings)
    if database:
        sinks[SQL_SINK] = lambda delivery, _: database.write(delivery.document)
        step = partial(_maintain_database, database, outbox)
        loop = BackgroundLoop(
            "database",
            step,
            DATABASE_UPKEEP_INTERVAL_S,
            immediately=True,
            outages=outages,
            consequence="no new job is written to the database",
            context=closing(database),
        )
        loops.append(loop)
    dispatcher = OutboxDispatcher(
        outbox,
        to_webhook,
        sinks,
        threads=settings.couriers,
        give_up_s=settings.webhook_give_up_s,
        lease_s=settings.webhook_timeout_s + LEASE_S,
        observer=observer,
        traces=spans,
        outages=outages,
    )
    return [*loops, dispatcher.loop]


def start(loops: Iterable[BackgroundLoop]) -> list[BackgroundLoop]:
    """Start the loops, and return them."""
    started = [*loops]
    for loop in started:
        loop.start()
    return started


def stop(loops: Iterable[BackgroundLoop]) -> None:
    """End the loops. Waits at most STOP_TIMEOUT_S for all of them together."""
    stop_all(loops, STOP_TIMEOUT_S)


def _database(settings: Settings) -> "SqlStatus | None":
    """The status database, if the settings name one. Raises InvalidSettings."""
    url = settings.status_sql_url.get_secret_value()
    if not url:
        return None
    with extras.required("GRADCAM_STATUS_SQL_URL", "sql", extras.WORKER, raises=InvalidSettings):
        from gradcam_worker.delivery.sql import SqlStatus

        database = SqlStatus(url, settings.status_sql_retention_s, connections=settings.couriers)
    try:
        database.upgrade()
    except StatusUnavailable as error:  # the first write upgrades it when the database is back
        log.warning("database_upgrade_postponed", error=error)
    return database


def _maintain_database(database: "SqlStatus", outbox: RedisOutbox) -> None:
    """Request that every job is written to the database, and delete old rows. Raises LedgerUnavailable."""
    outbox.open_sink(SQL_SINK)  # repeated, because the ledger may have lost it
    try:
        database.prune()
    except StatusUnavailable as error:
        log.warning("database_prune_failed", error=error)
