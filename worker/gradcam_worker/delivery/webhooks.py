"""Where status goes besides the ledger: webhooks, as Standard Webhooks 1.0 has them.

The ledger's document is the truth and every reader can have it there. A webhook is a copy of it, sent
by a dispatcher, so that a slow receiver holds up no job. A receiver answers 2xx, or hears how a job ended
again later, as the standard asks for: 400 may come of a secret that is being replaced, 404 of a program
that is, 302 of maintenance. What lies on the way to that end is told again only to one that is busy or
broken: who does not want to hear of a start must not have to wait for the end.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from gradcam_worker.errors import DeliveryRefused, EndpointGone, InvalidJob, StatusUnavailable
from gradcam_worker.net import webhook_signing
from gradcam_worker.net.http import HttpClient, HttpFailed
from gradcam_worker.observability import tracing
from gradcam_worker.schemas import model
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import Webhook
from gradcam_worker.schemas.status import StatusDocument, StatusEvent
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets

BUSY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
BROKEN = HTTPStatus.INTERNAL_SERVER_ERROR  # and above
MAX_BODY_BYTES = 20_000  # of an event: larger ones are refused by receivers and what stands before them
MAX_RETRY_AFTER_S = 86_400.0  # a day: who asks for more is asked again all the same
FEW_PREDICTIONS = 5  # of an event that is too large; the manifest has all
MAX_DETAIL = 500  # characters of its problem's detail


class Webhooks:
    """Posts signed events to the hosts that the operator allows."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is opened until it is needed."""
        allowed = settings.webhook_hosts, ("http", "https"), "GRADCAM_WEBHOOK_HOSTS"
        self._web = HttpClient(*allowed, settings.private_networks)
        self._timeout_s = settings.webhook_timeout_s
        self._secrets = webhook_signing.parse_secrets(settings.webhook_secrets.get_secret_value())

    def check(self, webhook: Webhook) -> None:
        """Raise UriNotAllowed, or InvalidJob for a secret that is not known, unless it may be told."""
        self._web.allowed(webhook.url)
        if webhook.secret_ref is not None and webhook.secret_ref not in self._secrets:
            raise InvalidJob(self._unknown(webhook.secret_ref))

    def send(self, url: str, secret_ref: str | None, event: StatusEvent, message_id: str) -> None:
        """Post an event. `message_id` is the same however often it is sent.

        Raises UriNotAllowed, EndpointGone, StatusUnavailable (try again; see `retry_after_s`), and
        DeliveryRefused where it tells of no end.
        """
        shown = without_secrets(url)
        if secret_ref is not None and secret_ref not in self._secrets:  # another worker may know it already
            message = f"Webhook {shown} was not told, for lack of a signature: {self._unknown(secret_ref)}"
            raise StatusUnavailable(message)
        secrets = self._secrets[secret_ref] if secret_ref is not None else ()
        body, shortened = body_of(event)
        headers = (
            webhook_signing.headers(secrets, message_id, utc_now(), body) | tracing.propagation_headers()
        )
        if shortened:
            headers["gradcam-shortened"] = ", ".join(shortened)
        try:
            answer = self._web.post(url, body, seconds=self._timeout_s, headers=headers)
        except HttpFailed as error:
            message = f"Webhook {shown} could not be told: {error}."
            raise StatusUnavailable(message) from error
        if HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES:
            return
        message = f"Webhook {shown} answered HTTP {answer.status}."
        if answer.status == HTTPStatus.GONE:
            raise EndpointGone(message)
        if not event.data.final and not (answer.status in BUSY or answer.status >= BROKEN):
            raise DeliveryRefused(message)
        raise StatusUnavailable(message, retry_after_s=_retry_after_s(answer.headers.get("retry-after", "")))

    def _unknown(self, secret_ref: str) -> str:
        known = ", ".join(self._secrets) or "none"
        if secret_ref.startswith(model.WEBHOOK_SECRET_PREFIX):  # it may be known elsewhere
            return f"secret_ref must be the name of a webhook secret, and is one. There are {known}."
        return f"There is no webhook secret {secret_ref[:60]!r}: GRADCAM_WEBHOOK_SECRETS has {known}."


def message_id(document: StatusDocument) -> str:
    """What a receiver knows a message by: of one revision of one job there is one."""
    return f"msg_{document.id}_{document.revision}"


def body_of(event: StatusEvent) -> tuple[str, tuple[str, ...]]:
    """An event as it is signed and sent, MAX_BODY_BYTES at most, and what had to be shortened for it.

    First the predictions (to the first five) and the warnings, which the manifest has too; then the
    problem's detail; last the metadata, by which a receiver may know its job.
    """
    shortened: list[str] = []
    for name, shorter in _SHORTER:
        if len(event.to_json().encode()) <= MAX_BODY_BYTES:
            break
        data = shorter(event.data)
        if data != event.data:
            event = event.model_copy(update={"data": data})
            shortened.append(name)
    return event.to_json(), tuple(shortened)


def _less_detail(document: StatusDocument) -> StatusDocument:
    if document.error is None or len(document.error.detail) <= MAX_DETAIL:
        return document
    error = document.error.model_copy(update={"detail": document.error.detail[:MAX_DETAIL] + "..."})
    return document.model_copy(update={"error": error})


_SHORTER: tuple[tuple[str, Callable[[StatusDocument], StatusDocument]], ...] = (
    ("predictions", lambda it: it.model_copy(update={"predictions": it.predictions[:FEW_PREDICTIONS]})),
    ("warnings", lambda it: it.model_copy(update={"warnings": ()})),
    ("error.detail", _less_detail),
    ("metadata", lambda it: it.model_copy(update={"metadata": {}})),
)


def _retry_after_s(value: str) -> float | None:
    """Seconds, from a number of them or from a date (RFC 9110, section 10.2.3); None if it says neither."""
    value = value.strip()
    try:
        if value.isascii() and value.isdecimal():
            seconds = float(value[:9])
        else:
            date = parsedate_to_datetime(value)
            date = date if date.tzinfo else date.replace(tzinfo=UTC)
            seconds = (date - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(seconds, MAX_RETRY_AFTER_S) if seconds > 0 else None
