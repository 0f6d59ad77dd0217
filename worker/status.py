"""Where status goes besides the ledger: webhooks, plain for now.

The ledger's document is the truth and every reader can have it there. A webhook is a copy of it,
sent by a task of its own, so that a slow receiver holds up no job.
"""

from worker.contract import Delivery
from worker.errors import DeliveryRefused, StatusUnavailable
from worker.settings import Settings, without_secrets
from worker.web import Web, WebError

RETRY_LATER = {408, 425, 429}  # the only answers below 500 that are worth another try


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
        url, body = self._web.allowed(delivery.url), delivery.event.to_json()
        shown, headers = without_secrets(delivery.url), {"content-type": "application/json"}
        try:
            response = self._web.client.post(url, content=body, headers=headers, timeout=self._timeout_s)
        except WebError as error:
            message = f"Webhook {shown} could not be reached: {error or type(error).__name__}"
            raise StatusUnavailable(message) from error
        if response.is_success:
            return
        message = f"Webhook {shown} answered HTTP {response.status_code}."
        if response.is_server_error or response.status_code in RETRY_LATER:
            raise StatusUnavailable(message)
        raise DeliveryRefused(message)
