"""Every way to fail, as one tree.

    GradcamError
    ├── PermanentError           trying again cannot help: the job fails at once
    │   ├── InvalidJob               invalid_job
    │   ├── InvalidRow               invalid_row              of a backfill's input
    │   ├── DuplicateId              duplicate_id             of a row before
    │   ├── UnknownNetwork           unknown_network
    │   ├── UnknownLayer             unknown_layer
    │   ├── UnknownClass             unknown_class
    │   ├── AmbiguousClass           ambiguous_class
    │   ├── UriNotAllowed            uri_not_allowed
    │   ├── ImageNotFound            image_not_found
    │   ├── ImageForbidden           image_forbidden
    │   ├── ImageTooLarge            image_too_large          bytes
    │   ├── ImagePixelsExceeded      image_pixels_exceeded    width x height
    │   ├── UnsupportedMediaType     unsupported_media_type
    │   ├── ImageDecodeFailed        image_decode_failed
    │   ├── ChecksumMismatch         checksum_mismatch
    │   ├── WeightsChecksumMismatch  weights_checksum_mismatch
    │   ├── NetworkIncompatible      network_incompatible
    │   ├── UnknownBackfill          unknown_backfill         of a shard
    │   ├── OutputNotAllowed         output_not_allowed
    │   ├── IdempotencyConflict      idempotency_conflict
    │   ├── JobTimeout               timeout
    │   ├── JobExpired               expired
    │   ├── JobCanceled              canceled
    │   └── MaxAttemptsExceeded      max_attempts_exceeded
    ├── RetryableError           trying again may help: the job is queued again, with backoff
    │   ├── ImageFetchFailed         image_fetch_failed
    │   ├── StorageUnavailable       storage_unavailable
    │   ├── StatusUnavailable        status_unavailable
    │   ├── WeightsUnavailable       weights_unavailable
    │   ├── DeviceOutOfMemory        device_out_of_memory
    │   ├── WorkerLost               worker_lost
    │   └── InternalError            internal                 anything nobody foresaw
    └── LocalError               the caller's to handle: never in a status document
        ├── BrokerUnavailable        the queue cannot be reached
        ├── LedgerUnavailable        the ledger cannot be reached
        ├── UnknownJob               no such job in the ledger, or its time there has passed
        ├── JobNotFailed             only a job that failed can be tried again
        ├── WaitTimeout              the job is not final yet
        ├── NoResult                 the job has left no manifest
        ├── DeliveryRefused          a webhook's receiver said no, and will say no again
        ├── EndpointGone             a webhook's receiver wants to hear no more, of any job
        ├── AttemptFenced            another attempt owns the job now
        ├── WorkerUnfit              this worker cannot work just now: somebody else, or later
        ├── InvalidInput             a backfill's input cannot be read, or not as what it is said to be
        ├── BackfillConflict         the output holds another backfill, or somebody else runs this one
        ├── BackfillStopped          too many rows failed: it was stopped
        └── InvalidSettings          an impossible setting or combination of settings

A message says what was received and what would have been right: a sentence for whoever runs the service, or
asks it. `public_message` is for end users: what is wrong with their image or request and whether trying again
helps, the same for every error of a class, and so without settings, hosts, buckets, paths or bytes.
The code is for machines, and is a promise (see `gradcam_worker.schemas.status.Problem`).
"""

from typing import ClassVar, Self


class GradcamError(Exception):
    """The root of the tree: `code` for machines, `str(error)` for operators, `public_message` for all."""

    code: ClassVar[str] = "internal"
    retryable: bool = False
    public_message: ClassVar[str] = "Something went wrong. Please try again later."
    # Ids of jobs, in order: see `gradcam_worker.client.client.GradcamClient.submit_many`.
    accepted: tuple[str, ...] = ()
    in_doubt: tuple[str, ...] = ()


class PermanentError(GradcamError):
    """Trying again cannot help."""

    public_message = "This request cannot be carried out. Trying again does not help."


class RetryableError(GradcamError):
    """Trying again may help."""

    retryable = True
    public_message = "This did not work just now. Please try again later."


class LocalError(GradcamError):
    """Raised to the caller; never written to a status document."""

    public_message = "This did not work. Please try again later."
    hopeless: bool = False  # asking again cannot help: a wrong password, say
    unsent: bool = (
        False  # nothing can have been changed: what was asked for did not reach anybody, or was refused
    )

    def saying(self, more: str) -> Self:
        """The same error, which says more."""
        error = type(self)(f"{self} {more}")
        vars(error).update(vars(self))
        return error


