"""Webhooks that an app receives: verified by Standard Webhooks 1.0, and read. It needs no server."""

import time
from collections.abc import Iterable
from typing import Protocol

from pydantic import ValidationError

from gradcam_worker.errors import InvalidSettings, InvalidWebhook
from gradcam_worker.net import webhook_signing
from gradcam_worker.schemas.model import describe
from gradcam_worker.schemas.status import StatusEvent

TOLERANCE_S = 300  # between a message's time and the receiver's clock
HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")
MAX_DIGITS = 12  # of a timestamp


class Headers(Protocol):
    """The headers of a request, as frameworks have them."""

    def items(self) -> Iterable[tuple[str, str]]:
        """Names, in whatever case, with their values."""
        ...


class Webhooks:
    """What a receiver of webhooks needs. `client.webhooks` is one; it can be used without a client."""

    @staticmethod
    def unwrap(
        body: bytes | str, headers: Headers, secrets: str | Iterable[str], *, tolerance_s: float = TOLERANCE_S
    ) -> StatusEvent:
        """Verify a webhook that was received, and read its event.

        Args:
            body: The body, byte for byte as it was received: not parsed and written again.
            headers: The headers of the request, in whatever case.
            secrets: The secret, `whsec_...`, or several, while one is being replaced: one of them must have
                signed the message.
            tolerance_s: How far the message's time may be from this machine's clock, in seconds.

        Returns:
            The event: `event.data` is the job's status document.

        Raises:
            InvalidWebhook: It is not signed with one of these secrets, is too old, or is no event. Answer
                with status 400 or 401: the message is sent again.
            InvalidSettings: A secret is none.

        Examples:
            >>> event = client.webhooks.unwrap(request.body, request.headers, secret)
            >>> event.type, event.data.id, event.data.status
            ('gradcam.job.succeeded', '01979f5c-...', 'succeeded')
        """
        keys = _keys_of([secrets] if isinstance(secrets, str) else list(secrets))
        body = body.encode(errors=webhook_signing.ANY_TEXT) if isinstance(body, str) else body
        found = {name.lower(): value for name, value in headers.items() if name.lower() in HEADERS}
        if missing := [name for name in HEADERS if not found.get(name)]:
            message = f"The request has no header {', '.join(missing)}: {_WHY_UNSIGNED}"
            raise InvalidWebhook(message)
        message_id, timestamp, signatures = (found[name] for name in HEADERS)
        _check_time(timestamp, tolerance_s)
        if not webhook_signing.is_signed(signatures, keys, message_id, timestamp, body):
            raise InvalidWebhook(_WHY_NO_SIGNATURE)
        try:
            return StatusEvent.model_validate_json(body)
        except ValidationError as error:
            message = f"The webhook is signed, but is no event of this version: {describe(error)}."
            raise InvalidWebhook(message) from error


_WHY_UNSIGNED = "the job's webhook names no secret_ref, or something before this app has removed it."
_WHY_NO_SIGNATURE = (
    "No signature of the webhook was made with these secrets: it must be the secret behind the job's "
    "secret_ref in GRADCAM_WEBHOOK_SECRETS of the workers, and the body as it was received, byte for byte."
)


def _keys_of(secrets: list[str]) -> list[bytes]:
    keys = []
    for number, secret in enumerate(secrets, 1):
        key = webhook_signing.secret_key(str(secret))
        if key is None:  # it is not shown: it may be one with a typing error
            message = (
                f"Webhook secret {number} of {len(secrets)} must be whsec_ and the base64 of "
                f"{webhook_signing.MIN_BYTES} to {webhook_signing.MAX_BYTES} bytes, without a name before it."
            )
            raise InvalidSettings(message)
        keys.append(key)
    if not keys:
        message = "There is no webhook secret: without one, no message can be verified."
        raise InvalidSettings(message)
    return keys


def _check_time(timestamp: str, tolerance_s: float) -> None:
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= MAX_DIGITS):
        message = f"The header webhook-timestamp is {timestamp[:40]!r}, not seconds since 1970."
        raise InvalidWebhook(message)
    age_s = time.time() - int(timestamp)
    if abs(age_s) > tolerance_s:
        when = f"{age_s:.0f} s ago" if age_s > 0 else f"{-age_s:.0f} s ahead of this machine's clock"
        message = f"The webhook was sent {when}, and {tolerance_s:g} s are allowed: others may repeat it."
        raise InvalidWebhook(message)
