"""Signs webhook messages by Standard Webhooks 1.0, HMAC-SHA256 of id, time and body, and verifies them.

The operator keeps the secrets, by name: `app1=whsec_new whsec_old,app2=whsec_...`. A job contains only the
name. While a secret is being replaced a name has two, and a message carries a signature with each.
"""

import base64
import binascii
import hmac
from collections.abc import Iterable
from datetime import UTC, datetime

from gradcam_worker.schemas.model import WEBHOOK_SECRET_PREFIX

MIN_BYTES, MAX_BYTES = 24, 64  # of a secret, by the standard
ANY_TEXT = "surrogatepass"  # frameworks decode headers that are not UTF-8 to text that no encoding has


def parse_secrets(text: str) -> dict[str, tuple[str, ...]]:
    """Parse `app1=whsec_new whsec_old,app2=whsec_...` into the secrets of each name.

    Raises ValueError, which says where the text is wrong, but does not quote it.
    """
    secrets: dict[str, tuple[str, ...]] = {}
    for number, entry in enumerate(filter(None, map(str.strip, text.split(","))), 1):
        name, equals, rest = (part.strip() for part in entry.partition("="))
        if not equals or not name or name.startswith(WEBHOOK_SECRET_PREFIX):
            message = f"entry {number} must look like name=whsec_..., or name=whsec_new whsec_old"
            raise ValueError(message)
        if name in secrets:
            message = f"{name!r} is there twice: a name's secrets stand together, with spaces between them"
            raise ValueError(message)
        secrets[name] = tuple(rest.split())
        wrong = [str(index) for index, secret in enumerate(secrets[name], 1) if not _is_secret(secret)]
        if wrong or not secrets[name]:
            which = f"secret {', '.join(wrong)} of {name!r}" if wrong else f"{name!r} has no secret: one"
            right = (
                f"must be {WEBHOOK_SECRET_PREFIX} and the base64 of {MIN_BYTES} to {MAX_BYTES} random bytes"
            )
            message = f"{which} {right}"
            raise ValueError(message)
    return secrets


def _is_secret(secret: str) -> bool:
    return secret_key(secret) is not None


def secret_key(secret: str) -> bytes | None:
    """The key that a secret encodes; None: it is no secret."""
    encoded = secret.removeprefix(WEBHOOK_SECRET_PREFIX)
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):  # without `validate`, invalid characters would be ignored
        return None
    return key if secret.startswith(WEBHOOK_SECRET_PREFIX) and MIN_BYTES <= len(key) <= MAX_BYTES else None


def is_signed(signatures: str, keys: Iterable[bytes], message_id: str, timestamp: str, body: bytes) -> bool:
    """Whether one of the signatures of a message was made with one of the keys.

    Args:
        signatures: The header `webhook-signature`, as in `v1,AAAA v1,BBBB`.
        keys: Keys of secrets.
        message_id: The header `webhook-id`.
        timestamp: The header `webhook-timestamp`.
        body: The body.

    Returns:
        Whether it was.
    """
    signed = f"{message_id}.{timestamp}.".encode(errors=ANY_TEXT) + body
    right = [base64.b64encode(hmac.digest(key, signed, "sha256")) for key in keys]
    found = [one.removeprefix("v1,") for one in signatures.split() if one.startswith("v1,")]
    given = [one.encode(errors=ANY_TEXT) for one in found]
    return any(hmac.compare_digest(one, other) for one in given for other in right)


def signed_headers(secrets: tuple[str, ...], message_id: str, sent_at: datetime, body: str) -> dict[str, str]:
    """Return the HTTP headers of a message: its id, the time of this attempt, a signature for each secret."""
    from standardwebhooks import Webhook

    sent_at = sent_at.astimezone(UTC)  # the library ignores time zones
    headers = {"webhook-id": message_id, "webhook-timestamp": str(int(sent_at.timestamp()))}
    if secrets:
        signatures = [Webhook(secret).sign(message_id, sent_at, body) for secret in secrets]
        headers["webhook-signature"] = " ".join(signatures)
    return headers