class InvalidJob(PermanentError):
    """The message is not a job, or asks for something no job may ask for."""

    code = "invalid_job"
    public_message = "This request cannot be carried out as it was made. Trying it again does not help."


class InvalidRow(PermanentError):
    """This row of the input names no image."""

    code = "invalid_row"
    public_message = "This entry names no image that can be read."


class DuplicateId(PermanentError):
    """A row before has the same id."""

    code = "duplicate_id"
    public_message = "An entry before this one has the same name."


class UnknownNetwork(PermanentError):
    """No such network in the catalog."""

    code = "unknown_network"
    public_message = "The model that was asked for is not available here."


class UnknownLayer(PermanentError):
    """The network has no such layer, or the layer keeps no rows and columns."""

    code = "unknown_layer"
    public_message = "The part of the model that was asked for does not exist."


class UnknownClass(PermanentError):
    """The network's labels hold no such id, wnid or name."""

    code = "unknown_class"
    public_message = "The model does not know one of the classes that were asked for."


class AmbiguousClass(PermanentError):
    """More than one class answers to this name."""

    code = "ambiguous_class"
    public_message = "One of the classes that were asked for may mean several. Please name it exactly."


class UriNotAllowed(PermanentError):
    """The operator does not allow this scheme, host, bucket or folder."""

    code = "uri_not_allowed"
    public_message = "Images cannot be taken from this address. Please use another one."


class ImageNotFound(PermanentError):
    """Nothing is stored at this URI."""

    code = "image_not_found"
    public_message = "The image is not there, or may not be read. Please upload it, and try again."


class ImageForbidden(PermanentError):
    """The store refuses to give the image to this worker."""

    code = "image_forbidden"
    public_message = "The image is not there, or may not be read. Please upload it, and try again."


class ImageTooLarge(PermanentError):
    """More bytes than the operator allows."""

    code = "image_too_large"
    public_message = "The image file is too large. Please use a smaller one."


class ImagePixelsExceeded(PermanentError):
    """More pixels, or a longer side, than the operator allows."""

    code = "image_pixels_exceeded"
    public_message = "The image has too many pixels. Please use a smaller one."


class UnsupportedMediaType(PermanentError):
    """The bytes are not an image in a format this worker reads."""

    code = "unsupported_media_type"
    public_message = "This is not an image in a format that can be read. JPEG, PNG and WebP can."


class ImageDecodeFailed(PermanentError):
    """The bytes start like an image but are damaged."""

    code = "image_decode_failed"
    public_message = "The image file is damaged or incomplete. Please save it again, or use another one."


class ChecksumMismatch(PermanentError):
    """The image is not the one the job named by its sha256."""

    code = "checksum_mismatch"
    public_message = "The image has changed since it was submitted. Please submit it again."


class WeightsChecksumMismatch(PermanentError):
    """The weights file is not the one the catalog names by its sha256."""

    code = "weights_checksum_mismatch"
    public_message = "The model cannot be used. Trying again does not help until that is put right."


class NetworkIncompatible(PermanentError):
    """The network cannot be explained."""

    code = "network_incompatible"
    public_message = "The model cannot explain this image. Trying again does not help."


class UnknownBackfill(PermanentError):
    """The ledger knows no backfill that this shard is of."""

    code = "unknown_backfill"
    public_message = "This request belongs to a batch that is not known any more. Submit the batch again."


class OutputNotAllowed(PermanentError):
    """The operator does not allow writing there."""

    code = "output_not_allowed"
    public_message = "The result cannot be stored. Trying again does not help until that is put right."


class IdempotencyConflict(PermanentError):
    """The id or idempotency key already belongs to a different job."""

    code = "idempotency_conflict"
    public_message = "Another request was made under the same name. Please start a new one."


class JobTimeout(PermanentError):
    """The job ran longer than its `timeout_s`."""

    code = "timeout"
    public_message = "This took too long. A smaller image may work."


class JobExpired(PermanentError):
    """The job's `expires_at` passed before it was started."""

    code = "expired"
    public_message = "This was not begun in time. Please try again."


