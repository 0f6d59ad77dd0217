"""The worker process: Celery's app, its task, the threads beside it, and its end."""

import errno
import logging
import os
import signal
import threading
import time
import warnings
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import celery.apps.worker
from celery import Celery
from celery.bootsteps import RUN
from celery.exceptions import CPendingDeprecationWarning, Reject
from celery.signals import setup_logging, worker_ready

from gradcam_worker.broker import app as broker
from gradcam_worker.broker.consumer import ConsumerHooks, JobConsumer, Request, ThreadPool
from gradcam_worker.broker.publisher import ENTERED_AT, EXPLAIN, EXPLAIN_SHARD, QUEUES, Publisher
from gradcam_worker.errors import (
    BrokerUnavailable,
    GradcamError,
    InternalError,
    InvalidJob,
    InvalidSettings,
    LedgerUnavailable,
    PermanentError,
    WeightsUnavailable,
    WorkerUnfit,
)
from gradcam_worker.execution.handler import JobHandler
from gradcam_worker.execution.services import Services
from gradcam_worker.observability.health import Health
from gradcam_worker.observability.logs import configure_logging
from gradcam_worker.resilience.budget import limit_memory
from gradcam_worker.resilience.outages import Outage
from gradcam_worker.runtime import background, parent_watch, preflight, service_factory
from gradcam_worker.runtime.bootstrap import WorkerComponents, build_worker
from gradcam_worker.runtime.liveness import LivenessReporter
from gradcam_worker.runtime.telemetry import Telemetry
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.settings import Settings

log = logging.getLogger("gradcam")

REQUEUE_DELAY_S = 1  # before a message goes back, so that an outage makes no busy loop
HAND_BACK_S = 8.0  # for handing back what runs and ending: less than a supervisor grants
GIVE_WAY_S = 3.0  # of it, for jobs to notice that they are to stop
SETTLE_S = 1.0  # of it, when they have, for Celery to end
HAND_BACK_EVERY_S = 0.2  # meanwhile: one was just beginning, the ledger did not answer
PRELOAD_EVERY_S = 10.0  # between two tries to have the weights of a network
NO_FILE = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES}  # which somebody has to put there
PROBE_S = 2.0  # that the broker has, to show that it answers
KINDS: dict[str, type[Job] | type[Shard]] = {EXPLAIN: Job, EXPLAIN_SHARD: Shard}
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)  # Celery's own ways lead astray here


def register(app: Celery, handler: JobHandler, ledger_outage: Outage) -> None:
    """Give the app its tasks, and no other."""

    def explain(self: Any, *args: object) -> None:
        try:
            entered_at = (self.request.headers or {}).get(ENTERED_AT)
            payload, kind = _payload(args), KINDS[self.name]
            handler.handle(payload, self.request.id, entered_at=entered_at, kind=kind)
        except (LedgerUnavailable, WorkerUnfit) as error:
            said = f"message {self.request.id} goes back: {error}"
            if isinstance(error, LedgerUnavailable):
                ledger_outage.failed(said)
            else:
                log.warning("%s", said)
            time.sleep(REQUEUE_DELAY_S)
            raise Reject(str(error), requeue=True) from error
        except BaseException as error:  # not only Exception: nothing else would free its place
            # A mistake of ours. No job is lost by it; what is no job goes round once, then ends.
            log.exception("message %s: unforeseen", self.request.id)
            if _redelivered(self.request) and _ended(handler, self.request.id, error):
                return
            time.sleep(REQUEUE_DELAY_S)
            raise Reject(str(error), requeue=True) from error

    app.finalize()
    for name in [*app.tasks]:  # Celery's own, which publish whatever they are told to
        app.tasks.unregister(name)
    for name in KINDS:
        app.task(explain, name=name, bind=True, shared=False, Request=Request)  # this app's alone


def _refuse(handler: JobHandler, message_id: str, why: str) -> None:
    """Record in the ledger that a message is no job."""
    handler.refuse(message_id, None, InvalidJob(f"The message is not a job: {why}."))


def _redelivered(request: Any) -> bool:
    """Whether the broker gave this message out before."""
    return bool((request.delivery_info or {}).get("redelivered"))


def _ended(handler: JobHandler, message_id: str, error: BaseException) -> bool:
    """Write down that a message cannot be handled; whether that ended it. A good job is left alone."""
    try:
        return handler.refuse(message_id, None, InternalError.of(error)).final
    except GradcamError as failure:  # the ledger is away, and the message comes again
        log.warning("message %s: its refusal could not be written down: %s", message_id, failure)
        return False


