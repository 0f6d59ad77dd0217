"""Checks, before a worker starts, that it can work with its settings.

A permanent fault (a wrong password, a missing bucket, a GPU that the driver does not show) is
InvalidSettings: one sentence that begins with the setting's name. A temporary fault raises the same error as
elsewhere, and the worker waits for the server.
"""

import errno
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import redis

from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.errors import (
    BrokerUnavailable,
    GradcamError,
    InvalidSettings,
    LedgerUnavailable,
    StorageUnavailable,
    UnknownNetwork,
)
from gradcam_worker.gradcam.files import weights
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.redis_server.client import NO_CLUSTER
from gradcam_worker.redis_server.sentinel import MasterUnknown
from gradcam_worker.redis_server.server_checks import ServerMonitor
from gradcam_worker.runtime import devices
from gradcam_worker.settings import ONE_SERVER, Settings
from gradcam_worker.storage.filesystem import LOCATION_ERRORS
from gradcam_worker.text import sentinel_urls
from gradcam_worker.text.log_events import EventLogger
from gradcam_worker.text.urls import without_secrets

log = EventLogger("gradcam")

ANSWER_TIMEOUT_S = 3.0  # of broker and ledger, asked once: a server that does not answer is waited for
# Errors of Redis that would occur again. (A wrong password is a ConnectionError, too.)
OUTPUT_FIX = "Set GRADCAM_OUTPUT to where results go: s3://bucket/folder or file:///folder."
PERMANENT_ERRORS = (
    redis.exceptions.AuthenticationError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.InvalidResponse,  # the server is no Redis
    redis.exceptions.NoPermissionError,
    MasterUnknown,
)
PERMANENT_ERROR_TEXTS = ("CERTIFICATE", "WRONG_VERSION_NUMBER", "Invalid Database", "DB index")
CREDENTIALS = "Correct address, user, password and database, and grant what deploy/redis/users.acl names."
NOT_FOUND = 404
FOLDER_ERRNOS = LOCATION_ERRORS | {errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENOTDIR}


def check(settings: Settings, *, stores: bool = True) -> None:
    """Check everything that needs no device. A server that is only unreachable is logged.

    The checks run in parallel: together they take at most 15 s, where storage does not answer.

    Args:
        settings: The settings of the process.
        stores: Whether the process explains images and writes to storage.

    Raises:
        InvalidSettings: A fault is permanent.
    """
    checks = [check_broker, check_ledger, check_redis]
    if stores:
        check_cache(settings, load_registry(settings))
        checks.append(check_storage)
    with ThreadPoolExecutor(len(checks)) as pool:
        for call in [pool.submit(one_check, settings) for one_check in checks]:
            try:
                call.result()
            except InvalidSettings:
                raise
            except GradcamError as error:
                log.warning("server_awaited", error=error)


def check_broker(settings: Settings) -> str:
    """Check that the broker answers. Returns its URL. Raises BrokerUnavailable, InvalidSettings."""
    publisher = Publisher(settings, timeout_s=ANSWER_TIMEOUT_S)
    try:
        _check_mode(publisher.read_mode(), "GRADCAM_BROKER_URL")
        publisher.queue_length("normal")
    except BrokerUnavailable as error:
        _raise_if_permanent(error, "GRADCAM_BROKER_URL")
        raise
    return without_secrets(settings.broker_url)


def check_ledger(settings: Settings) -> str:
    """Check that the ledger answers.

    Returns:
        Its URL, and the number of queued and running jobs, for the operator.

    Raises:
        LedgerUnavailable: The ledger does not answer.
        InvalidSettings: The ledger refuses this process.
    """
    name = "GRADCAM_LEDGER_URL" if settings.ledger_url else "GRADCAM_BROKER_URL"
    ledger = RedisLedger(settings, timeout_s=ANSWER_TIMEOUT_S, retries=0)
    try:
        _check_mode(ledger.server.read_mode(), name)
        queued, running = ledger.count_jobs()
    except LedgerUnavailable as error:
        _raise_if_permanent(error, name)
        raise
    return f"{without_secrets(settings.ledger)}: {queued} queued, {running} running"


