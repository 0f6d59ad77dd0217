"""Classifiers of keras-hub, built small with random weights: from presets in folders, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tensorflow

TIMEOUT_S = 220
PROGRAM = """
import json, socket, sys, tomllib
from pathlib import Path
import numpy as np
import keras_hub
import tensorflow
from gradcam_worker.errors import GradcamError
from gradcam_worker.gradcam import explain_image
from gradcam_worker.gradcam.conversion.convert import convert
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.models.hub_preset import find_preset, load_preset
from gradcam_worker.gradcam.models.loading import load_network
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.gradcam.files.weights import WeightsFile
from gradcam_worker.operations.convert import registry_lines
from dataclasses import asdict

def no_network(*_):
    raise AssertionError("the network is used")
socket.socket.connect = no_network
# Each pass is run once or twice: to trace it takes longer, as in the fixture `eagerly`.
tensorflow.config.run_functions_eagerly(True)
tensorflow.vectorized_map = lambda pull, values: tensorflow.stack([*map(pull, tensorflow.unstack(values))])

models, layers = keras_hub.models, keras_hub.layers
vit = models.ViTBackbone(
    image_shape=(32, 32, 3), patch_size=(8, 8), num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
)
resnet = models.ResNetBackbone(
    input_conv_filters=[64], input_conv_kernel_sizes=[7], stackwise_num_filters=[64, 64],
    stackwise_num_blocks=[1, 1], stackwise_num_strides=[1, 2], block_type="basic_block",
    image_shape=(None, None, 3),
)
models.ViTImageClassifier(
    vit, num_classes=3,
    preprocessor=models.ViTImageClassifierPreprocessor(
        image_converter=layers.ViTImageConverter(image_size=(32, 32), scale=1 / 127.5, offset=-1.0)
    ),
).save_to_preset("vit")
models.ResNetImageClassifier(
    resnet, num_classes=3, activation="softmax",
    preprocessor=models.ResNetImageClassifierPreprocessor(
        image_converter=layers.ResNetImageConverter(
            image_size=(64, 48), scale=[1 / 58.4, 1 / 57.1, 1 / 57.4], offset=[-2.1, -2.0, -1.8],
            crop_to_aspect_ratio=False, antialias=True,
        )
    ),
).save_to_preset("resnet")
photo = decode(Path(sys.argv[1]).read_bytes()).pixels
found = {}
for name in ("vit", "resnet"):
    network = load_preset(name, labels=["a", "b", "c"])
    explained = explain_image(network, photo, top_n=3)
    ours = {one.id: one.probability for one in explained.explained}
    outputs = models.ImageClassifier.from_preset("./" + name).predict(photo[None], verbose=0)[0]
    if name == "vit":
        outputs = np.exp(outputs) / np.exp(outputs).sum()
    converted = asdict(convert(Path(name), Path(f"{name}.keras")))
    lines = registry_lines(converted, Path(f"{name}.keras"))
    Path("networks.toml").write_text("\\n".join(lines))
    (row,) = Registry(Path("networks.toml")).operator_networks()
    loaded = load_network(row, file=WeightsFile(Path(f"{name}.keras"), row.file.sha256), forward="tensorflow")
    again = {one.id: one.probability for one in explain_image(loaded, photo, top_n=3).explained}
    found[name] = {
        "layer": network.facts.default_layer,
        "sizing": network.facts.sizing.describe(),
        "difference": float(max(abs(ours[id] - outputs[id]) for id in ours)),
        "after_conversion": float(max(abs(ours[id] - again[id]) for id in ours)),
        "lines": lines,
    }
try:
    find_preset("vit_base_patch16_224_imagenet")
except GradcamError as error:
    found["absent"] = [error.code, str(error)]
Path("found.json").write_text(json.dumps(found))
"""


def test_presets_of_keras_hub_are_explained_with_their_own_preprocessing(
    tmp_path: Path, photos: Path
) -> None:
    environment = os.environ | {"KAGGLEHUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(photos / "coffee.jpg")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["vit"]["layer"].startswith("vi_t_backbone/vit_encoder/transformer_block_")
    assert found["resnet"]["layer"] == "res_net_backbone/stack1_block0_out"
    assert found["vit"]["sizing"] == "bilinear, centre crop of 1"
    assert found["resnet"]["sizing"] == "bilinear_antialias, squash"
    for name in ("vit", "resnet"):
        assert found[name]["difference"] < 0.01, "as keras-hub's own pipeline predicts"
        assert found[name]["after_conversion"] < 1e-5
    assert 'sizing = { resize = "bilinear", fit = "crop" }' in found["vit"]["lines"]
    assert "input_size = [64, 48]" in found["resnet"]["lines"]
    code, message = found["absent"]
    assert code == "weights_unavailable"
    assert str(tmp_path / "cache" / "models" / "keras" / "vit") in message
