"""The worker process: Celery's app and its tasks, the background loops, and how the process ends."""

import logging
import os
import signal
import threading
import time
import warnings
from contextlib import suppress
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
    MissingExtra,
    WorkerUnfit,
)
from gradcam_worker.execution.handler import JobHandler
from gradcam_worker.inference.engine_client import EngineClient
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.observability import native_output
from gradcam_worker.observability.logs import configure_logging
from gradcam_worker.resilience.budget import limit_memory
from gradcam_worker.resilience.outages import Outage
from gradcam_worker.runtime import background, parent_watch, service_factory
from gradcam_worker.runtime.liveness import LivenessReporter
from gradcam_worker.runtime.processes import preflight
from gradcam_worker.runtime.processes.bootstrap import WorkerComponents, build_worker
from gradcam_worker.runtime.processes.preloading import freeze_loaded_objects, preload
from gradcam_worker.runtime.telemetry import Telemetry
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

REQUEUE_DELAY_S = 1  # before a message is requeued, so that an outage makes no busy loop
REQUEUE_TIMEOUT_S = 8.0  # to requeue running jobs and end; less than the supervisor waits
CANCEL_TIMEOUT_S = 3.0  # of it, for running jobs to notice that they are cancelled
SETTLE_S = 1.0  # of it, for Celery to end afterwards
REQUEUE_RETRY_S = 0.2  # meanwhile, where a job was just starting or the ledger did not answer
ENGINE_START_TIMEOUT_S = 600.0  # an engine that cannot start is reported by its supervisor
PROBE_TIMEOUT_S = 2.0  # of the broker, for the check of liveness
PAYLOADS: dict[str, type[Job] | type[Shard]] = {EXPLAIN: Job, EXPLAIN_SHARD: Shard}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)  # see `_handle_stop_signals`


def register(app: Celery, handler: JobHandler, ledger_outage: Outage) -> None:
    """Register our tasks with the app, and remove all others.

    Args:
        app: The worker's Celery app.
        handler: Handles the job of each message.
        ledger_outage: Notified when the ledger is unreachable.
    """

    def explain(self: Any, *args: object) -> None:
        try:
            entered_at = (self.request.headers or {}).get(ENTERED_AT)
            payload, kind = _single_argument(args), PAYLOADS[self.name]
            handler.handle(payload, self.request.id, entered_at=entered_at, kind=kind)
        except (LedgerUnavailable, WorkerUnfit) as error:
            if isinstance(error, LedgerUnavailable):
                ledger_outage.failed(f"message {self.request.id} is requeued: {error}")
            elif handler.breaker.is_open:  # which the breaker logs
                log.debug("job_requeued_until_storage_works", job_id=self.request.id, reason=error)
            else:
                log.warning("job_requeued_by_unfit_worker", job_id=self.request.id, reason=error)
            time.sleep(REQUEUE_DELAY_S)
            raise Reject(str(error), requeue=True) from error
        except BaseException as error:  # not only Exception: nothing else would free its slot
            # A defect of ours. No job is lost; a message without a valid job is refused at its redelivery.
            log.exception("message_handling_failed", job_id=self.request.id)
            if _is_redelivered(self.request) and _refuse_as_internal_error(handler, self.request.id, error):
                return
            time.sleep(REQUEUE_DELAY_S)
            raise Reject(str(error), requeue=True) from error

    app.finalize()
    for name in [*app.tasks]:  # Celery's own, which publish messages that their arguments name
        app.tasks.unregister(name)
    for name in PAYLOADS:
        app.task(explain, name=name, bind=True, shared=False, Request=Request)  # of this app alone


def _refuse(handler: JobHandler, message_id: str, reason: str) -> None:
    """Record in the ledger that a message is not a job."""
    handler.refuse(message_id, None, InvalidJob(f"The message is not a job: {reason}."))


def _is_redelivered(request: Any) -> bool:
    """Whether the message was delivered before."""
    return bool((request.delivery_info or {}).get("redelivered"))


def _refuse_as_internal_error(handler: JobHandler, message_id: str, error: BaseException) -> bool:
    """Record that a message cannot be handled, unless it has a valid job. Returns whether it is final."""
    try:
        return handler.refuse(message_id, None, InternalError.of(error)).final
    except GradcamError as failure:  # the ledger is unreachable: the message is redelivered
        log.warning("job_refusal_not_recorded", job_id=message_id, error=failure)
        return False


def _single_argument(args: tuple[object, ...]) -> object:
    """The only argument of a task. Several arguments are returned as a list, which is refused as no job."""
    return args[0] if len(args) == 1 else [*args]


