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

A message says what was received and what would have been right. It is a sentence for a person.
The code is for machines, and is a promise (see `worker.contract.Problem`).
"""

from typing import ClassVar


class GradcamError(Exception):
    """The root of the tree: `code` for machines, `str(error)` for people."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    # Ids of jobs, in order: see `worker.client.GradcamClient.submit_many`.
    accepted: tuple[str, ...] = ()
    in_doubt: tuple[str, ...] = ()


class PermanentError(GradcamError):
    """Trying again cannot help."""


class RetryableError(GradcamError):
    """Trying again may help."""

    retryable: ClassVar[bool] = True


class LocalError(GradcamError):
    """Raised to the caller; never written to a status document."""

    hopeless: bool = False  # asking again cannot help: a wrong password, say


class InvalidJob(PermanentError):
    """The message is not a job, or asks for something no job may ask for."""

    code = "invalid_job"


class InvalidRow(PermanentError):
    """This row of the input names no image."""

    code = "invalid_row"


class DuplicateId(PermanentError):
    """A row before has the same id."""

    code = "duplicate_id"


class UnknownNetwork(PermanentError):
    """No such network in the catalog."""

    code = "unknown_network"


class UnknownLayer(PermanentError):
    """The network has no such layer, or the layer keeps no rows and columns."""

    code = "unknown_layer"


class UnknownClass(PermanentError):
    """The network's labels hold no such id, wnid or name."""

    code = "unknown_class"


class AmbiguousClass(PermanentError):
    """More than one class answers to this name."""

    code = "ambiguous_class"


class UriNotAllowed(PermanentError):
    """The operator does not allow this scheme, host, bucket or folder."""

    code = "uri_not_allowed"


class ImageNotFound(PermanentError):
    """Nothing is stored at this URI."""

    code = "image_not_found"


class ImageForbidden(PermanentError):
    """The store refuses to give the image to this worker."""

    code = "image_forbidden"


class ImageTooLarge(PermanentError):
    """More bytes than the operator allows."""

    code = "image_too_large"


class ImagePixelsExceeded(PermanentError):
    """More pixels, or a longer side, than the operator allows."""

    code = "image_pixels_exceeded"


class UnsupportedMediaType(PermanentError):
    """The bytes are not an image in a format this worker reads."""

    code = "unsupported_media_type"


class ImageDecodeFailed(PermanentError):
    """The bytes start like an image but are damaged."""

    code = "image_decode_failed"


class ChecksumMismatch(PermanentError):
    """The image is not the one the job named by its sha256."""

    code = "checksum_mismatch"


class WeightsChecksumMismatch(PermanentError):
    """The weights file is not the one the catalog names by its sha256."""

    code = "weights_checksum_mismatch"


class NetworkIncompatible(PermanentError):
    """The network cannot be explained."""

    code = "network_incompatible"


class OutputNotAllowed(PermanentError):
    """The operator does not allow writing there."""

    code = "output_not_allowed"


class IdempotencyConflict(PermanentError):
    """The id or idempotency key already belongs to a different job."""

    code = "idempotency_conflict"


class JobTimeout(PermanentError):
    """The job ran longer than its `timeout_s`."""

    code = "timeout"


class JobExpired(PermanentError):
    """The job's `expires_at` passed before it was started."""

    code = "expired"


class JobCanceled(PermanentError):
    """Somebody cancelled the job."""

    code = "canceled"


class MaxAttemptsExceeded(PermanentError):
    """The job was started `max_attempts` times and never came to an end."""

    code = "max_attempts_exceeded"


class ImageFetchFailed(RetryableError):
    """The image could not be read just now."""

    code = "image_fetch_failed"


class StorageUnavailable(RetryableError):
    """Artifacts could not be written just now."""

    code = "storage_unavailable"


class StatusUnavailable(RetryableError):
    """A status could not be delivered just now."""

    code = "status_unavailable"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: how long its receiver asked to be left alone, if it did."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WeightsUnavailable(RetryableError):
    """The network's weights are neither here nor to be had just now."""

    code = "weights_unavailable"


class DeviceOutOfMemory(RetryableError):
    """The device had no room for this many images, classes or channels at once."""

    code = "device_out_of_memory"


class WorkerLost(RetryableError):
    """The worker process ended while it was needed."""

    code = "worker_lost"


class InternalError(RetryableError):
    """Something nobody foresaw; the message names it."""

    code = "internal"

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


class LedgerUnavailable(LocalError):
    """The ledger cannot be reached."""

    code = "ledger_unavailable"


class UnknownJob(LocalError):
    """No such job in the ledger, or its time there has passed."""

    code = "unknown_job"


class WaitTimeout(LocalError):
    """The job did not become final within the time the caller gave."""

    code = "wait_timeout"


class NoResult(LocalError):
    """This job has left no manifest that could be read."""

    code = "no_result"


class DeliveryRefused(LocalError):
    """A webhook's receiver said no, and will say no again."""

    code = "delivery_refused"


class EndpointGone(LocalError):
    """A webhook's receiver wants to hear no more, of any job (HTTP 410)."""

    code = "endpoint_gone"


class AttemptFenced(LocalError):
    """Another attempt owns the job now: this one must stop and touch nothing more."""

    code = "attempt_fenced"


class WorkerUnfit(LocalError):
    """This worker takes no jobs just now."""

    code = "worker_unfit"


class InvalidInput(LocalError):
    """A backfill's input cannot be read as what it is said to be."""

    code = "invalid_input"


class BackfillConflict(LocalError):
    """The output holds another backfill, or somebody else runs this one."""

    code = "backfill_conflict"


class BackfillStopped(LocalError):
    """Too many of the rows failed for the others to be tried."""

    code = "backfill_stopped"


class InvalidSettings(LocalError):
    """An impossible setting or combination of settings."""

    code = "invalid_settings"