def check_redis(settings: Settings) -> str:
    """Check that Redis is set up to lose no accepted job. What is less grave is logged by the process.

    Returns:
        What was found, for the operator.

    Raises:
        InvalidSettings: Accepted jobs would be evicted.
    """
    found = []
    for check in ServerMonitor(settings, timeout_s=ANSWER_TIMEOUT_S).read_checks():
        if check.is_permanent:
            message = f"{check.setting}: {check}"
            raise InvalidSettings(message)
        found.append(check.detail)
    return "; ".join(found)


def _check_mode(mode: str, setting: str) -> None:
    """Raise InvalidSettings for a cluster or a Sentinel: they answer like a single server."""
    if mode == "cluster":
        message = f"{setting}: the server is a Redis Cluster, which is not supported: {ONE_SERVER}."
        raise InvalidSettings(message)
    if mode == "sentinel":
        message = f"{setting}: the server is a Redis Sentinel: the URL of its master {sentinel_urls.FORM}."
        raise InvalidSettings(message)


def check_storage(settings: Settings) -> str:
    """Write to and read from storage as a job does.

    Returns:
        The URI that was written.

    Raises:
        StorageUnavailable: The fault is temporary.
        InvalidSettings: The fault is permanent.
    """
    try:
        return probe_storage(settings)
    except StorageUnavailable as error:
        if not storage_hint(error).permanent:
            raise
        detail, fix = describe_storage_fault(settings, error)
        message = f"{_sentence(detail)} {fix}"
        raise InvalidSettings(message) from error


def probe_storage(settings: Settings) -> str:
    """As `check_storage`, but every fault of the server is StorageUnavailable. See `storage_hint`."""
    from gradcam_worker.storage import s3  # a client may lack its libraries
    from gradcam_worker.storage import stores as storage

    return storage.probe(storage.Stores(settings, s3.S3(settings)).open(single_try=storage.PROBE))


@dataclass(frozen=True)
class Hint:
    """What an operator can do about storage that cannot be used."""

    setting: str  # to check first
    fix: str
    permanent: bool = True  # until an operator corrects it


def storage_hint(error: StorageUnavailable) -> Hint:
    """Return what an operator can do about an error of `probe_storage`."""
    from gradcam_worker.storage import s3_errors

    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:  # else it is the TimeoutError of an S3 server
        fix = "Name a folder that the worker may write to."
        return Hint("GRADCAM_OUTPUT", fix, permanent=cause.errno in FOLDER_ERRNOS)
    if isinstance(cause, s3_errors.IdentityFailed):
        fix = (
            "Correct what the environment says of the worker's identity (AWS_ROLE_ARN and its trust policy, "
            "the token in AWS_WEB_IDENTITY_TOKEN_FILE, AWS_PROFILE, or the role of the machine), or set "
            "GRADCAM_S3_ACCESS_KEY_ID and GRADCAM_S3_SECRET_ACCESS_KEY."
        )
        return Hint(
            "GRADCAM_S3_ACCESS_KEY_ID is empty", fix, permanent=not s3_errors.may_get_keys_later(cause)
        )
    if s3_errors.is_identity_error(cause):
        fix = "Correct them, GRADCAM_S3_REGION, or this machine's clock, whichever the server names."
        return Hint("GRADCAM_S3_ACCESS_KEY_ID and GRADCAM_S3_SECRET_ACCESS_KEY", fix)
    if s3_errors.is_foreign_answer(cause):
        fix = "Correct it, or what proxies there are on the way (HTTPS_PROXY, NO_PROXY)."
        return Hint("GRADCAM_S3_ENDPOINT_URL", fix, permanent=False)
    if s3_errors.is_location_error(cause):
        return Hint("GRADCAM_OUTPUT", _location_fix(s3_errors.server_answer(cause)))
    fix = "Start the server there, or correct GRADCAM_S3_ENDPOINT_URL and GRADCAM_OUTPUT."
    return Hint("GRADCAM_OUTPUT", fix, permanent=False)


