"""In-memory doubles of every seam, and a tiny network with a known answer: for our tests and yours.

>>> ledger, doorbell = MemoryLedger(), Doorbell()
>>> client = GradcamClient(ledger=ledger, publish=doorbell)
>>> job_id = client.submit(image="s3://in/pier.jpg", network="vgg16", target={"top_n": 1})
>>> [job.id for job in doorbell.jobs] == [job_id]
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.contract import ImageRef, Job, StatusEvent, Webhook
from worker.deadline import Deadline
from worker.errors import ImageNotFound, ImageTooLarge, UnknownLayer, UnknownNetwork
from worker.folder import Object, put_each
from worker.gradcam import cam
from worker.gradcam.catalog import NetworkRow
from worker.gradcam.classes import ClassIndex, Label
from worker.gradcam.decode import Limits
from worker.gradcam.network import GRADCAM, Computed, Method, Network, NetworkFacts
from worker.gradcam.registry import Registry
from worker.gradcam.residents import Residents
from worker.images import Fetched
from worker.memory import MemoryLedger
from worker.memory_outbox import MemoryOutbox
from worker.outside import Outside
from worker.room import Room, Rooms

__all__ = [
    "Doorbell",
    "MemoryImages",
    "MemoryLedger",
    "MemoryMessenger",
    "MemoryOutbox",
    "MemoryStore",
    "TinyNetwork",
    "outside",
]


@dataclass
class Doorbell:
    """Takes what would be published, and remembers it."""

    jobs: list[Job] = field(default_factory=list)

    def __call__(self, job: Job) -> None:
        """See `worker.broker.publish`."""
        self.jobs.append(job)


@dataclass
class MemoryStore:
    """A bucket in a dictionary: also a StoreSource that opens itself, wherever the job points."""

    objects: dict[str, bytes] = field(default_factory=dict)  # in the order they were written

    def open(self, uri: str | None = None) -> "MemoryStore":  # noqa: ARG002
        """See `worker.storage.Stores.open`."""
        return self

    def uri(self, key: str) -> str:
        """See `worker.storage.Store.uri`."""
        return f"memory://{key}"

    def put(self, key: str, data: bytes, media_type: str) -> str:  # noqa: ARG002
        """See `worker.storage.Store.put`."""
        self.objects[key] = data
        return self.uri(key)

    def put_many(self, objects: Sequence[Object], deadline: Deadline) -> list[str]:
        """See `worker.storage.Store.put_many`: in the order given."""
        return put_each(self.put, objects, deadline)

    def find(self, key: str, deadline: Deadline) -> bytes | None:
        """See `worker.storage.Store.find`."""
        deadline.check("looking for what is stored")
        return self.objects.get(key)

    def get(self, key: str) -> bytes:
        """See `worker.storage.Store.get`."""
        return self.objects[key]

    def names(self, folder: str) -> Iterator[str]:
        """See `worker.storage.Store.names`."""
        return iter(sorted(key for key in self.objects if key.startswith(f"{folder}/")))

    def remove(self, key: str) -> None:
        """See `worker.storage.Store.remove`."""
        self.objects.pop(key, None)


@dataclass(frozen=True)
class MemoryImages:
    """Images by URI. An exception in place of bytes is raised."""

    images: Mapping[str, bytes | Exception]

    def fetch(self, image: ImageRef, deadline: Deadline, at_most: int | None = None) -> Fetched:
        """See `worker.images.Images.fetch`."""
        deadline.check("fetch")
        found = self.images.get(image.uri, ImageNotFound(f"There is nothing at {image.uri}."))
        if isinstance(found, Exception):
            raise found
        if at_most is not None and len(found) > at_most:
            message = f"{image.uri} has more than {at_most:,} bytes."
            raise ImageTooLarge(message)
        return Fetched(found, hashlib.sha256(found).hexdigest(), image.uri)


@dataclass
class MemoryMessenger:
    """Takes every event, or raises what it is told to."""

    sent: list[StatusEvent] = field(default_factory=list)
    failure: Exception | None = None

    def check(self, webhook: Webhook) -> None:
        """See `worker.status.Webhooks.check`: every host and secret is allowed."""

    def send(self, url: str, secret_ref: str | None, event: StatusEvent, message_id: str) -> None:  # noqa: ARG002
        """See `worker.status.Webhooks.send`."""
        if self.failure:
            raise self.failure
        self.sent.append(event)


class TinyNetwork:
    """Sees red, green and blue. Input (16, 16), map (4, 4), global average pooling and one dense layer.

    Its activations are the means of 4 x 4 blocks of pixels, scaled to [0, 1]; each class looks at one
    colour and away from the two others. So Grad-CAM is known: the block means weighted by
    (2, -1, -1) / 16, in the order of the class's own colour first.
    """

    SIDE, CELLS = 16, 4
    KERNEL = np.array([[2, -1, -1], [-1, 2, -1], [-1, -1, 2]], np.float32)  # (channels, classes)

    labels = ClassIndex((Label(0, "n1", "red"), Label(1, "n2", "green"), Label(2, "n3", "blue")))
    facts = NetworkFacts(
        name="efficientnet_lite0",  # it stands in for a network of the catalog
        input_size=(SIDE, SIDE),
        preprocessing="none",
        weights_sha256=None,
        backend=f"numpy {np.__version__}",
        dtype="float32",
        default_layer="blocks",
        map_size=(CELLS, CELLS),
        parameters=9,
    )

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        """See `worker.gradcam.network.Network.compute`; of the scores it knows the logit."""
        if method.layer not in {None, "auto", "blocks"}:
            message = f"Layer {method.layer!r} does not exist; there is 'blocks'."
            raise UnknownLayer(message)
        cells, blocks, scores = self.CELLS, self._blocks(pixels), self.scores(pixels)
        order = np.argsort(-scores, axis=1, kind="stable")
        ranked = np.take_along_axis(order, np.maximum(-wanted - 1, 0), axis=1)
        class_ids = np.where(wanted < 0, ranked, wanted).astype(np.int32)
        weights = self.KERNEL.T[class_ids.T] / cells**2  # (k, n, channels)
        gradients = np.broadcast_to(weights[:, :, None, None], (*weights.shape[:2], cells, cells, 3))
        return Computed("blocks", scores, class_ids, cam.METHODS[method.name](np, blocks, gradients))

    def begin(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Callable[[], Computed]:
        """See `worker.gradcam.network.Network.begin`: there is no device but the CPU."""
        computed = self.compute(pixels, wanted, method)
        return lambda: computed

    def scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """See `worker.gradcam.network.Network.scores`."""
        return np.asarray(self._blocks(pixels).mean((1, 2)) @ self.KERNEL, np.float32)

    def _blocks(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        n, cells, step = len(pixels), self.CELLS, self.SIDE // self.CELLS
        means = pixels.reshape(n, cells, step, cells, step, 3).mean((2, 4), dtype=np.float32)
        return np.asarray(means / 255, np.float32)


def outside(
    images: Mapping[str, bytes | Exception], *, store: MemoryStore | None = None, **others: Any
) -> Outside:
    """An Outside in memory, with the catalog's networks, and TinyNetwork for `efficientnet_lite0`."""

    def load(row: NetworkRow) -> Network:
        if row.name != TinyNetwork.facts.name:
            message = f"There is no network {row.name!r} here."
            raise UnknownNetwork(message)
        return TinyNetwork()

    defaults: dict[str, Any] = {
        "images": MemoryImages(images),
        "networks": Registry(),
        "residents": Residents(load),
        "stores": store or MemoryStore(),
        "webhooks": MemoryMessenger(),
        "limits": Limits(),
        "max_classes": 50,
        "rooms": Rooms(Room(2**29, "bytes"), Room(2**28, "pixels"), most_bytes=2**25, threads=1),
    }
    return Outside(**{**defaults, **others})
