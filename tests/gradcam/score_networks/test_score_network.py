"""Any function of pixels as a network: RISE and occlusion explain it."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidSettings, MethodNotSupported, NetworkIncompatible
from gradcam_worker.gradcam import explain_image, wrap_callable
from gradcam_worker.gradcam.catalog import PREPROCESSING, Head, Preprocessing
from gradcam_worker.gradcam.imaging.network_input import preprocess
from gradcam_worker.gradcam.score_networks.score_network import ScoreNetwork

SIZE = (16, 24)
PIXELS = np.full((*SIZE, 3), 90, np.uint8)
PIXELS[4:8, 12:20] = (250, 20, 20)
RED = 90 + 160 / 12  # the mean of the first colour: the patch is a twelfth of the image


def colors(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """The means of the three colours, as scores."""
    return np.asarray(pixels.mean((1, 2)) / 10, np.float32)


def wrap(function: Callable[[NDArray[Any]], Any] = colors, **options: Any) -> ScoreNetwork:
    return wrap_callable(function, **{"input_size": SIZE, **options})


def softmax(pixels: NDArray[Any]) -> NDArray[np.float32]:
    powers = np.exp(colors(pixels) - 10)
    return np.asarray(powers / powers.sum(1, keepdims=True), np.float32)


def test_a_function_is_explained_by_rise_unless_a_method_is_named() -> None:
    network = wrap(labels=["red", "green", "blue"])
    explained = explain_image(network, PIXELS, classes=["red"])
    assert explained.method is not None
    assert (explained.method.name, explained.method.masks, explained.layer) == ("rise", 1024, "input")
    row, column = np.unravel_index(explained.heatmaps[0].argmax(), explained.heatmaps[0].shape)
    assert explained.heatmaps.shape == (1, 16, 24)
    assert 3 <= row <= 8
    assert 11 <= column <= 20
    occluded = explain_image(network, PIXELS, classes=["red", "green"], method="occlusion")
    assert occluded.method is not None
    assert occluded.method.window == 2
    assert occluded.raw_min[1] < -0.01, "the patch has less green than grey has"


def test_a_method_that_needs_gradients_is_refused_and_those_that_work_are_named() -> None:
    for method in ("gradcam", "eigencam", "notebook"):
        with pytest.raises(
            MethodNotSupported, match=f"colors only gives scores, and {method} .* rise and occl"
        ):
            explain_image(wrap(), PIXELS, top_n=1, method=method)


def test_a_function_gets_the_pixels_or_what_preprocessing_makes_of_them() -> None:
    given: list[NDArray[Any]] = []

    def function(images: NDArray[Any]) -> NDArray[np.float32]:
        given.append(images)
        return colors(images)

    wrap(function).scores(PIXELS[None])
    assert_array_equal(given[-1], PIXELS[None])
    assert given[-1].dtype == np.uint8
    wrap(function, preprocessing="tf").scores(PIXELS[None])
    assert_allclose(given[-1], PIXELS[None] / 127.5 - 1, rtol=1e-6)
    assert given[-1].dtype == np.float32


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "preprocessing", [*PREPROCESSING.values(), Preprocessing("grey", (9.0,), (3.0,), channels="grey")]
)
def test_preprocessing_is_that_of_keras_networks(preprocessing: Preprocessing) -> None:
    import keras

    pixels = PIXELS[None].astype("float32")
    expected = np.asarray(preprocess(pixels, preprocessing, keras.ops))
    assert_allclose(preprocess(pixels, preprocessing, np), expected, rtol=1e-6, atol=1e-6)


def test_probabilities_that_sum_to_one_are_taken_as_such_and_other_scores_get_a_softmax() -> None:
    for function, head in ((colors, "softmax"), (softmax, "probabilities")):
        network = wrap(function)
        assert network.facts.head == head
        predictions = explain_image(network, PIXELS, top_n=3, method="occlusion").predictions
        expected = np.sort(softmax(PIXELS[None])[0])[::-1]
        assert_allclose([one.probability for one in predictions], expected, rtol=1e-4)


def test_one_unit_is_the_probability_or_score_of_class_one() -> None:
    def probability(pixels: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(pixels[..., :1].mean((1, 2)) / 255, np.float32)

    network = wrap(probability, head=Head("probabilities"))
    assert_allclose(network.scores(PIXELS[None]), [[1 - RED / 255, RED / 255]], rtol=1e-5)
    network = wrap(probability, head=Head("sigmoid"), labels=["no", "yes"])
    assert_allclose(network.scores(PIXELS[None]), [[-RED / 255, RED / 255]], rtol=1e-5)
    predictions = explain_image(network, PIXELS, top_n=2, method="occlusion").predictions
    assert [one.name for one in predictions] == ["yes", "no"]
    assert_allclose([one.probability for one in predictions], [0.6, 0.4], atol=1e-3)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (lambda x: x.mean((1, 2))[:, :1], {}, "returns one number for an image"),
        (lambda x: x.mean((1, 2)) / 255, {}, "lie between 0 and 1 .* do not sum to 1"),
        (
            lambda x: x,
            {},
            r"returns an array \(7, 16, 24, 3\) for 7 images; a classifier's is \(7, classes\)",
        ),
        (lambda x: x.mean((0, 1, 2)), {}, r"returns an array \(3,\)"),
        (lambda x: x.mean((1, 2)) * np.nan, {}, "no numbers"),
        (lambda x: x.mean((1, 2, 9)), {}, "cannot be run: axis 9 is out of bounds"),
        (colors, {"head": Head("probabilities")}, "declared as probabilities"),
        (lambda x: x.mean((1, 2))[:, :1], {"head": Head("softmax")}, "its head is sigmoid or probabilities"),
        (colors, {"labels": ["a", "b"]}, "has 3 classes, but 2 labels"),
        (colors, {"preprocessing": "torchvision"}, "no preprocessing 'torchvision'"),
        (colors, {"preprocessing": {"scale": 2}}, r"preprocessing is one of caffe.*, not \{'scale': 2\}"),
        (colors, {"input_size": 24}, r"input_size is \(height, width\) in pixels, .*, not 24"),
        (colors, {"input_size": (16, 24, 3)}, r"input_size is .*, not \(16, 24, 3\)"),
        (colors, {"input_size": (16.0, 24)}, r"input_size is .*, not \(16.0, 24\)"),
        (colors, {"input_size": (0, 24)}, r"input_size is .*, not \(0, 24\)"),
        (colors, {"input_size": "16x24"}, r"input_size is .*, not '16x24'"),
        (colors, {"head": "softmax"}, r"head is as in Head\(kind=\"softmax\"\), not 'softmax'"),
        (colors, {"labels": None}, "labels cannot be used: None is none of a list of names"),
        (colors, {"labels": 3}, "labels cannot be used: 3 is none of a list of names"),
    ],
)
def test_what_is_no_classifier_is_refused(function: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NetworkIncompatible, match=message):
        wrap(function, **options)


def test_a_sizing_that_is_neither_a_name_nor_a_sizing_is_refused() -> None:
    with pytest.raises(InvalidSettings, match=r"sizing is a name, .*, not \{'fit': 'letterbox'\}"):
        wrap(colors, sizing={"fit": "letterbox"})


def test_a_function_that_returns_tensors_of_another_library_is_fine() -> None:
    class Tensor:
        """As much of a tensor of PyTorch as is used."""

        def __init__(self, values: NDArray[np.float32]) -> None:
            self.values = values

        def detach(self) -> "Tensor":
            return self

        def cpu(self) -> NDArray[np.float32]:
            return self.values

    network = wrap(lambda pixels: Tensor(colors(pixels)))
    assert_array_equal(network.scores(PIXELS[None]), colors(PIXELS[None]))


def test_explaining_a_function_imports_no_backend() -> None:
    program = (
        "import sys; import numpy as np\n"
        "from gradcam_worker.gradcam import explain_image, wrap_callable\n"
        "network = wrap_callable(lambda x: x.mean((1, 2)) / 9, input_size=(16, 16))\n"
        "explain_image(network, np.zeros((16, 16, 3), np.uint8), top_n=1, method='occlusion')\n"
        "assert not {'keras', 'tensorflow', 'jax', 'torch'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
