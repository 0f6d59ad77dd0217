"""What a job needs from outside, as protocols: the real services, or doubles."""

from dataclasses import dataclass
from typing import Protocol

from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.images.prepare import ImageFetcher
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.budget import Budgets
from gradcam_worker.schemas.job import Webhook
from gradcam_worker.schemas.status import StatusEvent
from gradcam_worker.storage.stores import Store


class ModelRegistry(Protocol):
    """See `gradcam_worker.gradcam.models.registry.Registry`."""

    def find(self, name: str) -> NetworkRow:
        """The row of a network, as it is described now. Raises UnknownNetwork."""
        ...


class StorageProvider(Protocol):
    """See `gradcam_worker.storage.stores.Stores`."""

    def open(self, uri: str | None = None) -> Store:
        """Where artifacts go."""
        ...


class WebhookSender(Protocol):
    """See `gradcam_worker.delivery.webhooks.Webhooks`."""

    def check(self, webhook: Webhook) -> None:
        """Raise UriNotAllowed or InvalidJob unless events may be sent there."""
        ...

    def send(self, url: str, secret_ref: str | None, event: StatusEvent, message_id: str) -> None:
        """Post an event."""
        ...


@dataclass(frozen=True)
class Services:
    """What `gradcam_worker.runtime.service_factory` builds from settings, and `testing` from memory."""

    images: ImageFetcher
    networks: ModelRegistry
    model_cache: ModelCache
    stores: StorageProvider
    webhooks: WebhookSender
    limits: Limits
    max_classes: int
    budgets: Budgets
