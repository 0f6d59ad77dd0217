"""Classify errors of S3: is the job's object at fault, its location, the worker's own access, or the server?

An error counts against a job only if the S3 server itself refused this very request. A failure to get keys
(STS, a token file, instance metadata) is the worker's. An answer without S3's headers comes from a proxy, or
from another program that listens at the endpoint. Both say nothing about an object, and are temporary.
"""

import re
from collections.abc import Mapping
from typing import Any

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

MISSING_STATUSES = {404, 410}
TRANSIENT_STATUSES = {307, 408, 409, 423, 425, 429}  # although below 500
TRANSIENT_CODES = {
    "KMS.ThrottlingException",
    "OperationAborted",
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}
BAD_REQUEST, NOT_IMPLEMENTED = 400, 501
# Codes that concern the worker's own keys, region or clock.
IDENTITY_CODES = {
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
PASSING_CODES = {"ExpiredToken", "RequestTimeTooSkewed", "TokenRefreshRequired"}  # of those
# Codes for an invalid key or bucket name.
INVALID_NAME_CODES = ("InvalidBucketName", "InvalidObjectName", "InvalidURI", "KeyTooLong")
S3_HEADERS = {"x-amz-request-id", "x-amz-id-2", "x-guploader-uploadid"}  # of Amazon, most others, and Google
# Of an object: a checksum, perhaps with the number of its parts. Web servers build theirs otherwise.
S3_ETAG = re.compile(r'"?(0x)?[0-9a-f]{15,}(-\d+)?"?', re.IGNORECASE)
NO_CONTENT = 204
# Errors of a source of keys that is temporarily unavailable.
KEY_SOURCE_ERRORS = (NotConnected, CredentialRetrievalError, HTTPClientError, OSError)
READ = "s3:GetObject"
DENIED_ACTION = re.compile(r"not authorized to perform: ([a-z0-9-]+:\w+)")  # in Amazon's sentences
MAX_MESSAGE_LENGTH = 500  # characters of a server's message that are shown
ORDINARY_OPERATIONS = {"GetObject", "PutObject", "DeleteObject", "ListObjectsV2"}  # need not be named


class IdentityFailed(Exception):
    """The worker has no valid keys for S3; the cause says why."""


class InvalidBucket(ValueError):
    """This cannot be the name of a bucket on this server."""


class InvalidListing(Exception):
    """A server's listing of objects is invalid."""


class ForeignAnswer(Exception):
    """A page of HTML came with a status of success: a proxy's login page, perhaps."""


S3_ERRORS = (
    BotoCoreError,
    ClientError,
    ForeignAnswer,
    IdentityFailed,
    InvalidBucket,
    InvalidListing,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
    OSError,
)


def _status_and_code(error: ClientError) -> tuple[int, str]:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(error.response.get("Error", {}).get("Code", ""))


def server_answer(error: BaseException | None) -> tuple[int, str] | None:
    """Return the HTTP status and the code of a server's answer; None for other errors."""
    return _status_and_code(error) if isinstance(error, ClientError) else None


def may_get_keys_later(error: BaseException | None) -> bool:
    """Return whether there are no keys only because their source refused this time, or was unreachable."""
    return isinstance(error, IdentityFailed) and isinstance(
        error.__cause__, (ClientError, *KEY_SOURCE_ERRORS)
    )


def is_foreign_answer(error: BaseException | None) -> bool:
    """Return whether the answer came from something other than an S3 server: a proxy, a login page."""
    if not isinstance(error, ClientError):
        return isinstance(error, ForeignAnswer)
    status, code = _status_and_code(error)
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    # Without an S3 error document, botocore uses the status as the code.
    return code in {"", str(status)} and not S3_HEADERS & set(headers)


def is_identity_error(error: BaseException | None) -> bool:
    """Return whether the worker's own keys were refused, or could not be found."""
    if isinstance(error, ClientError):
        return _status_and_code(error)[1] in IDENTITY_CODES
    return isinstance(error, IdentityFailed)


def are_wrong_keys(error: BaseException | None) -> bool:
    """Return whether whoever configured the keys must correct them: the server, or the source of keys, works.

    Keys that have expired, and a clock that is wrong, are not among them.
    """
    if isinstance(error, ClientError):
        return _status_and_code(error)[1] in IDENTITY_CODES - PASSING_CODES
    return isinstance(error, IdentityFailed) and not may_get_keys_later(error)


def is_permanent(error: BaseException | None) -> bool:
    """Return whether the same request, if retried within the job, would fail again."""
    if isinstance(error, IdentityFailed):
        return True  # for this attempt, so that a job does not hold its thread until there are keys
    if not isinstance(error, ClientError):
        return isinstance(error, ParamValidationError | ForeignAnswer | InvalidBucket | InvalidListing)
    status, code = _status_and_code(error)
    final = 300 <= status < 500 or status == NOT_IMPLEMENTED  # noqa: PLR2004  # classes of HTTP
    return final and status not in TRANSIENT_STATUSES and code not in TRANSIENT_CODES


def is_location_error(error: BaseException | None) -> bool:
    """Return whether the bucket or the key is at fault, rather than the server or the worker's access."""
    return is_permanent(error) and not is_identity_error(error) and not is_foreign_answer(error)


def is_missing_object(error: BaseException | None) -> bool:
    """Return whether the server reports that there is no such object, or may mean that by "access denied".

    Without permission to list a bucket, a missing object is reported as forbidden.
    """
    if not isinstance(error, ClientError) or is_foreign_answer(error):
        return False
    return _status_and_code(error)[0] in MISSING_STATUSES or _status_and_code(error) == (403, "AccessDenied")


def is_answer(error: BaseException) -> bool:
    """Return whether the server works, although it refused: what was asked for is at fault, or is missing.

    So are objects that are too large: our own errors are raised while parts of them arrive.
    """
    return isinstance(error, FileNotFoundError | GradcamError) or (
        isinstance(error, ClientError) and is_location_error(error)
    )


def has_no_keys(error: BaseException | None) -> bool:
    """Return whether no request was sent, since the worker has no valid keys: no job is to blame for it."""
    return isinstance(error, IdentityFailed)


def requires_checksum(error: ClientError) -> bool:
    """Return whether an object was refused because it had no checksum, as by buckets with Object Lock."""
    message = " ".join(map(str, error.response.get("Error", {}).values()))
    return (
        _status_and_code(error)[0] == BAD_REQUEST
        and re.search("content-?md5|checksum", message, re.IGNORECASE) is not None
    )


def check_answer(answer: Mapping[str, Any]) -> None:
    """Raise ForeignAnswer if boto3's answer is a page of HTML, and nothing in it is of an S3 server.

    Else an object would count as written or as removed, or a bucket as empty.
    """
    metadata = answer.get("ResponseMetadata", {})
    headers = metadata.get("HTTPHeaders", {})
    if metadata.get("HTTPStatusCode") != NO_CONTENT and not S3_HEADERS & set(headers):
        check_page(headers.get("content-type"), headers.get("etag"))


def check_page(content_type: str | None, etag: str | None) -> None:
    """Raise ForeignAnswer for a page of HTML that has no ETag as S3 servers send it."""
    if str(content_type).startswith("text/html") and not is_s3_etag(etag):
        message = "HTTP 200 from something that does not answer as S3 does, a proxy perhaps"
        raise ForeignAnswer(message)


def is_s3_etag(etag: str | None) -> bool:
    """Return whether an ETag has the form that S3 servers give it."""
    return S3_ETAG.fullmatch(etag or "") is not None


def describe(error: BaseException) -> str:
    """Return what went wrong as printable text, in the server's words if it sent any."""
    if isinstance(error, IdentityFailed):
        return f"there are no valid keys for S3: {describe(error.__cause__ or error)}"
    if not isinstance(error, ClientError):
        return visible(str(error).strip().rpartition("\n")[2])[:MAX_MESSAGE_LENGTH]
    status, code = _status_and_code(error)
    if is_foreign_answer(error):
        return f"HTTP {status} from something that does not answer as S3 does, a proxy perhaps"
    message = str(error.response.get("Error", {}).get("Message") or "")
    operation = "" if error.operation_name in ORDINARY_OPERATIONS else f"{error.operation_name}: "
    return visible(
        operation + " ".join(dict.fromkeys(("HTTP", str(status), code, message[:MAX_MESSAGE_LENGTH]))).strip()
    )


def read_error(uri: str, error: Exception) -> GradcamError:
    """Return our error for one of S3_ERRORS that was raised while an image or a network was read."""
    why = f"{uri} could not be read: {describe(error)}"
    if is_identity_error(error) or is_foreign_answer(error):
        return StorageUnavailable(why)
    if not is_permanent(error):
        return ImageFetchFailed(why)
    return _refusal(uri, error) if isinstance(error, ClientError) else _invalid_name(uri, error)


def _invalid_name(uri: str, error: Exception) -> UriNotAllowed:
    return UriNotAllowed(f"{uri} is not the name of an object: {describe(error)}")


def _refusal(uri: str, error: ClientError) -> GradcamError:
    """Our error for a final answer of an S3 server."""
    status, code = _status_and_code(error)
    if status in MISSING_STATUSES:
        return ImageNotFound(f"There is no such {'bucket' if code == 'NoSuchBucket' else 'object'}: {uri}.")
    if any(name in code for name in INVALID_NAME_CODES):
        return _invalid_name(uri, error)
    if code != "AccessDenied":
        return ImageForbidden(f"The server does not give {uri} to the worker: {describe(error)}")
    said = str(error.response.get("Error", {}).get("Message") or "")
    denied = DENIED_ACTION.search(said)
    if "explicit deny" in said:
        advice = "a policy that the server names denies it, and no grant helps against that."
    elif denied and denied[1] != READ:
        advice = f"grant it {visible(denied[1])}, as the server says."
    else:
        advice = (
            f"grant it {READ} there. Where it may not list the bucket, a missing object is forbidden, too."
        )
    return ImageForbidden(f"The worker may not read {uri} ({describe(error)}): {advice}")
