"""Deletion and insertion (RISE) on a network with known answers, and on photos."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.explain import Explanation, explain_image, explain_pixels
from gradcam_worker.gradcam.faithfulness import BATCH, METRICS, STEPS, measure
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.testing import TinyNetwork

SIDE = TinyNetwork.SIDE


@pytest.fixture
def flag() -> NDArray[np.uint8]:
    """Red on the left, blue on the right."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[:, : SIDE // 2, 0] = pixels[:, SIDE // 2 :, 2] = 255
    return pixels


def explain_classes(pixels: NDArray[np.uint8], *classes: int) -> Explanation:
    return explain_pixels(TinyNetwork(), pixels[np.newaxis], [classes])[0]


def probability_of_red(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores)
    return np.asarray(powers[..., 0] / powers.sum(-1))


def test_deletion_is_the_area_under_the_probability_as_the_hottest_pixels_turn_grey(
    flag: NDArray[np.uint8],
) -> None:
    """Each step greys 8 of 256 pixels, the red half first."""
    kernel, curve = TinyNetwork.KERNEL.astype(np.float64), []
    for step in range(STEPS + 1):
        grey_share = step / STEPS
        left, right = max(0.5 - grey_share, 0), min(1 - grey_share, 0.5)
        means = np.array([left, 0, right]) + grey_share * 127 / 255
        curve.append(probability_of_red(means @ kernel))
    expected = (sum(curve) - (curve[0] + curve[-1]) / 2) / STEPS
    [areas] = measure(TinyNetwork().scores, flag, explain_classes(flag, 0), ["deletion"])
    assert areas == {"deletion": pytest.approx(expected, abs=1e-5)}


def test_both_metrics_prefer_a_right_heatmap_to_a_wrong_one(flag: NDArray[np.uint8]) -> None:
    right = explain_classes(flag, 0)
    wrong = replace(right, heatmaps=right.heatmaps[:, :, ::-1])
    [right_areas], [wrong_areas] = (
        measure(TinyNetwork().scores, flag, explanation, METRICS) for explanation in (right, wrong)
    )
    assert right_areas["deletion"] < wrong_areas["deletion"]
    assert right_areas["insertion"] > wrong_areas["insertion"]
    assert all(0 <= area <= 1 for area in (*right_areas.values(), *wrong_areas.values()))


def test_the_confidence_drops_by_what_is_lost_of_the_probability_where_the_heatmap_is_cold(
    flag: NDArray[np.uint8],
) -> None:
    """Of red, the heatmap keeps the red half: blue is gone, and red becomes more probable."""
    metrics = ["confidence_increase", "confidence_drop"]
    seen = explain_classes(flag, 0, 2)
    ones, zeros = np.ones_like(seen.heatmaps[0]), np.zeros_like(seen.heatmaps[0])
    left = zeros.copy()
    left[:, :2] = 1
    shown = replace(seen, heatmaps=np.stack([left, zeros]))
    red, blue = measure(TinyNetwork().scores, flag, shown, metrics)
    assert list(red) == metrics
    assert red == {"confidence_drop": 0, "confidence_increase": 1}
    kernel = TinyNetwork.KERNEL.astype(np.float64)
    scores = np.array([0.5, 0, 0.5]) @ kernel
    whole = np.exp(scores[2]) / np.exp(scores).sum()
    assert blue["confidence_drop"] == pytest.approx((whole - 1 / 3) / whole, rel=1e-4)
    assert blue["confidence_increase"] == 0
    [kept] = measure(
        TinyNetwork().scores, flag, replace(explain_classes(flag, 0), heatmaps=ones[None]), metrics
    )
    assert kept == {"confidence_drop": 0, "confidence_increase": 0}


def test_all_metrics_together_are_those_of_each_alone(flag: NDArray[np.uint8]) -> None:
    seen = explain_classes(flag, 0, 2)
    together = measure(TinyNetwork().scores, flag, seen, METRICS)
    for metric in METRICS:
        alone = measure(TinyNetwork().scores, flag, seen, [metric])
        assert [{metric: values[metric]} for values in together] == alone


def test_every_class_has_its_areas_in_the_order_of_the_request(flag: NDArray[np.uint8]) -> None:
    both = measure(TinyNetwork().scores, flag, explain_classes(flag, 2, 0), METRICS)
    alone = [
        measure(TinyNetwork().scores, flag, explain_classes(flag, class_id), METRICS)[0]
        for class_id in (2, 0)
    ]
    assert both == alone


def test_only_requested_metrics_are_measured_and_in_batches(flag: NDArray[np.uint8]) -> None:
    sizes: list[int] = []

    def score(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        sizes.append(len(pixels))
        return TinyNetwork().scores(pixels)

    assert list(measure(score, flag, explain_classes(flag, 0), ["insertion"])[0]) == ["insertion"]
    assert max(sizes) <= BATCH
    assert sum(sizes) == STEPS + 1


def test_a_heatmap_of_zeros_is_measured_reproducibly(flag: NDArray[np.uint8]) -> None:
    dark = explain_classes(flag, 1)
    assert dark.zero_heatmaps == (1,)
    first, second = (measure(TinyNetwork().scores, flag, dark, METRICS) for _ in range(2))
    assert first == second
    assert np.isfinite(list(first[0].values())).all()


@pytest.mark.parametrize("channels", [1, 4])
def test_an_image_may_have_any_number_of_channels(flag: NDArray[np.uint8], channels: int) -> None:
    pixels = np.repeat(flag[..., :1], channels, axis=2)

    def score(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return TinyNetwork().scores(np.repeat(images[..., :1], 3, axis=3))

    assert measure(score, pixels, explain_classes(flag, 0), METRICS)[0]["deletion"] > 0


@pytest.mark.tensorflow
def test_on_photos_grad_cam_beats_its_rotated_heatmap(lite0: Any, photos: Path) -> None:
    better = []
    for name in ("camera", "coffee"):
        explanation = explain_image(lite0, photos / f"{name}.jpg", top_n=1)
        pixels = fit(decode((photos / f"{name}.jpg").read_bytes()).pixels, lite0.facts.input_size)
        rotated = replace(explanation, heatmaps=explanation.heatmaps[:, ::-1, ::-1])
        [true_areas], [rotated_areas] = (
            measure(lite0.scores, pixels, other, METRICS) for other in (explanation, rotated)
        )
        better += [
            true_areas["deletion"] < rotated_areas["deletion"],
            true_areas["insertion"] > rotated_areas["insertion"],
        ]
    assert all(better), better
