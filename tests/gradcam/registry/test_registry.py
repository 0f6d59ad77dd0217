"""An operator's own networks: what the file may hold, and what happens as it changes."""

import json
import logging
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from gradcam_worker.errors import UnknownNetwork
from gradcam_worker.gradcam.catalog import CATALOG, PREPROCESSING, Head, ModelFile, NetworkRow
from gradcam_worker.gradcam.network_inputs import NetworkInput
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.gradcam.registry.registry_file import OperatorNetwork
from gradcam_worker.gradcam.sizing import SIZINGS, Sizing
from tests.gradcam.registry_text import MODEL, SHA256, WEIGHTS, write

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "own-networks.md"


def read(folder: Path, body: str) -> NetworkRow:
    return Registry(write(folder, body)).find("tumours")


class TestRows:
    def test_without_a_file_there_are_the_networks_of_the_catalog(self) -> None:
        registry = Registry()
        assert registry.rows() == CATALOG
        assert registry.find("vgg16") is CATALOG["vgg16"]
        assert registry.operator_networks() == ()

    def test_an_operators_network_is_added_to_those_of_the_catalog(self, tmp_path: Path) -> None:
        registry = Registry(write(tmp_path, MODEL))
        assert registry.rows().keys() == {*CATALOG, "tumours"}
        assert registry.operator_networks() == (
            NetworkRow(
                name="tumours",
                input_size=(384, 320),
                preprocessing=PREPROCESSING["torch"],
                file=ModelFile(str(tmp_path / "tumours.keras"), SHA256),
                labels=(),
            ),
        )

    def test_a_misspelled_own_network_is_refused_with_the_nearest(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownNetwork, match="Did you mean 'tumours'"):
            Registry(write(tmp_path, MODEL)).find("tumors")

    def test_an_architecture_has_its_own_size_preprocessing_and_layer(self, tmp_path: Path) -> None:
        row, vgg16 = read(tmp_path, WEIGHTS), CATALOG["vgg16"]
        assert (row.builder, row.classes, row.labels) == ("keras.applications:VGG16", 200, ())
        assert (row.input_size, row.preprocessing) == (vgg16.input_size, vgg16.preprocessing)
        assert (row.target_layer, row.map_size) == ("block5_conv3", (14, 14))
        assert row.file == ModelFile(str(tmp_path / "birds.weights.h5"), SHA256)
        assert not row.keras_files, "Keras has no download for it"

    def test_options_override_those_of_the_architecture(self, tmp_path: Path) -> None:
        options = 'input_size = [448, 448]\npreprocessing = "unit"\ntarget_layer = "block4_conv3"\n'
        row = read(tmp_path, WEIGHTS + options)
        assert (row.input_size, row.preprocessing.name, row.target_layer) == (
            (448, 448),
            "unit",
            "block4_conv3",
        )
        assert row.map_size is None, "with another input its size is another one"

    @pytest.mark.parametrize(
        ("line", "expected"), [("", None), ("pretrained = true", True), ("pretrained = false", False)]
    )
    def test_how_an_architecture_was_built_is_declared_or_read_from_its_file(
        self, line: str, expected: bool | None, tmp_path: Path
    ) -> None:
        row = read(tmp_path, WEIGHTS.replace("VGG16", "EfficientNetB3") + line)
        assert row.pretrained is expected
        assert row.imagenet_scale == CATALOG["efficientnetb3"].imagenet_scale != ()

    def test_layer_and_head_are_used(self, tmp_path: Path) -> None:
        row = read(
            tmp_path, MODEL + 'target_layer = "a/b"\nhead = { kind = "sigmoid", output = "diagnosis" }'
        )
        assert (row.target_layer, row.head) == ("a/b", Head("sigmoid", "diagnosis"))

    def test_modules_and_further_inputs_are_described(self, tmp_path: Path) -> None:
        body = """
imports = ["my_package.layers", "other"]
image_input = "photo"
[networks.tumours.inputs.age]
minimum = 0
maximum = 120
default = 50
scale = 0.01
[networks.tumours.inputs.sex]
type = "category"
values = ["f", "m"]
input = "patient"
[networks.tumours.inputs.site]
type = "category"
values = [10, 11]
encoding = "index"
constant = 11
[networks.tumours.inputs.blood]
shape = [2, 3]
"""
        row = read(tmp_path, MODEL + body)
        assert (row.imports, row.image_input) == (("my_package.layers", "other"), "photo")
        assert row.inputs == (
            NetworkInput("age", minimum=0, maximum=120, default=50.0, scale=0.01),
            NetworkInput("sex", "category", input="patient", values=("f", "m")),
            NetworkInput(
                "site", "category", values=("10", "11"), encoding="index", default="11", constant=True
            ),
            NetworkInput("blood", shape=(2, 3)),
        )
        across = TypeAdapter(NetworkRow)
        assert across.validate_json(across.dump_json(row)) == row, "as an engine process gets it"

    @pytest.mark.parametrize(
        ("file", "line", "scores_only", "layout"),
        [
            ("t.keras", "", False, None),
            ("t.keras", "scores_only = true", True, None),
            ("s3://m/t.onnx", "", True, None),
            ("t.onnx", 'layout = "nchw"', True, "nchw"),
            ("t.tflite", "scores_only = true", True, None),
        ],
    )
    def test_onnx_and_tflite_files_only_give_scores_and_others_if_that_is_said(
        self, file: str, line: str, scores_only: bool, layout: str | None, tmp_path: Path
    ) -> None:
        row = read(tmp_path, MODEL.replace("tumours.keras", file) + line)
        assert (row.scores_only, row.layout) == (scores_only, layout)

    @pytest.mark.parametrize(
        ("written", "expected"),
        [
            ("s3://models/a/b.keras", "s3://models/a/b.keras"),
            ("/models/b.keras", "/models/b.keras"),
            ("file:///models/a%20b.keras", "/models/a b.keras"),
            ("../b.keras", "{folder}/../b.keras"),
        ],
    )
    def test_a_file_is_in_s3_or_at_a_path_from_the_registrys_folder(
        self, written: str, expected: str, tmp_path: Path
    ) -> None:
        row = read(tmp_path, MODEL.replace("tumours.keras", written))
        assert row.file == ModelFile(expected.format(folder=tmp_path), SHA256)

    def test_a_checksum_may_be_written_in_capitals(self, tmp_path: Path) -> None:
        row = read(tmp_path, MODEL.replace(SHA256, SHA256.upper()))
        assert row.file
        assert row.file.sha256 == SHA256


