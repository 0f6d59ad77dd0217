"""Whether a worker can work at all with its settings: looked at before it starts, not at its first job.

What stays wrong until somebody corrects it (a password, a bucket that is not there, a GPU that nobody sees)
is InvalidSettings here: one sentence that begins with the setting's name. What may be over in a moment
raises what it raises elsewhere, and is waited for.
"""

import errno
import importlib.util
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import redis

from worker import broker, devices
from worker.errors import (
    BrokerUnavailable,
    GradcamError,
    InvalidSettings,
    LedgerUnavailable,
    StorageUnavailable,
    UnknownNetwork,
)
from worker.folder import REFUSED
from worker.gradcam import weights
from worker.gradcam.registry import Registry
from worker.redis_ledger import NO_CLUSTER, RedisLedger
from worker.settings import ONE_SERVER, Settings
from worker.url import without_secrets

log = logging.getLogger("gradcam")

ANSWER_S = 3.0  # that broker and ledger have; asked once, since who does not answer is waited for
# What a Redis server says that it will say again. (That a password is wrong is a ConnectionError, too.)
HOPELESS = (
    redis.exceptions.AuthenticationError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.InvalidResponse,  # something else listens there
    redis.exceptions.NoPermissionError,
)
HOPELESS_WORDS = ("CERTIFICATE", "WRONG_VERSION_NUMBER", "Invalid Database", "DB index")
CREDENTIALS = "Correct address, user, password and database, and grant what deploy/redis/users.acl names."
NO_FOLDER = REFUSED | {errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENOTDIR}


def check(settings: Settings, *, stores: bool = True) -> None:
    """Look at all that needs no device; a log line says what is waited for. Raises InvalidSettings.

    `stores`: the process writes to storage, and explains. It takes no longer than the slowest answer, 15 s
    where storage does not say a word.
    """
    looks = [broker_answers, ledger_answers]
    if stores:
        cache_holds(settings, networks(settings))
        looks.append(storage_takes)
    with ThreadPoolExecutor(len(looks)) as pool:
        for found in [pool.submit(look, settings) for look in looks]:
            try:
                found.result()
            except InvalidSettings:
                raise
            except GradcamError as error:
                log.warning("%s It is waited for.", _sentence(error))


def broker_answers(settings: Settings) -> str:
    """Where the broker is. Raises BrokerUnavailable, InvalidSettings."""
    bell = broker.Bell(settings, timeout_s=ANSWER_S)
    try:
        bell.waiting("normal")
        _check_mode(bell.mode(), "GRADCAM_BROKER_URL")
    except BrokerUnavailable as error:
        _judge(error, "GRADCAM_BROKER_URL")
        raise
    return without_secrets(settings.broker_url)


def ledger_answers(settings: Settings) -> str:
    """Where the ledger is, and how much it has to do. Raises LedgerUnavailable, InvalidSettings."""
    name = "GRADCAM_LEDGER_URL" if settings.ledger_url else "GRADCAM_BROKER_URL"
    ledger = RedisLedger(settings, timeout_s=ANSWER_S, retries=0)
    try:
        queued, running = ledger.counts()
        _check_mode(ledger.server.mode(), name)
    except LedgerUnavailable as error:
        _judge(error, name)
        raise
    return f"{without_secrets(settings.ledger)}: {queued} queued, {running} running"


def _check_mode(mode: str, setting: str) -> None:
    """Raise InvalidSettings for what is no single server, though it answers as one."""
    if mode in {"cluster", "sentinel"}:
        message = f"{setting}: the server is a Redis {mode.title()}, which is not supported: {ONE_SERVER}."
        raise InvalidSettings(message)


