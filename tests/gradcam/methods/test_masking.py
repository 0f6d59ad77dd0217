"""RISE and occlusion, on functions whose scores are known."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidJob
from gradcam_worker.gradcam.methods import masking
from gradcam_worker.gradcam.network import Computed, Method

SIDE = 32
PIXELS = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
PIXELS[8:16, 16:24] = 227  # the patch: 100 levels above what covered pixels become
Score = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


def patch_score(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Class 0 is the brightness of the patch, class 1 its darkness, class 2 nothing."""
    patch = images[:, 8:16, 16:24].astype(np.float64).mean((1, 2, 3)) / 255
    return np.stack([patch, -patch, np.full(len(images), 0.3)], 1).astype(np.float32)


def compute(
    score: Score = patch_score,
    wanted: tuple[int, ...] = (0, 1, 2),
    pixels: NDArray[np.uint8] = PIXELS,
    report: Any = lambda done, total: None,
    **method: Any,
) -> Computed:
    chosen = masking.with_defaults(Method(**method), (pixels.shape[0], pixels.shape[1]))
    return masking.compute(score, pixels, wanted, chosen, lambda scores: scores, report)


def test_occlusion_of_a_patch_lowers_its_score_by_what_the_patch_has_above_grey() -> None:
    raw = compute(name="occlusion", window=8, stride=8).raw[0]
    expected = np.zeros((4, 4))
    expected[1, 2] = 100 / 255
    assert_allclose(raw, [expected, -expected, np.zeros((4, 4))], atol=1e-6)


def test_a_place_that_several_squares_cover_has_the_mean_of_their_drops() -> None:
    raw = compute(name="occlusion", window=8, stride=4).raw[0, 0]
    assert raw.shape == (8, 8)
    # The four places of the patch are covered by four squares each: whole, and by a half, a half, a quarter.
    assert_allclose(raw[2:4, 4:6], (1 + 0.5 + 0.5 + 0.25) / 4 * 100 / 255, atol=1e-6)
    assert_allclose(raw[0], 0, atol=1e-6)


def test_squares_that_do_not_fit_a_whole_number_of_times_reach_the_border() -> None:
    method = masking.with_defaults(Method("occlusion", window=9, stride=5), (SIDE, SIDE + 7))
    masks = [mask for mask, _ in masking._masks(method, (SIDE, SIDE + 7)).draw()]
    assert len(masks) == masking.image_count(method, (SIDE, SIDE + 7)) - 1 == 6 * 7
    assert_array_equal(np.min(masks, axis=0), 0)


def test_rise_is_the_formula_of_the_paper_minus_the_mean_score() -> None:
    method = masking.with_defaults(Method("rise", masks=50, cells=5, seed=9), (SIDE, SIDE))
    masks = np.stack([mask for mask, _ in masking._masks(method, (SIDE, SIDE)).draw()]).astype(np.float64)
    covered = np.rint((PIXELS - 127.0) * masks[..., None] + 127)
    scores = patch_score(covered.astype(np.uint8))[:, 0].astype(np.float64)
    paper = np.einsum("n,nhw->hw", scores, masks) / (50 * 0.5)
    expected = paper - scores.mean() * masks.mean(0) / 0.5
    raw = compute(name="rise", masks=50, cells=5, seed=9).raw[0, 0]
    assert_allclose(raw, cv2.resize(expected, (20, 20), interpolation=cv2.INTER_AREA), atol=1e-6)


def test_rise_finds_the_patch() -> None:
    raw = compute(name="rise").raw[0, 0]
    row, column = np.unravel_index(raw.argmax(), raw.shape)
    assert raw.shape == (28, 28)
    assert 8 / SIDE < row / 28 < 15 / SIDE
    assert 16 / SIDE < column / 28 < 23 / SIDE
    assert raw[14:, :10].max() < raw.max() / 5


def test_masks_keep_half_of_the_image_everywhere() -> None:
    method = masking.with_defaults(Method("rise", masks=2000), (SIDE, 45))
    masks = np.stack([mask for mask, _ in masking._masks(method, (SIDE, 45)).draw()])
    assert masks.shape == (2000, SIDE, 45)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert np.abs(masks.mean(0) - 0.5).max() < 0.05


@pytest.mark.parametrize("name", ["rise", "occlusion"])
def test_a_score_that_no_mask_changes_gives_exact_zeros(name: str) -> None:
    assert_array_equal(compute(name=name, wanted=(2,)).raw, 0)


