"""Models that take more than an image: each image is explained as with its values built in."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidNetworkInput, NetworkIncompatible
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.network import Method
from gradcam_worker.gradcam.network_inputs import NetworkInput, encode, resolve
from tests.gradcam.small_networks import ALL_CLASSES, COLUMNS, ROWS, Wrap, add_classifier, backbone

pytestmark = pytest.mark.tensorflow

AGE = NetworkInput("age", input="patient", scale=0.01)
SEX = NetworkInput("sex", "category", input="patient", values=("f", "m"))
SITE = NetworkInput("site", "category", values=("arm", "back", "face"), encoding="index", default="back")
INPUTS = (AGE, SEX, SITE)
PATIENTS = ({"age": 61, "sex": "f", "site": "face"}, {"age": 7, "sex": "m"})


def patient_model(keras: Any, *, named: bool = False, last: bool = False) -> Any:
    """A model of an image (rows, columns, 3), a patient (3,) and the number of a site (1,).

    `named`: it takes them by name. `last`: the image comes last.
    """
    layers = keras.layers
    image = keras.Input((ROWS, COLUMNS, 3), name="photo")
    patient = keras.Input((3,), name="patient")
    site = keras.Input((1,), dtype="int32", name="site")
    inner = backbone(keras)
    gate = layers.Dense(6, "sigmoid", kernel_initializer="random_normal", name="gate")(patient)
    x = layers.Multiply(name="gated")([inner(image), layers.Reshape((1, 1, 6))(gate)])
    x = layers.Conv2D(5, 3, padding="same", activation="relu", name="fused")(x)
    pooled = layers.GlobalAveragePooling2D(name="pool")(x)
    where = layers.Flatten()(layers.Embedding(3, 4, embeddings_initializer="random_normal")(site))
    x = layers.Dense(8, "relu", name="mixed")(layers.Concatenate()([pooled, where, patient]))
    scores = layers.Dense(3, "softmax", name="scores")(x)
    inputs: Any = [patient, site, image] if last else [image, patient, site]
    if named:
        inputs = {"photo": image, "patient": patient, "site": site}
    return keras.Model(inputs, scores, name="patients")


def numbers(given: Any) -> tuple[float, ...]:
    return encode(INPUTS, resolve(INPUTS, given, "patients"))


def with_values(keras: Any, model: Any, given: Any) -> Any:
    """The same model for one patient, whose values are built in: it takes an image alone."""
    *patient, site = numbers(given)
    photo = keras.Input((ROWS, COLUMNS, 3))
    ones = keras.layers.GlobalAveragePooling2D()(photo)[:, :1] * 0
    values = {
        "photo": photo,
        "patient": ones + keras.ops.convert_to_tensor([patient], "float32"),
        "site": keras.ops.cast(ones + site, "int32"),
    }
    names = [tensor.name for tensor in model.inputs]
    inputs = values if isinstance(model._inputs_struct, dict) else [values[name] for name in names]
    return keras.Model(photo, model(inputs))


@pytest.fixture
def pixels(noise: Callable[..., NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return noise(2, ROWS, COLUMNS)


@pytest.mark.parametrize("shape", [{}, {"named": True}, {"last": True}])
@pytest.mark.parametrize(
    "method",
    [Method(), Method("layercam"), Method(flip=True), Method(layer="backbone/act", score="probability")],
    ids=["gradcam", "layercam", "flip", "earlier"],
)
def test_patients_in_one_pass_are_explained_as_with_their_values_built_in(
    shape: dict[str, bool],
    method: Method,
    wrap: Wrap,
    pixels: NDArray[np.uint8],
    request: pytest.FixtureRequest,
) -> None:
    import keras

    if shape or not method.flip:  # one is traced, too
        request.getfixturevalue("eagerly")
    keras.utils.set_random_seed(3)
    model = patient_model(keras, **shape)
    network = wrap(model, inputs=INPUTS)
    assert network.facts.default_layer == "fused"
    values = np.array([numbers(given) for given in PATIENTS], np.float32)
    together = network.compute(pixels, ALL_CLASSES, method, values)
    scores = network.scores(pixels, values)
    assert_allclose(scores, together.scores, atol=1e-6)
    for index, given in enumerate(PATIENTS):
        alone = wrap(with_values(keras, model, given), layer="patients/fused")
        layer = method.layer and f"patients/{method.layer}"
        one = alone.compute(
            pixels[[index]],
            ALL_CLASSES[:1],
            Method(method.name, layer, method.score, flip=method.flip),
        )
        assert_allclose(together.scores[index], one.scores[0], atol=1e-5)
        assert_allclose(together.raw[index], one.raw[0], atol=1e-5 * np.abs(one.raw).max())
    assert np.abs(scores[0] - network.scores(pixels[[0]], values[[1]])[0]).max() > 1e-3, "they have an effect"


def test_an_image_is_explained_with_values_by_name(wrap: Wrap, pixels: NDArray[np.uint8]) -> None:
    import keras

    network = wrap(patient_model(keras), inputs=INPUTS)
    explanation = explain_image(network, pixels[0], top_n=1, inputs=PATIENTS[0])
    values = np.array([numbers(PATIENTS[0])], np.float32)
    expected = network.compute(pixels[:1], np.array([[-1]], np.int32), values=values)
    assert explanation.explained[0].id == expected.class_ids[0, 0]
    with pytest.raises(InvalidNetworkInput, match="by_hand needs age"):
        explain_image(network, pixels[0], top_n=1)


def test_an_array_of_another_width_is_refused(wrap: Wrap, pixels: NDArray[np.uint8]) -> None:
    import keras

    network = wrap(patient_model(keras), inputs=INPUTS)
    with pytest.raises(
        InvalidNetworkInput, match="takes 4 values beside each of 2 images, not an array of None"
    ):
        network.compute(pixels, ALL_CLASSES)
    with pytest.raises(InvalidNetworkInput, match=re.escape("not an array of (1, 4)")):
        network.scores(pixels, np.zeros((1, 4), np.float32))


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ((), "takes patient (None, 3), site (None, 1) beside the image: describe patient and site, as in"),
        ((AGE, SITE), "The input patient of by_hand takes (None, 3), 3 numbers for each image; age gives 1"),
        (
            (*INPUTS, NetworkInput("fat")),
            "no input 'fat' beside its image, which inputs.fat is for; there is",
        ),
        ((*INPUTS, NetworkInput("photo")), "by_hand has no input 'photo' beside its image"),
        (
            {"age": {"minimum": 0}},
            "inputs is a list, as in [NetworkInput(\"age\", minimum=0)]; in it is 'age'",
        ),
    ],
)
def test_inputs_that_do_not_fit_the_model_are_refused(inputs: Any, why: str, wrap: Wrap) -> None:
    import keras

    with pytest.raises(NetworkIncompatible, match=re.escape(why)):
        wrap(patient_model(keras), inputs=inputs)


def test_the_image_may_be_named_where_the_shape_does_not_tell(wrap: Wrap, pixels: NDArray[np.uint8]) -> None:
    import keras

    image = keras.Input((ROWS, COLUMNS, 3), name="photo")
    grid = keras.Input((2, 2, 1), name="grid")
    x = keras.layers.Concatenate()([backbone(keras)(image), keras.layers.Resizing(5, 7)(grid)])
    x = keras.layers.Conv2D(4, 3, padding="same", name="fused")(x)
    model = keras.Model([grid, image], add_classifier(keras, x))
    given = {"inputs": [NetworkInput("grid", shape=(2, 2))], "input_size": (ROWS, COLUMNS)}
    with pytest.raises(NetworkIncompatible, match="If only one of them is an image, name it: image_input"):
        wrap(model, **given)
    with pytest.raises(NetworkIncompatible, match="has no input 'foto' for the image; it takes grid"):
        wrap(model, **given, image_input="foto")
    given.pop("input_size")  # read from the model
    with pytest.raises(NetworkIncompatible, match="If only one of them is an image, name it: image_input"):
        wrap(model, **given)
    with pytest.raises(NetworkIncompatible, match="has no input 'foto' for the image; it takes grid"):
        wrap(model, **given, image_input="foto")
    network = wrap(model, **given, image_input="photo")
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    expected = model([values.reshape(2, 2, 2, 1), pixels / np.float32(127.5) - 1])
    logits = network.scores(pixels, values)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    assert_allclose(powers / powers.sum(1, keepdims=True), expected, atol=1e-5)


def test_openvino_is_not_used(wrap: Wrap) -> None:
    import keras

    from gradcam_worker.gradcam.models import compiled_forward

    network = wrap(patient_model(keras), inputs=INPUTS)
    assert "further inputs" in str(compiled_forward._obstacle(network))


def test_whole_numbers_keep_their_type_in_bfloat16(wrap: Wrap, pixels: NDArray[np.uint8]) -> None:
    import keras

    from gradcam_worker.gradcam.models.precision import with_precision

    keras.utils.set_random_seed(3)
    model = patient_model(keras)
    values = np.array([numbers(given) for given in PATIENTS], np.float32)
    exact = wrap(model, inputs=INPUTS).scores(pixels, values)
    rounded = wrap(with_precision(model, "mixed_bfloat16"), inputs=INPUTS).scores(pixels, values)
    assert_allclose(rounded, exact, atol=0.05)
