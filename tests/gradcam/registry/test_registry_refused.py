"""Errors in an operator's registry are refused, with their key in the file."""

import re
from pathlib import Path

import pytest

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.gradcam.registry.registry import Registry
from tests.gradcam.registry_text import MODEL, SHA256, WEIGHTS, write


def refusal(path: Path) -> str:
    with pytest.raises(InvalidSettings) as refused:
        Registry(path)
    assert str(refused.value).startswith(f"GRADCAM_NETWORKS: {path} cannot be used: ")
    return str(refused.value)


@pytest.mark.parametrize(
    ("labels", "text", "why"),
    [
        ("none.txt", "", "none.txt: No such file or directory"),
        ("l.txt", "", "number 1 is '', which is no name"),
        ("l.txt", "a\n\nb", "number 2 is '', which is no name"),
        ("l.txt", "a\n" * 500_001, "has more than 1,000,000 bytes"),
        ("l.json", '["a", 3]', "number 2 is 3, which is no name"),
        ("l.json", '{"a": [0]}', "must hold a list of names"),
        ("l.json", '{"a": 0, "b": 2}', "id 1 has no name, and the highest id is 2"),
        ("l.csv", "id,name\n0,a\n0,b", "id 0 has two names, 'a' and 'b'"),
        ("l.json", "[]", "must hold a list of names"),
        ("l.json", "[", "Expecting value"),
        ("l.txt", "\udcff", "it is not UTF-8 at byte 0"),
        ("s3://models/l.txt", "", "must be a file on this machine, or the names themselves"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(labels: str, text: str, why: str, tmp_path: Path) -> None:
    if "none" not in labels and "//" not in labels:
        (tmp_path / labels).write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(write(tmp_path, MODEL + f'labels = "{labels}"'))
    assert "networks.tumours.labels: " in message
    assert why in message


def test_the_number_of_labels_must_be_that_of_classes(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, WEIGHTS + 'labels = ["a", "b"]'))
    assert "networks.tumours.labels: there are 2, but classes is 200" in message


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (MODEL.replace("sha256", "sha265"), "networks.tumours.sha256: is missing: `sha256sum FILE`"),
        (MODEL.replace("sha256", "sha265"), "sha265: there is no such key; did you mean 'sha256'?"),
        (MODEL + 'imports = ["layers.py/x"]', "imports.0: 'layers.py/x' is no name of a module"),
        (MODEL + 'imports = ["../layers"]', "is no name of a module"),
        (WEIGHTS + 'imports = ["layers"]', "imports belongs to model: an architecture has no layers but"),
        (WEIGHTS + 'image_input = "a"', "inputs and image_input belong to model"),
        (MODEL + 'inputs.age.typ = "number"', "inputs.age.typ: there is no such key; did you mean 'type'?"),
        (MODEL + 'inputs."a b".default = 1', "inputs.a b: an input's name is made of letters, digits and"),
        (MODEL + 'inputs.age.type = "text"', "inputs.age.type: Input should be 'number', 'integer' or"),
        (MODEL + "inputs.age = { minimum = 5, maximum = 4 }", "inputs.age: minimum is larger than maximum"),
        (MODEL + "inputs.age = { maximum = 4, default = 5 }", "inputs.age: default: it must lie in"),
        (MODEL + "inputs.age = { minimum = 1e300 }", "inputs.age: no value is possible: it must lie in"),
        (
            MODEL + 'inputs.age = { type = "integer", minimum = 0.2, maximum = 0.8 }',
            "inputs.age: no value is possible: it must lie in",
        ),
        (MODEL + "inputs.age = { default = 5, constant = 5 }", "inputs.age: give either default or constant"),
        (MODEL + 'inputs.age = { values = ["a"] }', 'inputs.age: values is for type = "category"'),
        (MODEL + "inputs.age = { scale = 0 }", "inputs.age: scale must not be 0"),
        (MODEL + "inputs.age = { shape = [300, 300] }", "inputs.age: it has 90,000 numbers; at most"),
        (MODEL + 'inputs.sex = { type = "category" }', "inputs.sex: values is needed: the"),
        (MODEL + 'inputs.sex = { type = "category", values = ["f", "f"] }', "values has one category twice"),
        (
            MODEL + 'inputs.sex = { type = "category", values = ["f"], constant = "m" }',
            "inputs.sex: constant: it must be one of f, not 'm'",
        ),
        (
            MODEL + 'inputs.sex = { type = "category", values = ["f"], shape = [2], minimum = 0 }',
            "inputs.sex: shape, minimum is not for a category",
        ),
        (MODEL.replace(SHA256, "abc"), "networks.tumours.sha256: must be the 64 hexadecimal digits"),
        (MODEL.replace('"torch"', '"troch"'), "there is no preprocessing 'troch'; did you mean 'torch'?"),
        (MODEL.replace('"torch"', '"qqq"'), "there are caffe, tf, torch, lite, unit, none"),
        (MODEL.replace('"torch"', "3"), "networks.tumours.preprocessing: must be a name or a table"),
        (MODEL.replace('"torch"', "{ ofset = 1 }"), "preprocessing.ofset: there is no such key; did you"),
        (MODEL.replace('"torch"', "{ scale = 0 }"), "preprocessing: scale must not be 0"),
        (MODEL.replace('"torch"', "{ scale = nan }"), "preprocessing.scale.0: Input should be a finite"),
        (MODEL.replace('"torch"', "{ scale = [] }"), "preprocessing.scale: "),
        (MODEL.replace('"torch"', "{ scale = [1, 2] }"), "scale has 2 numbers for 3 channels"),
        (MODEL.replace('"torch"', '{ channels = "gbr" }'), "channels: must be rgb, bgr, grey, grey_mean, or"),
        (MODEL.replace('"torch"', "{ channels = 0 }"), "channels: must be rgb, bgr, grey, grey_mean, or"),
        (MODEL.replace('"torch"', "{ scale = 1, mean = 2 }"), "scale and mean exclude each other: give"),
        (MODEL.replace('"torch"', "{ mean = 0.5, std = 0.5 }"), "those of pixels from 0 to 1: add range"),
        (MODEL.replace('"torch"', "{ range = [1, 0] }"), "range is [1.0, 0.0]: it must rise, as [0, 1]"),
        (MODEL.replace('"torch"', "{ std = 0 }"), "preprocessing: std must not be 0"),
        (MODEL.replace('"torch"', "{ mean = [1, 2] }"), "mean has 2 numbers for 3 channels"),
        (MODEL + 'sizing = "torchvison"', "no sizing 'torchvison'; did you mean 'torchvision'?"),
        (MODEL + "sizing = 3", "networks.tumours.sizing: must be a name or a table"),
        (MODEL + 'sizing = { resize = "cubic" }', "networks.tumours.sizing.resize: Input should be 'area'"),
        (MODEL + "sizing = { resiz = 1 }", "sizing.resiz: there is no such key; did you mean 'resize'?"),
        (MODEL + "sizing = { short_side = 256 }", "sizing: short_side, crop_fraction and size belong to"),
        (MODEL + 'sizing = { fit = "crop", short_side = 9, size = [9, 9] }', "exclude each other: give one"),
        (MODEL + 'sizing = { fit = "crop", size = [0, 9] }', "size is (0, 9): its height and width must be"),
        (MODEL + 'sizing = { fit = "crop", size = [9] }', "networks.tumours.sizing.size"),
        (MODEL + 'sizing = { fit = "letterbox", color = 256 }', "sizing.color.0: Input should be less"),
        (MODEL + 'sizing = { fit = "letterbox", color = [1, 2] }', "color has 2 levels for 3 channels"),
        (WEIGHTS + 'sizing = { fit = "letterbox", color = [1, 2] }', "color has 2 levels for 3 channels"),
        (MODEL.replace('preprocessing = "torch"', ""), "preprocessing is needed beside model"),
        (MODEL.replace("input_size = [384, 320]", ""), "input_size = [height, width] is needed beside"),
        (MODEL.replace("384, 320", "384"), "networks.tumours.input_size: must be [height, width], as in"),
        (MODEL.replace("[384, 320]", "384"), "networks.tumours.input_size: must be [height, width], as in"),
        (MODEL.replace("384, 320", "384, 320, 3"), "tumours.input_size: must be [height, width], as in"),
        (MODEL.replace("384, 320", "384, 0"), "networks.tumours.input_size.1: Input should be greater"),
        (MODEL.replace("384, 320", "384, 320.5"), "input_size.1: Input should be a valid integer"),
        (MODEL + "pretrained = true", "pretrained belongs to architecture: a model is built as its file"),
        (WEIGHTS + 'pretrained = "yes"', "networks.tumours.pretrained: Input should be a valid boolean"),
        (MODEL + "classes = 4", "classes belongs to architecture"),
        (MODEL + 'head = { kind = "softmux" }', "networks.tumours.head.kind: Input should be 'softmax'"),
        (MODEL + 'head = "softmax"', 'tumours.head: must be a table, as in { kind = "softmax" }'),
        (MODEL + "inputs.age = 3", "tumours.inputs.age: must be a table"),
        (MODEL + 'head = { outputs = "a" }', "head.outputs: there is no such key; did you mean"),
        (MODEL + 'layout = "nchw"', "layout belongs to an .onnx or .tflite file"),
        (MODEL.replace("s.keras", "s.onnx") + 'layout = "chw"', "networks.tumours.layout: Input should be"),
        (MODEL.replace("s.keras", "s.onnx") + "scores_only = false", "scores_only cannot be false"),
        (MODEL.replace("s.keras", "s.tflite") + 'target_layer = "a"', "this one only gives scores"),
        (MODEL + 'scores_only = true\ntarget_layer = "a"', "target_layer belongs to a network with"),
        (WEIGHTS.replace("s.weights.h5", "s.onnx"), "must end in .weights.h5"),
        (MODEL + "labels = 3", "networks.tumours.labels: must be a list"),
        (MODEL + 'labels = ["a", 3]', "networks.tumours.labels.1: Input should be a valid string"),
        (MODEL + WEIGHTS.replace("sha256", "#"), "give either model, or architecture and weights"),
        (f'sha256 = "{SHA256}"', "give either model, or architecture and weights"),
        (WEIGHTS.replace("weights = ", "#"), "architecture and weights belong together"),
        (WEIGHTS.replace("classes", "#"), "classes is needed where there are no labels"),
        (WEIGHTS.replace("= 200", "= 1"), "networks.tumours.classes: Input should be greater than"),
        (WEIGHTS.replace("VGG16", "vgg61"), "no architecture 'vgg61' in keras.applications; did"),
        (WEIGHTS.replace("VGG16", "efficientnet_lite0"), "no architecture 'efficientnet_lite0' in"),
    ],
)  # fmt: skip
def test_errors_are_reported_with_their_key(body: str, why: str, tmp_path: Path) -> None:
    assert why in refusal(write(tmp_path, body))


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (
            "t.h5",
            "is a whole model in HDF5: convert it with `gradcam convert t.h5 NAME.keras`",
        ),
        ("s3://m/t.hdf5", "is a whole model in HDF5"),
        ("t.weights.h5", "name it with weights, beside architecture"),
        ("t.pkl", "is a pickle, which runs whatever code it holds"),
        ("saved/", "looks like a folder, a SavedModel: convert it"),
        ("saved_model.pb", "belongs to a SavedModel"),
        ("s3://m/saved", "looks like a folder"),
        ("t.pt", "is of PyTorch, which has no layers of Keras"),
        ("t.txt", "is no Keras model: save it with model.save('NAME.keras')"),
        ("https://m/t.keras", "https:// cannot be read: use s3://bucket/key, file:///path or a path"),
        ("s3://t.keras", "is not a whole address"),
        ("file://host/t.keras", "is not a whole address"),
        ("s3://m/t?v=1.keras", "is not a whole address"),
        ("a\\u0000b.keras", "is not a whole address"),
    ],
)
def test_only_a_keras_file_is_a_model(file: str, why: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, MODEL.replace("tumours.keras", file)))
    assert "networks.tumours.model: " in message
    assert why in message


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("b.h5", "must end in .weights.h5: save it with model.save_weights('NAME.weights.h5')"),
        ("b.keras", "is a whole model: name it with model, without architecture"),
        ("gs://m/b.weights.h5", "gs:// cannot be read"),
    ],
)
def test_only_a_weights_file_holds_weights(file: str, why: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, WEIGHTS.replace("birds.weights.h5", file)))
    assert "networks.tumours.weights: " in message
    assert why in message


