"""In-memory doubles of servers and services, and a tiny network with known heatmaps, for tests.

>>> ledger, publisher = MemoryLedger(), RecordingPublisher()
>>> client = GradcamClient(ledger=ledger, publish=publisher)
>>> job = client.submit(image="s3://in/pier.jpg", network="vgg16", top_n=1)
>>> [one.id for one in publisher.jobs] == [job]

`eager_client` is for unit tests of a web app: it needs no servers and no TensorFlow, but the extra `testing`.
"""

import base64
import hashlib
import mimetypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from gradcam_worker import extras

with extras.required("gradcam_worker.testing", "testing"):
    import numpy as np
    from numpy.typing import NDArray

    from gradcam_worker.client.client import GradcamClient
    from gradcam_worker.errors import (
        ImageNotFound,
        ImageTooLarge,
        StorageUnavailable,
        UnknownLayer,
        UnknownNetwork,
    )
    from gradcam_worker.execution.handler import JobHandler
    from gradcam_worker.execution.leases import LeaseManager
    from gradcam_worker.execution.services import Services
    from gradcam_worker.gradcam.catalog import NetworkRow
    from gradcam_worker.gradcam.classes import ClassIndex, Label, imagenet
    from gradcam_worker.gradcam.decoding.decode import Limits
    from gradcam_worker.gradcam.methods import cam, integrated
    from gradcam_worker.gradcam.network import GRADCAM, Computed, InputPixels, Method, Network, NetworkFacts
    from gradcam_worker.gradcam.registry.registry import Registry
    from gradcam_worker.images.fetch import FetchedBytes
    from gradcam_worker.inference.model_cache import ModelCache
    from gradcam_worker.ledger.memory.outbox import MemoryOutbox
    from gradcam_worker.ledger.memory.store import MemoryLedger
    from gradcam_worker.resilience.budget import Budgets, ResourceBudget
    from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
    from gradcam_worker.resilience.deadline import Deadline
    from gradcam_worker.schemas.job import ImageRef, Job, Webhook
    from gradcam_worker.schemas.status import StatusEvent, WorkerRef
    from gradcam_worker.settings import Settings
    from gradcam_worker.storage.filesystem import CollectedUpload, Object, put_each

__all__ = [
    "EagerNetwork",
    "MemoryImageFetcher",
    "MemoryLedger",
    "MemoryObjects",
    "MemoryOutbox",
    "MemoryStore",
    "RecordingPublisher",
    "RecordingWebhookSender",
    "TinyNetwork",
    "eager_client",
    "fake_services",
]


@dataclass
class RecordingPublisher:
    """Records jobs instead of publishing them."""

    jobs: list[Job] = field(default_factory=list)

    def __call__(self, job: Job) -> None:
        """See `gradcam_worker.broker.publisher.Publisher.publish`."""
        self.jobs.append(job)


@dataclass
class MemoryStore:
    """A bucket in a dictionary. It is also a StoreSource: `open` returns the bucket itself for every URI."""

    objects: dict[str, bytes] = field(default_factory=dict)  # in the order of writing

    def open(self, uri: str | None = None) -> "MemoryStore":  # noqa: ARG002
        """See `gradcam_worker.storage.stores.Stores.open`."""
        return self

    def uri(self, key: str) -> str:
        """See `gradcam_worker.storage.stores.Store.uri`."""
        return f"memory://{key}"

    def put(self, key: str, data: bytes, media_type: str) -> str:  # noqa: ARG002
        """See `gradcam_worker.storage.stores.Store.put`."""
        self.objects[key] = data
        return self.uri(key)

    def put_many(
        self, objects: Sequence[Object], deadline: Deadline, last: Object | None = None
    ) -> list[str]:
        """See `gradcam_worker.storage.stores.Store.put_many`: in order."""
        return put_each(self.put, objects, deadline, last)

    def upload(self, deadline: Deadline) -> AbstractContextManager["CollectedUpload"]:
        """See `gradcam_worker.storage.stores.Store.upload`."""
        return nullcontext(CollectedUpload(self.put_many, deadline))

    def find(self, key: str, deadline: Deadline) -> bytes | None:
        """See `gradcam_worker.storage.stores.Store.find`."""
        deadline.check("looking for what is stored")
        return self.objects.get(key)

    def get(self, key: str) -> bytes:
        """See `gradcam_worker.storage.stores.Store.get`."""
        return self.objects[key]

    def get_part(self, key: str, start: int, size: int) -> tuple[bytes, int]:
        """See `gradcam_worker.storage.stores.Store.get_part`."""
        data = self.objects[key]
        first = max(len(data) + start, 0) if start < 0 else start
        return data[first : first + size], len(data)

    def names(self, folder: str) -> Iterator[str]:
        """See `gradcam_worker.storage.stores.Store.names`."""
        return iter(sorted(key for key in self.objects if key.startswith(f"{folder}/")))

    def remove(self, key: str) -> None:
        """See `gradcam_worker.storage.stores.Store.remove`."""
        self.objects.pop(key, None)


