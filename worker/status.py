"""Where status goes besides the ledger: webhooks, plain for now.

The ledger's document is the truth and every reader can have it there. A webhook is a copy of it,
sent by a task of its own, so that a slow receiver holds up no job.
"""

import httpx

from worker.contract import Delivery
from worker.errors import PermanentError, StatusUnavailable, UriNotAllowed
from worker.settings import Settings, without_secrets

RETRY_LATER = {408, 425, 429}  # the only answers below 500 that are worth another try


class DeliveryRefused(PermanentError):
    """The receiver said no and will say no again."""

    code = "status_unavailable"


class Webhooks:
    """Posts events to the hosts that the operator allows."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is opened until it is needed."""
        self._hosts = settings.webhook_hosts
        self._http = httpx.Client(follow_redirects=False, trust_env=False, timeout=settings.webhook_timeout_s)

    def check(self, url: str) -> None:
        """Raise UriNotAllowed unless events may be sent there."""
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            message = f"Webhook {without_secrets(url)!r} is not a URL: {error}"
            raise UriNotAllowed(message) from error
        host = f"{parsed.host}:{parsed.port}" if parsed.port else parsed.host
        if parsed.scheme not in {"http", "https"} or parsed.userinfo or host not in self._hosts:
            hosts = ", ".join(self._hosts) or "none (GRADCAM_WEBHOOK_HOSTS)"
            message = f"Webhook {without_secrets(url)} is not allowed: allowed hosts are {hosts}."
            raise UriNotAllowed(message)

    def send(self, delivery: Delivery) -> None:
        """Post an event. Raises UriNotAllowed, DeliveryRefused, StatusUnavailable (try again)."""
        self.check(delivery.url)
        shown = without_secrets(delivery.url)
        headers = {"content-type": "application/json"}
        try:
            response = self._http.post(delivery.url, content=delivery.event.to_json(), headers=headers)
        except httpx.HTTPError as error:
            message = f"Webhook {shown} could not be reached: {error or type(error).__name__}"
            raise StatusUnavailable(message) from error
        if response.is_success:
            return
        message = f"Webhook {shown} answered HTTP {response.status_code}."
        if response.is_server_error or response.status_code in RETRY_LATER:
            raise StatusUnavailable(message)
        raise DeliveryRefused(message)