def _payload(args: tuple[object, ...]) -> object:
    """The one argument of a task; anything else is no job."""
    return args[0] if len(args) == 1 else [*args]


def run(settings: Settings, *, ready_fd: int | None = None, load: service_factory.Load | None = None) -> int:
    """Consume jobs in this process until it is asked to stop; return its exit code.

    `load` turns a row into a live network, where it is not to be done as `wiring.load` does it.

    With `ready_fd`, a supervisor started it: it writes bytes there as long as it takes jobs and all is
    well, and ends, cleanly, when whoever holds its standard input is gone.
    """
    configure_logging(settings.log_format, settings.log_level)
    _hush()
    if ready_fd is not None:
        parent_watch.on_parent_exit(lambda: _end(settings.shutdown_timeout_s + HAND_BACK_S))
    app = broker.make_app(settings)
    limit_memory(settings.memory_bytes)
    telemetry = Telemetry(settings)
    services = service_factory.build_services(settings, load, telemetry.observer)
    service_factory.prepare(settings)
    preflight.device(settings)
    publisher = Publisher(settings)
    components = build_worker(settings, publisher, services, telemetry.observer)
    handler = components.handler
    register(app, handler, components.outages.ledger)
    telemetry.ask_worker(
        lambda: services.model_cache.count, handler.breaker, components.eviction.last_problem
    )
    _preload(settings, services, telemetry.health)
    probe = partial(broker.is_reachable, broker.make_app(settings, timeout_s=PROBE_S))
    stopped, signals = threading.Event(), SimpleQueue[int]()
    loops = background.start([*components.background_loops, *telemetry.loops])
    ended = telemetry.watch(loops)
    liveness = LivenessReporter(
        ready_fd,
        broker_answers=probe,
        other_reason=lambda: services.model_cache.failure or ended() or handler.stall.unhealthy_reason(),
    )
    telemetry.health.live["loop"], telemetry.health.ready["work"] = (
        lambda: liveness.last_reason,
        handler.stall.unready_reason,
    )

    def ready(**_: object) -> None:
        _listen(signals)
        liveness.show()  # before the first job, which may be the end of this process
        telemetry.begun()
        liveness.loop.start()

    def give_up() -> None:
        """When the time is up, or at a second signal: hand everything back, and see to it that this ends."""
        signals.get()
        telemetry.ending()
        liveness.ending()
        _wait_for_second(signals, settings.shutdown_timeout_s)
        # A ledger may not even refuse.
        end = threading.Timer(HAND_BACK_S, lambda: _leave(0 if stopped.is_set() else 1))
        end.daemon = True
        end.start()
        all_back = _hand_back(handler, publisher, consumer)
        if not stopped.wait(SETTLE_S):  # some thread is stuck
            _put_back(consumer)
            _leave(0 if all_back else 1)

    worker_ready.connect(ready, weak=False)
    threading.Thread(target=give_up, name="give up", daemon=True).start()
    consumer = _celery_worker(app, settings, components, liveness)
    hands = f"{settings.threads} threads, {settings.shards} shards"
    log.info("%s on %s takes jobs, %s", handler.worker.id, handler.worker.device, hands)
    telemetry.started()
    consumer.start()
    stopped.set()
    background.stop([*loops, liveness.loop])
    return int(consumer.exitcode or 0)


def _celery_worker(
    app: Celery, settings: Settings, components: WorkerComponents, liveness: LivenessReporter
) -> Any:
    """Celery's worker, with our thread pool and our consumer."""
    handler = components.handler
    hooks = ConsumerHooks(
        refuse=partial(_refuse, handler),
        on_loop_turn=liveness.loop_turned,
        stall=handler.stall,
        broker_outage=components.outages.broker,
    )
    return app.Worker(
        pool=ThreadPool,
        consumer_cls=partial(JobConsumer, hooks=hooks),
        hostname=f"celery@{handler.worker.id}",
        concurrency=settings.threads + settings.shards,
        queues=list(QUEUES),
        without_gossip=True,  # with it, a restart of the broker can end the worker
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )


def _wait_for_second(signals: "SimpleQueue[int]", timeout_s: float) -> None:
    """Wait until the process is asked again to stop, or its time is up."""
    log.info("asked to stop: what runs has %g s to end", timeout_s)
    try:
        signals.get(timeout=timeout_s)
        log.warning("asked to stop again: what still runs is handed back")
    except Empty:
        log.warning("%g s are over: what still runs is handed back", timeout_s)


