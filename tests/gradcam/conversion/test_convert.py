"""Models of each format become `.keras` files that compute the same, or are refused."""

import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from gradcam_worker.errors import MissingExtra
from gradcam_worker.gradcam.conversion import formats
from gradcam_worker.gradcam.conversion.formats import Format
from gradcam_worker.gradcam.files.model_file import Refused

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries that read old formats
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SIZE = (16, 20, 3)
PIXELS = np.random.default_rng(5).integers(0, 256, (3, *SIZE)).astype(np.float32)
KERAS_2_FILE = Path(__file__).parents[1] / "models" / "old_keras" / "functional-2.15.0.keras"


def classifier(keras: Any, **options: Any) -> Any:
    """A model with a nested backbone, of Keras 2 or 3."""
    layers = keras.layers
    keras.utils.set_random_seed(7)
    inputs = keras.Input(SIZE)
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(6, 3, 2, name="stem")(inputs))
    x = layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise")(x)
    backbone = keras.Model(inputs, x, name="backbone")
    image = keras.Input(SIZE, name="image")
    rescale = options.get("rescale") or layers.Rescaling(1 / 127.5, -1.0)
    x = layers.GlobalAveragePooling2D(name="pool")(backbone(rescale(image)))
    model = keras.Model(image, layers.Dense(4, "softmax", name="scores")(layers.Dropout(0.3)(x)), name="own")
    rng = np.random.default_rng(8)
    values = [rng.normal(0, 0.5, tuple(weight.shape)) for weight in model.weights]
    model.set_weights(
        [
            np.abs(value) + 0.5 if "variance" in weight.name else value
            for value, weight in zip(values, model.weights, strict=True)
        ]
    )
    return model


def keras_2_hdf5(folder: Path) -> tuple[Path, Any]:
    import tf_keras

    model = classifier(tf_keras)
    model.save(folder / "old.hdf5", save_format="h5")
    return folder / "old.hdf5", model


def keras_3_hdf5(folder: Path) -> tuple[Path, Any]:
    import keras

    model = classifier(keras)
    model.save(folder / "old.h5")
    return folder / "old.h5", model


def keras_2_saved_model(folder: Path) -> tuple[Path, Any]:
    import tf_keras

    model = classifier(tf_keras)
    model.save(folder / "saved", save_format="tf")
    return folder / "saved", model


def keras_3_saved_model(folder: Path) -> tuple[Path, Any]:
    import keras

    model = classifier(keras)
    model.export(folder / "saved", verbose=False)
    return folder / "saved", model


def arithmetic(folder: Path) -> tuple[Path, Any]:
    """What Keras 2 makes of arithmetic between layers."""
    import tf_keras

    model = classifier(tf_keras, rescale=lambda x: x / 127.5 - 1.0)
    model.save(folder / "old.h5", save_format="h5")
    return folder / "old.h5", model


def old_settings(folder: Path) -> tuple[Path, Any]:
    """Names with a slash, and settings that Keras 3 does not know."""
    import tf_keras
    from tf_keras import layers

    flip = layers.RandomFlip("horizontal", name="flip/it")
    rescale = layers.Rescaling(1 / 127.5, -1.0, name="conv1/bn")
    model = classifier(tf_keras, rescale=lambda x: rescale(flip(x)))
    model.save(folder / "old.h5", save_format="h5")
    return folder / "old.h5", model


def function_layers(folder: Path) -> tuple[Path, Any]:
    """Functions of TensorFlow between layers, which Keras 3 has no layers for."""
    import tensorflow as tf
    import tf_keras

    model = classifier(tf_keras, rescale=lambda x: tf.math.maximum(x / 127.5 - 1.0, -0.5))
    model.save(folder / "old.h5", save_format="h5")
    return folder / "old.h5", model


def frozen_graph(folder: Path) -> tuple[Path, Any]:
    import keras
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    model = classifier(keras)
    function = tf.function(lambda image: model(image, training=False))
    frozen = convert_variables_to_constants_v2(
        function.get_concrete_function(tf.TensorSpec((None, *SIZE), "float32", name="image"))
    )
    (folder / "frozen.pb").write_bytes(frozen.graph.as_graph_def().SerializeToString())
    return folder / "frozen.pb", model


