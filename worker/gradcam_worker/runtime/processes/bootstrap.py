"""Builds what a worker process is made of: the job handler and the background loops beside it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from gradcam_worker import __version__
from gradcam_worker.backfill.registry import RedisBackfillRegistry
from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.execution.handler import JobHandler
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.execution.services import Services, StorageProvider
from gradcam_worker.inference.client import InferenceClient
from gradcam_worker.inference.engine_client import EngineClient
from gradcam_worker.observability import tracing
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.redis_server.server_checks import ServerMonitor
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.resilience.stall import StallDetector
from gradcam_worker.runtime import background, service_factory
from gradcam_worker.runtime.offered_networks import NetworkReport
from gradcam_worker.runtime.one_core import keep_on_one_core
from gradcam_worker.schemas.ids import process_name, utc_now
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.storage import stores as storage


@dataclass(frozen=True)
class WorkerComponents:
    """The job handler, and the background loops that run beside it until they are stopped."""

    handler: JobHandler
    outages: Outages
    background_loops: Sequence[BackgroundLoop]
    redis_checks: ServerMonitor


def build_worker(
    settings: Settings,
    publisher: Publisher,
    services: Services,
    device: str,
    observer: Observer = NULL_OBSERVER,
) -> WorkerComponents:
    """Build the parts of a worker process, for the device of this name. Raises InvalidSettings."""
    ledger, started_at = service_factory.build_ledger(settings), utc_now()
    worker = WorkerRef(id=process_name(), device=device)
    ledger.observer, outages = observer, Outages()
    activities = services.stores.activities if isinstance(services.stores, storage.Stores) else ()
    breaker = CircuitBreaker(partial(use_storage, services.stores), activities=activities)
    networks = NetworkReport(settings, services.networks)

    def health() -> str:
        """The state of this worker as JSON, which the ledger shows: see `Ledger.find_workers`."""
        state = {
            "device": worker.device,
            "since": started_at.isoformat(),
            "running": len(leases.jobs()),
            "batch": round(services.inference.mean_batch_size, 1),
            "trouble": breaker.open_reason or services.inference.failure,
            **_engine_state(services.inference, settings),
            "version": __version__,
            "networks": networks.read(),
        }
        return json.dumps(state)

    leases = LeaseManager(ledger, worker.id, settings.lease_s, health, observer, outages)
    spans = tracing.connect(settings.traces, "gradcam-worker", worker.id)
    send = services.webhooks.send
    shared_loops = background.build(settings, publisher, ledger, send, worker.id, observer, spans, outages)
    stall = StallDetector(publisher.any_waiting, settings.hung_after_s, lambda: breaker.is_open)
    handler = JobHandler(
        settings,
        ledger,
        services,
        worker,
        leases,
        breaker,
        observer=observer,
        traces=spans,
        admits=RedisBackfillRegistry(ledger.server).admits,
        stall=stall,
    )
    redis_checks = ServerMonitor(settings)
    loops = [leases.loop, breaker.loop, redis_checks.loop, stall.loop, *shared_loops]
    if settings.role == "jobs" and settings.one_core and (binding := keep_on_one_core()):
        loops.append(binding)
    return WorkerComponents(handler, outages, loops, redis_checks)


def _engine_state(inference: InferenceClient[Any], settings: Settings) -> dict[str, object]:
    """What a job process says of its engine process; nothing where this process computes by itself."""
    if not isinstance(inference, EngineClient):
        return {}
    engine = {
        "id": str(settings.engine_socket),  # the same for all job processes of this engine
        "pid": inference.pid,
        "requests": inference.in_flight,
        "networks": inference.count,
        "trouble": inference.not_ready,
    }
    return {"engine": engine}


def use_storage(stores: StorageProvider) -> None:
    """Use the storage as a job does. Raises whatever a job would meet."""
    if not isinstance(stores, storage.Stores):
        storage.probe(stores.open())
        return
    storage.probe(stores.open(single_try=storage.PROBE))
    stores.check_identity()  # artifacts may go to a folder, and images come from S3
