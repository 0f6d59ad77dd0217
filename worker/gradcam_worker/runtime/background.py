"""Those who keep at something beside the jobs and need no device: the reaper, the dispatcher, the database.

Each runs in a thread of its own until it is told to stop. Many processes may have them, and share the work.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.delivery.dispatcher import KEEP_S, Deliver, OutboxDispatcher
from gradcam_worker.delivery.webhooks import message_id
from gradcam_worker.errors import InvalidSettings, LedgerUnavailable, StatusUnavailable
from gradcam_worker.ledger.outbox import Delivery
from gradcam_worker.ledger.reaper import Reaper
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.observability.events import SILENT, Observer
from gradcam_worker.observability.tracing import OFF, Traces
from gradcam_worker.resilience.outages import Outage, Outages
from gradcam_worker.schemas.status import StatusEvent
from gradcam_worker.settings import Settings

if TYPE_CHECKING:
    from gradcam_worker.delivery.sql import SqlStatus

log = logging.getLogger("gradcam")

SQL = "sql"  # the name of the sink
KEEP_EVERY_S = 60.0  # between two looks at the database
LAST_WORD_S = 5.0  # for deliveries that are under way, the last renewal

BackgroundLoop = Callable[[threading.Event], None]
Send = Callable[[str, str | None, StatusEvent, str], None]


def build(
    settings: Settings,
    publisher: Publisher,
    ledger: RedisLedger,
    send: Send,
    me: str,
    observer: Observer = SILENT,
    spans: Traces = OFF,
    outages: Outages | None = None,
) -> dict[str, BackgroundLoop]:
    """All of them, by name, in the process `me`; `send` does what `Webhooks.send` does.

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

    loops: dict[str, BackgroundLoop] = {"reaper": reaper.run}
    sinks: dict[str, Deliver] = {}
    database = _database(settings)
    if database:
        sinks[SQL] = lambda delivery, _: database.write(delivery.document)
        loops["database"] = partial(_keep, database, outbox, outages.ledger)
    dispatcher = OutboxDispatcher(
        outbox,
        to_webhook,
        sinks,
        threads=settings.couriers,
        give_up_s=settings.webhook_give_up_s,
        keep_s=settings.webhook_timeout_s + KEEP_S,
        observer=observer,
        traces=spans,
        outage=outages.ledger,
    )
    loops["dispatcher"] = dispatcher.run
    return loops


def start(loops: Mapping[str, BackgroundLoop], stopped: threading.Event) -> list[threading.Thread]:
    """Let each of them keep at it, until `stopped`."""
    threads = [
        threading.Thread(target=keep, args=[stopped], name=name, daemon=True) for name, keep in loops.items()
    ]
    for one in threads:
        one.start()
    return threads


def join(threads: Iterable[threading.Thread]) -> None:
    """Wait for what is under way when they have been told to stop: LAST_WORD_S, for all of them together."""
    end_s = time.monotonic() + LAST_WORD_S
    for one in threads:
        one.join(max(end_s - time.monotonic(), 0))


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


def _keep(database: "SqlStatus", outbox: RedisOutbox, outage: Outage, stopped: threading.Event) -> None:
    """Have it told of every job, and have it forget what was completed long ago, a little at a time."""
    while True:
        try:
            outbox.open_sink(SQL)  # again and again: the ledger may have forgotten
            database.prune()
        except LedgerUnavailable as error:
            outage.failed(str(error))
        except StatusUnavailable as error:
            log.warning("%s", error)
        except BaseException:
            log.exception("the database met what nobody foresaw")
        if stopped.wait(KEEP_EVERY_S):
            database.close()
            return
