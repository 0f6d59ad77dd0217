"""Every failure is a GradcamError. What is to be caught is its cause.

    GradcamError
    ├── JobError
    │   ├── InvalidJob                 invalid_job               fails
    │   ├── IdempotencyConflict        idempotency_conflict      fails
    │   ├── JobTimeout                 timeout                   fails
    │   ├── JobExpired                 expired                   fails
    │   ├── JobCanceled                canceled                  fails
    │   ├── MaxAttemptsExceeded        max_attempts_exceeded     fails
    │   ├── UnknownJob                 unknown_job               raised
    │   ├── InvalidQuery               invalid_query             raised
    │   ├── JobNotFailed               job_not_failed            raised
    │   ├── WaitTimeout                wait_timeout              raised
    │   ├── NoResult                   no_result                 raised
    │   ├── InvalidExport              invalid_export            raised
    │   └── AttemptFenced              attempt_fenced            raised
    ├── ImageError
    │   ├── UriNotAllowed              uri_not_allowed           fails
    │   ├── ImageNotFound              image_not_found           fails
    │   ├── ImageForbidden             image_forbidden           fails
    │   ├── ImageTooLarge              image_too_large           fails
    │   ├── ImagePixelsExceeded        image_pixels_exceeded     fails
    │   ├── UnsupportedMediaType       unsupported_media_type    fails
    │   ├── ImageDecodeFailed          image_decode_failed       fails
    │   ├── ChecksumMismatch           checksum_mismatch         fails
    │   └── ImageFetchFailed           image_fetch_failed        retried
    ├── ModelError
    │   ├── UnknownNetwork             unknown_network           fails
    │   ├── UnknownLayer               unknown_layer             fails
    │   ├── UnknownClass               unknown_class             fails
    │   ├── AmbiguousClass             ambiguous_class           fails
    │   ├── MethodNotSupported         method_not_supported      fails
    │   ├── InvalidNetworkInput        invalid_network_input     fails
    │   ├── NetworkIncompatible        network_incompatible      fails
    │   ├── WeightsChecksumMismatch    weights_checksum_mismatch fails
    │   └── WeightsUnavailable         weights_unavailable       retried
    ├── StorageError
    │   ├── OutputNotAllowed           output_not_allowed        fails
    │   └── StorageUnavailable         storage_unavailable       retried
    ├── AccessError
    │   ├── InvalidApiKey              invalid_api_key           raised
    │   ├── ScopeMissing               scope_missing             raised
    │   ├── RateLimited                rate_limited              raised
    │   ├── QuotaExceeded              quota_exceeded            raised
    │   ├── UnknownTenant              unknown_tenant            raised
    │   └── InvalidPolicy              invalid_policy            raised
    ├── RedisUnavailable
    │   ├── BrokerUnavailable          broker_unavailable        raised
    │   └── LedgerUnavailable          ledger_unavailable        raised
    ├── DeliveryError
    │   ├── StatusUnavailable          status_unavailable        retried
    │   ├── DeliveryRefused            delivery_refused          raised
    │   ├── EndpointGone               endpoint_gone             raised
    │   └── InvalidWebhook             invalid_webhook           raised
    ├── BackfillError
    │   ├── InvalidInput               invalid_input             raised
    │   ├── InvalidRow                 invalid_row               fails
    │   ├── DuplicateId                duplicate_id              fails
    │   ├── UnknownBackfill            unknown_backfill          fails
    │   ├── BackfillConflict           backfill_conflict         raised
    │   ├── BackfillRunning            backfill_running          raised
    │   ├── BackfillStopped            backfill_stopped          raised
    │   ├── BackfillImpossible         backfill_impossible       raised
    │   └── BackfillCanceled           backfill_canceled         raised
    ├── RequestError
    │   ├── InvalidRequest             invalid_request           raised
    │   ├── RequestTooLarge            request_too_large         raised
    │   ├── UnsupportedRequestType     unsupported_request_type  raised
    │   └── ServerBusy                 server_busy               raised
    ├── WorkerError
    │   ├── DeviceOutOfMemory          device_out_of_memory      retried
    │   ├── DeviceOccupied             device_occupied           retried
    │   ├── WorkerLost                 worker_lost               retried
    │   ├── NetworkCrashed             network_crashed           fails
    │   ├── EngineUnavailable          engine_unavailable        retried
    │   ├── WorkerUnfit                worker_unfit              raised
    │   └── NoWorker                   no_worker                 raised
    ├── InvalidSettings                invalid_settings          raised
    ├── MissingExtra                   missing_extra             raised
    └── InternalError                  internal                  retried

The last column says what becomes of a job, and is a base class of the error too:

* `PermanentError` (fails): the job fails at once, since another attempt cannot help.
* `RetryableError` (retried): the job is queued again, with backoff, until `max_attempts`.
* `LocalError` (raised): raised to the caller, or ends a command. It is in no status document.

The code is for machines, and a promise: see `gradcam_worker.schemas.status.Problem`. `str(error)` is for the
operator: it says what was received and what would have been right. `public_message` is for end users: it is
the same for every error of a class, and so holds no setting, host, bucket, path or byte.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self, TypeVar


class GradcamError(Exception):
    """The root of all errors.

    Attributes:
        code: The name of the error for programs. It keeps its meaning.
        retryable: Whether the same request, made again later, may succeed.
        public_message: What an end user may be told: what is wrong with the image or the request.
        findings: What is wrong with a request to the HTTP API, for whoever made it: each with a `detail`, and
            a `pointer` into the body or the name of a `parameter` or `header`.

    Examples:
        >>> try:
        ...     explain_image(network, "photo.jpg")
        ... except ImageError as error:  # whatever is wrong with the image
        ...     log.warning("%s: %s", error.code, error)
        ...     show(error.public_message)
    """

    code: ClassVar[str] = "internal"
    retryable: bool = False
    public_message: ClassVar[str] = "Something went wrong."
    findings: tuple[Mapping[str, str], ...] = ()


class PermanentError(GradcamError):
    """A job fails at once: another attempt cannot help."""

    public_message = "This request cannot be carried out. Trying again does not help."


class RetryableError(GradcamError):
    """A job is queued again, with backoff: another attempt may help."""

    retryable = True
    public_message = "This did not work just now. Please try again later."


class LocalError(GradcamError):
    """Raised to the caller; never written to a status document."""

    public_message = "This did not work."


class JobError(GradcamError):
    """The job: how it was asked for, or how it went."""

    public_message = "This request could not be carried out."


class InvalidJob(JobError, PermanentError):
    """The message is not a job, or asks for something no job may ask for."""

    code = "invalid_job"
    public_message = "This request cannot be carried out as it was made. Trying it again does not help."
    accepted: tuple[str, ...] = ()  # ids of the jobs before this one: see `GradcamClient.submit_many`


class IdempotencyConflict(JobError, PermanentError):
    """The id or idempotency key already belongs to a different job."""

    code = "idempotency_conflict"
    public_message = "Another request was made under the same name. Please start a new one."
    accepted: tuple[str, ...] = ()  # ids of the jobs before this one: see `GradcamClient.submit_many`


class JobTimeout(JobError, PermanentError):
    """The job ran longer than its `timeout_s`."""

    code = "timeout"
    public_message = "This could not be finished in time."


class JobExpired(JobError, PermanentError):
    """The job's `expires_at` passed before it was started."""

    code = "expired"
    public_message = "This was not begun in time. Please make a new request."


