"""What is to be told to whom: parcels, which couriers take, in the order of each job's revisions.

A parcel is made in the same atomic step that changes the job: see `Ledger._swap`. Each recipient of a job
(one of its webhooks, or a sink that is told of every job) has a list of them, and only the first of a list
is ever out. Recipients at one host share a lane. After two failures in a row a lane is left alone for a
growing while, and then one parcel tries it: a host that is down holds up no other.
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

    destination: str  # see `lane`
    recipient: str  # <job id>:hook1, or <job id>:sql
    event: str  # job.succeeded and so on
    document: StatusDocument
    webhook: Webhook | None  # none: for the sink
    tries: int  # so far
    waited_s: float  # since it could first be taken
    held: str = ""  # what its dispatcher holds it by: whoever took it later holds it by another


@dataclass(frozen=True)
class DeadDelivery:
    """A recipient that could not be told."""

    destination: str
    recipient: str
    since_s: float  # seconds since the epoch
    events: int  # it is to be told, in order
    first: Delivery | None  # of them; none where it is forgotten by now or cannot be read

    @property
    def job_id(self) -> str:
        """Of the job that it was to be told of."""
        return self.recipient.partition(":")[0]

    @property
    def url(self) -> str | None:
        """Of the webhook; none for a sink, and where the first event is not to be had."""
        return self.first.webhook.url if self.first and self.first.webhook else None


class Outbox(ABC):
    """Raises LedgerUnavailable wherever it cannot be reached."""

    @abstractmethod
    def open_sink(self, name: str) -> None:
        """From now on, this one is told of every job."""

    @abstractmethod
    def close_sink(self, name: str) -> None:
        """It is told of no other job; what lies there for it stays."""

    @abstractmethod
    def take(self, limit: int, keep_s: float, room: Mapping[str, int], others: int) -> list[Delivery]:
        """Parcels that are due, `limit` at most; for `keep_s` nobody else gets one of the same recipients.

        Of a lane that is named in `room`, so many at most; of any other host one, and of these `others`
        together; of a lane that failed the last time one, and no other courier gets one meanwhile. Sinks
        have to be named.
        """

    @abstractmethod
    def delivered(self, delivery: Delivery) -> None:
        """It has arrived, or never can: the recipient's next one is due."""

    @abstractmethod
    def postpone(self, delivery: Delivery, delay_s: float, *, quiet_s: float = 0) -> None:
        """It was tried in vain and is due again in `delay_s`; its lane may be left alone for a while.

        For `quiet_s` its URL is told nothing else either, of any job.
        """

    @abstractmethod
    def park(self, delivery: Delivery) -> None:
        """Nobody tries any more, this one and those behind it, until they are replayed."""

    @abstractmethod
    def park_old(self, lane: str, waited_s: float) -> int:
        """Park those whose turn at this lane has not come for so long; how many, a thousand at most."""

    @abstractmethod
    def parked(self) -> list[DeadDelivery]:
        """Whoever could not be told; newest first."""

    @abstractmethod
    def unpark(self, one: DeadDelivery) -> bool:
        """Try again; whether there was something to try."""

    @abstractmethod
    def disable(self, url: str) -> None:
        """The receiver has said that it wants nothing more: whatever it were to be told is parked."""

    @abstractmethod
    def disabled(self) -> list[str]:
        """The URLs that have."""

    @abstractmethod
    def enable(self, url: str) -> None:
        """Try again what it says."""

    @abstractmethod
    def count(self) -> int:
        """Recipients that wait to be told, the parked ones not among them."""


def read(
    lane: str, recipient: str, text: str, *, tries: int = 0, waited_s: float = 0, held: str = ""
) -> Delivery:
    """A parcel as it lies in an outbox: event, webhook and document, a line each. Raises ValueError."""
    event, hook, document = text.split("\n", 2)
    return Delivery(
        lane,
        recipient,
        event,
        StatusDocument.model_validate_json(document),
        Webhook.model_validate_json(hook) if hook else None,
        tries,
        waited_s,
        held,
    )


def write(event: str, webhook: Webhook | None, document: StatusDocument) -> str:
    """The other way round."""
    return f"{event}\n{webhook.to_json() if webhook else ''}\n{document.to_json()}"


def destination(url: str) -> str:
    """`//host` of a webhook's URL, as far as it can be read: it is judged when it is dialled.

    A sink's lane is its name, which has no slashes.
    """
    host = re.split(r"[/?#\\]", url.partition("://")[2], maxsplit=1)[0]
    return "//" + host.rpartition("@")[2].casefold()
