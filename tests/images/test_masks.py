"""Masks of objects, from pictures and from run lengths."""

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import ImageDecodeFailed, ImageNotFound, ImagePixelsExceeded
from gradcam_worker.gradcam.localization import FULL
from gradcam_worker.images.masks import read_mask
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.annotations import AnnotatedMask
from gradcam_worker.testing import fake_services

URI = "s3://in/mask.png"
COMPRESSED = "81d04@00MM0330000i0L[O"  # what pycocotools 2.0 makes of `mask`


def mask() -> NDArray[np.bool_]:
    found = np.zeros((9, 13), np.bool_)
    found[2:7, 3:9] = found[0, 12] = found[8, 0] = True
    found[4, 5] = False
    return found


def counts() -> list[int]:
    """The run lengths of `mask`, counted pixel by pixel, column by column."""
    runs, last = [0], False
    for value in mask().T.ravel().tolist():
        if value != last:
            runs.append(0)
            last = value
        runs[-1] += 1
    return runs


def read(data: bytes | None = None, **fields: Any) -> NDArray[np.uint8]:
    services = fake_services({} if data is None else {URI: data})
    return read_mask(AnnotatedMask.model_validate(fields or {"uri": URI}), services, Deadline(9)).shares


@pytest.mark.parametrize("runs", [counts(), COMPRESSED], ids=["lengths", "compressed"])
def test_run_lengths_are_those_of_coco(runs: list[int] | str) -> None:
    assert_array_equal(read(rle={"size": [9, 13], "counts": runs}) == FULL, mask())


@pytest.mark.parametrize("runs", ["8", "81d04@00MM0330000i0L[O1", "\N{SNOWMAN}", "oooooooooo0", "n"])
def test_run_lengths_that_are_none_are_refused(runs: str) -> None:
    with pytest.raises(ImageDecodeFailed, match="run lengths"):
        read(rle={"size": [9, 13], "counts": runs})


def test_a_mask_that_claims_to_be_huge_is_refused_before_it_is_made() -> None:
    side = 65_000
    with pytest.raises(ImagePixelsExceeded, match="65000 x 65000"):
        read(rle={"size": [side, side], "counts": [side * side]})


@pytest.mark.parametrize("value", [1, 255])
def test_of_a_lossless_picture_all_that_is_not_zero_is_the_object(value: int) -> None:
    data = cv2.imencode(".png", mask().astype(np.uint8) * value)[1].tobytes()
    assert_array_equal(read(data) == FULL, mask())


def test_of_a_jpeg_what_is_light_is_the_object() -> None:
    large = np.kron(mask(), np.ones((8, 8))).astype(np.uint8) * 255
    data = cv2.imencode(".jpg", large, [cv2.IMWRITE_JPEG_QUALITY, 60])[1].tobytes()
    assert_array_equal(read(data) == FULL, large > 0)


def test_a_mask_that_is_not_there_is_told() -> None:
    with pytest.raises(ImageNotFound):
        read()


def test_the_proportions_of_a_mask_are_those_of_its_image() -> None:
    data = cv2.imencode(".png", mask().astype(np.uint8))[1].tobytes()
    found = read_mask(AnnotatedMask(uri=URI), fake_services({URI: data}), Deadline(9))
    assert found.region((18, 26)).ys[-1] == 18
    found.region((901, 1299))  # as far as whole pixels allow
    with pytest.raises(
        ImageDecodeFailed, match="The mask is of 13 x 9 pixels and the upright image of 9 x 13"
    ):
        found.region((13, 9))
