"""Heatmaps of shuffled weights, and the rank correlation with those of before."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.gradcam.network import Method
from gradcam_worker.gradcam.randomization import mean_rank_correlation

Noise = Callable[..., NDArray[np.uint8]]
SIZE = (20, 24)


def test_the_rank_correlation_is_spearmans_with_mean_ranks_for_equal_values() -> None:
    random = np.random.default_rng(0)
    one, other = (random.integers(0, 6, (5, 4, 4)).astype(np.float32) for _ in range(2))

    def ranks(values: NDArray[np.float32]) -> list[float]:
        flat = values.ravel().tolist()
        return [(sum(v < value for v in flat) + sum(v <= value for v in flat) - 1) / 2 for value in flat]

    expected = [np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in zip(one, other, strict=True)]
    assert mean_rank_correlation(one, other) == pytest.approx(np.mean(expected))
    assert mean_rank_correlation(one, 3 * one + 1) == pytest.approx(1)
    assert mean_rank_correlation(one, -one) == pytest.approx(-1)


def test_maps_that_have_no_rank_correlation_are_left_out() -> None:
    good = np.arange(9, dtype=np.float32).reshape(1, 3, 3)
    for bad in (np.zeros_like(good), np.full_like(good, np.nan), np.full_like(good, np.inf)):
        both = np.concatenate([good, bad])
        assert mean_rank_correlation(np.concatenate([good, good]), both) == pytest.approx(1)
        assert np.isnan(mean_rank_correlation(good, bad))
    assert np.isnan(mean_rank_correlation(good[:, :2, :2], good[:, :2, :2]))


def read(network: Any) -> list[NDArray[np.float32]]:
    """All weights that a network computes with: its head's may be a copy of the model's."""
    return [np.array(variable.numpy()) for variable in network._variables()]


@pytest.fixture
def model() -> Any:
    import keras
    from keras import layers

    keras.utils.set_random_seed(2)
    inputs = keras.Input((*SIZE, 3))
    x = layers.Conv2D(8, 3, 2, activation="relu", name="stem")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Conv2D(12, 3, activation="relu", name="target")(x)
    x = layers.Dense(5, "softmax", name="scores")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, x)


@pytest.mark.tensorflow
def test_the_same_seed_gives_the_same_score_and_the_network_is_as_before(
    model: Any, wrap: Callable[..., Any], noise: Noise
) -> None:
    from gradcam_worker.gradcam.randomization import randomize_parameters

    network, pixels = wrap(model, "target"), noise(4, *SIZE)
    weights = read(network)
    before = network.compute(pixels, np.full((4, 1), -1, np.int32))
    first, second, other = (randomize_parameters(network, pixels, seed=seed) for seed in (0, 0, 1))
    assert first == second != other
    assert all(abs(value) < 0.9 for value in (first.head, first.everything))
    for weight, stored in zip(read(network), weights, strict=True):
        assert_array_equal(weight, stored)
    assert_array_equal(network.compute(pixels, np.full((4, 1), -1, np.int32)).raw, before.raw)


@pytest.mark.tensorflow
def test_a_method_that_asks_no_head_does_not_change_with_the_head(
    model: Any, wrap: Callable[..., Any], noise: Noise
) -> None:
    from gradcam_worker.gradcam.randomization import randomize_parameters

    score = randomize_parameters(wrap(model, "target"), noise(4, *SIZE), method=Method("eigencam"))
    assert score.head == pytest.approx(1)
    assert score.everything < 0.9


@pytest.mark.tensorflow
def test_weights_are_restored_after_an_error_too(model: Any, wrap: Callable[..., Any]) -> None:
    network = wrap(model, "target")
    weights = read(network)

    def fail_meanwhile() -> None:
        with network.shuffled(None, head_only=True, seed=0) as count:
            assert count == 1
            pairs = zip(read(network), weights, strict=True)
            assert sum(not np.array_equal(weight, stored) for weight, stored in pairs) == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail_meanwhile()
    for weight, stored in zip(read(network), weights, strict=True):
        assert_array_equal(weight, stored)


@pytest.mark.tensorflow
def test_of_a_trained_network_nothing_is_left_of_its_heatmaps(lite0: Any) -> None:
    """On the five photos; the values are those of the documentation."""
    from gradcam_worker.gradcam.randomization import randomize_parameters

    score = randomize_parameters(lite0)
    assert abs(score.head) < 0.3
    assert abs(score.everything) < 0.3