def tflite(folder: Path) -> tuple[Path, Any]:
    import keras
    import tensorflow as tf

    model = classifier(keras)
    (folder / "old.tflite").write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
    return folder / "old.tflite", model


LAYERS, GRAPH = "layer by layer", "from its graph, operator by operator"


@pytest.mark.parametrize(
    ("make", "needs_consent", "rebuilt"),
    [
        (keras_2_hdf5, False, LAYERS),
        (keras_3_hdf5, False, LAYERS),
        (keras_2_saved_model, True, LAYERS),
        (keras_3_saved_model, True, GRAPH),
        (function_layers, False, GRAPH),
        (arithmetic, False, LAYERS),
        (old_settings, False, LAYERS),
        (frozen_graph, True, GRAPH),
        (tflite, False, GRAPH),
    ],
)
def test_the_new_file_computes_what_the_old_one_did_and_can_be_explained(
    make: Callable[[Path], tuple[Path, Any]], needs_consent: bool, rebuilt: str, tmp_path: Path
) -> None:
    import keras

    from gradcam_worker.gradcam.conversion.convert import convert

    path, old = make(tmp_path)
    if needs_consent:
        with pytest.raises(Refused, match=r"can read and write files"):
            convert(path, tmp_path / "new.keras")
    converted = convert(path, tmp_path / "new.keras", allow_code=needs_consent)
    new = keras.saving.load_model(tmp_path / "new.keras")
    assert_allclose(
        np.asarray(new(PIXELS, training=False)), np.asarray(old(PIXELS, training=False)), atol=1e-5
    )
    assert converted.difference < 1e-5
    assert (converted.rebuilt, converted.problem) == (rebuilt, "")
    assert (converted.input_size, converted.channels, converted.classes) == (SIZE[:2], 3, 4)
    assert converted.rescales or rebuilt == GRAPH, "in a graph it may be part of the first convolution"
    assert converted.map_size == (7, 9)


def test_a_keras_file_of_keras_2_is_converted(tmp_path: Path) -> None:
    from gradcam_worker.gradcam.conversion.convert import convert

    converted = convert(KERAS_2_FILE, tmp_path / "new.keras")
    assert converted.source == "Keras 2.15.0, .keras"
    assert converted.problem == ""
    with zipfile.ZipFile(tmp_path / "new.keras") as archive:
        assert b'"keras_version": "3.' in archive.read("metadata.json")


@pytest.mark.parametrize(
    ("library", "name"), [("keras", "a.h5"), ("keras", "a.keras"), ("tf_keras", "a.keras")]
)
def test_a_lambda_becomes_layers_where_its_code_may_run(library: str, name: str, tmp_path: Path) -> None:
    import keras

    from gradcam_worker.gradcam.conversion.convert import convert

    own = import_module(library)
    old = classifier(own, rescale=own.layers.Lambda(lambda x: x / 127.5 - 1.0, name="mine"))
    old.save(tmp_path / name)
    with pytest.raises(Refused, match=r"holds a layer Lambda \(mine\).* which can run code"):
        convert(tmp_path / name, tmp_path / "new.keras")
    converted = convert(tmp_path / name, tmp_path / "new.keras", allow_code=True)
    assert converted.rebuilt == GRAPH
    new = keras.saving.load_model(tmp_path / "new.keras")
    assert_allclose(np.asarray(new(PIXELS, training=False)), np.asarray(old(PIXELS)), atol=1e-5)


