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
from gradcam_worker.gradcam.imaging.overlay import fit
from gradcam_worker.testing import TinyNetwork

SIDE = TinyNetwork.SIDE


@pytest.fixture
def flag() -> NDArray[np.uint8]:
    """Red on the left, blue on the right."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[:, : SIDE // 2, 0] = pixels[:, SIDE // 2 :, 2] = 255
    return pixels


def explained(pixels: NDArray[np.uint8], *classes: int) -> Explanation:
    return explain_pixels(TinyNetwork(), pixels[np.newaxis], [classes])[0]


def red(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores)
    return np.asarray(powers[..., 0] / powers.sum(-1))


def test_deletion_is_the_area_under_the_probability_as_the_hottest_pixels_turn_grey(
    flag: NDArray[np.uint8],
) -> None:
    """By hand: each step greys 8 of 256 pixels, the red half first."""
    kernel, curve = TinyNetwork.KERNEL.astype(np.float64), []
    for step in range(STEPS + 1):
        greyed = step / STEPS
        left, right = max(0.5 - greyed, 0), min(1 - greyed, 0.5)
        means = np.array([left, 0, right]) + greyed * 127 / 255
        curve.append(red(means @ kernel))
    by_hand = (sum(curve) - (curve[0] + curve[-1]) / 2) / STEPS
    [areas] = measure(TinyNetwork().scores, flag, explained(flag, 0), ["deletion"])
    assert areas == {"deletion": pytest.approx(by_hand, abs=1e-5)}


def test_a_right_heatmap_is_better_than_a_wrong_one_by_both_metrics(flag: NDArray[np.uint8]) -> None:
    right = explained(flag, 0)
    wrong = replace(right, heatmaps=right.heatmaps[:, :, ::-1])
    [good], [bad] = (measure(TinyNetwork().scores, flag, seen, METRICS) for seen in (right, wrong))
    assert good["deletion"] < bad["deletion"]
    assert good["insertion"] > bad["insertion"]
    assert all(0 <= area <= 1 for area in (*good.values(), *bad.values()))


def test_every_class_has_its_own_areas_in_the_order_it_was_asked_for(flag: NDArray[np.uint8]) -> None:
    both = measure(TinyNetwork().scores, flag, explained(flag, 2, 0), METRICS)
    alone = [measure(TinyNetwork().scores, flag, explained(flag, one), METRICS)[0] for one in (2, 0)]
    assert both == alone


def test_only_what_was_asked_for_is_measured_and_in_batches(flag: NDArray[np.uint8]) -> None:
    sizes: list[int] = []

    def score(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        sizes.append(len(pixels))
        return TinyNetwork().scores(pixels)

    assert list(measure(score, flag, explained(flag, 0), ["insertion"])[0]) == ["insertion"]
    assert max(sizes) <= BATCH
    assert sum(sizes) == STEPS + 1


def test_a_dark_heatmap_is_measured_too_and_always_alike(flag: NDArray[np.uint8]) -> None:
    dark = explained(flag, 1)
    assert dark.zero_heatmaps == (1,)
    first, again = (measure(TinyNetwork().scores, flag, dark, METRICS) for _ in range(2))
    assert first == again
    assert np.isfinite(list(first[0].values())).all()


@pytest.mark.parametrize("channels", [1, 4])
def test_a_picture_may_have_any_number_of_channels(flag: NDArray[np.uint8], channels: int) -> None:
    pixels = np.repeat(flag[..., :1], channels, axis=2)

    def score(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        return TinyNetwork().scores(np.repeat(pictures[..., :1], 3, axis=3))

    assert measure(score, pixels, explained(flag, 0), METRICS)[0]["deletion"] > 0


@pytest.mark.tensorflow
def test_on_photos_grad_cam_beats_its_own_mirror_image(lite0: Any, photos: Path) -> None:
    better = []
    for name in ("camera", "chelsea", "coffee", "rocket"):
        seen = explain_image(lite0, photos / f"{name}.jpg", top_n=1)
        pixels = fit(decode((photos / f"{name}.jpg").read_bytes()).pixels, lite0.facts.input_size)
        turned = replace(seen, heatmaps=seen.heatmaps[:, ::-1, ::-1])
        [ours], [theirs] = (measure(lite0.scores, pixels, one, METRICS) for one in (seen, turned))
        better += [ours["deletion"] < theirs["deletion"], ours["insertion"] > theirs["insertion"]]
    assert sum(better) >= 7, better
