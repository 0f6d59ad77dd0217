import math
from dataclasses import replace

import numpy as np
import pytest

from devtools.planted.samples import anywhere, boxes_around, sample_of
from gradcam_worker.audit.dataset.samples import ClassSample
from gradcam_worker.audit.shortcuts.gaze_regions import (
    describe_place,
    hot_region,
    share_near_boxes,
    window_sums,
)
from gradcam_worker.audit.shortcuts.suspects import Suspect, find_suspects
from gradcam_worker.audit.significance import binomial_log_tail

CORNER = (0.08, 0.92)  # x, y: at the bottom left


def samples(looking_away: int, *, boxes: bool, count: int = 200) -> list[ClassSample]:
    """Four classes that look at their objects; of class 2 some images look at a corner."""
    of_each = []
    for class_id in range(4):
        objects = anywhere(count, class_id)
        gaze = objects.copy()
        if class_id == 2:
            gaze[:looking_away] = CORNER
        of_each.append(sample_of(class_id, gaze, boxes=boxes_around(objects) if boxes else None))
    return of_each


def named(suspect: Suspect) -> str:
    return suspect.kind if suspect.region is None else describe_place(suspect.region)


@pytest.mark.parametrize("boxes", [True, False])
def test_nothing_is_suspect_where_all_classes_look_at_objects_that_lie_anywhere(boxes: bool) -> None:
    assert not find_suspects(samples(0, boxes=boxes))


def test_a_corner_that_one_image_in_twenty_looks_at_is_suspect_with_boxes() -> None:
    (suspect,) = find_suspects(samples(10, boxes=True))
    assert (suspect.class_id, suspect.basis, named(suspect)) == (2, "boxes", "bottom left corner")
    assert suspect.members.tolist() == [*range(10)]
    assert suspect.heat > 0.5
    assert suspect.expected < 0.1


def test_a_corner_that_half_of_a_class_looks_at_is_suspect_without_boxes() -> None:
    (suspect,) = find_suspects(samples(100, boxes=False))
    assert (suspect.class_id, suspect.basis, named(suspect)) == (2, "other_classes", "bottom left corner")
    assert suspect.members.tolist() == [*range(100)]


def test_a_corner_that_all_classes_look_at_is_not_suspect() -> None:
    centers = np.concatenate([np.tile(np.array(CORNER, np.float32), (50, 1)), anywhere(50, 1)])
    assert not find_suspects([sample_of(class_id, centers) for class_id in range(4)])


def test_heat_outside_of_the_boxes_makes_the_background_suspect() -> None:
    of_each = samples(0, boxes=True)
    wide = sample_of(1, anywhere(200, 1), spread=2.0, boxes=of_each[1].boxes)
    suspects = [one for one in find_suspects([of_each[0], wide, *of_each[2:]]) if one.kind != "place"]
    assert [(one.class_id, one.kind, one.basis) for one in suspects] == [(1, "background", "boxes")]
    without = [replace(one, boxes=[None] * len(one)) for one in (of_each[0], wide, *of_each[2:])]
    suspects = [one for one in find_suspects(without) if one.kind != "place"]
    assert [(one.class_id, one.kind, one.basis) for one in suspects] == [(1, "spread", "other_classes")]


@pytest.mark.parametrize("classes", [0, 1])
def test_there_are_no_suspects_without_other_classes(classes: int) -> None:
    assert not find_suspects(samples(100, boxes=True)[:classes])


def test_images_without_heat_and_classes_of_few_images_are_left_out() -> None:
    cold = samples(10, boxes=True)
    cold[0] = replace(cold[0], heat=np.zeros_like(cold[0].heat))
    cold[1] = sample_of(1, anywhere(3, 1), boxes=boxes_around(anywhere(3, 1)))
    (suspect,) = find_suspects(cold)
    assert (suspect.class_id, named(suspect)) == (2, "bottom left corner")


def test_what_is_near_a_box_is_measured_as_a_loop_over_points_does() -> None:
    boxes = np.array([[0.3, 0.1, 0.55, 0.4]], np.float32)
    near = share_near_boxes([boxes, np.zeros((0, 4), np.float32)], (4, 5))
    fine = 40
    counted = np.zeros((4, 5))
    for row in range(4 * fine):
        for column in range(5 * fine):
            x, y = (column + 0.5) / (5 * fine), (row + 0.5) / (4 * fine)
            is_near = 0.3 - 1 / 5 <= x < 0.55 + 1 / 5 and 0.1 - 1 / 4 <= y < 0.4 + 1 / 4
            counted[row // fine, column // fine] += is_near / fine**2
    assert near[0] == pytest.approx(counted, abs=0.03)
    assert not near[1].any()


def test_window_sums_are_those_of_slices() -> None:
    maps = np.random.default_rng(0).random((2, 5, 6), np.float32)
    sums = window_sums(maps, (2, 3))
    assert sums.shape == (2, 4, 4)
    assert sums[1, 2, 3] == pytest.approx(maps[1, 2:4, 3:6].sum(), rel=1e-5)


def test_places_have_names() -> None:
    cells = np.zeros((9, 9), np.bool_)
    names = {}
    for row in (0, 4, 8):
        for column in (0, 4, 8):
            cells[:] = False
            cells[row, column] = True
            names[row, column] = describe_place(cells)
    assert names == {
        (0, 0): "top left corner",
        (0, 4): "top edge",
        (0, 8): "top right corner",
        (4, 0): "left edge",
        (4, 4): "centre",
        (4, 8): "right edge",
        (8, 0): "bottom left corner",
        (8, 4): "bottom edge",
        (8, 8): "bottom right corner",
    }
    assert describe_place(np.ones((9, 9), np.bool_)) == "all over"


def test_a_hot_region_is_connected_with_the_peak() -> None:
    map_ = np.zeros((5, 5), np.float32)
    map_[0, 0], map_[1, 1], map_[4, 4] = 1, 0.6, 0.9
    assert np.argwhere(hot_region(map_)).tolist() == [[0, 0], [1, 1]]


def test_the_tail_of_a_binomial_is_the_sum_of_its_terms() -> None:
    least, chances = np.array([0, 3, 7, 10]), np.array([0.2, 0.2, 0.01, 0.5])
    tails = np.exp(binomial_log_tail(least, 10, chances))
    for hits, chance, tail in zip(least.tolist(), chances.tolist(), tails.tolist(), strict=True):
        terms = (math.comb(10, k) * chance**k * (1 - chance) ** (10 - k) for k in range(hits, 11))
        assert tail == pytest.approx(sum(terms))
