"""Fetches, decodes and fits an image, within the memory budgets of the process.

    with fetch_image(ref, services, deadline) as fetched, fetched.decode() as image:
        pixels = image.fit(network.facts)

Jobs and the rows of shards use the same steps. Memory is reserved in `Budgets` before it is used: for the
encoded bytes until they are decoded, and for the pixels until they are released.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Protocol

from gradcam_worker.errors import ImageTooLarge
from gradcam_worker.gradcam.decoding.decode import Decoded, Limits, decode, read_structure
from gradcam_worker.gradcam.explain import check_channels
from gradcam_worker.gradcam.imaging.network_input import to_input
from gradcam_worker.gradcam.network import InputPixels, NetworkFacts
from gradcam_worker.gradcam.sizing import Placement
from gradcam_worker.images.fetch import FetchedBytes
from gradcam_worker.observability import native_output
from gradcam_worker.resilience.budget import Budgets, Reservation
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef
from gradcam_worker.schemas.manifest import ColorRecord, DamageRecord, InputRecord


class ImageFetcher(Protocol):
    """See `gradcam_worker.images.fetch.UriFetcher`."""

    def fetch(self, image: ImageRef, deadline: Deadline, max_bytes: int | None = None) -> FetchedBytes:
        """Read an image of at most `max_bytes`."""
        ...


class ImageServices(Protocol):
    """What preparing an image needs: a part of `gradcam_worker.execution.services.Services`."""

    @property
    def images(self) -> ImageFetcher:
        """Reads the bytes of images."""
        ...

    @property
    def budgets(self) -> Budgets:
        """The limits of bytes and pixels in memory at once."""
        ...

    @property
    def limits(self) -> Limits:
        """The limits of the size and the damage of one image."""
        ...


class DecodedImage:
    """The pixels of an image, and their memory reservation."""

    def __init__(self, record: InputRecord, decoded: Decoded, reservation: Reservation) -> None:
        """`record` describes the image in a manifest."""
        self.record, self.decoded, self._reservation = record, decoded, reservation

    def fit(self, facts: NetworkFacts) -> InputPixels:
        """Bring the image to the input size of a network, as its `sizing` says.

        Returns:
            Pixels (height, width, channels), of its `pixel_type`.

        Raises:
            NetworkIncompatible: The network expects a different number of channels.
            ImagePixelsExceeded: The image is too long and narrow for a centre crop.
        """
        check_channels(facts, self.decoded.pixels)
        return to_input(self.decoded.pixels, facts.input_size, facts.sizing)

    def placement(self, facts: NetworkFacts) -> Placement | None:
        """The part of the image that the input of a network shows; None: exactly all of it."""
        return facts.sizing.placement(self.decoded.size, facts.input_size)

    def release(self) -> None:
        """Drop the pixels and their reservation before the block ends."""
        del self.decoded
        self._reservation.shrink_to(0)


class FetchedImage:
    """The encoded bytes of an image, and their memory reservation."""

    def __init__(
        self, fetched: FetchedBytes, reservation: Reservation, services: ImageServices, deadline: Deadline
    ) -> None:
        """`reservation` is for exactly the bytes in `fetched`."""
        self.sha256 = fetched.sha256
        self._fetched, self._reservation = fetched, reservation
        self._services, self._deadline = services, deadline

    @contextmanager
    def decode(self, *, fast_jpeg: bool = False) -> Iterator[DecodedImage]:
        """Decode the image and drop its bytes. Can be called once. Within the block its pixels are reserved.

        Args:
            fast_jpeg: See `Limits`; what the `sizing` of the network says.

        Raises:
            UnsupportedMediaType: It is not an image of a known format.
            ImagePixelsExceeded: It has more pixels than are allowed.
            ImageDecodeFailed: It is damaged beyond the allowed share.
            InternalError: The process is out of memory.
            JobTimeout: The deadline passed while other images used up the budget.
        """
        services, fetched = self._services, self._fetched
        stored, size = read_structure(fetched.data, services.limits), len(fetched.data)
        uri = fetched.uri
        del fetched, self._fetched  # `stored` has a copy of what decoders need
        with services.budgets.pixels.reserve(stored.declared_pixels, self._deadline) as reservation:
            decoded = decode(stored, replace(services.limits, fast_jpeg=fast_jpeg), native_output.attributed)
            image = DecodedImage(_input_record(uri, self.sha256, size, decoded), decoded, reservation)
            del decoded, stored
            self._reservation.shrink_to(0)
            yield image


@contextmanager
def fetch_image(image: ImageRef, services: ImageServices, deadline: Deadline) -> Iterator[FetchedImage]:
    """Fetch an image. Within the block its bytes are reserved until it is decoded.

    The size of an image is not known in advance. So one thread's even share of the budget is reserved first,
    which is available at once as long as all images fit into their share. The fetch of a larger image is
    aborted, and repeated when there is room for the largest image that is allowed.

    Args:
        image: Its URI, and its SHA-256 if the bytes have to match one.
        services: The fetcher, the budgets and the limits.
        deadline: By when the image has to be fetched and decoded.

    Raises:
        GradcamError: Whatever the fetcher raises: see `gradcam_worker.images.fetch.UriFetcher.fetch`.
        JobTimeout: The deadline passed while other images used up the budget.
    """
    with ExitStack() as reservations:
        fetched, reservation = _fetch(image, services, deadline, reservations)
        reservation.shrink_to(len(fetched.data))
        fetched_image = FetchedImage(fetched, reservation, services, deadline)
        del fetched  # or this frame would keep the bytes until the block ends
        yield fetched_image


def _fetch(
    image: ImageRef, services: ImageServices, deadline: Deadline, reservations: ExitStack
) -> tuple[FetchedBytes, Reservation]:
    """Fetch an image; return it and its reservation, which ends with `reservations`."""
    *smaller, largest = services.budgets.reservation_steps
    for max_bytes in smaller:
        with ExitStack() as attempt, suppress(ImageTooLarge):
            reservation = attempt.enter_context(services.budgets.bytes.reserve(max_bytes, deadline))
            fetched = services.images.fetch(image, deadline, max_bytes)
            reservations.push(attempt.pop_all())
            return fetched, reservation
    reservation = reservations.enter_context(services.budgets.bytes.reserve(largest, deadline))
    return services.images.fetch(image, deadline, largest), reservation


def _input_record(uri: str, sha256: str, size: int, decoded: Decoded) -> InputRecord:
    height, width = decoded.size
    damage, source = decoded.damage, decoded.converted_from
    return InputRecord(
        uri=uri,
        sha256=sha256,
        bytes=size,
        media_type=decoded.media_type,
        width=width,
        height=height,
        damage=DamageRecord(missing=round(damage.share, 4), detail=damage.what) if damage else None,
        converted_from=ColorRecord(kind=source.kind, name=source.name) if source else None,
    )
