"""`gradcam doctor`: checks everything that a worker needs, and says how to fix what fails."""

import importlib.util
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from gradcam_worker import extras
from gradcam_worker.errors import (
    GradcamError,
    InternalError,
    InvalidSettings,
    LedgerUnavailable,
    StorageUnavailable,
)
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.gradcam.files import weights
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.redis_server.server_checks import ServerMonitor
from gradcam_worker.runtime import devices
from gradcam_worker.runtime.processes import preflight
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted

MILLION = 1_000_000
MAX_CORRELATION = 0.5  # of heatmaps before and after weights are shuffled, where they still depend on them
GPU_MEMORY_FIX = (
    "Unless a worker of yours elsewhere has loaded its networks there, end the processes that `nvidia-smi` "
    "names on the host of this GPU. A worker waits for memory to load what GRADCAM_PRELOAD names."
)
SETTING_FIX = "Correct the setting that the message names."


@dataclass(frozen=True)
class Finding:
    """The result of one check. The names of the fields are keys of the JSON of `gradcam doctor --json`."""

    what: str
    well: bool
    detail: str
    fix: str = ""  # what to do if it is not well


def run_checks(settings: Settings, *, expected_workers: int = 0) -> Iterator[Finding]:
    """Check broker, ledger, workers, storage, device, weights and the operator's own networks.

    Args:
        settings: Name the servers, the weights and the networks.
        expected_workers: With fewer workers alive, the finding is not well.

    Yields:
        Each finding as soon as its check is done, in this order.
    """
    broker_fix = "Start Redis or Valkey at that address, or set GRADCAM_BROKER_URL."
    yield _run_check("broker", preflight.check_broker, settings, broker_fix)
    yield _run_check("ledger", preflight.check_ledger, settings, broker_fix.replace("BROKER", "LEDGER"))
    yield from _check_redis(settings)
    workers = _find_workers(settings)
    yield from _check_workers(workers, expected_workers)
    if importlib.util.find_spec("keras") is None:
        detail = "not installed: this machine can submit jobs but not run them"
        fix = f"For a worker on CPUs: {extras.how_to_install('cpu')}; on GPUs with the extra gpu."
        yield Finding("worker", well=False, detail=detail, fix=fix)
        return
    yield _check_storage(settings)
    yield _run_check(
        "device",
        _describe_device,
        settings,
        "Check the driver and the TensorFlow installation, or set GRADCAM_DEVICES.",
    )
    yield from _check_gpu_memory(settings, workers)
    yield from _check_weights(settings)
    try:
        registry = preflight.load_registry(settings)
        preflight.check_cache(settings, registry)
    except InvalidSettings as error:
        yield Finding("networks", well=False, detail=str(error), fix=SETTING_FIX)
        return
    for row in registry.operator_networks():
        yield from _check_own_network(row, settings)


def _check_redis(settings: Settings) -> Iterator[Finding]:
    """Check how the servers of broker and ledger are set up."""
    for check in ServerMonitor(settings).read_checks():
        what = check.name if check.name == "eviction" else f"redis {check.name}"
        yield Finding(what, check.well, check.detail, check.fix)


def _check_weights(settings: Settings) -> Iterator[Finding]:
    """Check the weights of networks that are preloaded or on this machine; count all others together."""
    others = 0
    for row in CATALOG.values():
        needed = row.name in settings.preload
        path = weights.local_weights_path(row, settings.weights_dir, settings.keras_home)
        if path:
            yield Finding(f"weights of {row.name}", well=True, detail=str(path))
        elif needed:
            detail = "not on this machine: Keras downloads them when the worker starts"
            fix = f"`gradcam networks fetch {row.name}` downloads them now, or {weights.how_to_provide(row)}."
            yield Finding(f"weights of {row.name}", well=False, detail=detail, fix=fix)
        else:
            others += 1
    detail = f"Keras downloads the weights of {others} other networks when a job first needs them"
    yield Finding("weights", well=True, detail=detail)


def _check_own_network(row: NetworkRow, settings: Settings) -> Iterator[Finding]:
    """Download, verify, load and explain an operator's own network, as a worker does for its first job."""
    import numpy as np

    from gradcam_worker.gradcam.explain import check_channels
    from gradcam_worker.gradcam.methods import masking
    from gradcam_worker.inference.model_cache import ModelCache
    from gradcam_worker.runtime import service_factory
    from gradcam_worker.storage.s3 import S3

    what = f"network {row.name}"
    model_cache = ModelCache(partial(service_factory.load, settings, S3(settings)))
    try:
        network, warm_up = model_cache.load(row), model_cache.warm_up(row)
        check_channels(network.facts, np.zeros((1, 1, 3), np.uint8))  # images of jobs have 3 channels
    except Exception as error:  # noqa: BLE001  # an untrusted model may fail in any way
        problem = error if isinstance(error, GradcamError) else InternalError.of(error)
        fix = f"Correct networks.{row.name} in {settings.networks}, or fix what the message reports."
        yield Finding(what, well=False, detail=f"{problem.code}: {problem}", fix=fix)
        return
    facts, explanation = network.facts, warm_up.explanation
    rows, columns = explanation.heatmaps.shape[1:]
    size = f"{facts.parameters / 1e6:.1f} M" if facts.parameters > MILLION else f"{facts.parameters:,}"
    size = f"{size} parameters" if facts.parameters else f"{facts.weight_bytes / 1e6:.1f} MB"
    layer = f"layer {explanation.layer} {rows}x{columns}"
    if facts.scores_only:
        layer = f"explained by its scores alone ({' or '.join(masking.METHODS)})"
    detail = f"{layer}, {len(network.labels)} classes ({facts.head}), {size}"
    detail += f", sizing {facts.sizing.describe()}"
    if row.inputs:
        detail += f"; beside the image: {', '.join(one.describe() for one in row.inputs)}"
    if row.imports:
        detail += f"; with layers of {', '.join(row.imports)}"
    preprocessing = row.preprocessing
    scaled = any(preprocessing.mean) or any(deviation != 1 for deviation in preprocessing.std)
    if facts.rescales and scaled:
        detail += (
            "; its first layers rescale its input, in addition to the preprocessing "
            f'{preprocessing.name}: if it was trained on pixels from 0 to 255, set preprocessing = "none"'
        )
    yield Finding(what, well=True, detail=detail)
    yield from _measure_randomization(row.name, network)


