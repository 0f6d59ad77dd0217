"""Where heat lies, against plain loops over pixels and cells."""

import math
from itertools import product

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from gradcam_worker.gradcam.imaging.resize import enlarge
from gradcam_worker.gradcam.localization import (
    FULL,
    NOWHERE,
    Localization,
    Region,
    localize,
    region_of_boxes,
    region_of_mask,
    shrink_mask,
)
from gradcam_worker.gradcam.sizing import Placement, Size, Sizing

BOXES = [(5.25, 1.5, 15.25, 10.75), (12.5, 7.5, 23.75, 50.0), (-5.0, -5.0, 2.5, 3.25)]
SIZES = [(16, 24), (24, 10), (11, 37)]  # (height, width)
PLACEMENTS = {
    "squash": None,
    "crop": Sizing("area", "crop"),
    "letterbox": Sizing("area", "letterbox"),
}


def placed(fit: str, size: Size) -> Placement | None:
    sizing = PLACEMENTS[fit]
    return sizing.placement(size, (16, 16)) if sizing else None


def heatmap_of(seed: int, grid: Size = (4, 4)) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return np.maximum(rng.normal(size=grid), 0).astype(np.float32) + np.float32(0.01)


def overlap(first: tuple[float, float], second: tuple[float, float]) -> float:
    return max(min(first[1], second[1]) - max(first[0], second[0]), 0.0)


def pixels(side: tuple[float, float], length: int) -> range:
    """The pixels that a side of a cell touches."""
    return range(max(math.floor(side[0]), 0), min(math.ceil(side[1]), length))


def plain_shares(
    heatmap: NDArray[np.float32], size: Size, placement: Placement | None, mask: NDArray[np.bool_]
) -> tuple[float, float, float]:
    """Share of heat inside a mask of pixels, share of area, share of heat at the border: pixel by pixel."""
    height, width = size
    left, top, right, bottom = placement.box(size) if placement else (0, 0, width, height)
    rows, columns = heatmap.shape
    heat = inside = area = inside_area = border = 0.0
    band = min(size) / 10
    for row, column in product(range(rows), range(columns)):
        ys = top + row * (bottom - top) / rows, top + (row + 1) * (bottom - top) / rows
        xs = left + column * (right - left) / columns, left + (column + 1) * (right - left) / columns
        value = float(heatmap[row, column])
        for y, x in product(pixels(ys, height), pixels(xs, width)):
            part = overlap(ys, (y, y + 1)) * overlap(xs, (x, x + 1))
            heat, area = heat + part * value, area + part
            if mask[y, x]:
                inside, inside_area = inside + part * value, inside_area + part
        cell = overlap(ys, (0, height)) * overlap(xs, (0, width))
        middle = overlap(ys, (band, height - band)) * overlap(xs, (band, width - band))
        border += (cell - middle) * value
    return inside / heat, inside_area / area, border / heat


def mask_of(size: Size) -> NDArray[np.bool_]:
    """A disc, and a stripe at one side."""
    ys, xs = np.mgrid[: size[0], : size[1]]
    mask: NDArray[np.bool_] = (
        (ys - size[0] * 0.4) ** 2 + (xs - size[1] * 0.6) ** 2 < (min(size) / 3) ** 2
    ) | (xs < 2)
    return mask


