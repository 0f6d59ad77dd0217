from dataclasses import replace

import pytest

from gradcam_worker.errors import UnknownNetwork
from gradcam_worker.gradcam.catalog import CATALOG, ModelFile, find
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.files.weights import file_sha256


@pytest.mark.parametrize(
    ("name", "input_size", "target_layer", "map_size", "preprocessing"),
    [
        ("vgg16", (224, 224), "block5_conv3", (14, 14), "caffe"),
        ("xception", (299, 299), "block14_sepconv2_act", (10, 10), "tf"),
        ("efficientnet_lite0", (224, 224), "top_act", (7, 7), "lite"),
        ("convnexttiny", (224, 224), "add_17", (7, 7), "none"),
        ("densenet121", (224, 224), "relu", (7, 7), "torch"),
        ("efficientnetv2l", (480, 480), "top_activation", (15, 15), "none"),
    ],
)
def test_a_row_defines_input_and_target_layer(
    name: str, input_size: tuple[int, int], target_layer: str, map_size: tuple[int, int], preprocessing: str
) -> None:
    row = find(name)
    assert row.name == name
    assert (row.input_size, row.target_layer, row.map_size) == (input_size, target_layer, map_size)
    assert row.preprocessing.name == preprocessing


def test_every_row_has_its_name_as_key() -> None:
    assert {key: row.name for key, row in CATALOG.items()} == {key: key for key in CATALOG}


def test_every_row_has_shipped_weights_with_their_checksum_or_names_those_that_keras_downloads() -> None:
    for row in CATALOG.values():
        assert (row.shipped and row.sha256) or row.keras_files, row.name


def test_a_shipped_file_has_the_checksum_of_its_row() -> None:
    shipped = {row.name: row for row in CATALOG.values() if row.shipped}
    assert "efficientnet_lite0" in shipped
    for row in shipped.values():
        assert file_sha256(DATA / str(row.shipped)) == row.sha256


def test_an_unknown_network_is_refused_with_the_command_that_lists_all_networks() -> None:
    few = {name: CATALOG[name] for name in ("xception", "vgg16")}
    with pytest.raises(UnknownNetwork) as refused:
        find("qqq", few)
    assert str(refused.value) == "There is no network 'qqq'. There are 2: `gradcam networks` lists them."


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("VGG16", "vgg16"),
        ("vgg-16", "vgg16"),
        ("Exception", "xception"),
        ("efficientnet-lite0", "efficientnet_lite0"),
        ("efficientnet", "efficientnet_lite0"),
        ("EfficientNet_", "efficientnet_lite0"),
        ("efficientnet-b3", "efficientnetb3"),
        ("mobilenet_v2", "mobilenetv2"),
        ("resnet", "resnet50"),
    ],
)
def test_a_misspelled_network_is_refused_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UnknownNetwork, match=f"'{wrong}'.*Did you mean '{right}'"):
        find(wrong)


@pytest.mark.parametrize("name", ["own.keras", "models/own", "resnet50.h5"])
def test_a_file_instead_of_a_name_is_refused_with_a_hint_at_the_registry(name: str) -> None:
    with pytest.raises(UnknownNetwork, match=r"A file is named in the registry, GRADCAM_NETWORKS"):
        find(name)


def test_an_own_network_is_suggested_before_one_that_would_be_downloaded() -> None:
    own = replace(CATALOG["vgg16"], name="vgg17", file=ModelFile("vgg17.keras", "0" * 64))
    with pytest.raises(UnknownNetwork, match="Did you mean 'vgg17' or 'vgg16'"):
        find("vgg", {**CATALOG, "vgg17": own})
