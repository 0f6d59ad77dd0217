"""Builds the services of a worker process from its settings."""

from collections.abc import Callable
from functools import partial
from typing import Any

from gradcam_worker.delivery.webhooks import Webhooks
from gradcam_worker.errors import MissingExtra, NetworkIncompatible
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.gradcam.files import weights
from gradcam_worker.gradcam.files.file_cache import FileCache
from gradcam_worker.gradcam.models import openvino_forward
from gradcam_worker.gradcam.network import Network
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.images.fetch import UriFetcher
from gradcam_worker.inference.client import InferenceClient
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.budget import Budgets, ResourceBudget
from gradcam_worker.schemas.shard import READERS
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores

Load = Callable[[NetworkRow], Network]


def build_services(
    settings: Settings, inference: InferenceClient[Any] | None = None, observer: Observer = NULL_OBSERVER
) -> Services:
    """Build the services that jobs use. Nothing is connected yet.

    Args:
        settings: The settings of this process.
        inference: Loads networks and computes, here or in an engine process; None: a new ModelCache.
        observer: Counts what the services do.

    Raises:
        InvalidSettings: A setting cannot be used.
    """
    if settings.forward == "openvino":
        openvino_forward.require()
    s3 = S3(settings)
    return Services(
        images=UriFetcher(settings, s3, observer=observer),
        networks=Registry(settings.networks),
        inference=inference or build_model_cache(settings, observer=observer),
        stores=Stores(settings, s3, observer),
        webhooks=Webhooks(settings),
        limits=image_limits(settings),
        max_classes=settings.max_classes,
        budgets=Budgets(
            ResourceBudget(settings.max_bytes_in_flight, "bytes"),
            ResourceBudget(settings.max_pixels_in_flight, "pixels"),
            max_image_bytes=settings.max_image_bytes,
            threads=settings.threads + READERS * settings.shards,
        ),
    )


def image_limits(settings: Settings) -> Limits:
    """The limits of images, and whether their colours are converted."""
    return Limits(
        settings.max_image_pixels,
        settings.max_image_side,
        settings.max_image_damage,
        settings.convert_colors,
    )


def build_model_cache(
    settings: Settings, load_row: Load | None = None, observer: Observer = NULL_OBSERVER
) -> ModelCache:
    """Build what loads networks and computes in this process. Nothing is loaded yet.

    Args:
        settings: The settings of this process.
        load_row: Replaces `load`, so that a custom program can run other networks than Keras's.
        observer: Counts what it does.
    """
    return ModelCache(
        load_row or partial(load, settings, S3(settings)),
        max_batch=settings.max_batch,
        max_bytes=settings.resident_bytes,
        wait_s=settings.batch_wait_s,
        peak_bytes=_peak_bytes,
        on_gpu=on_gpu,
        observer=observer,
    )


def build_ledger(settings: Settings) -> RedisLedger:
    """Build the ledger. Nothing is connected yet."""
    return RedisLedger(settings)


def load(settings: Settings, s3: S3, row: NetworkRow) -> Network:
    """Load a network. The backend is imported here, when the first network is needed.

    The file of an operator's own network is downloaded, and its checksum verified, before anything reads it.

    Args:
        settings: The settings of this process.
        s3: Downloads the file.
        row: The network's row in the registry.

    Returns:
        The network, ready to compute.

    Raises:
        NetworkIncompatible: It cannot be loaded or explained, or an extra that it needs is not installed.
        WeightsChecksumMismatch: Its file has another checksum.
        WeightsUnavailable: Its weights cannot be read.
    """
    file = None
    if row.file:
        file = weights.fetch_cached(row.file, settings.cache, s3.download, settings.cache_bytes)
    if row.scores_only and file:
        from gradcam_worker.gradcam.score_networks.score_files import load_file

        try:
            return load_file(row, file, threads=settings.intra_op_threads)
        except MissingExtra as error:  # which is for callers of Python: no job ends with it
            message = f"{row.name} cannot be loaded here: {error}"
            raise NetworkIncompatible(message) from error
    from gradcam_worker.gradcam.models.loading import load_network

    return load_network(
        row,
        weights_dir=settings.weights_dir,
        file=file,
        precision=settings.precision,
        exact_backward=settings.exact_backward,
        forward=settings.forward,
        forward_cache=FileCache(settings.cache, settings.cache_bytes),
    )


def _peak_bytes() -> int | None:
    """The peak of the device's memory since the last call."""
    from gradcam_worker.gradcam import backend

    peak = backend.peak_memory()
    backend.reset_peak_memory()
    return peak


def on_gpu() -> bool:
    """Whether the device of this process is a GPU."""
    from gradcam_worker.gradcam import backend

    return backend.device_name() != "cpu"


def prepare(settings: Settings) -> None:
    """Limit the threads of the backend, before it computes anything."""
    from gradcam_worker.gradcam import backend

    backend.set_intra_op_threads(settings.intra_op_threads)


def device_name() -> str:
    """The name of the device of this process. Imports the backend."""
    from gradcam_worker.gradcam import backend

    return backend.device_name()