class JobCanceled(JobError, PermanentError):
    """Somebody cancelled the job."""

    code = "canceled"
    public_message = "This was cancelled."


class MaxAttemptsExceeded(JobError, PermanentError):
    """The job was started `max_attempts` times and never came to an end."""

    code = "max_attempts_exceeded"
    public_message = "This could not be finished after several tries. Please use another image."


class UnknownJob(JobError, LocalError):
    """No such job in the ledger, or its time there has passed."""

    code = "unknown_job"
    public_message = "There is no such request, or it was made too long ago."


class InvalidQuery(JobError, LocalError):
    """Jobs cannot be listed so; the message names each condition that is wrong."""

    code = "invalid_query"
    public_message = "This list cannot be made as it was asked for. Please correct the request."


class JobNotFailed(JobError, LocalError):
    """Only a job that failed can be tried again: this one has ended otherwise."""

    code = "job_not_failed"
    public_message = "This request has not failed. Please make a new one."


class WaitTimeout(JobError, LocalError):
    """The job did not become final within the time the caller gave."""

    code = "wait_timeout"
    retryable = True
    public_message = "This is not finished yet. Please look again later."


class NoResult(JobError, LocalError):
    """This job has left no manifest that could be read."""

    code = "no_result"
    public_message = "There is no result."


