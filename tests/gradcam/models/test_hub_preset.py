"""Classifiers of keras-hub, built small with random weights: from presets in folders, without a network."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradcam_worker.errors import GradcamError
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.files.weights import WeightsFile
from gradcam_worker.gradcam.network import Network
from gradcam_worker.gradcam.registry.registry import Registry

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.usefixtures("eagerly", "no_network"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of keras-hub and what it imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Presets are looked for in the current folder and in an empty cache, and downloaded from nowhere."""

    def refuse(*_: object) -> None:
        message = "the network is used"
        raise AssertionError(message)

    with pytest.MonkeyPatch.context() as patch:  # undone before a fixture reads from Redis
        patch.setattr(socket.socket, "connect", refuse)
        patch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "cache"))
        patch.chdir(tmp_path)
        yield


def save_vit() -> None:
    from keras_hub import layers, models

    backbone = models.ViTBackbone(
        image_shape=(32, 32, 3), patch_size=(8, 8), num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    converter = layers.ViTImageConverter(image_size=(32, 32), scale=1 / 127.5, offset=-1.0)
    preprocessor = models.ViTImageClassifierPreprocessor(image_converter=converter)
    models.ViTImageClassifier(backbone, num_classes=3, preprocessor=preprocessor).save_to_preset("vit")


def save_resnet() -> None:
    from keras_hub import layers, models

    backbone = models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(None, None, 3),
    )
    converter = layers.ResNetImageConverter(
        image_size=(64, 48),
        scale=[1 / 58.4, 1 / 57.1, 1 / 57.4],
        offset=[-2.1, -2.0, -1.8],
        crop_to_aspect_ratio=False,
        antialias=True,
    )
    models.ResNetImageClassifier(
        backbone,
        num_classes=3,
        activation="softmax",
        preprocessor=models.ResNetImageClassifierPreprocessor(image_converter=converter),
    ).save_to_preset("resnet")


def softmax(scores: Any) -> Any:
    return np.exp(scores) / np.exp(scores).sum()


@pytest.mark.parametrize(
    ("name", "save", "probabilities", "layer", "sizing", "line"),
    [
        (
            "vit",
            save_vit,
            softmax,
            "vi_t_backbone/vit_encoder/transformer_block_",
            "bilinear, centre crop of 1",
            'sizing = { resize = "bilinear", fit = "crop" }',
        ),
        (
            "resnet",
            save_resnet,
            np.asarray,
            "res_net_backbone/stack1_block0_out",
            "bilinear_antialias, squash",
            "input_size = [64, 48]",
        ),
    ],
    ids=["vit", "resnet"],
)
def test_a_preset_of_keras_hub_is_explained_with_its_own_preprocessing(
    name: str,
    save: Callable[[], None],
    probabilities: Callable[[Any], Any],
    layer: str,
    sizing: str,
    line: str,
    photos: Path,
) -> None:
    from dataclasses import asdict

    from keras_hub import models

    from gradcam_worker.gradcam.conversion.convert import convert
    from gradcam_worker.gradcam.models.hub_preset import load_preset
    from gradcam_worker.gradcam.models.loading import load_network
    from gradcam_worker.operations.convert import registry_lines

    save()
    photo = decode((photos / "coffee.jpg").read_bytes()).pixels

    def explained(network: Network) -> dict[int, float]:
        return {one.id: one.probability for one in explain_image(network, photo, top_n=3).explained}

    network = load_preset(name, labels=["a", "b", "c"])
    assert network.facts.default_layer.startswith(layer)
    assert network.facts.sizing.describe() == sizing
    ours = explained(network)
    own_pipeline = models.ImageClassifier.from_preset(f"./{name}").predict(photo[None], verbose=0)[0]
    assert ours == pytest.approx(dict(enumerate(probabilities(own_pipeline))), abs=0.01)

    file = Path(f"{name}.keras")
    lines = registry_lines(asdict(convert(Path(name), file)), file)
    assert line in lines
    Path("networks.toml").write_text("\n".join(lines))
    (row,) = Registry(Path("networks.toml")).operator_networks()
    assert row.file
    loaded = load_network(row, file=WeightsFile(file, row.file.sha256), forward="tensorflow")
    assert explained(loaded) == pytest.approx(ours, abs=1e-5)


def test_a_preset_that_is_not_there_is_named_with_the_folder_that_it_belongs_in(tmp_path: Path) -> None:
    from gradcam_worker.gradcam.models.hub_preset import find_preset

    with pytest.raises(GradcamError) as raised:
        find_preset("vit_base_patch16_224_imagenet")
    assert raised.value.code == "weights_unavailable"
    assert str(tmp_path / "cache" / "models" / "keras" / "vit") in str(raised.value)
