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
from gradcam_worker.gradcam.models import weights
from gradcam_worker.gradcam.models.registry import Registry
from gradcam_worker.ledger.redis.client import NO_CLUSTER
from gradcam_worker.ledger.redis.eviction import FIX, EvictionMonitor
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.runtime import devices
from gradcam_worker.settings import ONE_SERVER, Settings
from gradcam_worker.storage.filesystem import LOCATION_ERRORS
from gradcam_worker.text.urls import without_secrets

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
NOT_FOUND = 404
NO_FOLDER = LOCATION_ERRORS | {errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.ENOTDIR}


def check(settings: Settings, *, stores: bool = True) -> None:
    """Look at all that needs no device; a log line says what is waited for. Raises InvalidSettings.

    `stores`: the process writes to storage, and explains. It takes no longer than the slowest answer, 15 s
    where storage does not say a word.
    """
    looks = [broker_answers, ledger_answers, redis_keeps]
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
    publisher = Publisher(settings, timeout_s=ANSWER_S)
    try:
        publisher.queue_length("normal")
        _check_mode(publisher.read_mode(), "GRADCAM_BROKER_URL")
    except BrokerUnavailable as error:
        _judge(error, "GRADCAM_BROKER_URL")
        raise
    return without_secrets(settings.broker_url)


def ledger_answers(settings: Settings) -> str:
    """Where the ledger is, and how much it has to do. Raises LedgerUnavailable, InvalidSettings."""
    name = "GRADCAM_LEDGER_URL" if settings.ledger_url else "GRADCAM_BROKER_URL"
    ledger = RedisLedger(settings, timeout_s=ANSWER_S, retries=0)
    try:
        queued, running = ledger.count_jobs()
        _check_mode(ledger.server.read_mode(), name)
    except LedgerUnavailable as error:
        _judge(error, name)
        raise
    return f"{without_secrets(settings.ledger)}: {queued} queued, {running} running"


def redis_keeps(settings: Settings) -> str:
    """What Redis forgets when its memory is full. Raises InvalidSettings where that is accepted jobs."""
    said = []
    for one in EvictionMonitor(settings, timeout_s=ANSWER_S).read_policies():
        if one.loses_jobs:
            message = f"{one.setting}: {one} {FIX}"
            raise InvalidSettings(message)
        if one.evicts or one.name is None:
            log.warning("%s: %s%s", one.setting, one, f" {FIX}" if one.evicts else "")
        said.append(str(one))
    return "; ".join(said)


def _check_mode(mode: str, setting: str) -> None:
    """Raise InvalidSettings for what is no single server, though it answers as one."""
    if mode in {"cluster", "sentinel"}:
        message = f"{setting}: the server is a Redis {mode.title()}, which is not supported: {ONE_SERVER}."
        raise InvalidSettings(message)


def storage_takes(settings: Settings) -> str:
    """Write and read as a job does; where. Raises StorageUnavailable, InvalidSettings."""
    try:
        return probe_storage(settings)
    except StorageUnavailable as error:
        hint = storage_hint(error)
        if not hint.lasting:
            raise
        message = f"{hint.setting}: {_sentence(error)} {hint.fix}"
        raise InvalidSettings(message) from error


def probe_storage(settings: Settings) -> str:
    """As `storage_takes`: all that goes wrong once it is asked is StorageUnavailable, see `storage_hint`."""
    from gradcam_worker.storage import s3, s3_errors  # which a client may lack
    from gradcam_worker.storage import stores as storage

    try:
        door = s3.S3(settings)
    except (
        *s3_errors.S3_ERRORS,
        ValueError,
    ) as error:  # a profile or a region of the environment there is not
        message = f"GRADCAM_S3_ENDPOINT_URL, or what the environment says of S3, cannot be used: {error}."
        raise InvalidSettings(message) from error
    return storage.probe(storage.Stores(settings, door).open())


@dataclass(frozen=True)
class Hint:
    """What to do about storage that cannot be used."""

    setting: str  # that is to be looked at first
    fix: str
    lasting: bool = True  # until somebody puts it right


def storage_hint(error: StorageUnavailable) -> Hint:
    """What to do about what `probe_storage` raised."""
    from gradcam_worker.storage import s3_errors

    cause = error.__cause__
    if isinstance(cause, OSError):
        fix = "Name a folder that the worker may write to."
        return Hint("GRADCAM_OUTPUT", fix, lasting=cause.errno in NO_FOLDER)
    if isinstance(cause, s3_errors.IdentityFailed):
        fix = (
            "Correct what the environment says of the worker's identity (AWS_ROLE_ARN and its trust policy, "
            "the token in AWS_WEB_IDENTITY_TOKEN_FILE, AWS_PROFILE, or the role of the machine), or set "
            "GRADCAM_S3_ACCESS_KEY_ID and GRADCAM_S3_SECRET_ACCESS_KEY."
        )
        return Hint("GRADCAM_S3_ACCESS_KEY_ID is empty", fix, lasting=not s3_errors.may_get_keys_later(cause))
    if s3_errors.is_identity_error(cause):
        fix = "Correct them, GRADCAM_S3_REGION, or this machine's clock, whichever the server names."
        return Hint("GRADCAM_S3_ACCESS_KEY_ID and GRADCAM_S3_SECRET_ACCESS_KEY", fix)
    if s3_errors.is_foreign_answer(cause):
        fix = "Correct it, or what proxies there are on the way (HTTPS_PROXY, NO_PROXY)."
        return Hint("GRADCAM_S3_ENDPOINT_URL", fix, lasting=False)
    if s3_errors.is_location_error(cause):
        return Hint("GRADCAM_OUTPUT", _place_fix(s3_errors.server_answer(cause)))
    fix = "Start the server there, or correct GRADCAM_S3_ENDPOINT_URL and GRADCAM_OUTPUT."
    return Hint("GRADCAM_OUTPUT", fix, lasting=False)


def _place_fix(answer: tuple[int, str] | None) -> str:
    """What to do where a server has refused to write, or to read what was written."""
    status, code = answer or (0, "")
    if status == NOT_FOUND:
        return "Create the bucket, or correct GRADCAM_OUTPUT and GRADCAM_S3_ENDPOINT_URL."
    if code == "AccessDenied":
        return "Grant what deploy/s3/policy.json names, or correct GRADCAM_OUTPUT."
    if code.startswith("KMS"):
        return "Put right the key that encrypts the bucket, and grant what deploy/s3/README.md names."
    return "Put right what the server names, or name another bucket."


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
        for one in registry.operator_networks()
        if one.file and not weights.cache_path(one.file, settings.cache).is_file()
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
    from gradcam_worker.runtime import service_factory

    found = service_factory.worker_ref().device
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