class InvalidExport(JobError, LocalError):
    """A file is no export of a ledger, or is damaged."""

    code = "invalid_export"
    public_message = "This file cannot be used."


class AttemptFenced(JobError, LocalError):
    """Another attempt owns the job now: this one must stop and touch nothing more."""

    code = "attempt_fenced"
    public_message = "This request is being carried out elsewhere."


class ImageError(GradcamError):
    """The image, or the address that it is fetched from."""

    public_message = "The image cannot be used."


class UriNotAllowed(ImageError, PermanentError):
    """The operator does not allow this scheme, host, bucket or folder."""

    code = "uri_not_allowed"
    public_message = "This address may not be used. Please use another one."


class ImageNotFound(ImageError, PermanentError):
    """Nothing is stored at this URI."""

    code = "image_not_found"
    public_message = "The image is not there, or may not be read. Please upload it first."


class ImageForbidden(ImageError, PermanentError):
    """The store refuses to give the image to this worker."""

    code = "image_forbidden"
    public_message = "The image is not there, or may not be read. Please upload it first."


class ImageTooLarge(ImageError, PermanentError):
    """More bytes than the operator allows."""

    code = "image_too_large"
    public_message = "The image file is too large. Please use a smaller one."


class ImagePixelsExceeded(ImageError, PermanentError):
    """More pixels, or a longer side, than the operator allows."""

    code = "image_pixels_exceeded"
    public_message = "The image has too many pixels. Please use a smaller one."


class UnsupportedMediaType(ImageError, PermanentError):
    """The bytes are not an image in a format this worker reads."""

    code = "unsupported_media_type"
    public_message = "This is not an image in a format that can be read. JPEG, PNG and WebP can."


class ImageDecodeFailed(ImageError, PermanentError):
    """The bytes start like an image but are damaged."""

    code = "image_decode_failed"
    public_message = "The image file is damaged or incomplete. Please save it again, or use another one."


class ChecksumMismatch(ImageError, PermanentError):
    """The image is not the one the job named by its sha256."""

    code = "checksum_mismatch"
    public_message = "The image has changed since it was submitted. Please make a new request."


class ImageFetchFailed(ImageError, RetryableError):
    """The image could not be read just now."""

    code = "image_fetch_failed"
    public_message = "The image cannot be fetched just now. Please try again later."


class ModelError(GradcamError):
    """The network: its name, its layers, its classes, its weights."""

    public_message = "The model cannot be used."


class UnknownNetwork(ModelError, PermanentError):
    """No such network in the catalog."""

    code = "unknown_network"
    public_message = "The model that was asked for is not available here."


class UnknownLayer(ModelError, PermanentError):
    """The network has no such layer, or the layer keeps no rows and columns."""

    code = "unknown_layer"
    public_message = "The part of the model that was asked for does not exist."


class UnknownClass(ModelError, PermanentError):
    """The network's labels hold no such id, wnid or name."""

    code = "unknown_class"
    public_message = "The model does not know one of the classes that were asked for."


class AmbiguousClass(ModelError, PermanentError):
    """More than one class answers to this name."""

    code = "ambiguous_class"
    public_message = "One of the classes that were asked for may mean several. Please name it exactly."


class MethodNotSupported(ModelError, PermanentError):
    """The network cannot be explained by this method; the message names those that can."""

    code = "method_not_supported"
    public_message = "The model cannot be explained in this way. Please choose another method."


