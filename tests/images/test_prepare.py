"""`fetch_image` by itself. What a whole job reserves is tested in `tests/execution/test_in_flight.py`."""

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
from gradcam_worker.testing import TinyNetwork, fake_services

URI = "s3://in/flag.png"
FLAG = cv2.imencode(".png", np.full((32, 48, 3), 99, np.uint8))[1].tobytes()
PIXELS = 32 * 48


@contextmanager
def opened(services: Services) -> Iterator[DecodedImage]:
    with fetch_image(ImageRef(uri=URI), services, Deadline(5)) as fetched, fetched.decode() as image:
        yield image


def held(services: Services) -> tuple[int, int]:
    return services.budgets.bytes.held, services.budgets.pixels.held


def test_bytes_are_reserved_until_they_are_decoded_and_pixels_until_the_block_ends() -> None:
    services = fake_services({URI: FLAG})
    with fetch_image(ImageRef(uri=URI), services, Deadline(5)) as fetched:
        assert fetched.sha256 == hashlib.sha256(FLAG).hexdigest()
        assert held(services) == (len(FLAG), 0)
        with fetched.decode() as image:
            assert held(services) == (0, PIXELS)
            assert image.decoded.size == (32, 48)
    assert held(services) == (0, 0)


def test_pixels_that_are_released_are_no_longer_in_memory() -> None:
    services = fake_services({URI: FLAG})
    with opened(services) as image:
        image.release()
        assert held(services) == (0, 0)
        assert not hasattr(image, "decoded")


def test_an_image_that_cannot_be_decoded_leaves_nothing_reserved() -> None:
    services = fake_services({URI: FLAG[:60]})
    with pytest.raises(ImageDecodeFailed), opened(services):
        pass
    assert held(services) == (0, 0)


def test_what_is_raised_while_an_image_is_open_is_passed_on_and_leaves_nothing_reserved() -> None:
    services = fake_services({URI: FLAG})
    with pytest.raises(ZeroDivisionError), opened(services):
        raise ZeroDivisionError
    assert held(services) == (0, 0)


def test_an_image_is_fitted_to_a_network_and_described() -> None:
    with opened(fake_services({URI: FLAG})) as image:
        assert image.fit(TinyNetwork.facts).shape == (16, 16, 3)
        record = image.record
    assert (record.uri, record.bytes, record.media_type) == (URI, len(FLAG), "image/png")
    assert (record.width, record.height, record.damage) == (48, 32, None)


def test_a_network_of_another_number_of_channels_is_refused() -> None:
    facts = replace(TinyNetwork.facts, channels=4)
    with opened(fake_services({URI: FLAG})) as image, pytest.raises(NetworkIncompatible, match="4 channels"):
        image.fit(facts)
