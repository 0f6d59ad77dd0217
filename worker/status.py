"""Where status goes besides the ledger: webhooks, plain for now.

The ledger's document is the truth and every reader can have it there. A webhook is a copy of it,
sent by a task of its own, so that a slow receiver holds up no job.
"""

from worker.contract import Delivery
from worker.errors import DeliveryRefused, StatusUnavailable
from worker.settings import Settings, without_secrets
from worker.web import Web, WebFailed

TAKEN = range(200, 300)
RETRY_LATER = {408, 425, 429, *range(500, 600)}


class Webhooks:
    """Posts events to the hosts that the operator allows."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is opened until it is needed."""
        self._web = Web(settings.webhook_hosts, ("http", "https"), "GRADCAM_WEBHOOK_HOSTS")
        self._timeout_s = settings.webhook_timeout_s

    def check(self, url: str) -> None:
        """Raise UriNotAllowed unless events may be sent there."""
        self._web.allowed(url)

    def send(self, delivery: Delivery) -> None:
        """Post an event. Raises UriNotAllowed, DeliveryRefused, StatusUnavailable (try again)."""
        shown = without_secrets(delivery.url)
        try:
            answer = self._web.post(delivery.url, delivery.event.to_json(), seconds=self._timeout_s)
        except WebFailed as error:
            message = f"Webhook {shown} could not be told: {error}."
            raise StatusUnavailable(message) from error
        if answer.status in TAKEN:
            return
        message = f"Webhook {shown} answered HTTP {answer.status}."
        if answer.status in RETRY_LATER:
            raise StatusUnavailable(message)
        raise DeliveryRefused(message)
