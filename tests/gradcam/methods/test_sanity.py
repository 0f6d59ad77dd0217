"""Do the maps show what the network has learned? Adebayo et al., arXiv 1810.03292: see `randomised`."""

from collections.abc import Callable

import numpy as np
import pytest

from gradcam_worker.gradcam.methods import cam

pytestmark = pytest.mark.tensorflow

SIGNED = sorted(set(cam.METHODS) - {"gradcam++", "layercam", "eigencam"})
POSITIVE = ["gradcam++", "layercam"]  # they drop what speaks against a class, and so hear less of the head
BY_GRADIENTS = sorted([*SIGNED, *POSITIVE])
Kept = Callable[[str, str], tuple[float, float]]


@pytest.fixture(scope="module")
def kept() -> Kept:
    """Of a method's maps after a stage: overlap and rank correlation with the trained network's, means."""
    from devtools.agreement.randomisation import cascade, overlap, rank_correlation
    from gradcam_worker.gradcam.models.loading import load_network  # of its own: its weights are shuffled

    (_, trained), *stages = cascade(load_network("efficientnet_lite0"))
    figures = {
        (stage, name): (overlap(trained[name], raw), rank_correlation(trained[name], raw))
        for stage, maps in stages
        for name, raw in maps.items()
    }
    return lambda stage, name: figures[stage, name]


@pytest.mark.parametrize("name", SIGNED)
def test_shuffling_the_head_alone_makes_other_maps(name: str, kept: Kept) -> None:
    hot, ranks = kept("head", name)
    assert hot < 0.3
    assert abs(ranks) < 0.3


@pytest.mark.parametrize("name", POSITIVE)
def test_methods_of_positive_gradients_alone_hear_less_of_the_head_but_change(name: str, kept: Kept) -> None:
    """Known of their kind, and a reason to take Grad-CAM where classes are to be told apart."""
    hot, ranks = kept("head", name)
    assert hot < 0.8
    assert ranks < 0.99


@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_further_down_nothing_is_left_of_any_map_by_gradients(name: str, kept: Kept) -> None:
    for stage in ("last block", "blocks 4 to 6", "everything"):
        hot, ranks = kept(stage, name)
        assert hot < 0.4, stage
        assert ranks < 0.5, stage


def test_eigencam_asks_no_head_and_changes_with_the_layers_that_it_shows(kept: Kept) -> None:
    assert kept("head", "eigencam") == pytest.approx((1, 1))
    assert kept("last convolution", "eigencam")[0] < 0.95
    assert kept("last block", "eigencam")[0] < 0.5


def test_overlap_and_rank_correlation_are_what_their_names_say() -> None:
    from devtools.agreement.randomisation import overlap, rank_correlation

    one = np.array([[[4.0, 3, 1], [0, -1, -2]]], np.float32)
    other = np.array([[[4.0, 1, 3], [0, -1, -2]]], np.float32)
    assert overlap(one, one) == 1
    assert overlap(one, other) == pytest.approx(1 / 3)
    assert overlap(one, -one) == 0
    assert rank_correlation(one, 7 * one + 1) == pytest.approx(1)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, other) == pytest.approx(1 - 6 * 2 / (6 * 35))
