"""Signs webhook messages by Standard Webhooks 1.0: HMAC-SHA256 of id, time and body.

The operator keeps the secrets, by name: `app1=whsec_new whsec_old,app2=whsec_...`. A job contains only the
name. While a secret is being replaced a name has two, and a message carries a signature with each.
"""

import base64
import binascii
from datetime import UTC, datetime

from gradcam_worker.schemas.model import WEBHOOK_SECRET_PREFIX

MIN_BYTES, MAX_BYTES = 24, 64  # of a secret, by the standard


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
    encoded = secret.removeprefix(WEBHOOK_SECRET_PREFIX)
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):  # without `validate`, invalid characters would be ignored
        return False
    return secret.startswith(WEBHOOK_SECRET_PREFIX) and MIN_BYTES <= len(key) <= MAX_BYTES


def signed_headers(secrets: tuple[str, ...], message_id: str, sent_at: datetime, body: str) -> dict[str, str]:
    """Return the HTTP headers of a message: its id, the time of this attempt, a signature for each secret."""
    from standardwebhooks import Webhook

    sent_at = sent_at.astimezone(UTC)  # the library ignores time zones
    headers = {"webhook-id": message_id, "webhook-timestamp": str(int(sent_at.timestamp()))}
    if secrets:
        signatures = [Webhook(secret).sign(message_id, sent_at, body) for secret in secrets]
        headers["webhook-signature"] = " ".join(signatures)
    return headers