class InvalidNetworkInput(ModelError, PermanentError):
    """A further input of the network is unknown, missing, of the wrong type, or not allowed."""

    code = "invalid_network_input"
    public_message = "A value beside the image is missing, or is not one that the model takes."


class NetworkIncompatible(ModelError, PermanentError):
    """The network cannot be explained."""

    code = "network_incompatible"
    public_message = "The model cannot explain this image. Trying again does not help."


class WeightsChecksumMismatch(ModelError, PermanentError):
    """The weights file is not the one the catalog names by its sha256."""

    code = "weights_checksum_mismatch"
    public_message = "The model cannot be used. Trying again does not help until that is put right."


class WeightsUnavailable(ModelError, RetryableError):
    """The network's weights are neither here nor to be had just now."""

    code = "weights_unavailable"
    public_message = "The model cannot be loaded just now. Please try again later."


class StorageError(GradcamError):
    """The place that artifacts are written to and read from."""

    public_message = "The result cannot be stored or read."


class OutputNotAllowed(StorageError, PermanentError):
    """The operator does not allow writing there."""

    code = "output_not_allowed"
    public_message = "The result cannot be stored. Trying again does not help until that is put right."


class StorageUnavailable(StorageError, RetryableError):
    """The storage could not be used just now."""

    code = "storage_unavailable"
    public_message = "The result cannot be stored or read just now. Please try again later."


class AccessError(GradcamError):
    """What a key of the HTTP API may do, and how much of it."""

    public_message = "This request is not allowed."


class InvalidApiKey(AccessError, LocalError):
    """No API key was sent, or one that is unknown, expired or revoked."""

    code = "invalid_api_key"
    public_message = "The key that was sent does not open anything here. Please use a valid one."


class ScopeMissing(AccessError, LocalError):
    """The API key is valid, and was made for other requests than this one."""

    code = "scope_missing"
    public_message = "The key that was sent does not allow this. Please use another one."


