"""What went wrong with S3, and whose fault it is: the job's, the place's, or that of the worker itself.

A refusal counts against a job only if the S3 server itself has refused this very request. Who fails to get
keys (STS, a token file, instance metadata) is the worker; a page without S3's marks comes from a proxy, or
from something else that listens at the endpoint: both say nothing of an object, and go by.
"""

import re

import urllib3.exceptions
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    ParamValidationError,
)
from botocore.exceptions import ConnectionError as NotConnected
from botocore.parsers import ResponseParserError

from gradcam_worker.errors import (
    GradcamError,
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    StorageUnavailable,
    UriNotAllowed,
)
from gradcam_worker.text.visible import visible

GONE = {404, 410}
BRIEF = {307, 408, 409, 423, 425, 429}  # of all that a client is to blame for, what may be gone next time
BRIEF_CODES = {
    "KMS.ThrottlingException",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}
BAD_REQUEST, NOT_IMPLEMENTED = 400, 501
# What a server says of the worker's own keys, region or clock, which no job is to blame for.
OWN_FAULTS = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidSecurity",
    "InvalidToken",
    "NotSignedUp",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
# What servers call a key or a bucket that cannot be one.
MISNAMED = ("InvalidBucketName", "InvalidObjectName", "InvalidURI", "KeyTooLong")
MARKS = {"x-amz-request-id", "x-amz-id-2"}  # headers of an S3 server's answers, whatever they say
# How whoever gives keys out may be away for a moment.
AWAY = (NotConnected, CredentialRetrievalError, HTTPClientError, OSError)
SAID = 500  # characters of what a server says that are shown


class IdentityFailed(Exception):
    """The worker's own keys cannot be had: its cause says why."""


class InvalidBucket(ValueError):
    """This cannot be a bucket of the server that is asked."""


class InvalidListing(Exception):
    """A server's listing cannot be gone through."""


FAILED = (
    BotoCoreError,
    ClientError,
    IdentityFailed,
    InvalidBucket,
    InvalidListing,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
    OSError,
)


def told(error: ClientError) -> tuple[int, str]:
    """The HTTP status and the code of a server's answer."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(error.response.get("Error", {}).get("Code", ""))


def answered(error: BaseException | None) -> tuple[int, str] | None:
    """What `told` says of a server's answer; None of anything else."""
    return told(error) if isinstance(error, ClientError) else None


def away(error: BaseException | None) -> bool:
    """Whether keys may be had in a moment: whoever gives them has refused this time, or was out of reach."""
    return isinstance(error, IdentityFailed) and isinstance(error.__cause__, (ClientError, *AWAY))


def foreign(error: BaseException | None) -> bool:
    """Whether an answer came from something that is no S3 server: a proxy, a login page."""
    if not isinstance(error, ClientError):
        return False
    status, code = told(error)
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    # Without a document of S3's own, botocore makes up a code: the status.
    return code in {"", str(status)} and not MARKS & set(headers)


def own_fault(error: BaseException | None) -> bool:
    """Whether it is the worker's own identity that is refused, or cannot be had."""
    if isinstance(error, ClientError):
        return told(error)[1] in OWN_FAULTS
    return isinstance(error, IdentityFailed)


def hopeless(error: BaseException | None) -> bool:
    """Whether asking again in the same way is of no use."""
    if isinstance(error, IdentityFailed):
        return True  # within a job: others must not wait with it
    if not isinstance(error, ClientError):
        return isinstance(error, ParamValidationError | InvalidBucket | InvalidListing)
    status, code = told(error)
    final = 300 <= status < 500 or status == NOT_IMPLEMENTED  # noqa: PLR2004  # classes of HTTP
    return final and status not in BRIEF and code not in BRIEF_CODES


def refused(error: BaseException | None) -> bool:
    """Whether this place is what cannot be used: not the server just now, not the worker itself."""
    return hopeless(error) and not own_fault(error) and not foreign(error)


def absent(error: BaseException | None) -> bool:
    """Whether a server says, as far as it may, that there is no such object.

    Who may read an object but not list its bucket is told that a missing one is forbidden.
    """
    if not isinstance(error, ClientError) or foreign(error):
        return False
    return told(error)[0] in GONE or told(error) == (403, "AccessDenied")


def wants_checksum(error: ClientError) -> bool:
    """Whether an object was refused because no checksum came with it, as buckets with Object Lock do."""
    said = " ".join(map(str, error.response.get("Error", {}).values()))
    return (
        told(error)[0] == BAD_REQUEST and re.search("content-?md5|checksum", said, re.IGNORECASE) is not None
    )


def reason(error: BaseException) -> str:
    """What went wrong, in the server's own words where it has said any, fit to be shown."""
    if isinstance(error, IdentityFailed):
        return f"the worker's own identity cannot be had: {reason(error.__cause__ or error)}"
    if not isinstance(error, ClientError):
        return visible(str(error).strip().rpartition("\n")[2])[:SAID]
    status, code = told(error)
    if foreign(error):
        return f"HTTP {status} from something that does not answer as S3 does, a proxy perhaps"
    said = str(error.response.get("Error", {}).get("Message") or "")
    where = "" if error.operation_name in ORDINARY else f"{error.operation_name}: "
    return visible(where + " ".join(dict.fromkeys(("HTTP", str(status), code, said[:SAID]))).strip())


ORDINARY = {"GetObject", "PutObject", "DeleteObject", "ListObjectsV2"}  # what a job's own requests are


def unreadable(uri: str, error: Exception) -> GradcamError:
    """Why an image, or a network, cannot be read, as one of FAILED."""
    why = f"{uri} could not be read: {reason(error)}"
    if own_fault(error) or foreign(error):
        return StorageUnavailable(why)
    if not hopeless(error):
        return ImageFetchFailed(why)
    return _refusal(uri, error) if isinstance(error, ClientError) else _misnamed(uri, error)


def _misnamed(uri: str, error: Exception) -> UriNotAllowed:
    return UriNotAllowed(f"{uri} is not the name of an object: {reason(error)}")


def _refusal(uri: str, error: ClientError) -> GradcamError:
    """What an S3 server has said for good."""
    status, code = told(error)
    if status in GONE:
        return ImageNotFound(f"There is no such {'bucket' if code == 'NoSuchBucket' else 'object'}: {uri}.")
    if any(name in code for name in MISNAMED):
        return _misnamed(uri, error)
    if code != "AccessDenied":
        return ImageForbidden(f"The server does not give {uri} to the worker: {reason(error)}")
    return ImageForbidden(
        f"The worker may not read {uri} ({reason(error)}): grant it s3:GetObject there. "
        "Where it may not list the bucket, a missing object is forbidden, too."
    )
