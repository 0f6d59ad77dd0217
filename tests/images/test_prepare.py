"""`fetch_image`. `tests/execution/test_memory_budgets.py` tests the reservations of a whole job."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import cv2
import numpy as np
import pytest

from gradcam_worker.errors import ImageDecodeFailed, NetworkIncompatible
from gradcam_worker.execution.services import Services
from gradcam_worker.images.prepare import DecodedImage, fetch_image
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef
from gradcam_worker.schemas.manifest import ColorRecord
from gradcam_worker.testing import TinyNetwork, fake_services
from tests.gradcam.decoding.colored_files import COLORS, DISPLAY_P3, iccp, png

URI = "s3://in/flag.png"
FLAG = cv2.imencode(".png", np.full((32, 48, 3), 99, np.uint8))[1].tobytes()
PIXELS = 32 * 48


@contextmanager
def decoded(services: Services) -> Iterator[DecodedImage]:
    with fetch_image(ImageRef(uri=URI), services, Deadline(5)) as fetched, fetched.decode() as image:
        yield image


def reserved(services: Services) -> tuple[int, int]:
    return services.budgets.bytes.held, services.budgets.pixels.held


def test_bytes_are_reserved_until_they_are_decoded_and_pixels_until_the_block_ends() -> None:
    services = fake_services({URI: FLAG})
    with fetch_image(ImageRef(uri=URI), services, Deadline(5)) as fetched:
        assert fetched.sha256 == hashlib.sha256(FLAG).hexdigest()
        assert reserved(services) == (len(FLAG), 0)
        with fetched.decode() as image:
            assert reserved(services) == (0, PIXELS)
            assert image.decoded.size == (32, 48)
    assert reserved(services) == (0, 0)


def test_released_pixels_are_dropped_from_memory() -> None:
    services = fake_services({URI: FLAG})
    with decoded(services) as image:
        image.release()
        assert reserved(services) == (0, 0)
        assert not hasattr(image, "decoded")


def test_an_image_that_cannot_be_decoded_leaves_nothing_reserved() -> None:
    services = fake_services({URI: FLAG[:60]})
    with pytest.raises(ImageDecodeFailed), decoded(services):
        pass
    assert reserved(services) == (0, 0)


def test_an_error_in_the_block_is_passed_on_and_leaves_nothing_reserved() -> None:
    services = fake_services({URI: FLAG})
    with pytest.raises(ZeroDivisionError), decoded(services):
        raise ZeroDivisionError
    assert reserved(services) == (0, 0)


def test_an_image_is_fitted_to_a_network_and_described() -> None:
    with decoded(fake_services({URI: FLAG})) as image:
        assert image.fit(TinyNetwork.facts).shape == (16, 16, 3)
        record = image.record
    assert (record.uri, record.bytes, record.media_type) == (URI, len(FLAG), "image/png")
    assert (record.width, record.height, record.damage) == (48, 32, None)


def test_the_description_of_an_image_says_which_colors_it_had() -> None:
    with decoded(fake_services({URI: png(COLORS, iccp(DISPLAY_P3))})) as image:
        assert image.record.converted_from == ColorRecord(kind="icc", name="Display P3")
    with decoded(fake_services({URI: FLAG})) as image:
        assert image.record.converted_from is None


def test_a_network_with_a_different_number_of_channels_is_refused() -> None:
    facts = replace(TinyNetwork.facts, channels=4)
    with decoded(fake_services({URI: FLAG})) as image, pytest.raises(NetworkIncompatible, match="4 channels"):
        image.fit(facts)