def run(settings: Settings, *, ready_fd: int | None = None, load: service_factory.Load | None = None) -> int:
    """Handle jobs in this process until it is asked to stop.

    Args:
        settings: The settings of this process.
        ready_fd: The file descriptor for signs of life, if a supervisor started this process. It writes
            there while it takes jobs and is healthy, and ends cleanly when its standard input is closed.
        load: Loads a network, instead of `service_factory.load`.

    Returns:
        The exit code.

    Raises:
        InvalidSettings: The process cannot work with its settings.
    """
    configure_logging(settings.log_format, settings.log_level)
    with native_output.capture(settings.stderr_pipe if ready_fd is not None else ()):
        return _run(settings, ready_fd, load)


def _run(settings: Settings, ready_fd: int | None, load: service_factory.Load | None) -> int:
    _quiet_libraries()
    if ready_fd is not None:
        parent_watch.on_parent_exit(
            lambda: _stop_without_supervisor(settings.shutdown_timeout_s + REQUEUE_TIMEOUT_S)
        )
    app = broker.make_app(settings)
    limit_memory(settings.memory_bytes)
    telemetry = Telemetry(settings)
    inference, device = _open_inference(settings, load, telemetry)
    services = service_factory.build_services(settings, inference, telemetry.observer)
    publisher = Publisher(settings)
    components = build_worker(settings, publisher, services, device, telemetry.observer)
    handler = components.handler
    register(app, handler, components.outages.ledger)
    telemetry.add_worker(lambda: inference.count, handler.breaker, components.redis_checks)
    _wait_for_networks(settings, inference, telemetry)
    broker_answers = partial(broker.is_reachable, broker.make_app(settings, timeout_s=PROBE_TIMEOUT_S))
    stopped, signals = threading.Event(), SimpleQueue[int]()
    loops = background.start([*components.background_loops, *telemetry.loops])
    ended_loops = telemetry.require_alive(loops)
    liveness = LivenessReporter(
        ready_fd,
        broker_answers=broker_answers,
        other_reason=lambda: inference.failure or ended_loops() or handler.stall.unhealthy_reason(),
    )
    telemetry.health.live["loop"], telemetry.health.ready["work"] = (
        lambda: liveness.last_reason,
        handler.stall.unready_reason,
    )

    def ready(**_: object) -> None:
        freeze_loaded_objects()
        _handle_stop_signals(signals)
        liveness.write_sign()  # before the first job, which may kill this process
        telemetry.ready()
        liveness.loop.start()

    def stop_on_signal() -> None:
        """Wait for a signal, then for a second one or the timeout; requeue running jobs; end."""
        signals.get()
        telemetry.stopping()
        liveness.stopping()
        _wait_for_second_signal(signals, settings.shutdown_timeout_s)
        # The ledger may hang.
        timer = threading.Timer(REQUEUE_TIMEOUT_S, lambda: _exit_at_once(0 if stopped.is_set() else 1))
        timer.daemon = True
        timer.start()
        all_requeued = _requeue_running_jobs(handler, publisher, consumer)
        if not stopped.wait(SETTLE_S):  # a thread is stuck
            _requeue_unacknowledged(consumer)
            _exit_at_once(0 if all_requeued else 1)

    worker_ready.connect(ready, weak=False)
    threading.Thread(target=stop_on_signal, name="stop", daemon=True).start()
    consumer = _celery_worker(app, settings, components, liveness)
    log.info(
        "worker_started",
        worker=handler.worker.id,
        device=handler.worker.device,
        threads=settings.threads,
        shards=settings.shards,
    )
    telemetry.started()
    consumer.start()
    stopped.set()
    background.stop([*loops, liveness.loop])
    _remove_from_live_workers(handler)
    return int(consumer.exitcode or 0)


def _open_inference(
    settings: Settings, load: service_factory.Load | None, telemetry: Telemetry
) -> tuple[ModelCache | EngineClient, str]:
    """Open what computes: in this process, or in the engine process. Returns also the device's name."""
    if settings.engine_socket:
        engine = EngineClient(
            settings.engine_socket, pool_bytes=settings.engine_pool_bytes, observer=telemetry.observer
        )
        telemetry.add_engine(engine)
        return engine, engine.connect(ENGINE_START_TIMEOUT_S).device
    model_cache = service_factory.build_model_cache(settings, load, telemetry.observer)
    service_factory.prepare(settings)
    return model_cache, preflight.check_device(settings)


def _wait_for_networks(
    settings: Settings, inference: ModelCache | EngineClient, telemetry: Telemetry
) -> None:
    """Load the networks of GRADCAM_PRELOAD, or wait until the engine process has. Raises InvalidSettings."""
    if isinstance(inference, EngineClient):
        inference.wait_until_ready()
    else:
        preload(settings, inference, telemetry.health)


