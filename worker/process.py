"""The worker process: Celery's app, its task, the threads beside it, and its end."""

import logging
import os
import signal
import threading
import time
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from celery import Celery
from celery.exceptions import Reject
from celery.signals import setup_logging, worker_ready

from worker import broker, lifeline, wiring
from worker.crew import gather
from worker.errors import BrokerUnavailable, InternalError, InvalidJob, LedgerUnavailable, WorkerUnfit
from worker.pulse import Pulse
from worker.settings import Settings
from worker.tasks import Desk

log = logging.getLogger("gradcam")

RETURN_AFTER_S = 1  # before a message goes back, so that an outage makes no busy loop
LAST_WORD_S = 5.0  # for what is under way beside the jobs when they have ended: deliveries, the last renewal


def register(app: Celery, desk: Desk) -> None:
    """Give the app its task, and say what becomes of messages that are none."""

    def explain(self: Any, *args: object, **kwargs: object) -> None:
        try:
            entered_at = (self.request.headers or {}).get(broker.ENTERED_AT)
            desk.handle(_payload(args, kwargs), self.request.id, entered_at=entered_at)
        except (LedgerUnavailable, WorkerUnfit) as error:
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

    app.task(explain, name=broker.EXPLAIN, bind=True, shared=False)  # this app's alone
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

    With `ready_fd`, a supervisor started it: it writes bytes there as long as it takes jobs and all is
    well, and ends, cleanly, when whoever holds its standard input is gone.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Our own lines say it in the job's words, and each line costs.
    for chatty in ("httpx", "celery.app.trace", "celery.worker.strategy"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    setup_logging.connect(_keep_logging)
    if ready_fd is not None:
        lifeline.watch(lambda: _end(settings.shutdown_timeout_s))
    app = broker.make_app(settings)
    outside = wiring.outside(settings, load)
    wiring.prepare(settings)
    crew = gather(settings, app, outside)
    desk = crew.desk
    register(app, desk)
    for name in settings.preload:
        outside.residents.warm(outside.networks.find(name))
        log.info("%s is loaded", name)
    pulse = Pulse(ready_fd, reachable=partial(broker.answers, app), ill=lambda: outside.residents.trouble)
    app.turned = pulse.turned
    stopped, signals = threading.Event(), SimpleQueue[int]()
    keepers = [
        threading.Thread(target=keep, args=[stopped], name=name, daemon=True)
        for name, keep in crew.keepers.items()
    ]
    for one in keepers:
        one.start()

    def ready(**_: object) -> None:
        _listen(signals)
        threading.Thread(target=pulse.keep, args=[stopped], name="pulse", daemon=True).start()

    def give_up() -> None:
        """Hand everything back: at a second signal, or when the time is up."""
        signals.get()
        pulse.ending()
        try:
            signals.get(timeout=settings.shutdown_timeout_s)
        except Empty:
            log.warning("%g s are over: what still runs is handed back", settings.shutdown_timeout_s)
        _hand_back(desk, app)
        os._exit(0)

    worker_ready.connect(ready, weak=False)
    threading.Thread(target=give_up, name="give up", daemon=True).start()
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
    stopped.set()
    for one in keepers:
        one.join(LAST_WORD_S)
    return int(consumer.exitcode or 0)


def _listen(signals: SimpleQueue[int]) -> None:
    """Note each SIGTERM, beside what Celery does at the first: it takes nothing new and ends what it has."""
    celerys: Any = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: object) -> None:
        signals.put(number)
        celerys(number, frame)

    signal.signal(signal.SIGTERM, note)


def _hand_back(desk: Desk, app: Celery) -> None:
    """What runs here, back into the queue. What cannot be is found by the reaper, when its lease runs out."""
    try:
        for job_id in desk.hand_back():
            if job := desk.ledger.job(job_id):
                broker.publish(app, job)
                log.info("job %s is handed back", job_id)
    except (LedgerUnavailable, BrokerUnavailable) as error:
        log.warning("%s", error)


def _keep_logging(**_: object) -> None:
    """Being connected to Celery's signal is what keeps Celery from configuring the logs."""


def _end(timeout_s: float) -> None:
    log.warning("whoever started this worker is gone: ending")
    threading.Timer(timeout_s, os._exit, [1]).start()
    os.kill(os.getpid(), signal.SIGTERM)
