"""`gradcam doctor`: is everything there that a worker needs, and what to do where it is not."""

import importlib.util
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import kombu.exceptions

from worker import broker
from worker.errors import BrokerUnavailable, GradcamError, StorageUnavailable
from worker.gradcam import weights
from worker.gradcam.catalog import CATALOG
from worker.redis_ledger import RedisLedger
from worker.settings import Settings, without_secrets


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `fix` says what to do where it is not well."""

    what: str
    well: bool
    detail: str
    fix: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at broker, ledger, storage, device and weights, in this order; each as it is found."""
    broker_fix = "Start Redis or Valkey there, or set GRADCAM_BROKER_URL."
    yield _look("broker", _broker, settings, broker_fix)
    yield _look("ledger", _ledger, settings, broker_fix.replace("BROKER", "LEDGER"))
    if importlib.util.find_spec("tensorflow") is None:
        detail = "not installed: from here jobs can be submitted, not run"
        fix = "For a worker: pip install 'gradcam-worker[cpu]' (or [gpu])."
        yield Finding("worker", well=False, detail=detail, fix=fix)
        return
    storage_fix = (
        "Create the bucket, check GRADCAM_OUTPUT, GRADCAM_S3_ENDPOINT_URL and the keys, and grant "
        "s3:PutObject and s3:GetObject."
    )
    yield _look("storage", _storage, settings, storage_fix)
    yield _look("device", _device, settings, "Check the driver and the TensorFlow installation.")
    for row in CATALOG.values():
        needed = row.name in settings.preload
        path = weights.where(row, settings.weights_dir)
        if path and path.is_file():
            yield Finding(f"weights of {row.name}", well=True, detail=str(path))
        else:
            detail = "not here: Keras downloads them when the first job asks for them"
            fix = f"Put {row.name}.weights.h5 into the folder that GRADCAM_WEIGHTS_DIR names."
            yield Finding(f"weights of {row.name}", well=not needed, detail=detail, fix=fix if needed else "")


def _look(what: str, look: Callable[[Settings], str], settings: Settings, fix: str) -> Finding:
    try:
        return Finding(what, well=True, detail=look(settings))
    except GradcamError as error:
        return Finding(what, well=False, detail=str(error), fix=fix)


def _broker(settings: Settings) -> str:
    app = broker.make_app(settings)
    place = without_secrets(settings.broker_url)
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=5)
    except (kombu.exceptions.OperationalError, OSError) as error:
        message = f"{place} does not answer: {error}"
        raise BrokerUnavailable(message) from error
    return place


def _ledger(settings: Settings) -> str:
    ledger = RedisLedger(settings.ledger, prefix=settings.key_prefix, retention_s=settings.retention_s)
    queued, running = ledger.counts()
    return f"{without_secrets(settings.ledger)}: {queued} queued, {running} running"


def _storage(settings: Settings) -> str:
    from worker.storage import S3, Stores

    store = Stores(settings, S3(settings)).open()
    probe = uuid.uuid4().hex.encode()
    uri = store.put("doctor/probe.txt", probe, "text/plain")
    if store.get("doctor/probe.txt") != probe:
        message = f"{uri} was written but reads back differently."
        raise StorageUnavailable(message)
    return f"wrote and read {uri}"


def _device(settings: Settings) -> str:  # noqa: ARG001  # one signature for all looks
    from worker.wiring import worker_ref

    return worker_ref().device