@dataclass(frozen=True)
class MemoryImageFetcher:
    """Images by URI. An exception in place of bytes is raised when the image is fetched."""

    images: Mapping[str, bytes | BaseException]

    def fetch(self, image: ImageRef, deadline: Deadline, max_bytes: int | None = None) -> FetchedBytes:
        """See `gradcam_worker.images.fetch.UriFetcher.fetch`."""
        deadline.check("fetch")
        data = self.images.get(image.uri, ImageNotFound(f"There is nothing at {image.uri}."))
        if isinstance(data, BaseException):
            raise data
        if max_bytes is not None and len(data) > max_bytes:
            message = f"{image.uri} has more than {max_bytes:,} bytes."
            raise ImageTooLarge(message)
        return FetchedBytes(data, hashlib.sha256(data).hexdigest(), image.uri)


@dataclass
class RecordingWebhookSender:
    """Records events instead of sending them, or raises `failure`."""

    sent: list[StatusEvent] = field(default_factory=list)
    failure: Exception | None = None

    def check(self, webhook: Webhook) -> None:
        """See `gradcam_worker.delivery.webhooks.Webhooks.check`: every host and secret is allowed."""

    def send(self, url: str, secret_ref: str | None, event: StatusEvent, message_id: str) -> None:  # noqa: ARG002
        """See `gradcam_worker.delivery.webhooks.Webhooks.send`."""
        if self.failure:
            raise self.failure
        self.sent.append(event)