class TestPreprocessing:
    @pytest.mark.parametrize(
        ("table", "channels", "pixel", "expected"),
        [
            ("{ scale = 0.00784313725490196, offset = -1.0 }", "rgb", (0, 127.5, 255), (-1, 0, 1)),
            ('{ scale = 0.5, offset = [1, 2, 3], channels = "bgr" }', "bgr", (10, 20, 30), (6, 12, 18)),
            ("{ scale = [1, 2, -1] }", "rgb", (10, 20, 30), (10, 40, -30)),
            ('{ offset = -128, channels = "grey" }', "grey", (128,), (0,)),
            ("{ channels = 5 }", 5, (1, 2, 3, 4, 5), (1, 2, 3, 4, 5)),
            ("{ mean = [10, 20, 30], std = 10 }", "rgb", (20, 20, 20), (1, 0, -1)),
            ('{ range = [-1, 1], channels = "grey_mean" }', "grey_mean", (0, 127.5, 255), (-1, 0, 1)),
            (
                "{ range = [0, 1], mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225] }",
                "rgb",
                (0, 255, 255),
                (-0.485 / 0.229, 0.544 / 0.224, 0.594 / 0.225),
            ),
        ],
    )
    def test_input_is_pixel_times_scale_plus_offset(
        self,
        table: str,
        channels: str | int,
        pixel: tuple[float, ...],
        expected: tuple[float, ...],
        tmp_path: Path,
    ) -> None:
        preprocessing = read(tmp_path, MODEL.replace('"torch"', table)).preprocessing
        assert preprocessing.channels == channels
        actual = (np.array(pixel) - np.array(preprocessing.mean)) / np.array(preprocessing.std)
        np.testing.assert_allclose(actual, expected, atol=1e-12)

    def test_it_has_a_name_for_the_manifest(self, tmp_path: Path) -> None:
        table = '{ scale = 0.5, offset = [1, 2, 3], channels = "bgr" }'
        preprocessing = read(tmp_path, MODEL.replace('"torch"', table)).preprocessing
        assert preprocessing.name == "scale 0.5, offset 1 2 3, bgr"
        table = "{ range = [0, 1], std = [0.5, 0.25, 0.5] }"
        preprocessing = read(tmp_path, MODEL.replace('"torch"', table)).preprocessing
        assert preprocessing.name == "range 0 1, mean 0, std 0.5 0.25 0.5, rgb"

    def test_pytorchs_numbers_are_the_named_preprocessing(self, tmp_path: Path) -> None:
        table = "{ range = [0, 1], mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225] }"
        written = read(tmp_path, MODEL.replace('"torch"', table)).preprocessing
        named = read(tmp_path, MODEL).preprocessing
        np.testing.assert_allclose([written.mean, written.std], [named.mean, named.std])