@pytest.mark.parametrize("form", ["hdf5", "keras_hub", "saved_model", "frozen_graph"])
def test_modules_are_imported_before_a_model_of_any_format_is_loaded(
    form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradcam_worker.gradcam.conversion.sources import open_source
    from gradcam_worker.gradcam.models.own_layers import NotImported

    monkeypatch.setattr(formats, "keras_version", lambda *_: "2.15.0")
    with pytest.raises(NotImported, match="no_such"):
        open_source(tmp_path, form, tmp_path, None, allow_code=True, imports=("no_such",))


def test_modules_have_no_meaning_for_a_file_without_layers(tmp_path: Path) -> None:
    from gradcam_worker.gradcam.conversion.sources import open_source

    with pytest.raises(Refused, match=r"no layers of my\.layers: convert it without --import"):
        open_source(tmp_path, "tflite", tmp_path, None, allow_code=True, imports=("my.layers",))


def test_a_size_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    from gradcam_worker.gradcam.conversion import convert

    path, _ = keras_3_hdf5(tmp_path)
    with pytest.raises(Refused, match=r"takes images of 16 x 20, not of 20 x 20: --input-size is for"):
        convert.convert(path, tmp_path / "new.keras", input_size=(20, 20))
    assert not (tmp_path / "new.keras").exists()
    assert convert.convert(path, tmp_path / "new.keras", input_size=SIZE[:2]).input_size == SIZE[:2]


def test_a_new_model_that_computes_something_else_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    from gradcam_worker.gradcam.conversion import convert, sources

    path, _ = keras_3_hdf5(tmp_path)
    build = sources._of_keras

    def with_other_weights(*args: Any) -> Any:
        source = build(*args)
        rebuilds = []
        for rebuild in source.rebuilds:

            def make(rebuild: Any = rebuild) -> Any:
                model = rebuild.build()
                changed = keras.models.clone_model(model)
                weights = model.get_weights()
                weights[-1] = weights[-1] + np.float32(0.01)  # of the bias of one class
                weights[-1][0] += np.float32(0.01)
                changed.set_weights(weights)
                return changed

            rebuilds.append(sources.Rebuild(rebuild.description, make))
        return sources.Source(source.description, source.inputs, source.predict, tuple(rebuilds))

    monkeypatch.setattr(sources, "_of_keras", with_other_weights)
    with pytest.raises(Refused, match=r"something else than the new model: by 0\.0\d+ of the range"):
        convert.convert(path, tmp_path / "new.keras")
    assert not (tmp_path / "new.keras").exists()


def test_a_quantised_file_needs_a_limit_that_its_rounding_meets(tmp_path: Path) -> None:
    import keras
    import tensorflow as tf

    from gradcam_worker.gradcam.conversion.convert import convert
    from gradcam_worker.gradcam.models.sample_images import varied_images

    model = classifier(keras)
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    images = varied_images(SIZE).astype(np.float32)
    converter.representative_dataset = lambda: ([image[np.newaxis]] for image in images)
    (tmp_path / "old.tflite").write_bytes(converter.convert())
    with pytest.raises(
        Refused,
        match=r"of 21 images\)\. The file is quantised, it rounds to 8 or 16 bits .* with --tolerance",
    ):
        convert(tmp_path / "old.tflite", tmp_path / "new.keras")
    converted = convert(tmp_path / "old.tflite", tmp_path / "new.keras", tolerance=0.1)
    assert 1e-4 < converted.difference < 0.1


def test_keras_2_is_named_by_its_extra_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from gradcam_worker.gradcam.conversion.convert import convert

    monkeypatch.setitem(sys.modules, "tf_keras", None)
    with pytest.raises(MissingExtra, match=r"tf_keras is not installed. .* needs the extra convert"):
        convert(KERAS_2_FILE, tmp_path / "new.keras")


def test_the_end_of_the_text_of_a_failure_is_told(tmp_path: Path) -> None:
    import h5py

    from gradcam_worker.gradcam.conversion.convert import convert

    path, _ = keras_3_hdf5(tmp_path)
    with h5py.File(path, "a") as file:
        config = str(file.attrs["model_config"])
        file.attrs["model_config"] = config.replace('"units": 4', '"units": 4, "of_a_later_version": 1')
    with pytest.raises(Refused, match=r"^cannot be loaded: .*'of_a_later_version': 1\}"):
        convert(path, tmp_path / "new.keras")
