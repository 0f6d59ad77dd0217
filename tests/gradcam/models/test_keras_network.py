"""Real architectures with seeded random weights: what a network promises, whatever its weights.

Their images are small; what they are for images of their own size, `test_every_network.py` tests.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import UnknownLayer
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.explain import explain_pixels
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Computed, Method, Network

pytestmark = pytest.mark.tensorflow

Noise = Callable[..., NDArray[np.uint8]]
TOP_2 = np.array([[-1, -2]], np.int32)
ROWS = {
    name: replace(CATALOG[name], input_size=(side, side), map_size=None)
    for name, side in (("vgg16", 64), ("xception", 96))
}
both_networks = pytest.mark.parametrize("name", [*ROWS])


@pytest.fixture(scope="module")
def random_network() -> Callable[[str], Any]:
    """Builds one of the networks."""
    from gradcam_worker.gradcam.models.loading import load_network

    return cache(lambda name: load_network(ROWS[name], random_seed=1, forward="tensorflow"))


@pytest.fixture
def compute(random_network: Callable[[str], Network], noise: Noise) -> Callable[..., Computed]:
    """The top two classes of one noisy image."""

    def compute(name: str, layer: str | None = None) -> Computed:
        return random_network(name).compute(noise(1, *ROWS[name].input_size), TOP_2, Method(layer=layer))

    return compute


def fingerprint(model: Any) -> str:
    hasher = hashlib.sha256()
    for weight in model.get_weights():
        hasher.update(weight.data)
    return hasher.hexdigest()


def assert_maps(computed: Computed, size: tuple[int, int]) -> None:
    """Two maps of this size, finite, and heatmaps in [0, 1] that reach 1 where anything is positive."""
    assert computed.raw.shape == (1, 2, *size)
    assert np.isfinite(computed.raw).all()
    heatmaps = cam.heatmaps(computed.raw[0])
    assert heatmaps.min() >= 0
    assert_array_equal(heatmaps.max((1, 2)), (computed.raw[0].max((1, 2)) > 0).astype(np.float32))
    assert np.ptp(computed.raw) > 0


@both_networks
class TestRealArchitectures:
    def test_its_maps_are_finite_and_as_large_as_its_facts_say(
        self, name: str, compute: Callable[..., Computed], random_network: Callable[[str], Network]
    ) -> None:
        computed = compute(name)
        assert computed.layer == CATALOG[name].target_layer
        assert_maps(computed, random_network(name).facts.map_size)

    def test_ranks_are_those_of_the_scores(self, name: str, compute: Callable[..., Computed]) -> None:
        computed = compute(name)
        assert computed.scores.shape == (1, 1000)
        assert_array_equal(computed.class_ids, np.argsort(-computed.scores, kind="stable")[:, :2])

    def test_a_batch_gives_what_single_images_give(
        self, name: str, random_network: Callable[[str], Network], noise: Noise
    ) -> None:
        pixels, wanted = noise(3, *ROWS[name].input_size), np.array([[-1, 5]] * 3, np.int32)
        pixels[1] //= 2
        together = random_network(name).compute(pixels, wanted)
        for index in range(3):
            alone = random_network(name).compute(pixels[index : index + 1], wanted[:1])
            peak, largest = abs(alone.raw).max(), abs(alone.scores).max()
            assert_allclose(together.raw[index], alone.raw[0], atol=5e-6 * peak, rtol=0)
            assert_allclose(together.scores[index], alone.scores[0], atol=1e-5 * largest, rtol=0)

    def test_selections_of_different_lengths_are_padded_and_cut_again(
        self, name: str, random_network: Callable[[str], Network], noise: Noise
    ) -> None:
        pixels = noise(3, *ROWS[name].input_size)
        wishes = [(-1, -2, -3), (5,), (812, 3)]
        together = explain_pixels(random_network(name), pixels, wishes)
        assert [len(one.heatmaps) for one in together] == [3, 1, 2]
        assert [one.id for one in together[2].explained] == [812, 3]
        for index, wish in enumerate(wishes):
            alone = explain_pixels(random_network(name), pixels[index : index + 1], [wish])[0]
            assert [one.id for one in together[index].explained] == [one.id for one in alone.explained]
            assert_allclose(together[index].heatmaps, alone.heatmaps, atol=1e-5)

    @pytest.mark.usefixtures("eagerly")
    def test_the_model_is_not_changed(
        self, name: str, random_network: Callable[[str], Any], noise: Noise
    ) -> None:
        import keras

        from gradcam_worker.gradcam.models.keras_network import KerasNetwork

        model, pixels = random_network(name)._model, noise(1, *ROWS[name].input_size)
        weights, layers = fingerprint(model), [layer.name for layer in model.layers]
        output = model(pixels / 255).numpy()
        KerasNetwork(ROWS[name], model, weights_sha256=None).compute(pixels, TOP_2)
        assert model.layers[-1].activation is keras.activations.softmax
        assert fingerprint(model) == weights
        assert [layer.name for layer in model.layers] == layers
        assert output.sum() == pytest.approx(1, abs=1e-5)
        assert_allclose(model(pixels / 255).numpy(), output, rtol=1e-6)


class TestLayers:
    @pytest.mark.usefixtures("eagerly")
    @pytest.mark.parametrize(
        ("name", "layer", "size"),
        [
            ("vgg16", "block1_conv1", (64, 64)),
            ("vgg16", "block3_pool", (8, 8)),
            ("xception", "block1_conv1_act", (47, 47)),
            ("xception", "block5_sepconv2_bn", (6, 6)),
            ("xception", "block13_sepconv1", (6, 6)),
        ],
    )
    def test_early_and_middle_layers_can_be_explained_also_inside_a_residual_block(
        self, name: str, layer: str, size: tuple[int, int], compute: Callable[..., Computed]
    ) -> None:
        computed = compute(name, layer)
        assert computed.layer == layer
        assert_maps(computed, size)

    @pytest.mark.parametrize(
        ("name", "layer"), [("vgg16", "fc1"), ("vgg16", "flatten"), ("xception", "avg_pool")]
    )
    def test_a_layer_without_rows_and_columns_is_refused_with_layers_that_have_them(
        self, name: str, layer: str, compute: Callable[..., Computed]
    ) -> None:
        default = CATALOG[name].target_layer
        with pytest.raises(UnknownLayer, match=f"'{layer}' of {name} keeps no rows.* is {default}"):
            compute(name, layer)

    def test_an_unknown_layer_is_refused_with_existing_layers(self, compute: Callable[..., Computed]) -> None:
        with pytest.raises(UnknownLayer) as refused:
            compute("vgg16", "block9_conv9")
        assert "'block9_conv9' of vgg16 does not exist" in str(refused.value)
        assert "block5_conv1, block5_conv2, block5_conv3, block5_pool" in str(refused.value)
        assert "The default is block5_conv3" in str(refused.value)

    @pytest.mark.usefixtures("eagerly")
    def test_only_the_most_recent_layers_are_cached(self, wrap: Callable[..., Any]) -> None:
        import keras

        from gradcam_worker.gradcam.models.keras_network import MAX_TRACED

        names = [f"layer{number}" for number in range(MAX_TRACED + 1)]
        inputs = x = keras.Input((4, 4, 3))
        for name in names:
            x = keras.layers.Rescaling(1.5, name=name)(x)
        x = keras.layers.GlobalAveragePooling2D()(x)
        network = wrap(keras.Model(inputs, keras.layers.Dense(1000)(x)), names[0])
        pixels = np.full((1, 4, 4, 3), 200, np.uint8)
        for name in [*names[:-1], names[0], names[-1]]:
            assert network.compute(pixels, TOP_2, Method(layer=name)).layer == name
        kept = [place.path for place, *_ in network._passes]
        assert kept == [*names[2:-1], names[0], names[-1]]


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize(
    ("method", "room"),
    [
        (Method(), 2 * 2048),  # pooled gradients
        (Method("hirescam"), 2 * 3 * 3 * 2048),  # of every position
        (Method("eigencam"), 2 * 1000),  # none: the scores
    ],
)
def test_classes_that_do_not_fit_at_once_are_computed_in_turns(
    method: Method,
    room: int,
    random_network: Callable[[str], Any],
    noise: Callable[..., NDArray[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    xception = random_network("xception")
    pixels, wanted = noise(1, 96, 96), np.array([[-1, 7, -3, 400, -2]], np.int32)
    whole = xception.compute(pixels, wanted, method)
    counts = []
    run_pass, size = xception._pass(xception._target(whole.layer), method)

    def counted(pixels: Any, wanted: Any) -> Any:
        counts.append(wanted.shape[1])
        return run_pass(pixels, wanted)

    monkeypatch.setattr(xception, "_pass", lambda *_: (counted, size))
    monkeypatch.setattr("gradcam_worker.gradcam.models.keras_network.MAX_GRADIENTS", room)
    parts = xception.compute(pixels, wanted, method)
    assert counts == [2, 2, 1]
    assert_array_equal(parts.class_ids, whole.class_ids)
    assert_array_equal(parts.scores, whole.scores)
    assert_allclose(parts.raw, whole.raw, atol=1e-5 * np.abs(whole.raw).max())
