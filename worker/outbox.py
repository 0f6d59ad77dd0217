"""What is to be told to whom: parcels, which couriers take, in the order of each job's revisions.

A parcel is made in the same atomic step that changes the job: see `Ledger._swap`. Each recipient of a job
(one of its webhooks, or a sink that is told of every job) has a list of them, and only the first of a list
is ever out. Recipients at one host share a lane, which is left alone for a while after a failure: a host
that is down holds up no other.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from worker.contract import StatusDocument, Webhook


@dataclass(frozen=True)
class Parcel:
    """One event on its way to one recipient."""

    lane: str  # a host, or the name of a sink
    recipient: str  # <job id>:hook1, or <job id>:sql
    event: str  # job.succeeded and so on
    document: StatusDocument
    webhook: Webhook | None  # none: for the sink
    tries: int  # so far
    waited_s: float  # since it was first tried
    text: str  # as it lies in the outbox


@dataclass(frozen=True)
class Parked:
    """A recipient that could not be told."""

    lane: str
    recipient: str
    since_s: float  # seconds since the epoch
    first: Parcel | None  # what it was to be told; none where that is forgotten by now


class Outbox(ABC):
    """Raises LedgerUnavailable wherever it cannot be reached."""

    @abstractmethod
    def open_sink(self, name: str) -> None:
        """From now on, this one is told of every job."""

    @abstractmethod
    def close_sink(self, name: str) -> None:
        """It is told of no other job; what lies there for it stays."""

    @abstractmethod
    def take(self, limit: int, keep_s: float) -> list[Parcel]:
        """Parcels that are due. For `keep_s`, no other courier gets one of the same recipients."""

    @abstractmethod
    def delivered(self, parcel: Parcel) -> None:
        """It has arrived, or never can: the recipient's next one is due."""

    @abstractmethod
    def postpone(self, parcel: Parcel, delay_s: float) -> None:
        """It was tried in vain and is due again in `delay_s`; its lane is left alone for a while."""

    @abstractmethod
    def park(self, parcel: Parcel) -> None:
        """Nobody tries any more, this one and those behind it, until they are replayed."""

    @abstractmethod
    def parked(self) -> list[Parked]:
        """Whoever could not be told; newest first."""

    @abstractmethod
    def unpark(self, one: Parked) -> bool:
        """Try again; whether there was something to try."""

    @abstractmethod
    def disable(self, url: str) -> None:
        """The receiver has said that it wants nothing more."""

    @abstractmethod
    def disabled(self, url: str) -> bool:
        """Whether it has."""

    @abstractmethod
    def enable(self, url: str) -> None:
        """Try again what it says."""

    @abstractmethod
    def count(self) -> int:
        """Lanes where something waits to be told, parked parcels not among it."""


def read(lane: str, recipient: str, text: str, tries: int = 0, waited_s: float = 0) -> Parcel:
    """A parcel as it lies in an outbox: event, webhook and document, a line each."""
    event, hook, document = text.split("\n", 2)
    return Parcel(
        lane,
        recipient,
        event,
        StatusDocument.model_validate_json(document),
        Webhook.model_validate_json(hook) if hook else None,
        tries,
        waited_s,
        text,
    )


def write(event: str, webhook: Webhook | None, document: StatusDocument) -> str:
    """The other way round."""
    return f"{event}\n{webhook.to_json() if webhook else ''}\n{document.to_json()}"


def lane(url: str) -> str:
    """The host that a webhook's URL leads to, as far as it can be read; it is judged when it is dialled."""
    return url.partition("://")[2].partition("/")[0].rpartition("@")[2].casefold() or "unreadable"
