"""Everything a job touches that is not the job, by what is asked of it: real, or a double."""

from dataclasses import dataclass
from typing import Protocol

from worker.contract import ImageRef, StatusEvent, Webhook
from worker.deadline import Deadline
from worker.gradcam.catalog import NetworkRow
from worker.gradcam.decode import Limits
from worker.gradcam.residents import Residents
from worker.images import Fetched
from worker.room import Rooms
from worker.storage import Store


class ImageSource(Protocol):
    """See `worker.images.Images`."""

    def fetch(self, image: ImageRef, deadline: Deadline, at_most: int | None = None) -> Fetched:
        """URI -> bytes: `at_most` so many, where less is wanted than is allowed."""
        ...


class NetworkSource(Protocol):
    """See `worker.gradcam.registry.Registry`."""

    def find(self, name: str) -> NetworkRow:
        """The row of a network, as it is described now. Raises UnknownNetwork."""
        ...


class StoreSource(Protocol):
    """See `worker.storage.Stores`."""

    def open(self, uri: str | None = None) -> Store:
        """Where artifacts go."""
        ...


class Messenger(Protocol):
    """See `worker.status.Webhooks`."""

    def check(self, webhook: Webhook) -> None:
        """Raise UriNotAllowed or InvalidJob unless events may be sent there."""
        ...

    def send(self, url: str, secret_ref: str | None, event: StatusEvent, message_id: str) -> None:
        """Post an event."""
        ...


@dataclass(frozen=True)
class Outside:
    """What `wiring` builds from settings, and `testing` from memory."""

    images: ImageSource
    networks: NetworkSource
    residents: Residents
    stores: StoreSource
    webhooks: Messenger
    limits: Limits
    max_classes: int
    rooms: Rooms