def _remove_from_live_workers(handler: JobHandler) -> None:
    """Remove this worker from the list of live workers."""
    with suppress(LedgerUnavailable):  # then its entry expires
        handler.ledger.remove_worker(handler.worker.id)
    log.info("worker_stopped", worker=handler.worker.id)


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
        is_paused=lambda: handler.breaker.is_open,
    )
    worker = app.Worker(
        pool=ThreadPool,
        consumer_cls=partial(JobConsumer, hooks=hooks),
        hostname=f"celery@{handler.worker.id}",
        concurrency=settings.threads + settings.shards,
        queues=list(QUEUES),
        without_gossip=True,  # else a restart of the broker can end the worker
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    # Celery has just asked for such warnings, of which it makes one at each lost connection.
    warnings.simplefilter("ignore", CPendingDeprecationWarning)
    return worker


def _wait_for_second_signal(signals: "SimpleQueue[int]", timeout_s: float) -> None:
    """Wait for a second signal, at most `timeout_s`."""
    log.info("worker_stopping", timeout_s=timeout_s, reason="running jobs may finish until the timeout")
    try:
        signals.get(timeout=timeout_s)
        log.warning("worker_stop_repeated", reason="running jobs are requeued")
    except Empty:
        log.warning("worker_stop_timed_out", timeout_s=timeout_s, reason="running jobs are requeued")


def run_supervised(settings: Settings, ready_fd: int) -> int:
    """As `run`, for a supervisor. Returns EX_CONFIG for wrong settings: then a restart is of no use."""
    try:
        return run(settings, ready_fd=ready_fd)
    except GradcamError as error:
        log.error("worker_failed", error=error)  # noqa: TRY400  # the error's sentence is enough
        return os.EX_CONFIG if isinstance(error, InvalidSettings | MissingExtra) else 1


def _handle_stop_signals(signals: SimpleQueue[int]) -> None:
    """Queue each signal that asks for an end, and do what Celery does at SIGTERM: take no new messages.

    At SIGINT and SIGQUIT Celery would do what a thread pool cannot do, and at SIGHUP restart this program.
    """
    celery_handler: Any = signal.getsignal(signal.SIGTERM)

    def queue_and_handle(number: int, frame: object) -> None:
        signals.put(number)
        celery_handler(number, frame)

    for number in STOP_SIGNALS:
        signal.signal(number, queue_and_handle)


def _requeue_running_jobs(handler: JobHandler, publisher: Publisher, consumer: Any) -> bool:
    """Requeue the running jobs, and wait until they have ended here. Returns whether all are requeued.

    The reaper finds the others when their leases expire.
    """
    end_s, unpublished = time.monotonic() + CANCEL_TIMEOUT_S, list[str]()
    while True:
        time_is_up, failed = time.monotonic() > end_s, False
        try:
            unpublished += handler.requeue_unfinished()
            # While the consumer runs, this process would receive the message again.
            while unpublished and (time_is_up or consumer.blueprint.state != RUN):
                if route := handler.ledger.read_route(unpublished[-1]):
                    publisher.republish([unpublished[-1]], route)
                    log.info("job_requeued_at_stop", job_id=unpublished[-1])
                unpublished.pop()
        except (LedgerUnavailable, BrokerUnavailable) as error:
            log.warning("requeue_at_stop_failed", error=error)
            failed = True
        if time_is_up or not (failed or unpublished or handler.leases.jobs()):
            return not failed
        time.sleep(REQUEUE_RETRY_S)


def _requeue_unacknowledged(consumer: Any) -> None:
    """Requeue the messages that are not acknowledged, as Celery does when its threads have ended."""
    if consumer.blueprint.state != RUN:  # Celery's own thread only waits for its threads
        try:
            consumer.consumer.shutdown()
        except Exception:
            log.exception(
                "unacknowledged_messages_not_requeued",
                reason="they are redelivered after their visibility timeout",
            )


def _exit_at_once(code: int) -> None:
    """Exit without waiting for stuck threads, as Python would."""
    log.warning("worker_exited_with_running_jobs")
    logging.shutdown()
    os._exit(code)


def _quiet_libraries() -> None:
    """Silence libraries where our own events tell the same, with the job's id. Each line costs time."""
    for name in ("httpx", "celery.worker.strategy", "celery.worker.consumer.connection"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # They log a traceback for each requeued message, and several lines for each lost connection.
    for name in ("celery.app.trace", "celery.worker.consumer.consumer", "kombu.transport.virtual.base"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # `traces_dropped` is logged instead
    setup_logging.connect(_keep_logging)
    celery.apps.worker.safe_say = lambda *_: None  # it prints, beside the log, that it stops


def _keep_logging(**_: object) -> None:
    """Do nothing: a receiver of Celery's signal keeps Celery from configuring the logs."""


def _stop_without_supervisor(timeout_s: float) -> None:
    log.warning("supervisor_gone", reason="the worker stops, as nothing would restart it")
    timer = threading.Timer(timeout_s, os._exit, [1])
    timer.daemon = True  # else the process would wait for it
    timer.start()
    os.kill(os.getpid(), signal.SIGTERM)