class TestSizing:
    @pytest.mark.parametrize("name", SIZINGS)
    def test_it_has_a_name(self, name: str, tmp_path: Path) -> None:
        assert read(tmp_path, MODEL + f'sizing = "{name}"').sizing == SIZINGS[name]

    @pytest.mark.parametrize(
        ("table", "expected"),
        [
            ('{ resize = "nearest" }', Sizing("nearest")),
            ('{ fit = "crop", short_side = 256 }', Sizing(fit="crop", short_side=256)),
            ('{ fit = "crop", size = [256, 300] }', Sizing(fit="crop", size=(256, 300))),
            ("{ grey = true }", Sizing(grey=True)),
            ('{ fit = "letterbox", color = 114 }', Sizing(fit="letterbox", color=(114,))),
            ('{ fit = "letterbox", color = [1, 2, 3] }', Sizing(fit="letterbox", color=(1, 2, 3))),
            (
                '{ resize = "lanczos", fit = "crop", crop_fraction = 0.9 }',
                Sizing("lanczos", "crop", crop_fraction=0.9),
            ),
        ],
    )
    def test_it_is_a_table(self, table: str, expected: Sizing, tmp_path: Path) -> None:
        assert read(tmp_path, MODEL + f"sizing = {table}").sizing == expected

    def test_without_it_images_are_squashed_by_area(self, tmp_path: Path) -> None:
        assert read(tmp_path, MODEL).sizing == Sizing("area", "squash")
        assert read(tmp_path, WEIGHTS).sizing == Sizing("area", "squash")