class TinyNetwork:
    """A network with the classes red, green and blue, whose Grad-CAM heatmaps are known.

    Its input is (16, 16), its heatmaps are (4, 4). The activations of its target layer are the means of 4 x 4
    blocks of pixels, scaled to [0, 1]; global average pooling and one dense layer follow. The heatmap of a
    class is the sum of the block means, with the weight 2 / 16 for its own colour and -1 / 16 for the others.
    """

    SIDE, CELLS = 16, 4
    KERNEL = np.array([[2, -1, -1], [-1, 2, -1], [-1, -1, 2]], np.float32)  # (channels, classes)

    labels = ClassIndex((Label(0, "n1", "red"), Label(1, "n2", "green"), Label(2, "n3", "blue")))
    facts = NetworkFacts(
        name="efficientnet_lite0",  # the network of the catalog that it replaces
        input_size=(SIDE, SIDE),
        preprocessing="none",
        weights_sha256=None,
        backend=f"numpy {np.__version__}",
        dtype="float32",
        default_layer="blocks",
        map_size=(CELLS, CELLS),
        parameters=9,
    )

    def compute(self, pixels: InputPixels, wanted: NDArray[np.int32], method: Method = GRADCAM) -> Computed:
        """See `gradcam_worker.gradcam.network.Network.compute`: the score is always the logit."""
        if method.layer not in {None, "auto", "blocks"}:
            message = f"Layer {method.layer!r} does not exist; there is 'blocks'."
            raise UnknownLayer(message)
        if method.name == integrated.NAME:
            return self._integrate(pixels, wanted, method)
        cells, blocks, scores = self.CELLS, self._blocks(pixels), self.scores(pixels)
        class_ids, weights = self._explained(scores, wanted, method)
        weights = weights / np.float32(cells**2)
        gradients = np.broadcast_to(weights[:, :, None, None], (*weights.shape[:2], cells, cells, 3))
        raw = cam.METHODS[method.name](np, blocks, gradients)
        with np.errstate(invalid="ignore"):  # of a map that is zero
            features = cam.heat_features(np, blocks, raw) if method.features else None
        return Computed("blocks", scores, class_ids, raw, features=features)

    def _explained(
        self, scores: NDArray[np.float32], wanted: NDArray[np.int32], method: Method
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Class ids (n, k), and how what is explained rises with the mean of each colour (k, n, channels)."""
        ranked_scores = scores.copy()
        ranked_scores[:, [*method.against]] = -np.inf
        order = np.argsort(-ranked_scores, axis=1, kind="stable")
        ranked = np.take_along_axis(order, np.maximum(-wanted - 1, 0), axis=1)
        class_ids = np.where(wanted < 0, ranked, wanted).astype(np.int32)
        slopes: NDArray[Any] = self.KERNEL.T[class_ids.T]
        if method.against:
            slopes = slopes - self.KERNEL.T[[*method.against]].mean(axis=0)
        return class_ids, np.asarray(slopes, np.float32)

    def _integrate(self, pixels: InputPixels, wanted: NDArray[np.int32], method: Method) -> Computed:
        """Integrated Gradients: the scores are linear, so that the slopes are the same at every step."""
        scores = self.scores(pixels)
        class_ids, slopes = self._explained(scores, wanted, method)
        _, shares = integrated.positions_and_shares(method)
        apart = pixels.astype(np.float32) - integrated.baseline(pixels, method.baseline)
        raw = np.einsum("nhwc,knc->nkhw", apart, slopes) * shares.sum() / (255 * self.SIDE**2)
        return Computed(integrated.LAYER, scores, class_ids, raw.astype(np.float32))

    def begin(
        self, pixels: InputPixels, wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Callable[[], Computed]:
        """See `gradcam_worker.gradcam.network.Network.begin`: it computes at once, on the CPU."""
        computed = self.compute(pixels, wanted, method)
        return lambda: computed

    def scores(self, pixels: InputPixels) -> NDArray[np.float32]:
        """See `gradcam_worker.gradcam.network.Network.scores`."""
        return np.asarray(self._blocks(pixels).mean((1, 2)) @ self.KERNEL, np.float32)

    def _blocks(self, pixels: InputPixels) -> NDArray[np.float32]:
        n, cells, step = len(pixels), self.CELLS, self.SIDE // self.CELLS
        means = pixels.reshape(n, cells, step, cells, step, 3).mean((2, 4), dtype=np.float32)
        return np.asarray(means / 255, np.float32)


class EagerNetwork(TinyNetwork):
    """The network of `eager_client`: the classes of ImageNet by their own numbers, then red, green and blue.

    As in `TinyNetwork` the most probable classes are red, green and blue, and their heatmaps are known. Those
    of ImageNet can be asked for: each is warm where the image is bright.
    """

    labels = ClassIndex(
        (
            *imagenet().labels,
            *(Label(len(imagenet()) + id_, wnid, name) for id_, wnid, name in TinyNetwork.labels.labels),
        )
    )
    KERNEL = np.concatenate(  # (channels, classes)
        [np.random.default_rng(0).random((3, len(imagenet())), np.float32), TinyNetwork.KERNEL], axis=1
    )
    HANDICAP = 10.0  # of each class of ImageNet, in its score

    def scores(self, pixels: InputPixels) -> NDArray[np.float32]:
        """See `gradcam_worker.gradcam.network.Network.scores`."""
        scores = super().scores(pixels)
        scores[:, : len(imagenet())] -= self.HANDICAP
        return scores


def fake_services(
    images: Mapping[str, bytes | BaseException], *, store: MemoryStore | None = None, **others: Any
) -> Services:
    """Create the services of a worker, in memory.

    Args:
        images: The images that can be fetched, by URI. An exception in place of bytes is raised.
        store: The bucket for results; None: a new one.
        others: Fields of `gradcam_worker.execution.services.Services` to replace.

    Returns:
        The services, with the networks of the catalog. Only `efficientnet_lite0` can be loaded: TinyNetwork.
    """

    def load(row: NetworkRow) -> Network:
        if row.name != TinyNetwork.facts.name:
            message = f"There is no network {row.name!r} here."
            raise UnknownNetwork(message)
        return TinyNetwork()

    defaults: dict[str, Any] = {
        "images": MemoryImageFetcher(images),
        "networks": Registry(),
        "inference": ModelCache(load),
        "stores": store or MemoryStore(),
        "webhooks": RecordingWebhookSender(),
        "limits": Limits(),
        "max_classes": 50,
        "budgets": Budgets(
            ResourceBudget(2**29, "bytes"), ResourceBudget(2**28, "pixels"), max_image_bytes=2**25, threads=1
        ),
    }
    return Services(**{**defaults, **others})


@dataclass
class MemoryObjects:
    """The objects that a client reads and uploads: see `gradcam_worker.client.results.Objects`."""

    store: MemoryStore
    images: dict[str, bytes | BaseException]

    def read(self, uri: str) -> bytes:
        """See `gradcam_worker.client.results.Objects.read`."""
        data = self.store.objects.get(uri.removeprefix("memory://"))
        if data is None:
            message = f"There is nothing at {uri}."
            raise StorageUnavailable(message)
        return data

    def put(self, uri: str, data: bytes, media_type: str) -> None:  # noqa: ARG002
        """See `gradcam_worker.client.results.Objects.put`."""
        self.images[uri] = data

    def url(self, uri: str, expires_s: int) -> str:  # noqa: ARG002
        """See `gradcam_worker.client.results.Objects.url`: the object itself, as a data: URL."""
        media_type = mimetypes.guess_type(uri)[0] or "application/octet-stream"
        return f"data:{media_type};base64,{base64.b64encode(self.read(uri)).decode()}"


def eager_client(
    images: Mapping[str, bytes | BaseException] | None = None,
    *,
    network: Network | None = None,
    settings: Settings | None = None,
    **others: Any,
) -> GradcamClient:
    """Create a client whose `submit` runs the job at once and in memory, for unit tests.

    Failed attempts are retried without a pause. Webhooks are not called.

    Args:
        images: The images, by URI. An exception in place of bytes is raised when the image is fetched.
        network: Computes every job, whichever network of the catalog the job names. None: an `EagerNetwork`,
            which knows the classes of ImageNet, and red, green and blue, which it sees.
        settings: The settings; None: the defaults.
        others: Fields of `gradcam_worker.execution.services.Services` to replace.

    Returns:
        The client.

    Examples:
        >>> import cv2
        >>> red = cv2.imencode(".png", np.full((32, 32, 3), (0, 0, 255), np.uint8))[1].tobytes()
        >>> client = eager_client({"s3://in/red.png": red})
        >>> job = client.submit(image="s3://in/red.png", network="vgg16", top_n=1)
        >>> job.wait().predictions[0].name
        'red'
        >>> overlay = job.result().overlays[0]
        >>> (overlay.class_name, overlay.url.partition(",")[0])
        ('red', 'data:image/jpeg;base64')
        >>> cats = client.submit(image="s3://in/red.png", network="vgg16", classes=["tabby", 285])
        >>> [one.class_name for one in cats.result().overlays]
        ['tabby', 'Egyptian_cat']
        >>> client.submit(image="s3://in/lost.png", network="vgg16", top_n=1).status().error.code
        'image_not_found'
    """
    settings = settings or Settings()
    uploads = settings.uploads or "s3://uploads"
    settings = settings.model_copy(update={"retry_backoff_s": 1e-6, "uploads": uploads})
    image_data, store, ledger = dict(images or {}), MemoryStore(), MemoryLedger()
    inference = ModelCache(lambda _: network or EagerNetwork())
    services = fake_services(image_data, store=store, **{"inference": inference, **others})
    worker = WorkerRef(id="eager", device="cpu")

    def run(job: Job) -> None:
        leases = LeaseManager(ledger, worker.id, settings.lease_s)
        handler = JobHandler(settings, ledger, services, worker, leases, CircuitBreaker(lambda: None))
        while not ledger.read(job.id).final:
            ledger.requeue(job.id)  # if it is retrying
            handler.handle({"id": job.id}, job.id)

    objects = MemoryObjects(store, image_data)
    return GradcamClient(settings=settings, ledger=ledger, publish=run, objects=objects)
