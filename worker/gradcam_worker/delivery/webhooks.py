"""Webhooks by the specification Standard Webhooks 1.0: signed HTTP posts of status events.

An event contains a copy of the job's document in the ledger. A final event is repeated until the receiver
answers 2xx, as the specification requires: 400 may be caused by a secret that is being replaced, 404 by a
deployment, 302 by maintenance. Other events are repeated only if the receiver is busy or broken, so that a
receiver that refuses them does not delay its final event.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING

from gradcam_worker.errors import DeliveryRefused, EndpointGone, InvalidJob, StatusUnavailable
from gradcam_worker.net import webhook_signing
from gradcam_worker.observability import tracing
from gradcam_worker.schemas import model
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import Webhook
from gradcam_worker.schemas.status import StatusDocument, StatusEvent
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets

if TYPE_CHECKING:
    from gradcam_worker.net.http import HttpClient

BUSY_STATUSES = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
MIN_SERVER_ERROR = HTTPStatus.INTERNAL_SERVER_ERROR
MAX_BODY_BYTES = 20_000  # of an event: receivers and their proxies refuse larger ones
MAX_RETRY_AFTER_S = 86_400.0  # one day: a longer Retry-After is shortened to it
SHORTENED_PREDICTIONS = 5  # the number in an event that is too large; the manifest has all
SHORTENED_DETAIL = 500  # characters of `error.detail` in an event that is too large


class Webhooks:
    """Posts signed events to the hosts that the operator allows."""

    def __init__(self, settings: Settings) -> None:
        """Connect to nothing yet. `settings`: the allowed hosts, the timeout and the secrets of webhooks."""
        self._settings = settings
        self._timeout_s = settings.webhook_timeout_s
        self._secrets = webhook_signing.parse_secrets(settings.webhook_secrets.get_secret_value())

    @cached_property
    def _web(self) -> "HttpClient":
        """Imported and made for the first webhook, as in `images.fetch`."""
        from gradcam_worker.net.http import HttpClient

        allowed = self._settings.webhook_hosts, ("http", "https"), "GRADCAM_WEBHOOK_HOSTS"
        return HttpClient(*allowed, self._settings.private_networks)

    def check(self, webhook: Webhook) -> None:
        """Check whether events could be sent to a webhook.

        Args:
            webhook: The webhook.

        Raises:
            UriNotAllowed: Its host is not allowed.
            InvalidJob: Its secret is not configured.
        """
        self._web.check_url(webhook.url)
        if webhook.secret_ref is not None and webhook.secret_ref not in self._secrets:
            raise InvalidJob(self._describe_unknown_secret(webhook.secret_ref))

    def send(self, url: str, secret_ref: str | None, event: StatusEvent, message_id: str) -> None:
        """Post an event.

        Args:
            url: The webhook's URL.
            secret_ref: The name of the secret that signs the event; None: it is not signed.
            event: The event.
            message_id: The id of the message: see `message_id`. It is the same for each repetition.

        Raises:
            UriNotAllowed: The host is not allowed.
            EndpointGone: The receiver answered 410: no further event is to be sent.
            DeliveryRefused: The receiver refused an event that is not final: it is not to be repeated.
            StatusUnavailable: The delivery failed and is to be repeated, after `retry_after_s` if that is
                set.
        """
        from gradcam_worker.net.http import HttpFailed

        shown = without_secrets(url)
        if secret_ref is not None and secret_ref not in self._secrets:  # another worker may have it already
            reason = self._describe_unknown_secret(secret_ref)
            message = f"Nothing was sent to webhook {shown}, for lack of a signature: {reason}"
            raise StatusUnavailable(message)
        secrets = self._secrets[secret_ref] if secret_ref is not None else ()
        body, shortened = make_body(event)
        headers = webhook_signing.signed_headers(secrets, message_id, utc_now(), body)
        headers |= tracing.propagation_headers()
        if shortened:
            headers["gradcam-shortened"] = ", ".join(shortened)
        try:
            answer = self._web.post(url, body, seconds=self._timeout_s, headers=headers)
        except HttpFailed as error:
            message = f"Webhook {shown} cannot be reached: {error}."
            raise StatusUnavailable(message) from error
        if HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES:
            return
        message = f"Webhook {shown} answered HTTP {answer.status}."
        if answer.status == HTTPStatus.GONE:
            raise EndpointGone(message)
        if not event.data.final and not (answer.status in BUSY_STATUSES or answer.status >= MIN_SERVER_ERROR):
            raise DeliveryRefused(message)
        raise StatusUnavailable(
            message, retry_after_s=_parse_retry_after(answer.headers.get("retry-after", ""))
        )

    def _describe_unknown_secret(self, secret_ref: str) -> str:
        names = ", ".join(self._secrets) or "none"
        if secret_ref.startswith(
            model.WEBHOOK_SECRET_PREFIX
        ):  # not shown: it may be a valid secret elsewhere
            return f"secret_ref must be the name of a webhook secret, not the secret. Names: {names}."
        return f"There is no webhook secret {secret_ref[:60]!r}: GRADCAM_WEBHOOK_SECRETS has {names}."


def message_id(document: StatusDocument) -> str:
    """Make the id of the message about a document: each revision of each job has another."""
    return f"msg_{document.id}_{document.revision}"


def make_body(event: StatusEvent) -> tuple[str, tuple[str, ...]]:
    """Serialize an event, shortened to MAX_BODY_BYTES.

    Predictions and warnings are shortened first, since the manifest has them too; then the error's detail;
    then the metadata, by which a receiver may identify its job.

    Args:
        event: The event.

    Returns:
        The JSON text, and the names of the fields that were shortened.
    """
    shortened: list[str] = []
    for name, shorten in _SHORTENINGS:
        if len(event.to_json().encode()) <= MAX_BODY_BYTES:
            break
        data = shorten(event.data)
        if data != event.data:
            event = event.model_copy(update={"data": data})
            shortened.append(name)
    return event.to_json(), tuple(shortened)


def _shorten_detail(document: StatusDocument) -> StatusDocument:
    if document.error is None or len(document.error.detail) <= SHORTENED_DETAIL:
        return document
    error = document.error.model_copy(update={"detail": document.error.detail[:SHORTENED_DETAIL] + "..."})
    return document.model_copy(update={"error": error})


_SHORTENINGS: tuple[tuple[str, Callable[[StatusDocument], StatusDocument]], ...] = (
    (
        "predictions",
        lambda document: document.model_copy(
            update={"predictions": document.predictions[:SHORTENED_PREDICTIONS]}
        ),
    ),
    ("warnings", lambda document: document.model_copy(update={"warnings": ()})),
    ("error.detail", _shorten_detail),
    ("metadata", lambda document: document.model_copy(update={"metadata": {}})),
)


def _parse_retry_after(header: str) -> float | None:
    """The seconds of a Retry-After header (RFC 9110, section 10.2.3); None if it is missing or invalid."""
    header = header.strip()
    try:
        if header.isascii() and header.isdecimal():
            seconds = float(header[:9])
        else:
            date = parsedate_to_datetime(header)
            date = date if date.tzinfo else date.replace(tzinfo=UTC)
            seconds = (date - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(seconds, MAX_RETRY_AFTER_S) if seconds > 0 else None