def describe_storage_fault(settings: Settings, error: StorageUnavailable) -> tuple[str, str]:
    """Describe an error of `probe_storage` to an operator.

    Returns:
        What is wrong, which begins with the setting to check, and what to do about it.
    """
    if "output" not in settings.model_fields_set:
        unusable = f"its default, {settings.output}, cannot be used: {error}"
        return f"GRADCAM_OUTPUT is not set, and {unusable}", OUTPUT_FIX
    hint = storage_hint(error)
    return f"{hint.setting}: {error}", hint.fix


def _location_fix(answer: tuple[int, str] | None) -> str:
    """What to do where the server refused to write, or to read what was written."""
    status, code = answer or (0, "")
    if status == NOT_FOUND:
        return "Create the bucket, or correct GRADCAM_OUTPUT and GRADCAM_S3_ENDPOINT_URL."
    if code == "AccessDenied":
        return "Grant what deploy/s3/policy.json names, or correct GRADCAM_OUTPUT."
    if code.startswith("KMS"):
        return "Put right the key that encrypts the bucket, and grant what deploy/s3/README.md names."
    return "Put right what the server names, or name another bucket."


def load_registry(settings: Settings) -> Registry:
    """Read the registry, and check the networks to be preloaded. Raises InvalidSettings."""
    registry = Registry(settings.networks)
    for name in settings.preload:
        try:
            registry.find(name)
        except UnknownNetwork as error:
            message = f"GRADCAM_PRELOAD: {error}"
            raise InvalidSettings(message) from error
    return registry


def check_cache(settings: Settings, registry: Registry) -> None:
    """Check that the files of the operator's own networks can be cached. Raises InvalidSettings.

    A read-only folder is sufficient if it has all of the files.
    """
    missing = [
        row
        for row in registry.operator_networks()
        if row.file and not weights.cache_path(row.file, settings.cache).is_file()
    ]
    if missing and not _writable(settings.cache):
        message = (
            f"GRADCAM_CACHE_DIR: {settings.cache} cannot be written to, and {missing[0].name} is not in it. "
            "Name a folder that the worker may write to, or fill it with `gradcam networks fetch --all-mine`."
        )
        raise InvalidSettings(message)


def check_device(settings: Settings) -> str:
    """Import the backend, and check that it has a GPU if the settings need one.

    Returns:
        The name of the device.

    Raises:
        InvalidSettings: The device is a CPU, and a GPU is needed.
    """
    from gradcam_worker.runtime import service_factory

    name = service_factory.device_name()
    names_gpu = settings.devices not in {"auto", "cpu"}
    if name == "cpu" and (names_gpu or (settings.devices == "auto" and _has_gpu_extra())):
        reason = f"is {settings.devices!r}" if names_gpu else "is 'auto', and the extra gpu is installed"
        gpus = len(devices.visible_gpus(os.environ))
        message = (
            f"GRADCAM_DEVICES {reason}, but no GPU can be computed on (the driver shows {gpus}). Check "
            "driver, container runtime and the extra gpu; GRADCAM_DEVICES=cpu computes without one."
        )
        raise InvalidSettings(message)
    return name


def _has_gpu_extra() -> bool:
    return importlib.util.find_spec("pynvml") is not None  # no other extra installs it


def _writable(folder: Path) -> bool:
    """Whether a file can be created in the folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _raise_if_permanent(error: GradcamError, setting: str) -> None:
    """Raise InvalidSettings where the same error would occur again."""
    cause = error.__cause__
    if NO_CLUSTER in str(error):
        message = f"{setting}: {_sentence(error)}"
        raise InvalidSettings(message) from error
    if isinstance(cause, PERMANENT_ERRORS) or any(text in str(cause) for text in PERMANENT_ERROR_TEXTS):
        name = setting + (" or GRADCAM_REDIS_CA" if "CERTIFICATE" in str(cause) else "")
        message = f"{name}: {_sentence(error)} {CREDENTIALS}"
        raise InvalidSettings(message) from error


def _sentence(error: Exception | str) -> str:
    text = str(error)
    return text if text.endswith((".", "!", "?")) else f"{text}."
