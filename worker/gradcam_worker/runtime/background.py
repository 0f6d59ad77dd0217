"""The background loops that need no device: the reaper, the dispatcher, the database's.

Several processes may run them, and share the work.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from gradcam_worker.delivery.sql import SqlStatus

log = logging.getLogger("gradcam")

SQL = "sql"  # the name of the sink
DATABASE_EVERY_S = 60.0  # between two rounds of the database's upkeep
STOP_S = 5.0  # for all loops to end: for deliveries that are under way, the last renewal

Send = Callable[[str, str | None, StatusEvent, str], None]


def build(
    settings: Settings,
    publisher: Publisher,
    ledger: RedisLedger,
    send: Send,
    me: str,
    observer: Observer = NULL_OBSERVER,
    spans: Traces = NO_TRACES,
    outages: Outages | None = None,
) -> list[BackgroundLoop]:
    """All of them, in the process `me`; `send` does what `Webhooks.send` does.

    Raises InvalidSettings.
    """
    outages = outages or Outages()
    reaper = Reaper(
        ledger,
        me,
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
        sinks[SQL] = lambda delivery, _: database.write(delivery.document)
        step = partial(_maintain_database, database, outbox)
        loop = BackgroundLoop(
            "database",
            step,
            DATABASE_EVERY_S,
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
    """Start each of them, and return them."""
    started = [*loops]
    for loop in started:
        loop.start()
    return started


def stop(loops: Iterable[BackgroundLoop]) -> None:
    """End them, and wait for that: STOP_S, for all of them together."""
    stop_all(loops, STOP_S)


def _database(settings: Settings) -> "SqlStatus | None":
    """The database that is told of every job, where there is one. Raises InvalidSettings."""
    url = settings.status_sql_url.get_secret_value()
    if not url:
        return None
    try:
        from gradcam_worker.delivery.sql import SqlStatus

        database = SqlStatus(url, settings.status_sql_retention_s, connections=settings.couriers)
    except ImportError as error:
        message = "GRADCAM_STATUS_SQL_URL needs the extra sql: pip install 'gradcam-worker[cpu,sql]'."
        raise InvalidSettings(message) from error
    try:
        database.upgrade()
    except StatusUnavailable as error:  # the first write does it, when the database is back
        log.warning("%s", error)
    return database


def _maintain_database(database: "SqlStatus", outbox: RedisOutbox) -> None:
    """Have it told of every job, and delete some of what was completed long ago. Raises LedgerUnavailable."""
    outbox.open_sink(SQL)  # again and again: the ledger may have forgotten
    try:
        database.prune()
    except StatusUnavailable as error:
        log.warning("%s", error)