def _measure_randomization(name: str, network: object) -> Iterator[Finding]:
    """Report what is left of the heatmaps when the weights are shuffled, where they can be."""
    from gradcam_worker.gradcam.models.keras_network import KerasNetwork
    from gradcam_worker.gradcam.randomization import randomize_parameters

    if not isinstance(network, KerasNetwork):
        return
    what = f"parameter randomisation of {name}"
    try:
        score = randomize_parameters(network)
    except Exception as error:  # noqa: BLE001  # an untrusted model may fail in any way
        yield Finding(what, well=True, detail=f"not measured: {InternalError.of(error)}")
        return
    stages = {"all weights": score.everything, "those of the head": score.head}
    left = [f"{value:.2f} with {stage} shuffled" for stage, value in stages.items() if not math.isnan(value)]
    if not left:
        yield Finding(
            what, well=True, detail="not measured: the heatmaps are too small, or the same everywhere"
        )
        return
    hardly = max(filter(math.isfinite, stages.values())) > MAX_CORRELATION
    meaning = "they hardly depend on what it has learned" if hardly else "0 or less is good"
    yield Finding(what, well=True, detail=f"heatmaps stay as they are by {', '.join(left)}: {meaning}")


def _run_check(what: str, check: Callable[[Settings], str], settings: Settings, fix: str) -> Finding:
    try:
        return Finding(what, well=True, detail=check(settings))
    except GradcamError as error:
        return Finding(what, well=False, detail=str(error), fix=fix)
    except Exception as error:  # noqa: BLE001  # a failed check does not stop the others
        return Finding(what, well=False, detail=str(InternalError.of(error)), fix=fix)


def _find_workers(settings: Settings) -> dict[str, dict[str, Any]] | None:
    """The health of the workers that are alive, on any machine, by name; None: nobody can tell."""
    try:
        found = RedisLedger(settings).find_workers()
    except LedgerUnavailable:
        return None  # the check of the ledger reports it
    return {name: json.loads(text) for name, text in sorted(found.items())}


def _check_workers(workers: Mapping[str, Mapping[str, Any]] | None, expected: int) -> Iterator[Finding]:
    """Report the workers that are alive."""
    if workers is None:
        return
    if len(workers) < expected:
        fix = "Start `gradcam worker` with the GRADCAM_BROKER_URL and GRADCAM_KEY_PREFIX that are set here."
        yield Finding("workers", well=False, detail=f"{len(workers)} alive, {expected} expected", fix=fix)
    elif not workers:
        yield Finding("workers", well=True, detail="none is alive")
    for name, health in workers.items():
        started = datetime.fromisoformat(health["since"]).astimezone(UTC)
        running = counted(health["running"], "job")
        detail = f"{health['device']}, {running} running, started {started:%Y-%m-%d %H:%M:%SZ}"
        trouble = health["trouble"]
        fix = "It takes jobs again by itself when the cause is gone."
        yield Finding(
            f"worker {name}", well=not trouble, detail=trouble or detail, fix=fix if trouble else ""
        )


def _check_storage(settings: Settings) -> Finding:
    try:
        detail = f"wrote and read {preflight.probe_storage(settings)}"
    except InvalidSettings as error:
        return Finding("storage", well=False, detail=str(error), fix=SETTING_FIX)
    except StorageUnavailable as error:
        detail, fix = preflight.describe_storage_fault(settings, error)
        return Finding("storage", well=False, detail=detail, fix=fix)
    return Finding("storage", well=True, detail=detail)


def _describe_device(settings: Settings) -> str:
    processes = devices.choose(settings)
    return preflight.check_device(settings) + (f", {len(processes)} processes" if len(processes) > 1 else "")


def _check_gpu_memory(
    settings: Settings, workers: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[Finding]:
    """Report the memory of each GPU that a worker would use, where its driver tells.

    Full ones are well where as many workers of this machine, each on a GPU of its own, take jobs.
    """
    from gradcam_worker.gradcam import device_memory

    try:
        gpus = [device for device in devices.choose(settings) if device.is_gpu]
    except InvalidSettings:
        return  # the check of the device reports it
    here = {  # job processes with the same engine process are one worker on one GPU
        (health.get("engine") or {}).get("id", name): name
        for name, health in (workers or {}).items()
        if name.startswith(f"{platform.node()}:") and health["device"] != "cpu" and not health["trouble"]
    }
    names = [gpu.environment[devices.VISIBLE_GPUS] for gpu in gpus]
    memories = [device_memory.read_gpu_memory(name) for name in names]
    full = [memory is not None and memory.free < device_memory.LITTLE_BYTES for memory in memories]
    excused = sum(full) <= len(here)
    for gpu, name, memory, is_full in zip(gpus, names, memories, full, strict=True):
        detail = f"{memory} ({name})" if memory else f"its driver does not tell ({name})"
        if is_full and here:
            running = ", ".join(here.values())
            detail += f"; {sum(full)} full, and on GPUs of this machine run: {running}"
        well = not is_full or excused
        yield Finding(f"memory of {gpu.name}", well=well, detail=detail, fix="" if well else GPU_MEMORY_FIX)
