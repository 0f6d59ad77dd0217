"""Why A and not B: the explained score is that of A less the mean of those of the others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidJob, UnknownClass
from gradcam_worker.gradcam.catalog import Head, HeadKind
from gradcam_worker.gradcam.classes import ClassIndex, imagenet, versus
from gradcam_worker.gradcam.explain import explain_image, explain_pixels
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Method, Network
from gradcam_worker.testing import TinyNetwork

Noise = Callable[..., NDArray[np.uint8]]
Wrap = Callable[..., Network]

SIZE, CLASSES = (20, 24), 6
CATS = ClassIndex.of(["tabby", "tiger cat", "Persian cat", "lynx"])
RANKED = sorted(cam.METHODS.keys() - cam.CLASSLESS - {"notebook"})  # which ranks by other scores
OF_ONE_SLOPE = ("gradcam", "hirescam", "xgradcam", "counterfactual")


@pytest.fixture
def pixels(noise: Noise) -> NDArray[np.uint8]:
    return noise(2, *SIZE)


@pytest.fixture
def linear() -> Any:
    """A convolution, global average pooling and one dense layer."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(5)
    inputs = keras.Input((*SIZE, 3))
    x = layers.Conv2D(7, 3, 2, activation="relu", name="target")(inputs)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(CLASSES, "softmax", bias_initializer="random_normal", name="scores")(x)
    return keras.Model(inputs, x)


