"""Signing what webhooks are sent, as Standard Webhooks 1.0 says: HMAC-SHA256 over id, time and body.

The operator keeps the secrets, each under a name: `app1=whsec_new whsec_old,app2=whsec_...`. A job says
only the name. While a secret is being replaced there are two, and a message carries a signature of each.
"""

import base64
import binascii
from datetime import UTC, datetime

from gradcam_worker.schemas.model import WEBHOOK_SECRET_PREFIX

MIN_BYTES, MAX_BYTES = 24, 64  # of a secret, as the standard has it


def parse_secrets(text: str) -> dict[str, tuple[str, ...]]:
    """`app1=whsec_new whsec_old,app2=whsec_...` -> the secrets of each name.

    Raises ValueError, which says where the text is wrong and never what stands there.
    """
    known: dict[str, tuple[str, ...]] = {}
    for number, entry in enumerate(filter(None, map(str.strip, text.split(","))), 1):
        name, equals, rest = (part.strip() for part in entry.partition("="))
        if not equals or not name or name.startswith(WEBHOOK_SECRET_PREFIX):
            message = f"entry {number} must look like name=whsec_..., or name=whsec_new whsec_old"
            raise ValueError(message)
        if name in known:
            message = f"{name!r} is there twice: a name's secrets stand together, with spaces between them"
            raise ValueError(message)
        known[name] = tuple(rest.split())
        wrong = [str(place) for place, secret in enumerate(known[name], 1) if not _fits(secret)]
        if wrong or not known[name]:
            which = f"secret {', '.join(wrong)} of {name!r}" if wrong else f"{name!r} has no secret: one"
            right = (
                f"must be {WEBHOOK_SECRET_PREFIX} and the base64 of {MIN_BYTES} to {MAX_BYTES} random bytes"
            )
            message = f"{which} {right}"
            raise ValueError(message)
    return known


def _fits(secret: str) -> bool:
    encoded = secret.removeprefix(WEBHOOK_SECRET_PREFIX)
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):  # the library would leave out what is no base64, and go on
        return False
    return secret.startswith(WEBHOOK_SECRET_PREFIX) and MIN_BYTES <= len(key) <= MAX_BYTES


def headers(secrets: tuple[str, ...], message_id: str, sent_at: datetime, body: str) -> dict[str, str]:
    """What goes with a message: its id, the time of this attempt to send it, a signature for each secret."""
    from standardwebhooks import Webhook

    sent_at = sent_at.astimezone(UTC)  # the library takes any clock's time for UTC
    headers = {"webhook-id": message_id, "webhook-timestamp": str(int(sent_at.timestamp()))}
    if secrets:
        signatures = [Webhook(secret).sign(message_id, sent_at, body) for secret in secrets]
        headers["webhook-signature"] = " ".join(signatures)
    return headers
