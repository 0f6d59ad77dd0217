"""`gradcam doctor`: is everything there that a worker needs, and what to do where it is not."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from gradcam_worker.errors import (
    GradcamError,
    InternalError,
    InvalidSettings,
    LedgerUnavailable,
    StorageUnavailable,
)
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.gradcam.models import weights
from gradcam_worker.ledger.redis.eviction import FIX, EvictionMonitor
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.runtime import devices, preflight
from gradcam_worker.settings import Settings

MILLION = 1_000_000
OUTPUT_FIX = "Set GRADCAM_OUTPUT to where results go: s3://bucket/folder or file:///folder."


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `fix` says what to do where it is not well."""

    what: str
    well: bool
    detail: str
    fix: str = ""


def run_checks(settings: Settings, *, expected_workers: int = 0) -> Iterator[Finding]:
    """Look at broker, ledger, workers, storage, device, weights and the operator's own networks.

    In this order, and each is told as it is found. Fewer workers that live than are expected are not well.
    """
    broker_fix = "Start Redis or Valkey there, or set GRADCAM_BROKER_URL."
    yield _look("broker", preflight.broker_answers, settings, broker_fix)
    yield _look("ledger", preflight.ledger_answers, settings, broker_fix.replace("BROKER", "LEDGER"))
    yield from _eviction(settings)
    yield from _workers(settings, expected_workers)
    if importlib.util.find_spec("keras") is None:
        detail = "not installed: from here jobs can be submitted, not run"
        fix = "For a worker: pip install 'gradcam-worker[cpu]' (or [gpu])."
        yield Finding("worker", well=False, detail=detail, fix=fix)
        return
    yield _storage(settings)
    yield _look(
        "device",
        _device,
        settings,
        "Check the driver and the TensorFlow installation, or set GRADCAM_DEVICES.",
    )
    yield from _weights(settings)
    try:
        registry = preflight.networks(settings)
        preflight.cache_holds(settings, registry)
    except InvalidSettings as error:
        fix = "Correct what it names."
        yield Finding("networks", well=False, detail=str(error), fix=fix)
        return
    for row in registry.own():
        yield _own(row, settings)


def _eviction(settings: Settings) -> Iterator[Finding]:
    """What broker and ledger forget when their memory is full."""
    for one in EvictionMonitor(settings).read_policies():
        yield Finding("eviction", one.is_safe, str(one), FIX if one.evicts else "")


def _weights(settings: Settings) -> Iterator[Finding]:
    """The weights of what is preloaded or here, one by one; how many others there are, in one line."""
    others = 0
    for row in CATALOG.values():
        needed = row.name in settings.preload
        path = weights.here(row, settings.weights_dir, settings.keras_home)
        if path:
            yield Finding(f"weights of {row.name}", well=True, detail=str(path))
        elif needed:
            detail = "not here: Keras downloads them when the worker starts"
            fix = f"`gradcam networks fetch {row.name}` downloads them now, or {weights.put(row)}."
            yield Finding(f"weights of {row.name}", well=False, detail=detail, fix=fix)
        else:
            others += 1
    detail = f"Keras downloads those of {others} others when a job first asks for them"
    yield Finding("weights", well=True, detail=detail)


def _own(row: NetworkRow, settings: Settings) -> Finding:
    """Fetch, check, load and explain an operator's own network, as a worker would for its first job."""
    import numpy as np

    from gradcam_worker.gradcam.explain import check_channels
    from gradcam_worker.inference.model_cache import ModelCache
    from gradcam_worker.runtime import service_factory
    from gradcam_worker.storage.s3 import S3

    what = f"network {row.name}"
    model_cache = ModelCache(partial(service_factory.load, settings, S3(settings)))
    try:
        network, turn = model_cache.load(row), model_cache.warm_up(row)
        check_channels(network.facts, np.zeros((1, 1, 3), np.uint8))  # a job's picture is a photo
    except Exception as error:  # noqa: BLE001  # a stranger's model may fail in any way; the doctor tells it
        known = error if isinstance(error, GradcamError) else InternalError.of(error)
        fix = f"Correct networks.{row.name} in {settings.networks}, or put right what it names."
        return Finding(what, well=False, detail=f"{known.code}: {known}", fix=fix)
    facts, seen = network.facts, turn.explanation
    rows, columns = seen.heatmaps.shape[1:]
    size = f"{facts.parameters / 1e6:.1f} M" if facts.parameters > MILLION else f"{facts.parameters:,}"
    layer = f"layer {seen.layer} {rows}x{columns}"
    detail = f"{layer}, {len(network.labels)} classes ({facts.head}), {size} parameters"
    how = row.preprocessing
    scaled = any(how.mean) or any(one != 1 for one in how.std)
    if facts.rescales and scaled:
        detail += (
            f"; it begins with layers that rescale its input, on top of the preprocessing {how.name}: where "
            'it was trained on pixels from 0 to 255, preprocessing = "none" is right'
        )
    return Finding(what, well=True, detail=detail)


def _look(what: str, look: Callable[[Settings], str], settings: Settings, fix: str) -> Finding:
    try:
        return Finding(what, well=True, detail=look(settings))
    except GradcamError as error:
        return Finding(what, well=False, detail=str(error), fix=fix)
    except Exception as error:  # noqa: BLE001  # what stops one look does not stop the others
        return Finding(what, well=False, detail=str(InternalError.of(error)), fix=fix)


def _workers(settings: Settings, expected: int) -> Iterator[Finding]:
    """What the workers say of themselves that run now, wherever they are."""
    try:
        found = RedisLedger(settings).find_workers()
    except LedgerUnavailable:
        return  # which has been told already
    if len(found) < expected:
        fix = "Start `gradcam worker` there, with the same GRADCAM_BROKER_URL and GRADCAM_KEY_PREFIX."
        detail = f"{len(found) or 'none'} of the {expected} expected"
        yield Finding("workers", well=False, detail=detail, fix=fix)
    elif not found:
        yield Finding("workers", well=True, detail="none takes jobs just now")
    for name, text in sorted(found.items()):
        said = json.loads(text)
        detail = f"{said['device']}, {said['running']} at work, since {said['since']}"
        trouble = said["trouble"]
        fix = "It takes jobs again by itself as soon as that is over."
        yield Finding(
            f"worker {name}", well=not trouble, detail=trouble or detail, fix=fix if trouble else ""
        )


def _storage(settings: Settings) -> Finding:
    try:
        detail = f"wrote and read {preflight.probe_storage(settings)}"
    except InvalidSettings as error:
        return Finding("storage", well=False, detail=str(error), fix="Correct what it names.")
    except StorageUnavailable as error:
        if "output" not in settings.model_fields_set:
            detail = f"GRADCAM_OUTPUT is not set, and its default, {settings.output}, cannot be used: {error}"
            return Finding("storage", well=False, detail=detail, fix=OUTPUT_FIX)
        hint = preflight.storage_hint(error)
        return Finding("storage", well=False, detail=f"{hint.setting}: {error}", fix=hint.fix)
    return Finding("storage", well=True, detail=detail)


def _device(settings: Settings) -> str:
    processes = devices.choose(settings)
    return preflight.device(settings) + (f", {len(processes)} processes" if len(processes) > 1 else "")