@pytest.fixture
def bent() -> Any:
    """A tail that is not linear, so that the gradients depend on the position."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(6)
    inputs = keras.Input((*SIZE, 3))
    x = layers.Conv2D(7, 3, 2, activation="relu", name="target")(inputs)
    x = layers.Conv2D(8, 3, activation="tanh", name="bend")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(CLASSES, "softmax", bias_initializer="random_normal", name="scores")(x)
    return keras.Model(inputs, x)


class TestWhichClasses:
    def test_names_ids_and_wnids_are_found_and_repeated_ones_count_once(self) -> None:
        assert CATS.select_against(["lynx", 1, "tiger cat"], (0,)) == (3, 1)
        assert CATS.select_against(None, (0,)) == ()
        assert imagenet().select_against(["n02123045"], (282,)) == (281,)

    def test_a_class_against_itself_is_refused(self) -> None:
        with pytest.raises(InvalidJob, match=r"Class 1 \(tiger cat\) would be explained against itself"):
            CATS.select_against(["tiger cat"], (0, 1))

    def test_top_n_counts_the_other_classes(self) -> None:
        assert CATS.select_against([0], (-1, -2, -3)) == (0,)
        with pytest.raises(InvalidJob, match="top_n is 4: it must be from 1 to 3"):
            CATS.select_against([0], (-1, -2, -3, -4))

    def test_an_unknown_class_and_a_single_text_are_refused(self) -> None:
        with pytest.raises(UnknownClass):
            CATS.select_against(["dog"], (0,))
        with pytest.raises(InvalidJob, match="against is a list"):
            CATS.select_against("lynx", (0,))

    def test_captions_name_at_most_three_of_them(self) -> None:
        assert versus(()) == ""
        assert versus(CATS.labels[:2]) == "not 0 tabby or 1 tiger cat"
        assert versus(imagenet().labels[:5]).endswith("2 great white shark or 2 others")

    def test_a_method_that_explains_no_class_takes_none(self) -> None:
        with pytest.raises(InvalidJob, match="eigencam explains no class, and so none against others"):
            explain_image(
                TinyNetwork(),
                np.zeros((16, 16, 3), np.uint8),
                top_n=1,
                against=["blue"],
                method=Method("eigencam"),
            )


class TestKnownAnswers:
    def test_of_the_tiny_network_the_map_is_that_of_the_difference_of_the_kernels(self) -> None:
        photo = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
        [seen] = explain_pixels(TinyNetwork(), photo, [(0,)], Method(against=(2,)))
        blocks = photo.reshape(1, 4, 4, 4, 4, 3).mean((2, 4)) / 255
        raw = blocks[0] @ (np.array([2, -1, -1]) - np.array([-1, -1, 2])) / 16
        assert_allclose([seen.raw_min[0], seen.raw_max[0]], [raw.min(), raw.max()], rtol=1e-5)
        assert_allclose(seen.heatmaps[0], np.maximum(raw, 0) / raw.max(), atol=1e-5)
        assert [label.name for label in seen.against] == ["blue"]
        assert seen.title(0).endswith(", not 2 blue")
        assert "not 2 blue" in repr(seen)

    @pytest.mark.parametrize("name", ["rise", "occlusion"])
    def test_from_scores_alone_it_is_the_map_of_a_network_with_the_difference_as_its_score(
        self, name: str
    ) -> None:
        class Difference(TinyNetwork):
            KERNEL = TinyNetwork.KERNEL - np.array([0, 0, 1]) * TinyNetwork.KERNEL[:, :2].mean(
                1, keepdims=True
            )

        photo = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
        method = Method(name, masks=64 if name == "rise" else None)
        [contrast] = explain_pixels(TinyNetwork(), photo, [(-1,)], replace(method, against=(0, 1)))
        [expected] = explain_pixels(Difference(), photo, [(2,)], method)
        assert contrast.explained[0].id == 2
        assert_allclose(contrast.heatmaps, expected.heatmaps, atol=1e-5)
        assert_allclose(contrast.raw_min, expected.raw_min, rtol=1e-5)

    @pytest.mark.tensorflow
    @pytest.mark.usefixtures("eagerly")
    @pytest.mark.parametrize("name", OF_ONE_SLOPE)
    def test_behind_pooling_the_weights_of_the_map_are_those_of_the_head_less_the_others(
        self, name: str, linear: Any, wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        import keras

        network = wrap(linear, "target")
        against, wanted = (1, 5), np.array([[0, 3]] * 2, np.int32)
        computed = network.compute(pixels, wanted, Method(name, against=against))
        kernel = linear.get_layer("scores").get_weights()[0].astype(np.float64)
        trunk = keras.Model(linear.input, linear.get_layer("target").output)
        activations = np.asarray(trunk(pixels / np.float32(127.5) - 1), np.float64)
        weights = kernel[:, [0, 3]] - kernel[:, [*against]].mean(axis=1, keepdims=True)
        sign = -1 if name == "counterfactual" else 1
        cells = activations.shape[1] * activations.shape[2]
        expected = sign * np.einsum("nhwc,ck->nkhw", activations, weights) / cells
        assert_allclose(computed.raw, expected, atol=1e-6 * np.abs(expected).max())
        assert_array_equal(computed.class_ids, wanted)

    @pytest.mark.tensorflow
    @pytest.mark.usefixtures("eagerly")
    @pytest.mark.parametrize("score", cam.SCORES)
    def test_with_a_softmax_the_probability_gives_the_map_of_the_scores(
        self, score: str, bent: Any, wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        """The logarithm of a ratio of probabilities is the difference of the scores."""
        network, wanted = wrap(bent, "target"), np.array([[2]] * 2, np.int32)
        plain = network.compute(pixels, wanted, Method("hirescam", against=(4,))).raw
        assert_array_equal(
            network.compute(pixels, wanted, Method("hirescam", score=score, against=(4,))).raw, plain
        )

    @pytest.mark.tensorflow
    @pytest.mark.usefixtures("eagerly")
    @pytest.mark.parametrize(("activation", "score"), [("softmax", "logit"), ("sigmoid", "probability")])
    def test_hirescam_of_a_bent_tail_agrees_with_finite_differences(
        self, activation: HeadKind, score: str, bent: Any, wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        import keras

        bent.get_layer("scores").activation = keras.activations.get(activation)
        network = wrap(bent, "target", head=Head(kind=activation))
        method = Method("hirescam", score=score, against=(1, 4))
        computed = network.compute(pixels[:1], np.array([[2]], np.int32), method)
        trunk = keras.Model(bent.input, bent.get_layer("target").output)
        activations = np.asarray(trunk(pixels[:1] / np.float32(127.5) - 1), np.float64)[0]
        bend, dense = (
            [weight.astype(np.float64) for weight in bent.get_layer(layer).get_weights()]
            for layer in ("bend", "scores")
        )

        def explained(feature_map: NDArray[np.float64]) -> float:
            windows = np.lib.stride_tricks.sliding_window_view(feature_map, (3, 3), axis=(0, 1))
            x = np.tanh(np.einsum("hwcij,ijcd->hwd", windows, bend[0]) + bend[1]).ravel()
            z = x @ dense[0] + dense[1]
            values = -np.logaddexp(0, -z) if score == "probability" else z
            return float(values[2] - (values[1] + values[4]) / 2)

        step = 1e-5
        for row, column in ((0, 0), (4, 6), (8, 2)):
            slope = np.zeros(activations.shape[2])
            for channel in range(len(slope)):
                moved = np.zeros_like(activations)
                moved[row, column, channel] = step
                slope[channel] = explained(activations + moved) - explained(activations - moved)
            expected = slope @ activations[row, column] / (2 * step)
            assert computed.raw[0, 0, row, column] == pytest.approx(
                expected, abs=2e-5 * float(np.abs(computed.raw).max())
            )

    @pytest.mark.tensorflow
    @pytest.mark.parametrize("name", RANKED)
    @pytest.mark.parametrize("flip", [False, True])
    def test_ranks_skip_the_classes_against_and_other_classes_against_need_no_new_function(
        self,
        name: str,
        flip: bool,
        bent: Any,
        wrap: Wrap,
        pixels: NDArray[np.uint8],
        request: pytest.FixtureRequest,
    ) -> None:
        if not (name == "gradcam" and flip):  # one is traced, too
            request.getfixturevalue("eagerly")
        network = wrap(bent, "target")
        ranked = np.argsort(-network.scores(pixels[:1])[0])
        first, second, third = map(int, ranked[:3])
        computed = network.compute(
            pixels[:1], np.array([[-1, -2]], np.int32), Method(name, flip=flip, against=(first,))
        )
        assert computed.class_ids.tolist() == [[second, third]]
        functions = len(network._passes)  # type: ignore[attr-defined]
        other = network.compute(
            pixels[:1], np.array([[first]], np.int32), Method(name, flip=flip, against=(second, third))
        )
        assert len(network._passes) == functions  # type: ignore[attr-defined]
        assert other.raw.any() or name == "notebook"  # whose probabilities saturate

    @pytest.mark.tensorflow
    @pytest.mark.usefixtures("eagerly")
    def test_of_a_binary_head_the_other_class_is_the_negated_score(self, wrap: Wrap, noise: Noise) -> None:
        import keras
        from keras import layers

        inputs = keras.Input((*SIZE, 3))
        x = layers.Conv2D(5, 3, 2, activation="relu", name="target")(inputs)
        x = layers.Dense(1, "sigmoid")(layers.GlobalAveragePooling2D()(x))
        network, pixels = wrap(keras.Model(inputs, x), "target"), noise(1, *SIZE)
        wanted = np.array([[1]], np.int32)
        plain = network.compute(pixels, wanted).raw
        assert_allclose(network.compute(pixels, wanted, Method(against=(0,))).raw, 2 * plain, rtol=1e-5)


@pytest.mark.tensorflow
@pytest.mark.usefixtures("eagerly")
def test_of_the_cat_what_tells_it_from_a_dog_and_from_a_tabby_are_different_regions(
    lite0: Any, photos: Path
) -> None:
    """Much of the Egyptian cat tells it from a golden retriever; less of it tells it from a tabby."""
    photo = photos / "chelsea.jpg"
    plain, dog, tabby = (
        explain_image(lite0, photo, classes=[285], against=against).heatmaps[0].ravel()
        for against in (None, ["golden_retriever"], ["tabby"])
    )
    same_as_plain = [float(np.corrcoef(plain, other)[0, 1]) for other in (dog, tabby)]
    assert same_as_plain[0] > same_as_plain[1]
    assert same_as_plain[1] < 0.95