def _preload(settings: Settings, services: Services, health: Health) -> None:
    """Weights that cannot be had just now are waited for. Raises InvalidSettings."""
    left = [*settings.preload]

    def missing() -> str | None:
        return f"not loaded yet: {', '.join(left)}" if left else None

    health.ready["networks"] = health.startup["networks"] = missing
    while left:
        try:
            services.model_cache.warm_up(services.networks.find(left[0]))
        except (PermanentError, WeightsUnavailable) as error:
            cause = error.__cause__
            no_file = isinstance(cause, OSError) and cause.errno in NO_FILE
            if isinstance(error, PermanentError) or no_file:
                message = f"GRADCAM_PRELOAD: {error}"
                raise InvalidSettings(message) from error
            log.warning("%s It is tried again in %g s.", error, PRELOAD_EVERY_S)
            time.sleep(PRELOAD_EVERY_S)
            continue
        log.info("%s is loaded", left.pop(0))


def run_supervised(settings: Settings, ready_fd: int) -> int:
    """As `run`, for a supervisor, which does not try again what can only fail again: EX_CONFIG."""
    try:
        return run(settings, ready_fd=ready_fd)
    except GradcamError as error:
        log.error("%s", error)  # noqa: TRY400  # a sentence is enough
        return os.EX_CONFIG if isinstance(error, InvalidSettings) else 1


def _listen(signals: SimpleQueue[int]) -> None:
    """Note each signal that asks for an end, beside what Celery does at SIGTERM: it takes nothing new, and
    ends what it has.

    At SIGINT and SIGQUIT it would do what a pool of threads cannot, and at SIGHUP start this program again.
    """
    celerys: Any = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: object) -> None:
        signals.put(number)
        celerys(number, frame)

    for one in STOPS:
        signal.signal(one, note)


def _hand_back(handler: JobHandler, publisher: Publisher, consumer: Any) -> bool:
    """What runs here, back into the queue, until it has ended here, too; whether all of it is back.

    What is not, the reaper finds when its lease runs out.
    """
    end_s, back = time.monotonic() + GIVE_WAY_S, list[str]()
    while True:
        over, failed = time.monotonic() > end_s, False
        try:
            back += handler.requeue_unfinished()
            while back and (over or consumer.blueprint.state != RUN):  # else it would be taken here, again
                if route := handler.ledger.read_route(back[-1]):
                    publisher.republish([back[-1]], route)
                    log.info("job %s is handed back", back[-1])
                back.pop()
        except (LedgerUnavailable, BrokerUnavailable) as error:
            log.warning("%s", error)
            failed = True
        if over or not (failed or back or handler.leases.jobs()):
            return not failed
        time.sleep(HAND_BACK_EVERY_S)


def _put_back(consumer: Any) -> None:
    """Messages that were received and not acknowledged, as Celery does when its threads have ended."""
    if consumer.blueprint.state != RUN:  # its own thread does no more than wait for them
        try:
            consumer.consumer.shutdown()
        except Exception:
            log.exception("messages were not put back: they come when their visibility timeout is over")


def _leave(code: int) -> None:
    """End here and now: Python would wait for threads that are stuck."""
    log.warning("some jobs do not stop: the process leaves them")
    logging.shutdown()
    os._exit(code)


def _hush() -> None:
    """Our own lines say it in the job's words, and each line costs."""
    for chatty in ("httpx", "celery.worker.strategy", "celery.worker.consumer.connection"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # A traceback for what goes back; lines of each lost connection and of what follows from it.
    for chatty in ("celery.app.trace", "celery.worker.consumer.consumer", "kombu.transport.virtual.base"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # that nothing gets through is said once
    warnings.simplefilter("ignore", CPendingDeprecationWarning)  # said at each lost connection
    setup_logging.connect(_keep_logging)
    celery.apps.worker.safe_say = lambda *_: None  # prints, past the log, what `_wait_for_second` says


def _keep_logging(**_: object) -> None:
    """Being connected to Celery's signal is what keeps Celery from configuring the logs."""


def _end(timeout_s: float) -> None:
    log.warning("whoever started this worker is gone: ending")
    timer = threading.Timer(timeout_s, os._exit, [1])
    timer.daemon = True  # or the end would wait for it
    timer.start()
    os.kill(os.getpid(), signal.SIGTERM)
