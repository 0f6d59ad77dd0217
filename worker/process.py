"""The worker process: Celery's app, its tasks, its logs, and its end."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import Celery
from celery.exceptions import Reject
from celery.signals import setup_logging, worker_ready

from worker import broker, lifeline, wiring
from worker.errors import BrokerUnavailable, InternalError, InvalidJob, LedgerUnavailable
from worker.settings import Settings
from worker.tasks import Desk

log = logging.getLogger("gradcam")

RETURN_AFTER_S = 1  # before a message goes back, so that an outage makes no busy loop


def register(app: Celery, desk: Desk) -> None:
    """Give the app its tasks, and say what becomes of messages that are none."""

    def task(name: str, handler: Callable[[object, Any], str]) -> None:
        def receive(self: Any, *args: object, **kwargs: object) -> None:
            try:
                handler(_payload(args, kwargs), self.request)
            except (LedgerUnavailable, BrokerUnavailable) as error:
                log.warning("message %s goes back: %s", self.request.id, error)
                time.sleep(RETURN_AFTER_S)
                raise Reject(str(error), requeue=True) from error
            except Exception as error:
                # A mistake of ours. No job is lost by it; what is no job goes round once, then ends.
                log.exception("message %s: unforeseen", self.request.id)
                if _redelivered(self.request) and _ended(desk, self.request.id, error):
                    return
                time.sleep(RETURN_AFTER_S)
                raise Reject(str(error), requeue=True) from error

        app.task(receive, name=name, bind=True, shared=False)  # this app's alone

    def explain(payload: object, request: Any) -> str:
        entered_at = (request.headers or {}).get(broker.ENTERED_AT)
        return desk.handle(payload, request.id, redelivered=_redelivered(request), entered_at=entered_at)

    task(broker.EXPLAIN, explain)
    task(broker.DELIVER, lambda payload, _: desk.deliver(payload))
    app.refuse_message = lambda message_id, why: desk.refuse(
        message_id, None, InvalidJob(f"The message is not a job: {why}.")
    )
    app.conf.worker_consumer = "worker.consumer:SturdyConsumer"


def _redelivered(request: Any) -> bool:
    """Whether the broker gave this message out before."""
    return bool((request.delivery_info or {}).get("redelivered"))


def _ended(desk: Desk, message_id: str, error: Exception) -> bool:
    """Write down that a message cannot be handled; whether that ended it. A good job is left alone."""
    return desk.refuse(message_id, None, InternalError.of(error)).final


def _payload(args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    """The one argument of a task, by position or by any name; anything else is no job."""
    given = [*args, *kwargs.values()]
    return given[0] if len(given) == 1 else given


def run(settings: Settings, *, ready_fd: int | None = None, load: wiring.Load | None = None) -> int:
    """Consume jobs in this process until it is asked to stop; return its exit code.

    `load` turns a row into a live network, where it is not to be done as `wiring.load` does it.

    With `ready_fd`, a supervisor started it: it writes one byte there as soon as it takes jobs, and
    ends, cleanly, when whoever holds its standard input is gone.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Our own lines say it in the job's words, and each line costs.
    for chatty in ("httpx", "celery.app.trace", "celery.worker.strategy"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    setup_logging.connect(_keep_logging)
    if ready_fd is not None:
        worker_ready.connect(lambda **_: os.write(ready_fd, b"1"), weak=False)
        lifeline.watch(lambda: _end(settings.shutdown_timeout_s))
    app = broker.make_app(settings)
    outside = wiring.outside(settings, load)
    wiring.prepare(settings)
    desk = Desk(
        settings,
        wiring.ledger(settings),
        outside,
        wiring.worker_ref(),
        publish=partial(broker.publish, app),
        publish_delivery=partial(broker.publish_delivery, app),
    )
    register(app, desk)
    for name in settings.preload:
        outside.residents.warm(outside.networks.find(name))
        log.info("%s is loaded", name)
    consumer = app.Worker(
        pool="threads",
        concurrency=settings.threads,
        queues=list(broker.QUEUES),
        without_gossip=True,  # with it, a restart of the broker can end the worker
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    log.info("%s on %s takes jobs, %d threads", desk.worker.id, desk.worker.device, settings.threads)
    consumer.start()
    return int(consumer.exitcode or 0)


def _keep_logging(**_: object) -> None:
    """Being connected to Celery's signal is what keeps Celery from configuring the logs."""


def _end(timeout_s: float) -> None:
    log.warning("whoever started this worker is gone: ending")
    threading.Timer(timeout_s, os._exit, [1]).start()
    os.kill(os.getpid(), signal.SIGTERM)