class JobCanceled(PermanentError):
    """Somebody cancelled the job."""

    code = "canceled"
    public_message = "This was cancelled."


class MaxAttemptsExceeded(PermanentError):
    """The job was started `max_attempts` times and never came to an end."""

    code = "max_attempts_exceeded"
    public_message = "This could not be finished after several tries. Please use another image."


class ImageFetchFailed(RetryableError):
    """The image could not be read just now."""

    code = "image_fetch_failed"
    public_message = "The image cannot be fetched just now. Please try again later."


class StorageUnavailable(RetryableError):
    """The storage could not be used just now."""

    code = "storage_unavailable"
    public_message = "The result cannot be stored or read just now. Please try again later."


class StatusUnavailable(RetryableError):
    """A status could not be delivered just now."""

    code = "status_unavailable"
    public_message = "A notification cannot be delivered just now. It is tried again."

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: how long its receiver asked to be left alone, if it did."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WeightsUnavailable(RetryableError):
    """The network's weights are neither here nor to be had just now."""

    code = "weights_unavailable"
    public_message = "The model cannot be loaded just now. Please try again later."


class DeviceOutOfMemory(RetryableError):
    """The device had no room for this many images, classes or channels at once."""

    code = "device_out_of_memory"
    public_message = "There was not enough memory for this request. Please ask for less, or try again later."


class WorkerLost(RetryableError):
    """The worker process ended while it was needed."""

    code = "worker_lost"
    public_message = "This was interrupted. Please try again."


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


class BrokerUnavailable(LocalError):
    """The queue cannot be reached."""

    code = "broker_unavailable"
    retryable = True
    public_message = "The service cannot be reached just now. Please try again in a minute."


class LedgerUnavailable(LocalError):
    """The ledger cannot be reached."""

    code = "ledger_unavailable"
    retryable = True
    public_message = "The service cannot be reached just now. Please try again in a minute."


class UnknownJob(LocalError):
    """No such job in the ledger, or its time there has passed."""

    code = "unknown_job"
    public_message = "There is no such request, or it was made too long ago."


class JobNotFailed(LocalError):
    """Only a job that failed can be tried again: this one has ended otherwise."""

    code = "job_not_failed"
    public_message = "Only a request that failed can be tried again. Please start a new one."


class WaitTimeout(LocalError):
    """The job did not become final within the time the caller gave."""

    code = "wait_timeout"
    retryable = True
    public_message = "This is not finished yet. Please look again later."


class NoResult(LocalError):
    """This job has left no manifest that could be read."""

    code = "no_result"
    public_message = "There is no result."


class DeliveryRefused(LocalError):
    """A webhook's receiver said no, and will say no again."""

    code = "delivery_refused"
    public_message = "A notification was refused by its receiver."


class EndpointGone(LocalError):
    """A webhook's receiver wants to hear no more, of any job (HTTP 410)."""

    code = "endpoint_gone"
    public_message = "A notification has no receiver any more."


class AttemptFenced(LocalError):
    """Another attempt owns the job now: this one must stop and touch nothing more."""

    code = "attempt_fenced"
    public_message = "This request is being carried out elsewhere. Please look again later."


class WorkerUnfit(LocalError):
    """This worker takes no jobs just now."""

    code = "worker_unfit"
    public_message = "The service cannot take this request just now. Please try again later."


class InvalidInput(LocalError):
    """A backfill's input cannot be read as what it is said to be."""

    code = "invalid_input"
    public_message = "The list of images cannot be read."


class BackfillConflict(LocalError):
    """The output holds another backfill, or somebody else runs this one."""

    code = "backfill_conflict"
    public_message = "This is being done already, or was begun in another way."


class BackfillStopped(LocalError):
    """Too many of the rows failed for the others to be tried."""

    code = "backfill_stopped"
    public_message = "Too many images failed, and the others were not tried."


class InvalidSettings(LocalError):
    """An impossible setting or combination of settings."""

    code = "invalid_settings"
    public_message = (
        "The service is not set up as it should be. Trying again does not help until that is put right."
    )


def public_message(code: str) -> str:
    """What end users are told of an error with this code, which may be of a later version."""
    left: list[type[GradcamError]] = [GradcamError]
    for kind in left:
        if vars(kind).get("code") == code and kind is not GradcamError:
            return kind.public_message
        left += kind.__subclasses__()
    return GradcamError.public_message
