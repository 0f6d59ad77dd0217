"""Loads the networks of GRADCAM_PRELOAD before a process takes work."""

import errno
import gc
import time

from gradcam_worker.errors import NO_DEVICE_MEMORY, InvalidSettings, PermanentError, WeightsUnavailable
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.observability.health import Health
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

RETRY_S = 10.0  # between two attempts to load a network
MISSING_FILE_ERRNOS = {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES}  # an operator has to act


def preload(settings: Settings, model_cache: ModelCache, health: Health) -> None:
    """Load the networks of GRADCAM_PRELOAD, and wait for weights, or for device memory, that others have.

    Args:
        settings: Of this process.
        model_cache: Loads them.
        health: Gets a check that names the networks that are not loaded yet.

    Raises:
        InvalidSettings: A network can never be loaded.
    """
    networks = Registry(settings.networks)
    remaining = [*settings.preload]

    def loading_reason() -> str | None:
        return f"not loaded yet: {', '.join(remaining)}" if remaining else None

    health.ready["networks"] = health.startup["networks"] = loading_reason
    while remaining:
        try:
            model_cache.warm_up(networks.find(remaining[0]))
        except (PermanentError, WeightsUnavailable, *NO_DEVICE_MEMORY) as error:
            cause = error.__cause__
            no_file = isinstance(cause, OSError) and cause.errno in MISSING_FILE_ERRNOS
            if isinstance(error, PermanentError) or no_file:
                message = f"GRADCAM_PRELOAD: {error}"
                raise InvalidSettings(message) from error
            log.warning("preload_postponed", network=remaining[0], retry_s=RETRY_S, error=error)
            time.sleep(RETRY_S)
            continue
        log.info("network_preloaded", network=remaining.pop(0))


def freeze_loaded_objects() -> None:
    """Leave all objects that there are now out of later searches for garbage.

    A worker has some hundred thousand, mostly of modules, and going through them takes tenths of a second.
    """
    gc.collect()
    gc.freeze()
