"""The outbox: deliveries of events, which a dispatcher claims, in the order of each job's revisions.

An event is recorded in the same atomic step that changes the job: see `Ledger._swap`. Each recipient of a job
(one of its webhooks, or a sink that hears of every job) has a list of them, and only the first of a list is
ever under way. Recipients at one host share a destination. After two failures in a row a destination is left
alone for a growing while, and then one delivery tries it: a host that is down holds up no other.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from gradcam_worker.resilience.retry import RetryPolicy
from gradcam_worker.schemas.job import Webhook
from gradcam_worker.schemas.status import StatusDocument

# A destination that has failed twice in a row is left alone: counted from the second failure on.
DESTINATION_BACKOFF = RetryPolicy(first_s=2.0, max_s=60.0)


@dataclass(frozen=True)
class Delivery:
    """One event on its way to one recipient."""

    destination: str  # see `destination` below
    recipient: str  # <job id>:hook1, or <job id>:sql
    event: str  # job.succeeded and so on
    document: StatusDocument
    webhook: Webhook | None  # none: for the sink
    tries: int  # so far
    waited_s: float  # since it could first be taken
    lease_token: str = ""  # of the dispatcher that claimed it: whoever claims it later gets another


@dataclass(frozen=True)
class DeadDelivery:
    """A recipient that was given up."""

    destination: str
    recipient: str
    since_s: float  # seconds since the epoch
    events: int  # that it has not got
    first: Delivery | None  # of them; none where it is forgotten by now or cannot be read

    @property
    def job_id(self) -> str:
        """Of the job whose events it has not got."""
        return self.recipient.partition(":")[0]

    @property
    def url(self) -> str | None:
        """Of the webhook; none for a sink, and where the first event is not to be had."""
        return self.first.webhook.url if self.first and self.first.webhook else None


class Outbox(ABC):
    """Events to be delivered. Each method raises LedgerUnavailable where the ledger cannot be reached."""

    @abstractmethod
    def open_sink(self, name: str) -> None:
        """From now on, this sink hears of every job."""

    @abstractmethod
    def close_sink(self, name: str) -> None:
        """This sink hears of no other job; what lies there for it stays."""

    @abstractmethod
    def claim_deliveries(
        self, limit: int, *, lease_s: float, limits: Mapping[str, int], others_limit: int
    ) -> list[Delivery]:
        """Claim deliveries that are due.

        To a destination that failed the last time only one is claimed, and no other dispatcher gets one
        meanwhile.

        Args:
            limit: How many at most.
            lease_s: How long no other dispatcher gets one to the same recipients.
            limits: How many at most to each of these destinations. A sink has to be named here.
            others_limit: How many at most to hosts that are not named, one to each.

        Returns:
            The deliveries, those to the longest due destination first.
        """

    @abstractmethod
    def complete(self, delivery: Delivery) -> None:
        """Remove a delivery that has arrived, or never can: the recipient's next one is due."""

    @abstractmethod
    def postpone(self, delivery: Delivery, delay_s: float, *, quiet_s: float = 0) -> None:
        """Try a delivery that failed again; its destination may be left alone for a while.

        Args:
            delivery: What was claimed.
            delay_s: When it is due again.
            quiet_s: How long nothing else is delivered to its URL either, of any job.
        """

    @abstractmethod
    def park(self, delivery: Delivery) -> None:
        """Give a delivery up, and those behind it, until they are replayed."""

    @abstractmethod
    def park_overdue(self, destination: str, waited_s: float) -> int:
        """Park the recipients of a destination that are due and have waited for so long.

        Returns:
            How many: a thousand at most.
        """

    @abstractmethod
    def find_parked(self) -> list[DeadDelivery]:
        """Find the recipients that were given up; newest first."""

    @abstractmethod
    def unpark(self, one: DeadDelivery) -> bool:
        """Try a parked recipient again; False where there is nothing to try."""

    @abstractmethod
    def disable(self, url: str) -> None:
        """The receiver has said that it wants nothing more: what it were to get is parked."""

    @abstractmethod
    def find_disabled(self) -> list[str]:
        """Find the URLs whose receivers have said so."""

    @abstractmethod
    def enable(self, url: str) -> None:
        """Deliver to a URL again, and hear what it says."""

    @abstractmethod
    def count_recipients(self) -> int:
        """Count the recipients that have events to come, the parked ones not among them."""


def read(
    destination: str, recipient: str, text: str, *, tries: int = 0, waited_s: float = 0, lease_token: str = ""
) -> Delivery:
    """Read a delivery as it lies in an outbox: event, webhook and document, a line each.

    Raises:
        ValueError: Another version wrote it.
    """
    event, hook, document = text.split("\n", 2)
    return Delivery(
        destination,
        recipient,
        event,
        StatusDocument.model_validate_json(document),
        Webhook.model_validate_json(hook) if hook else None,
        tries,
        waited_s,
        lease_token,
    )


def write(event: str, webhook: Webhook | None, document: StatusDocument) -> str:
    """Write what `read` reads."""
    return f"{event}\n{webhook.to_json() if webhook else ''}\n{document.to_json()}"


def destination(url: str) -> str:
    """`//host` of a webhook's URL, as far as it can be read: it is judged when it is dialled.

    The destination of a sink is its name, which has no slashes.
    """
    host = re.split(r"[/?#\\]", url.partition("://")[2], maxsplit=1)[0]
    return "//" + host.rpartition("@")[2].casefold()
