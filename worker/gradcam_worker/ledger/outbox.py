"""The outbox: events to deliver, which a dispatcher claims in the order of each job's revisions.

An event is recorded in the same atomic step that changes the job: see `Ledger._compare_and_set`. A recipient
is one webhook of a job, or a sink that receives the events of every job. Each has a list of events, of which
only the first is in delivery at any time. Recipients at one host share a destination. A destination that
fails twice in a row is paused, for longer after each further failure, and then probed with one delivery: a
host that is down delays no other.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from gradcam_worker.resilience.retry import RetryPolicy
from gradcam_worker.schemas.job import Webhook
from gradcam_worker.schemas.status import StatusDocument

# The pauses of a destination that fails repeatedly: the first one follows the second failure.
DESTINATION_BACKOFF = RetryPolicy(first_s=2.0, max_s=60.0)


@dataclass(frozen=True)
class Delivery:
    """One event for one recipient."""

    destination: str  # see `destination_of`
    recipient: str  # <job id>:hook1, or <job id>:sql
    event: str  # such as job.succeeded
    document: StatusDocument
    webhook: Webhook | None  # None: the recipient is a sink
    tries: int  # failed tries so far
    waited_s: float  # since it was first due
    lease_token: str = ""  # identifies this claim: each later claim has another token


@dataclass(frozen=True)
class DeadDelivery:
    """A parked recipient: its deliveries were given up."""

    destination: str
    recipient: str
    since_s: float  # when it was parked, in seconds since the epoch
    events: int  # the number of undelivered events
    first: Delivery | None  # the first of them; None: it is forgotten, or this version cannot read it

    @property
    def job_id(self) -> str:
        """The id of the job whose events were not delivered."""
        return self.recipient.partition(":")[0]

    @property
    def url(self) -> str | None:
        """The webhook's URL; None for a sink, and if `first` is None."""
        return self.first.webhook.url if self.first and self.first.webhook else None


class Outbox(ABC):
    """Events to deliver. Methods raise LedgerUnavailable if the ledger cannot be reached."""

    @abstractmethod
    def open_sink(self, name: str) -> None:
        """Record the events of every job for a sink, from now on."""

    @abstractmethod
    def close_sink(self, name: str) -> None:
        """Record no further events for a sink. Its recorded events stay."""

    @abstractmethod
    def claim_deliveries(
        self, limit: int, *, lease_s: float, limits: Mapping[str, int], others_limit: int
    ) -> list[Delivery]:
        """Claim deliveries that are due.

        For a destination that failed the last time only one is claimed, and none by other dispatchers
        meanwhile.

        Args:
            limit: The maximum number of deliveries.
            lease_s: For how long no other dispatcher can claim a delivery to the same recipients.
            limits: The maximum number for each of these destinations. Sinks are claimed only if named here.
            others_limit: The maximum number for all hosts that `limits` does not name; one for each host.

        Returns:
            The deliveries. Those to the destination that has been due longest come first.
        """

    @abstractmethod
    def complete(self, delivery: Delivery) -> None:
        """Remove a delivery that succeeded or is not to be repeated. The recipient's next one is due."""

    @abstractmethod
    def postpone(self, delivery: Delivery, delay_s: float, *, quiet_s: float = 0) -> None:
        """Repeat a failed delivery later, and count the failure of its destination.

        Args:
            delivery: The claimed delivery.
            delay_s: The time until it is due again.
            quiet_s: The time during which nothing is delivered to its URL, for any job.
        """

    @abstractmethod
    def park(self, delivery: Delivery) -> None:
        """Park a recipient: its deliveries are not tried until it is replayed."""

    @abstractmethod
    def park_overdue(self, destination: str, waited_s: float) -> int:
        """Park the recipients of a destination that are due and have waited too long.

        Args:
            destination: The destination.
            waited_s: The time since a recipient's first event was first due.

        Returns:
            The number of parked recipients: at most a thousand for each call.
        """

    @abstractmethod
    def find_parked(self) -> list[DeadDelivery]:
        """Find the parked recipients, the most recently parked first."""

    @abstractmethod
    def unpark(self, parked: DeadDelivery) -> bool:
        """Queue a parked recipient again; return False if it has nothing to deliver."""

    @abstractmethod
    def disable(self, url: str) -> None:
        """Stop deliveries to a URL: its recipients are parked when they are due."""

    @abstractmethod
    def find_disabled(self) -> list[str]:
        """Find the URLs that are disabled."""

    @abstractmethod
    def enable(self, url: str) -> None:
        """Deliver to a disabled URL again."""

    @abstractmethod
    def count_recipients(self) -> int:
        """Count the recipients that have events to deliver, without the parked ones."""


def parse_delivery(
    destination: str,
    recipient: str,
    text: str,
    *,
    tries: int = 0,
    waited_s: float = 0,
    lease_token: str = "",
    of_tenant: bool = False,
) -> Delivery:
    """Parse a delivery from its stored text.

    Args:
        destination: Its destination.
        recipient: Its recipient.
        text: What `serialize_delivery` returned: event, webhook and document, one line each.
        tries: The number of failed tries.
        waited_s: The time since it was first due.
        lease_token: The token of the claim.
        of_tenant: Whether the job is a tenant's: then its webhooks receive what a tenant sees.

    Returns:
        The delivery.

    Raises:
        ValueError: The text cannot be read: another version wrote it.
    """
    event, hook, text = text.split("\n", 2)
    document = StatusDocument.model_validate_json(text)
    return Delivery(
        destination,
        recipient,
        event,
        document.for_tenant() if hook and of_tenant else document,
        Webhook.model_validate_json(hook) if hook else None,
        tries,
        waited_s,
        lease_token,
    )


def serialize_delivery(event: str, webhook: Webhook | None, document: StatusDocument) -> str:
    """Serialize a delivery for storage: see `parse_delivery`."""
    return f"{event}\n{webhook.to_json() if webhook else ''}\n{document.to_json()}"


def destination_of(url: str) -> str:
    """Derive the destination of a webhook.

    Args:
        url: The webhook's URL. It may be invalid: it is checked when a delivery is tried.

    Returns:
        `//host`. The destination of a sink is its name, which contains no slash.
    """
    host = re.split(r"[/?#\\]", url.partition("://")[2], maxsplit=1)[0]
    return "//" + host.rpartition("@")[2].casefold()