def test_the_same_seed_gives_the_same_map_to_the_last_digit_and_another_seed_another_one() -> None:
    first, again, other = (compute(name="rise", masks=40, seed=seed).raw for seed in (5, 5, 6))
    assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0


@pytest.mark.parametrize("name", ["rise", "occlusion"])
def test_all_classes_share_the_passes_and_each_has_the_map_that_it_has_alone(name: str) -> None:
    sizes: list[int] = []

    def score(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        sizes.append(len(images))
        return patch_score(images)

    together = compute(score, name=name)
    count = masking.image_count(masking.with_defaults(Method(name), (SIDE, SIDE)), (SIDE, SIDE))
    assert sizes == [64] * -(-count // 64)
    for class_id in range(3):
        assert_array_equal(compute(name=name, wanted=(class_id,)).raw[0, 0], together.raw[0, class_id])


def test_ranks_are_those_of_the_whole_image() -> None:
    computed = compute(name="occlusion", wanted=(-1, -2, -3))
    assert computed.class_ids.tolist() == [[0, 2, 1]]
    assert_array_equal(computed.scores, patch_score(PIXELS[None]))


def test_progress_is_reported_before_the_first_pass_and_after_each() -> None:
    reported: list[tuple[int, int]] = []
    compute(name="rise", masks=150, report=lambda done, total: reported.append((done, total)))
    assert reported == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_what_the_report_raises_ends_the_computation() -> None:
    def report(done: int, _: int) -> None:
        if done == 1:
            raise TimeoutError

    calls: list[int] = []

    def score(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        calls.append(len(images))
        return patch_score(images)

    with pytest.raises(TimeoutError):
        compute(score, name="rise", report=report)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("size", "images"), [((224, 224), 16), ((299, 299), 8), ((600, 600), 2), ((28, 28), 64), ((2000, 900), 1)]
)
def test_a_pass_has_as_many_images_as_their_size_allows(size: tuple[int, int], images: int) -> None:
    assert masking.pass_size(size) == images


def test_images_that_fill_a_pass_alone_are_explained_too() -> None:
    pixels = np.full((900, 900, 3), 200, np.uint8)

    def score(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert len(images) == 1
        top = images[:, :450].astype(np.float64).mean((1, 2, 3))
        return np.stack([top, -top], 1).astype(np.float32)

    raw = compute(score, (0,), pixels, name="occlusion", window=450, stride=450).raw[0, 0]
    assert_allclose(raw, np.array([[36.5, 36.5], [0, 0]]), atol=1e-3)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_any_number_of_channels_are_covered(channels: int) -> None:
    pixels = np.full((16, 16, channels), 255, np.uint8)

    def score(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        mean = images.astype(np.float64).mean((1, 2, 3))
        return np.stack([mean, -mean], 1).astype(np.float32)

    raw = compute(score, (0,), pixels, name="occlusion", window=8, stride=8).raw[0, 0]
    assert_allclose(raw, np.full((2, 2), 128 / 4), atol=1e-4)


def test_parameters_that_are_open_depend_on_the_size_of_the_input() -> None:
    assert masking.with_defaults(Method("occlusion"), (224, 224)) == Method("occlusion", window=32, stride=16)
    assert masking.with_defaults(Method("rise"), (224, 224)) == Method("rise", masks=1024, cells=7, seed=0)
    assert masking.with_defaults(Method("gradcam", flip=True), (224, 224)) == Method("gradcam", flip=True)
    sizes = {name: masking.with_defaults(Method(name), (224, 224)) for name in masking.METHODS}
    assert {name: masking.image_count(method, (224, 224)) for name, method in sizes.items()} == {
        "rise": 1025,
        "occlusion": 170,
    }


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Method("gradcam", masks=9), "masks is a parameter of rise, not of gradcam"),
        (Method("rise", stride=9), "stride is a parameter of occlusion, not of rise"),
        (Method("rise", layer="top_act"), "rise covers parts of the image: it has no layer"),
        (Method("occlusion", flip=True), "it has no flip"),
        (Method("rise", masks=1), "masks of rise is 1; for this network it must be 2 to 100000"),
        (Method("rise", cells=33), "must be 2 to 32"),
        (Method("occlusion", window=33), "must be 1 to 32"),
        (
            Method("occlusion", window=4, stride=5),
            "stride of occlusion is 5; for this network it must be 1 to 4",
        ),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused(method: Method, message: str) -> None:
    with pytest.raises(InvalidJob, match=message):
        masking.with_defaults(method, (SIDE, SIDE))