class TestLabels:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("l.txt", "benign\nmalignant tumour\n[other]\n"),
            ("l.txt", "\ufeffbenign\r\nmalignant tumour\r\n[other]\r\n\r\n"),
            ("l.json", '["benign", "malignant tumour", "[other]"]'),
        ],
    )
    def test_they_are_read_from_a_file(self, name: str, text: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(text.encode())
        row = read(tmp_path, MODEL + f'labels = "{name}"')
        assert row.labels == ("benign", "malignant tumour", "[other]")

    def test_they_may_be_listed_in_the_registry(self, tmp_path: Path) -> None:
        assert read(tmp_path, MODEL + 'labels = ["benign", "malignant"]').labels == ("benign", "malignant")

    def test_without_them_classes_have_numbers_and_imagenets_have_a_name(self, tmp_path: Path) -> None:
        assert read(tmp_path, MODEL).labels == ()
        assert read(tmp_path, MODEL + 'labels = "imagenet"').labels is None

    def test_they_define_the_number_of_classes_of_an_architecture(self, tmp_path: Path) -> None:
        weights = WEIGHTS.replace("classes = 200\n", "")
        assert read(tmp_path, weights + 'labels = ["a", "b", "c"]').classes == 3
        assert read(tmp_path, weights + 'labels = "imagenet"').classes == 1000


def names(registry: Registry) -> list[str]:
    return [row.name for row in registry.operator_networks()]


class TestChanges:
    def test_added_networks_are_found_and_removed_ones_are_not(self, tmp_path: Path) -> None:
        registry = Registry(write(tmp_path, MODEL, "first"))
        write(tmp_path, MODEL, "second")
        assert registry.find("second")
        with pytest.raises(UnknownNetwork, match="'first'"):
            registry.find("first")

    def test_a_changed_network_is_a_new_row(self, tmp_path: Path) -> None:
        registry = Registry(write(tmp_path, MODEL))
        before = registry.find("tumours")
        write(tmp_path, MODEL.replace(SHA256, "cd" * 32))
        after = registry.find("tumours")
        assert after.file != before.file
        assert registry.find("tumours") is after

    def test_a_file_that_is_written_over_in_place_is_read_again(self, tmp_path: Path) -> None:
        path = write(tmp_path, MODEL)
        registry, before = Registry(path), path.stat()
        path.write_text(path.read_text().replace("torch", "caffe"))  # as long as before
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert registry.find("tumours").preprocessing.name == "caffe"

    def test_a_link_that_points_elsewhere_is_followed(self, tmp_path: Path) -> None:
        (tmp_path / "one").mkdir()
        (tmp_path / "two").mkdir()
        write(tmp_path / "one", MODEL, "first")
        write(tmp_path / "two", MODEL, "second")
        (tmp_path / "now").symlink_to("one")  # as Kubernetes exchanges what a ConfigMap holds
        registry = Registry(tmp_path / "now" / "networks.toml")
        (tmp_path / "next").symlink_to("two")
        (tmp_path / "next").replace(tmp_path / "now")
        assert names(registry) == ["second"]

    def test_changed_labels_make_a_new_row(self, tmp_path: Path) -> None:
        (tmp_path / "l.txt").write_text("a\nb\n")
        registry = Registry(write(tmp_path, MODEL + 'labels = "l.txt"'))
        assert registry.find("tumours").labels == ("a", "b")
        (tmp_path / "l.txt").write_text("a\nb\nc\n")
        assert registry.find("tumours").labels == ("a", "b", "c")

    @pytest.mark.parametrize("broken", ["", "[networks", "missing"])
    def test_a_file_that_becomes_invalid_leaves_the_networks_as_they_were_and_is_logged_once(
        self, broken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        registry = Registry(write(tmp_path, MODEL))
        path = tmp_path / "networks.toml"
        path.unlink() if broken == "missing" else path.write_text(broken)
        with caplog.at_level(logging.INFO, "gradcam"):
            assert [names(registry) for _ in range(3)] == [["tumours"]] * 3
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert f'registry_reload_failed error="GRADCAM_NETWORKS: {path} cannot be used' in caplog.text
        write(tmp_path, MODEL, "corrected")
        with caplog.at_level(logging.INFO, "gradcam"):
            assert names(registry) == ["corrected"]
        assert caplog.records[-1].getMessage() == f"registry_reloaded path={path} networks=corrected"

    def test_missing_labels_that_appear_later_make_it_valid(self, tmp_path: Path) -> None:
        registry = Registry(write(tmp_path, MODEL))
        write(tmp_path, MODEL + 'labels = "l.txt"')
        assert registry.find("tumours").labels == ()
        (tmp_path / "l.txt").write_text("a\nb\n")
        assert registry.find("tumours").labels == ("a", "b")

    def test_what_has_not_changed_is_not_read_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registry = Registry(write(tmp_path, MODEL))
        rows = registry.rows()

        def refuse(*_: object, **__: object) -> None:
            message = "nothing is to be opened"
            raise AssertionError(message)

        monkeypatch.setattr(Path, "open", refuse)
        assert registry.rows() is rows

    def test_threads_see_either_version_and_never_a_mixture(self, tmp_path: Path) -> None:
        def registry_body(number: int) -> str:
            labels = json.dumps([f"{number}", f"{number}"])
            return MODEL.replace(SHA256, f"{number:064}") + f"labels = {labels}"

        registry, inconsistent, done = Registry(write(tmp_path, registry_body(0))), [], threading.Event()

        def read() -> None:
            while not done.is_set():
                row = registry.find("tumours")
                if row.labels != (str(int(row.file.sha256 if row.file else -1)),) * 2:
                    inconsistent.append(row)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(1, 40):
            write(tmp_path, registry_body(number))
        done.set()
        for thread in threads:
            thread.join()
        assert inconsistent == []
        assert registry.find("tumours").labels == ("39", "39")


def test_the_documentation_lists_every_key_of_a_network() -> None:
    table = PAGE.read_text().split("\n## Keys\n\n")[1].split("\n\n")[0]
    keys = [key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(keys) == sorted(OperatorNetwork.model_fields)


def test_the_examples_of_the_documentation_are_a_registry(tmp_path: Path) -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    tables = "\n".join(block for block in blocks if block.startswith("[networks."))
    (tmp_path / "tumours.txt").write_text("benign\nmalignant\n")
    (tmp_path / "networks.toml").write_text(tables.replace('"..."', f'"{SHA256}"'))
    assert names(Registry(tmp_path / "networks.toml")) == [
        *("tumours", "scans", "birds", "moles"),
        *("plankton", "leaves", "opaque"),
    ]
    for line in "".join(block for block in blocks if block not in tables).splitlines():
        body = MODEL.replace('preprocessing = "torch"', "") if line.startswith("preprocessing") else MODEL
        assert read(tmp_path, body + line), line
