"""The pointing game, `devtools.agreement.pointing_game`: two shapes in a picture, asked for one of them."""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest

from gradcam_worker.gradcam.methods import cam

pytestmark = pytest.mark.tensorflow

Play = Callable[[str], dict[str, float]]
REQUIRED = {"pooling": 0.95, "flattening": 0.80}
BY_CLASS = sorted(set(cam.METHODS) - {"counterfactual", "eigencam", "notebook"})
both_heads = pytest.mark.parametrize("head", REQUIRED)


@pytest.fixture(scope="module")
def play() -> Play:
    """Hits in [0, 1] by method, of networks that were trained before."""
    from devtools.agreement.pointing_game import play, saved

    return cache(partial(play, build=saved))


@both_heads
@pytest.mark.parametrize("name", BY_CLASS)
def test_the_peak_lies_on_the_shape_that_was_asked_for(head: str, name: str, play: Play) -> None:
    figures = play(head)
    assert figures["named"] >= 0.95, figures
    assert 0.12 <= figures["chance"] <= 0.16, figures
    assert figures[name] >= REQUIRED[head], figures


@both_heads
def test_what_speaks_against_a_shape_is_elsewhere(head: str, play: Play) -> None:
    figures = play(head)
    assert figures["counterfactual"] < 0.1, figures


@both_heads
def test_without_asking_for_a_class_one_finds_no_more_than_half(head: str, play: Play) -> None:
    """What makes the game one of classes: EigenCAM finds a shape, but which one it cannot know."""
    figures = play(head)
    assert 0.3 <= figures["eigencam"] <= 0.6, figures


def test_shapes_lie_in_their_boxes_and_do_not_overlap() -> None:
    from devtools.agreement.pointing_game import BACKGROUND, COLORS, SIDE, draw

    scene = draw(50, np.random.default_rng(3))
    for pixels, classes, boxes in zip(scene.pixels, scene.classes, scene.boxes, strict=True):
        assert len(set(classes)) == 2
        covered = np.zeros((SIDE, SIDE), int)
        for left, top, right, bottom in boxes:
            covered[top:bottom, left:right] += 1
            assert (pixels[top:bottom, left:right] >= COLORS[0]).any()
        assert covered.max() == 1
        assert (pixels[covered == 0] < BACKGROUND[1]).all()
