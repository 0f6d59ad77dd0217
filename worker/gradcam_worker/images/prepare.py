"""URI -> bytes -> pixels -> a network's input, within the memory budgets of the process.

    with fetch_image(ref, services, deadline) as fetched, fetched.decode() as image:
        pixels = image.fit(network.facts)

The image of a job and that of a row of a shard are prepared in the same way. What is in memory is reserved in
`Budgets`: bytes from before they are fetched until they are decoded, pixels from before they are decoded
until they are released.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import ImageTooLarge
from gradcam_worker.gradcam.decoding.decode import Decoded, Limits, declared_pixels, decode
from gradcam_worker.gradcam.explain import check_channels
from gradcam_worker.gradcam.imaging.overlay import fit
from gradcam_worker.gradcam.network import NetworkFacts
from gradcam_worker.images.fetch import Fetched
from gradcam_worker.resilience.budget import Budgets, Reservation
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef
from gradcam_worker.schemas.manifest import DamageRecord, InputRecord


class ImageFetcher(Protocol):
    """See `gradcam_worker.images.fetch.UriFetcher`."""

    def fetch(self, image: ImageRef, deadline: Deadline, at_most: int | None = None) -> Fetched:
        """URI -> bytes: `at_most` so many, where less is wanted than is allowed."""
        ...


class ImageServices(Protocol):
    """What preparing an image takes: a part of `gradcam_worker.execution.services.Services`."""

    @property
    def images(self) -> ImageFetcher:
        """Where bytes come from."""
        ...

    @property
    def budgets(self) -> Budgets:
        """How many bytes and pixels may be in memory at once."""
        ...

    @property
    def limits(self) -> Limits:
        """How large, and how damaged, one image may be."""
        ...


class DecodedImage:
    """An image's pixels, and the reservation for them."""

    def __init__(self, record: InputRecord, decoded: Decoded, reservation: Reservation) -> None:
        """`record` is what a manifest says of the image."""
        self.record, self.decoded, self._reservation = record, decoded, reservation

    def fit(self, facts: NetworkFacts) -> NDArray[np.uint8]:
        """The image as a network takes it.

        Returns:
            Pixels (height, width, channels) of the network's input size.

        Raises:
            NetworkIncompatible: The network takes images of another number of channels.
        """
        check_channels(facts, self.decoded.pixels)
        return fit(self.decoded.pixels, facts.input_size)

    def release(self) -> None:
        """Drop the pixels before the block ends, and give back what was reserved for them."""
        del self.decoded
        self._reservation.shrink_to(0)


class FetchedImage:
    """An image's bytes, and the reservation for them."""

    def __init__(
        self, fetched: Fetched, reservation: Reservation, services: ImageServices, deadline: Deadline
    ) -> None:
        """`reservation` is of as many bytes as were fetched."""
        self.sha256 = fetched.sha256
        self._fetched, self._reservation = fetched, reservation
        self._services, self._deadline = services, deadline

    @contextmanager
    def decode(self) -> Iterator[DecodedImage]:
        """Decode the image, once, and drop its bytes. Within the block its pixels are reserved.

        Raises:
            UnsupportedMediaType, ImagePixelsExceeded, ImageDecodeFailed: It is no image that is allowed.
            InternalError: There is not enough memory just now.
            JobTimeout: The deadline passed while other images held the budget.
        """
        services = self._services
        pixels = declared_pixels(self._fetched.data, services.limits)
        with services.budgets.pixels.reserve(pixels, self._deadline) as reservation:
            decoded = decode(self._fetched.data, services.limits)
            image = DecodedImage(_record(self._fetched, decoded), decoded, reservation)
            del decoded, self._fetched
            self._reservation.shrink_to(0)
            yield image


@contextmanager
def fetch_image(image: ImageRef, services: ImageServices, deadline: Deadline) -> Iterator[FetchedImage]:
    """Fetch an image. Within the block its bytes are reserved until it is decoded.

    How many bytes it has is not known before. So a thread's even share of the budget is reserved first, which
    is free at once as long as all images are of that size. One that proves larger is given up, and fetched
    again when there is room for the largest that is allowed.

    Args:
        image: Where it is, and perhaps which bytes it must be.
        services: The fetcher, the budgets and the limits.
        deadline: By when it has to be there.

    Raises:
        GradcamError: Whatever the fetcher raises: see `gradcam_worker.images.fetch.UriFetcher.fetch`.
        JobTimeout: The deadline passed while other images held the budget.
    """
    with ExitStack() as held:
        fetched, reservation = _fetch(image, services, deadline, held)
        reservation.shrink_to(len(fetched.data))
        opened = FetchedImage(fetched, reservation, services, deadline)
        del fetched  # or this frame would hold the bytes until the block ends
        yield opened


def _fetch(
    image: ImageRef, services: ImageServices, deadline: Deadline, held: ExitStack
) -> tuple[Fetched, Reservation]:
    """The image, and the reservation that `held` keeps for it."""
    *smaller, largest = services.budgets.steps
    for at_most in smaller:
        with ExitStack() as attempt, suppress(ImageTooLarge):
            reservation = attempt.enter_context(services.budgets.bytes.reserve(at_most, deadline))
            fetched = services.images.fetch(image, deadline, at_most)
            held.push(attempt.pop_all())
            return fetched, reservation
    reservation = held.enter_context(services.budgets.bytes.reserve(largest, deadline))
    return services.images.fetch(image, deadline, largest), reservation


def _record(fetched: Fetched, decoded: Decoded) -> InputRecord:
    height, width = decoded.size
    damage = decoded.damage
    return InputRecord(
        uri=fetched.uri,
        sha256=fetched.sha256,
        bytes=len(fetched.data),
        media_type=decoded.media_type,
        width=width,
        height=height,
        damage=DamageRecord(missing=round(damage.share, 4), detail=damage.what) if damage else None,
    )