class RateLimited(AccessError, LocalError):
    """The tenant makes more requests at a time than its policy allows.

    Args:
        message: What was received, and what the policy allows.
        retry_after_s: When a request is accepted again, in seconds from now.
    """

    code = "rate_limited"
    retryable = True
    public_message = "There were too many requests at once. Please try again in a moment."

    def __init__(self, message: str = "", *, retry_after_s: float = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceeded(AccessError, LocalError):
    """The tenant has submitted as many jobs on this day as its policy allows.

    Args:
        message: What was received, and what the policy allows.
        retry_after_s: When the day ends, in seconds from now.
    """

    code = "quota_exceeded"
    retryable = True
    public_message = "There were too many requests today. Please try again tomorrow."

    def __init__(self, message: str = "", *, retry_after_s: float = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownTenant(AccessError, LocalError):
    """There is no tenant of this name."""

    code = "unknown_tenant"
    public_message = "There is no such customer."


class InvalidPolicy(AccessError, LocalError):
    """What a tenant is to be allowed is no policy, or would reach into another tenant's places."""

    code = "invalid_policy"
    public_message = "These permissions cannot be given."


class RedisUnavailable(GradcamError):
    """The Redis server of the queue or of the ledger cannot be reached, or refuses.

    Args:
        message: What was asked of which server, and what it answered.
        retryable: False if the server will refuse again, because of a wrong password, user or database.
        changed_nothing: Whether it is certain that nothing was changed there: what was asked did not reach
            the server, or was refused by it.
    """

    retryable = True
    public_message = "The service cannot be reached just now. Please try again in a minute."

    def __init__(self, message: str = "", *, retryable: bool = True, changed_nothing: bool = False) -> None:
        super().__init__(message)
        self.retryable, self.changed_nothing = retryable, changed_nothing


class BrokerUnavailable(RedisUnavailable, LocalError):
    """The queue cannot be reached."""

    code = "broker_unavailable"
    public_message = "The service cannot be reached just now. Please try again in a minute."


class LedgerUnavailable(RedisUnavailable, LocalError):
    """The ledger cannot be reached."""

    code = "ledger_unavailable"
    public_message = "The service cannot be reached just now. Please try again in a minute."
    accepted: tuple[str, ...] = ()  # ids of the jobs before this one: see `GradcamClient.submit_many`
    in_doubt: tuple[str, ...] = ()  # ids of jobs that may have been accepted, or not


class DeliveryError(GradcamError):
    """A webhook or the status database."""

    public_message = "A notification cannot be delivered."


class StatusUnavailable(DeliveryError, RetryableError):
    """A status could not be delivered just now."""

    code = "status_unavailable"
    public_message = "A notification cannot be delivered just now. It is tried again."

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: how long its receiver asked to be left alone, if it did."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeliveryRefused(DeliveryError, LocalError):
    """A webhook's receiver said no, and will say no again."""

    code = "delivery_refused"
    public_message = "A notification was refused by its receiver."


class EndpointGone(DeliveryError, LocalError):
    """A webhook's receiver wants to hear no more, of any job (HTTP 410)."""

    code = "endpoint_gone"
    public_message = "A notification has no receiver any more."


class InvalidWebhook(DeliveryError, LocalError):
    """A received webhook is not signed with a secret of this app, is too old, or is no event."""

    code = "invalid_webhook"
    public_message = "This notification cannot be accepted."


class BackfillError(GradcamError):
    """A backfill: its input, its rows, its output."""

    public_message = "This batch of images cannot be carried out."


class InvalidInput(BackfillError, LocalError):
    """The input of a backfill, or the sample of a check, cannot be read as what it is said to be."""

    code = "invalid_input"
    public_message = "The list of images cannot be read."


class InvalidRow(BackfillError, PermanentError):
    """This row of the input names no image."""

    code = "invalid_row"
    public_message = "This entry names no image that can be read."


class DuplicateId(BackfillError, PermanentError):
    """A row before has the same id."""

    code = "duplicate_id"
    public_message = "An entry before this one has the same name."


class UnknownBackfill(BackfillError, PermanentError):
    """The ledger knows no backfill that this shard is of."""

    code = "unknown_backfill"
    public_message = "This request belongs to a batch that is not known any more. Please start a new batch."


class BackfillConflict(BackfillError, LocalError):
    """The output holds another backfill, or what it holds does not fit what is asked for."""

    code = "backfill_conflict"
    public_message = "This is being done already, or was begun in another way."


class BackfillRunning(BackfillError, LocalError):
    """Another process runs this backfill."""

    code = "backfill_running"
    retryable = True
    public_message = "This is being done already. Please try again later."


class BackfillStopped(BackfillError, LocalError):
    """Too many of the rows failed for the others to be tried."""

    code = "backfill_stopped"
    public_message = "Too many images failed, and the others were not tried."


class BackfillImpossible(BackfillError, LocalError):
    """No image can be explained as it is asked for: a class, the network or the output is wrong."""

    code = "backfill_impossible"
    public_message = "These images cannot be explained in the way that was asked for."


class BackfillCanceled(BackfillError, LocalError):
    """The backfill was cancelled while it ran. What is done is kept."""

    code = "backfill_canceled"
    public_message = "This batch of images was cancelled."


class RequestError(GradcamError):
    """A request to the HTTP API."""

    public_message = "This request cannot be carried out."

    def __init__(self, message: str = "", findings: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)

    @classmethod
    def at(cls, detail: str, **place: str) -> Self:
        """What is wrong in one place: a `pointer` into the body, or the name of a `parameter` or `header`."""
        return cls(f"{' '.join(place.values())}: {detail}.", [{**place, "detail": detail}])


class InvalidRequest(RequestError, LocalError):
    """A header, a parameter or the body of a request is not what it should be."""

    code = "invalid_request"
    public_message = "This request cannot be carried out as it was made. Trying it again does not help."


class RequestTooLarge(RequestError, LocalError):
    """The body of a request has more bytes than the server reads."""

    code = "request_too_large"
    public_message = "This request is too large."


class UnsupportedRequestType(RequestError, LocalError):
    """The body of a request has another media type than the API reads."""

    code = "unsupported_request_type"
    public_message = "This request is not in a form that can be read."


class ServerBusy(RequestError, LocalError):
    """The server holds as many open requests as it may."""

    code = "server_busy"
    retryable = True
    public_message = "The service cannot take this request just now. Please try again later."


class WorkerError(GradcamError):
    """The worker process, or its device."""

    public_message = "This could not be finished."


class DeviceOutOfMemory(WorkerError, RetryableError):
    """The device had no room for this many images, classes or channels at once."""

    code = "device_out_of_memory"
    public_message = "There was not enough memory for this request. Please ask for less, or try again later."


class DeviceOccupied(WorkerError, RetryableError):
    """Other processes have so much of the device's memory that there was no room."""

    code = "device_occupied"
    public_message = "There is too little room for this request just now. Please try again later."


NO_DEVICE_MEMORY = (DeviceOutOfMemory, DeviceOccupied)


class WorkerLost(WorkerError, RetryableError):
    """The worker process ended while it was needed."""

    code = "worker_lost"
    public_message = "This was interrupted. Please try again."


class NetworkCrashed(WorkerError, PermanentError):
    """The engine process ended whenever it computed this image with this network, and nothing else."""

    code = "network_crashed"
    public_message = "The model cannot process this image. Trying again does not help."


class EngineUnavailable(WorkerError, RetryableError):
    """There was no engine process that could compute, for longer than the job could wait."""

    code = "engine_unavailable"
    public_message = "The model cannot be used just now. Please try again later."


class WorkerUnfit(WorkerError, LocalError):
    """This worker takes no jobs just now."""

    code = "worker_unfit"
    retryable = True
    public_message = "The service cannot take this request just now. Please try again later."


class NoWorker(WorkerError, LocalError):
    """No worker is alive that could do what is asked for at once."""

    code = "no_worker"
    retryable = True
    public_message = "The service cannot do this just now. Please try again later."


class InvalidSettings(LocalError):
    """Impossible settings. The message has a line for each.

    Attributes:
        problems: What is wrong, a sentence for each setting.
    """

    code = "invalid_settings"
    public_message = (
        "The service is not set up as it should be. Trying again does not help until that is put right."
    )

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class MissingExtra(LocalError, ModuleNotFoundError):
    """A package that comes with an extra is not installed; the message names the extra."""

    code = "missing_extra"
    public_message = "The service is not complete. Trying again does not help until that is put right."


class InternalError(RetryableError):
    """Something nobody foresaw; the message names it."""

    code = "internal"
    public_message = "Something went wrong that nobody foresaw. Please try again later."

    @classmethod
    def of(cls, error: BaseException) -> "InternalError":
        """Any other exception, named: one that cannot even be told, and one that is no Exception, too."""
        try:
            said = str(error)
        except BaseException as another:  # noqa: BLE001  # a stranger's class
            said = f"it cannot be told ({type(another).__name__})"
        return cls(f"Unforeseen {type(error).__name__}: {said}")


E = TypeVar("E", bound=GradcamError)


def with_sentence(error: E, sentence: str) -> E:
    """The same error, its class and its attributes, with one more sentence at its end.

    Args:
        error: The error. Its class must take a message alone, as all classes of this module do.
        sentence: The sentence to add.

    Returns:
        A new error.
    """
    longer = type(error)(f"{error} {sentence}")
    vars(longer).update(vars(error))
    return longer


def all_errors() -> tuple[type[GradcamError], ...]:
    """Every error of this module that has a code of its own: those that are raised."""
    return tuple(
        one
        for one in globals().values()
        if isinstance(one, type) and issubclass(one, GradcamError) and "code" in vars(one)
    )[1:]


def error_class(code: str) -> type[GradcamError]:
    """The class of an error, by its code.

    Args:
        code: The code of an error of this version or of a later one.

    Returns:
        The class; `InternalError` where this version does not know the code.
    """
    return next((known for known in all_errors() if known.code == code), InternalError)


def public_message(code: str) -> str:
    """What an end user may be told of an error, by its code.

    Args:
        code: The code of an error of this version or of a later one.

    Returns:
        The `public_message` of the class; that of `GradcamError` where this version does not know the code.
    """
    known = {one.code: one.public_message for one in all_errors()}
    return known.get(code, GradcamError.public_message)
