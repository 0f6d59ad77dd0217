"""Who works in a worker process: the desk, and those who keep at something beside it."""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from celery import Celery

from worker import broker, storage, wiring
from worker.breaker import Breaker
from worker.contract import StatusEvent
from worker.courier import KEEP_S, Courier, Deliver
from worker.errors import InvalidSettings, LedgerUnavailable, StatusUnavailable
from worker.leases import Leases
from worker.outbox import Parcel
from worker.outside import Outside
from worker.reaper import Reaper
from worker.redis_outbox import RedisOutbox
from worker.settings import Settings
from worker.status import message_id
from worker.tasks import Desk
from worker.wire import utc_now

if TYPE_CHECKING:
    from worker.sql_status import SqlStatus

log = logging.getLogger("gradcam")

SQL = "sql"  # the name of the sink
KEEP_EVERY_S = 60.0  # between two looks at the database


@dataclass(frozen=True)
class Crew:
    """The desk, and what has a thread of its own until it is told to stop."""

    desk: Desk
    keepers: Mapping[str, Callable[[threading.Event], None]]


def gather(settings: Settings, app: Celery, outside: Outside) -> Crew:
    """Everybody a worker process needs. Raises InvalidSettings."""
    ledger, me, began_at = wiring.ledger(settings), wiring.worker_ref(), utc_now()
    breaker = Breaker(lambda: storage.probe(outside.stores.open()))

    def health() -> str:
        """What other people can read about this worker: see `Ledger.workers`."""
        said = {"device": me.device, "since": began_at.isoformat(), "running": len(leases.jobs())}
        return json.dumps({**said, "trouble": breaker.open or outside.residents.trouble})

    leases = Leases(ledger, me.id, settings.lease_s, health)
    reaper = Reaper(
        ledger,
        me.id,
        partial(broker.ring, app),
        partial(broker.waiting, app),
        lease_s=settings.lease_s,
        lost_after_s=settings.lost_after_s,
    )
    outbox = RedisOutbox(ledger.server, retention_s=settings.retention_s)

    def to_webhook(parcel: Parcel, event: StatusEvent) -> None:
        if parcel.webhook:
            hook = parcel.webhook
            outside.webhooks.send(hook.url, hook.secret_ref, event, message_id(parcel.document))

    keepers = {"leases": leases.keep, "reaper": reaper.keep, "breaker": breaker.watch}
    sinks: dict[str, Deliver] = {}
    database = _database(settings)
    if database:
        sinks[SQL] = lambda parcel, _: database.write(parcel.document)
        keepers["database"] = partial(_keep, database, outbox)
    courier = Courier(
        outbox,
        to_webhook,
        sinks,
        threads=settings.couriers,
        give_up_s=settings.webhook_give_up_s,
        keep_s=settings.webhook_timeout_s + KEEP_S,
    )
    keepers["courier"] = courier.keep
    return Crew(Desk(settings, ledger, outside, me, leases, breaker), keepers)


def _database(settings: Settings) -> "SqlStatus | None":
    """The database that is told of every job, where there is one. Raises InvalidSettings."""
    url = settings.status_sql_url.get_secret_value()
    if not url:
        return None
    try:
        from worker.sql_status import SqlStatus

        database = SqlStatus(url, settings.status_sql_retention_s, connections=settings.couriers)
    except ImportError as error:
        message = "GRADCAM_STATUS_SQL_URL needs the extra sql: pip install 'gradcam-worker[cpu,sql]'."
        raise InvalidSettings(message) from error
    try:
        database.upgrade()
    except StatusUnavailable as error:  # the first write does it, when the database is back
        log.warning("%s", error)
    return database


def _keep(database: "SqlStatus", outbox: RedisOutbox, stopped: threading.Event) -> None:
    """Have it told of every job, and have it forget what was completed long ago, a little at a time."""
    while True:
        try:
            outbox.open_sink(SQL)  # again and again: the ledger may have forgotten
            database.prune()
        except (LedgerUnavailable, StatusUnavailable) as error:
            log.warning("%s", error)
        except Exception:
            log.exception("the database met what nobody foresaw")
        if stopped.wait(KEEP_EVERY_S):
            database.close()
            return