@pytest.mark.parametrize("name", ["vgg16", "VGG16", "efficientnet_lite0"])
def test_a_network_of_the_catalog_cannot_be_redefined(name: str, tmp_path: Path) -> None:
    message = refusal(write(tmp_path, MODEL, name))
    assert f"networks.{name}: this is the name of a network of the catalog" in message


@pytest.mark.parametrize("name", ['"a b"', '"../a"', '".a"', '""', '"ä"', f'"{"a" * 65}"'])
def test_invalid_names_are_refused(name: str, tmp_path: Path) -> None:
    assert "a network's name is made of letters, digits and _ - ." in refusal(write(tmp_path, MODEL, name))


@pytest.mark.parametrize("name", ["a", '"v1.2"', "a_b-c", "7"])
def test_valid_names_are_accepted(name: str, tmp_path: Path) -> None:
    assert Registry(write(tmp_path, MODEL, name)).find(name.strip('"'))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "networks: is missing"),
        (b"[network.a]", "network: there is no such key; did you mean 'networks'?"),
        (b"[networks", "it is not TOML: "),
        (b"a = '\xff'", "it is not UTF-8 at byte 5"),
        (b"networks = 3", "networks: "),
        (b"#" * 1_000_001, "has more than 1,000,000 bytes"),
    ],
)
def test_a_file_that_is_no_registry_is_refused(text: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "networks.toml").write_bytes(text)
    assert why in refusal(tmp_path / "networks.toml")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file or directory" in refusal(tmp_path / "networks.toml")


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    body = MODEL.replace(SHA256, "abc").replace("torch", "troch")
    message = refusal(write(tmp_path, body))
    assert "networks.tumours.sha256: " in message
    assert "networks.tumours.preprocessing: " in message


def test_a_registry_without_networks_is_valid(tmp_path: Path) -> None:
    (tmp_path / "networks.toml").write_text("[networks]")
    assert Registry(tmp_path / "networks.toml").operator_networks() == ()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x" * 300, "number 1 is 'xxx.*a name is printable, of at most 256 letters"),
        ('["fine", "\\ud800"]', "number 2 is .*a name is printable"),
        ("[" * 90_000, "nested too deeply"),
    ],
)
def test_labels_that_cannot_be_printed_or_are_too_long_are_refused(
    text: str, why: str, tmp_path: Path
) -> None:
    name = "labels.json" if text.startswith("[") else "labels.txt"
    (tmp_path / name).write_text(text)
    assert re.search(why, refusal(write(tmp_path, f'{MODEL}labels = "{name}"')))