@pytest.mark.parametrize("fit", PLACEMENTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_heat_inside_a_mask_is_that_of_a_loop_over_pixels(fit: str, size: Size) -> None:
    placement, mask = placed(fit, size), mask_of(size)
    region = region_of_mask(shrink_mask(mask), size, size)
    for seed in range(3):
        heatmap = heatmap_of(seed)
        (found,) = localize(heatmap[None], size, placement, [(1, 1)], [region])
        assert (found.heat_inside, found.inside_area, found.heat_at_border) == pytest.approx(
            plain_shares(heatmap, size, placement, mask)
        )
        assert found.pointing_hit is bool(mask[1, 1])


@pytest.mark.parametrize("fit", PLACEMENTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_heat_inside_boxes_is_that_of_a_mask_of_quarters_of_pixels(fit: str, size: Size) -> None:
    """The edges of `BOXES` lie at quarters of pixels, at which a finer mask has its edges, too."""
    placement, fine = placed(fit, size), (4 * size[0], 4 * size[1])
    mask = np.zeros(fine, np.bool_)
    for left, top, right, bottom in BOXES:
        mask[max(int(4 * top), 0) : int(4 * bottom), max(int(4 * left), 0) : int(4 * right)] = True
    heatmap = heatmap_of(5)
    (found,) = localize(heatmap[None], size, placement, [(1, 1)], [region_of_boxes(BOXES, size)])
    inside, area, _ = plain_shares(heatmap, fine, placement, mask)
    assert (found.heat_inside, found.inside_area) == pytest.approx((inside, area))
    (same,) = localize(
        heatmap[None], size, placement, [(1, 1)], [region_of_mask(shrink_mask(mask), fine, size)]
    )
    assert vars(same) == pytest.approx(vars(found))


def test_even_heat_inside_is_the_share_of_the_area() -> None:
    heat = np.ones((1, 7, 7), np.float32)
    (found,) = localize(heat, (90, 120), None, [(60, 45)], [region_of_boxes([(30, 0, 90, 45)], (90, 120))])
    at_border = pytest.approx(1 - (72 * 102) / (90 * 120))
    assert vars(found) == vars(Localization(0, 0.25, 0.25, pointing_hit=False, iou=0.25)) | {
        "heat_at_border": at_border
    }


@pytest.mark.parametrize("size", [(32, 48), (112, 112)], ids=str)
def test_iou_is_that_of_the_pixels_of_the_enlarged_heatmap(size: Size) -> None:
    for seed in range(5):
        heatmap = heatmap_of(seed, (7, 7))
        large = enlarge(heatmap, (7 * 16, 7 * 16))
        hot = large >= large.max() / 2
        boxes = [
            (0.0, 0.0, size[1] * 0.5, size[0] * 0.25),
            (size[1] * 0.25, 0.0, size[1] * 0.75, size[0] * 0.5),
        ]
        truth = np.zeros_like(hot)
        truth[:28, :56] = truth[:56, 28:84] = True
        (found,) = localize(heatmap[None], size, None, [(0, 0)], [region_of_boxes(boxes, size)])
        assert found.iou == pytest.approx((hot & truth).sum() / (hot | truth).sum())


def test_the_object_counts_altogether_where_the_network_sees_a_part_of_it() -> None:
    """A crop of the middle third; the object is the left half: of 60 columns 10 are seen, and all are hot."""
    placement = Placement(1 / 3, 0, 2 / 3, 1)
    heat = np.ones((1, 4, 4), np.float32)
    (found,) = localize(
        heat, (40, 120), placement, [(60, 20)], [region_of_boxes([(0, 0, 60, 40)], (40, 120))]
    )
    assert (found.heat_inside, found.inside_area, found.iou) == pytest.approx((0.5, 0.5, 20 / 80))


def test_a_heatmap_that_is_zero_on_the_image_lies_nowhere() -> None:
    region = region_of_boxes([(0, 0, 4, 4)], (8, 8))
    assert localize(np.zeros((1, 2, 2), np.float32), (8, 8), None, [None], [region]) == [NOWHERE]


def test_what_lies_outside_the_image_counts_for_nothing() -> None:
    region = region_of_boxes([(20, 0, 30, 5)], (10, 10))
    assert not region.inside.any()
    (found,) = localize(np.ones((1, 2, 2), np.float32), (10, 10), None, [(9, 9)], [region])
    assert (found.heat_inside, found.iou, found.pointing_hit) == (0, 0, False)


def test_each_class_has_its_own_object() -> None:
    size, heat = (10, 10), np.zeros((3, 2, 2), np.float32)
    heat[:, 0, 0] = 1
    left, right = region_of_boxes([(0, 0, 5, 10)], size), region_of_boxes([(5, 0, 10, 10)], size)
    found = localize(heat, size, None, [(2, 2)] * 3, [left, right, None])
    assert [one.heat_inside for one in found] == [pytest.approx(1), 0, None]
    assert found[2].heat_at_border == pytest.approx(0.36)


def test_a_large_mask_becomes_shares_of_blocks() -> None:
    size = (2500, 3100)
    mask = mask_of(size)
    small = shrink_mask(mask)
    assert small.shape == (625, 775)
    assert small.sum() / FULL * 16 == pytest.approx(mask.sum(), rel=1e-3)
    region = region_of_mask(small, size, size)
    expected = cv2.resize(mask.astype(np.float64), (10, 10), interpolation=cv2.INTER_AREA)
    found = region.coverage(np.linspace(0, 2500, 11), np.linspace(0, 3100, 11)) / (250 * 310)
    assert np.abs(found - expected).max() < 2e-3


def test_a_point_on_a_line_belongs_to_what_follows_it() -> None:
    region = region_of_boxes([(2, 2, 4, 4)], (8, 8))
    assert isinstance(region, Region)
    assert [region.contains(*point) for point in ((2, 2), (4, 3), (3.999, 3), (8, 8))] == [
        True,
        False,
        True,
        False,
    ]
    assert math.isclose(region.coverage(np.array([0.0, 8]), np.array([0.0, 8])).sum(), 4)