def storage_takes(settings: Settings) -> str:
    """Write and read as a job does; where. Raises StorageUnavailable, InvalidSettings."""
    from worker import s3, storage  # which a client may lack

    try:
        door = s3.S3(settings)
    except (*s3.FAILED, ValueError) as error:  # a profile or a region of the environment that there is not
        message = f"GRADCAM_S3_ENDPOINT_URL, or what the environment says of S3, cannot be used: {error}."
        raise InvalidSettings(message) from error
    try:
        return storage.probe(storage.Stores(settings, door).open())
    except StorageUnavailable as error:
        cause = error.__cause__
        if isinstance(cause, s3.FAILED) and s3.refused(cause):
            fix = "Create the bucket, or correct GRADCAM_OUTPUT and GRADCAM_S3_ENDPOINT_URL, or grant what "
            fix += "deploy/s3/policy.json names."
            message = f"GRADCAM_OUTPUT: {_sentence(error)} {fix}"
        elif isinstance(cause, s3.FAILED) and s3.hopeless(cause):
            message = f"GRADCAM_S3_ACCESS_KEY_ID and GRADCAM_S3_SECRET_ACCESS_KEY: {_sentence(error)}"
        elif isinstance(cause, OSError) and cause.errno in NO_FOLDER:
            message = f"GRADCAM_OUTPUT: {_sentence(error)} Name a folder that the worker may write to."
        else:
            raise
        raise InvalidSettings(message) from error


def networks(settings: Settings) -> Registry:
    """The networks there are, those to be preloaded among them. Raises InvalidSettings."""
    registry = Registry(settings.networks)
    for name in settings.preload:
        try:
            registry.find(name)
        except UnknownNetwork as error:
            message = f"GRADCAM_PRELOAD: {error}"
            raise InvalidSettings(message) from error
    return registry


def cache_holds(settings: Settings, registry: Registry) -> None:
    """See to it that the operator's own networks have a place. Raises InvalidSettings.

    A folder that may only be read will do where all of their files are in it.
    """
    missing = [
        one
        for one in registry.own()
        if one.file and not weights.cached_at(one.file, settings.cache).is_file()
    ]
    if missing and not _writable(settings.cache):
        message = (
            f"GRADCAM_CACHE_DIR: {settings.cache} cannot be written to, and {missing[0].name} is not in it. "
            "Name a folder that the worker may write to, or fill it with `gradcam networks fetch --all-mine`."
        )
        raise InvalidSettings(message)


def device(settings: Settings) -> str:
    """What this process computes on; its backend is imported.

    Raises InvalidSettings where that is no GPU and one was asked for.
    """
    from worker import wiring

    found = wiring.worker_ref().device
    asked = settings.devices not in {"auto", "cpu"}
    if found == "cpu" and (asked or (settings.devices == "auto" and _has_gpu_extra())):
        why = f"is {settings.devices!r}" if asked else "is 'auto', and the extra gpu is installed"
        gpus = len(devices.visible_gpus(os.environ))
        message = (
            f"GRADCAM_DEVICES {why}, but no GPU can be computed on (the driver shows {gpus}). Check driver, "
            "container runtime and the extra gpu; GRADCAM_DEVICES=cpu computes without one."
        )
        raise InvalidSettings(message)
    return found


def _has_gpu_extra() -> bool:
    return importlib.util.find_spec("pynvml") is not None  # which no other extra brings


def _writable(folder: Path) -> bool:
    """Whether a file can be made there, or the folder itself."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _judge(error: GradcamError, setting: str) -> None:
    """Raise InvalidSettings where asking again is of no use."""
    cause = error.__cause__
    if NO_CLUSTER in str(error):
        message = f"{setting}: {_sentence(error)}"
        raise InvalidSettings(message) from error
    if isinstance(cause, HOPELESS) or any(words in str(cause) for words in HOPELESS_WORDS):
        name = setting + (" or GRADCAM_REDIS_CA" if "CERTIFICATE" in str(cause) else "")
        message = f"{name}: {_sentence(error)} {CREDENTIALS}"
        raise InvalidSettings(message) from error


def _sentence(error: Exception) -> str:
    text = str(error)
    return text if text.endswith((".", "!", "?")) else f"{text}."
