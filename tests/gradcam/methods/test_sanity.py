"""Do the maps show what the network has learned? Adebayo et al., arXiv 1810.03292.

The weights of a trained network are shuffled from the head down, one group of layers after the other. An
explanation that stays as it was does not explain what the network has learned.

`pytest --log-cli-level=info` prints the figures of docs/explanation/agreement.md.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from devtools.agreement.photos import overlap, photographs
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Method

pytestmark = pytest.mark.tensorflow
log = logging.getLogger(__name__)

TOP = 3  # classes a photo
# Of EfficientNet-Lite0: down to where each stage shuffles, by the beginnings of the layers' names.
STAGES = {
    "head": ("scores",),
    "last convolution": ("top",),
    "last block": ("block7",),
    "blocks 4 to 6": ("block6", "block5", "block4"),
    "everything": ("block3", "block2", "block1", "stem"),
}

Maps = NDArray[np.float32]
SIGNED = sorted(set(cam.METHODS) - {"gradcam++", "layercam", "eigencam"})
POSITIVE = ["gradcam++", "layercam"]  # they drop what speaks against a class, and so hear less of the head
BY_GRADIENTS = sorted([*SIGNED, *POSITIVE])
PREPARED = sorted(set(cam.METHODS) - {"notebook"})  # its image is not preprocessed
Kept = Callable[[str, str], tuple[float, float]]


def cascade(
    network: Any, compute_together: Callable[..., dict[str, Maps]]
) -> Iterator[tuple[str, dict[str, Maps]]]:
    """Raw maps (photos x classes, rows, columns) of every method: as trained, then after each stage.

    The classes are those that the trained network ranked first. The network's weights are shuffled in place.
    """
    pixels = photographs(network.facts.input_size)
    ranked = np.tile(-np.arange(1, TOP + 1, dtype=np.int32), (len(pixels), 1))
    class_ids = network.compute(pixels, ranked).class_ids

    def maps() -> dict[str, Maps]:
        raw = compute_together(network, pixels, class_ids, PREPARED)
        raw["notebook"] = network.compute(pixels, class_ids, Method("notebook")).raw
        return {name: one.reshape(-1, *one.shape[2:]) for name, one in raw.items()}

    yield "as trained", maps()
    rng = np.random.default_rng(0)
    for stage, beginnings in STAGES.items():
        for layer in network._model.layers:
            if layer.weights and layer.name.startswith(beginnings):
                layer.set_weights([shuffled(weight, rng) for weight in layer.get_weights()])
        yield stage, maps()


def shuffled(weight: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """The same numbers in other places."""
    return rng.permutation(weight.ravel()).reshape(weight.shape)


def rank_correlation(one: Maps, other: Maps) -> float:
    """Spearman's, between raw maps (n, rows, columns), the mean."""
    ranks = [maps.reshape(len(maps), -1).argsort(axis=1).argsort(axis=1) for maps in (one, other)]
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)]))


@pytest.fixture(scope="module")
def kept(compute_together: Callable[..., dict[str, Maps]]) -> Kept:
    """Of a method's maps after a stage: overlap and rank correlation with the trained network's, means."""
    from gradcam_worker.gradcam.models.loading import load_network  # of its own: its weights are shuffled

    network = load_network("efficientnet_lite0", forward="tensorflow")
    (_, trained), *stages = cascade(network, compute_together)
    figures = {
        (stage, name): (overlap(trained[name], raw), rank_correlation(trained[name], raw))
        for stage, maps in stages
        for name, raw in maps.items()
    }
    for (stage, name), (hot, ranks) in figures.items():
        log.info("%s, %s: IoU %.3f, rank correlation %.3f", stage, name, hot, ranks)
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
    one = np.array([[[4.0, 3, 1], [0, -1, -2]]], np.float32)
    other = np.array([[[4.0, 1, 3], [0, -1, -2]]], np.float32)
    assert overlap(one, one) == 1
    assert overlap(one, other) == pytest.approx(1 / 3)
    assert overlap(one, -one) == 0
    assert rank_correlation(one, 7 * one + 1) == pytest.approx(1)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, other) == pytest.approx(1 - 6 * 2 / (6 * 35))
