"""The services that a job uses, as protocols, so that tests can replace them."""

from dataclasses import dataclass
from typing import Any, Protocol

from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.images.prepare import ImageFetcher
from gradcam_worker.inference.client import InferenceClient
from gradcam_worker.resilience.budget import Budgets
from gradcam_worker.schemas.job import Webhook
from gradcam_worker.schemas.status import StatusEvent
from gradcam_worker.storage.store import Store


class ModelRegistry(Protocol):
    """See `gradcam_worker.gradcam.registry.registry.Registry`."""

    def find(self, name: str) -> NetworkRow:
        """Look up the current row of a network. Raises UnknownNetwork."""
        ...


class StorageProvider(Protocol):
    """See `gradcam_worker.storage.stores.Stores`."""

    def open(self, uri: str | None = None) -> Store:
        """Open an output; by default that of the settings."""
        ...


class WebhookSender(Protocol):
    """See `gradcam_worker.delivery.webhooks.Webhooks`."""

    def check(self, webhook: Webhook) -> None:
        """Raise UriNotAllowed or InvalidJob unless events may be sent to this webhook."""
        ...

    def send(self, url: str, secret_ref: str | None, event: StatusEvent, message_id: str) -> None:
        """Post an event."""
        ...


@dataclass(frozen=True)
class Services:
    """The services of a worker process. See `service_factory.build_services` and `testing.fake_services`."""

    images: ImageFetcher
    networks: ModelRegistry
    inference: InferenceClient[Any]
    stores: StorageProvider
    webhooks: WebhookSender
    limits: Limits
    max_classes: int
    budgets: Budgets
