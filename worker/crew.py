"""Who works in a worker process: the desk, and those who keep at something beside it."""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from celery import Celery

from worker import broker, storage, wiring
from worker.breaker import Breaker
from worker.contract import StatusEvent
from worker.courier import Courier, Deliver
from worker.leases import Leases
from worker.outbox import Outbox, Parcel
from worker.outside import Outside
from worker.reaper import Reaper
from worker.redis_outbox import RedisOutbox
from worker.settings import Settings
from worker.status import message_id
from worker.tasks import Desk
from worker.wire import utc_now

SQL = "sql"  # the name of the sink


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

    courier = Courier(
        outbox,
        to_webhook,
        _sinks(settings, outbox),
        threads=settings.couriers,
        give_up_s=settings.webhook_give_up_s,
    )
    return Crew(
        Desk(settings, ledger, outside, me, leases, breaker),
        {"leases": leases.keep, "reaper": reaper.keep, "courier": courier.keep, "breaker": breaker.watch},
    )


def _sinks(settings: Settings, outbox: Outbox) -> dict[str, Deliver]:
    """Who is told of every job: a database, where there is one."""
    url = settings.status_sql_url.get_secret_value()
    if not url:
        outbox.close_sink(SQL)
        return {}
    from worker.sql_status import SqlStatus

    database = SqlStatus(url, settings.status_sql_retention_s, connections=settings.couriers)
    database.upgrade()
    outbox.open_sink(SQL)
    return {SQL: lambda parcel, _: database.write(parcel.document)}
