"""Inspection of model files before Keras opens them: other formats, archives, limits."""

import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gradcam_worker.gradcam.files import model_file
from gradcam_worker.gradcam.files.model_file import (
    Refused,
    check_weights,
    read_config,
    refusal_by_ending,
    refusal_of_folder,
)

CONFIG = json.dumps({"class_name": "Functional", "config": {}})


@pytest.mark.parametrize(
    ("name", "conversion"),
    [
        ("a.h5", "is a whole model in HDF5: convert it with `gradcam convert a.h5 NAME.keras`"),
        ("s3://m/a b.HDF5", "`gradcam convert 'a b.HDF5' NAME.keras`"),
        (
            "s3://m/a.weights.h5",
            "model.load_weights('a.weights.h5'), and save it with model.save('NAME.keras')",
        ),
        ("a.tflite", "is of TensorFlow Lite: convert it with `gradcam convert a.tflite NAME.keras`"),
        ("a.onnx", "`onnx2tf -i a.onnx -o made`, then `gradcam convert made/a_float32.tflite NAME.keras`"),
        (
            "a.pt",
            "is of PyTorch, which has no layers of Keras: in the program that made it, torch.onnx.export(",
        ),
        (
            "a.pth",
            "`onnx2tf -i NAME.onnx -o made`, then `gradcam convert made/NAME_float32.tflite NAME.keras`",
        ),
        ("a.safetensors", "layer.set_weights(...)"),
        ("a.pkl", "is a pickle, which runs whatever code it holds"),
        (
            "a/saved_model.pb",
            "belongs to a SavedModel, a folder: convert it with `gradcam convert FOLDER NAME",
        ),
        ("a.pb", "is a graph of TensorFlow: convert it with `gradcam convert a.pb NAME.keras`"),
        (
            "s3://m/saved",
            "looks like a folder, a SavedModel: convert it with `gradcam convert saved NAME.keras`",
        ),
        ("saved/", "looks like a folder, a SavedModel: convert it with `gradcam convert saved NAME.keras`"),
        ("a.mlmodel", "is of Core ML, which cannot be converted back"),
        ("a.json", "keras.models.model_from_json(open('a.json').read())"),
        ("a.keras.zip", "is an archive: unpack it"),
        ("a.tar.gz", "is compressed: unpack it"),
        ("a.{}.txt", "is no Keras model: save it with model.save('NAME.keras')"),
        ("{0}.h5", "`gradcam convert '{0}.h5' NAME.keras`"),
    ],
)
def test_another_ending_is_refused_with_the_line_that_converts_it(name: str, conversion: str) -> None:
    assert conversion in refusal_by_ending(name)


def test_a_folder_of_tensorflow_js_is_refused_with_the_line_that_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "model.json").write_text('{"format": "layers-model", "weightsManifest": []}')
    assert "--output_format=keras web/model.json NAME.h5`" in str(model_file.refusal_of_folder(folder))


def test_only_a_model_that_is_at_hand_can_be_saved_again() -> None:
    for ending in (".onnx", ".pb", ".tflite", ".h5", ".hdf5", ".pt", ".pth", ""):
        assert "model.save(" not in model_file.refusal(ending, f"a{ending}"), ending


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty (0 bytes): copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "`git lfs pull`"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "is a web page, an error or a login perhaps"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page, an error"),
        (b'\xef\xbb\xbf{"class_name": "Functional"}', "holds an architecture without weights"),
        (
            b'{"cats": 0, "dogs": 1}',
            "is JSON without a network: names of classes are named as `labels` beside",
        ),
        (b'["cats", "dogs"]', "is JSON without a network"),
        (b"\x1c\0\0\0TFL3\0", "is of TensorFlow Lite: convert it with `gradcam convert model.keras NAME"),
        (b"\x80\x04}.", "is a pickle"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "is of PyTorch"),  # before 1.6
        (
            b'{"modelTopology": {"class_name": "Sequential"}, "weightsManifest": []}',
            "--output_format=keras model.keras NAME.h5`, then `gradcam convert NAME.h5 NAME.keras`",
        ),
        (struct.pack("<Q", 300) + b'{"__metadata__":{}', "holds arrays without their network"),
        (b"\x08\x07\x12\x07pytorch", "is of ONNX"),
        (b"\x1f\x8b\x08", "is compressed"),
        (b"not a model", "is no Keras model, it begins with b'not a mo': save it with"),
        (b"PK\x03\x04" + bytes(500), "is cut off after 504 bytes"),
    ],
)
def test_a_file_is_recognised_by_its_content_whatever_its_name(data: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(data)
    with pytest.raises(Refused, match=re.escape(why)):
        read_config(path, "model.keras")


@pytest.mark.parametrize(
    ("members", "why"),
    [
        (["saved/saved_model.pb", "saved/variables/variables.index"], "is an archive of a SavedModel"),
        (["own/metadata.json", "own/config.json"], "is an archive of the folder 'own': pack what is in it"),
        (["archive/data.pkl", "archive/data/0"], "is of PyTorch"),
        (["a/own.keras"], "is an archive: unpack it, and name 'a/own.keras', which is in it"),
        (["kernel.npy", "bias.npy"], "holds arrays without their network"),
        ([], "is an archive without the config.json of a Keras model"),
    ],
)
def test_an_archive_is_recognised_by_its_members(members: list[str], why: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=re.escape(why)):
        read_config(pack(tmp_path, dict.fromkeys(members, "")), "model.keras")


def pack(folder: Path, members: dict[str, bytes | str], method: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive of these members."""
    path = folder / "model.keras"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def zeros(name: str, size: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "model.keras"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("config.json", CONFIG)
            with archive.open(name, "w", force_zip64=True) as file:
                for _ in range(size // 2**20):
                    file.write(bytes(2**20))
        return path

    return write


class TestBounds:
    @pytest.mark.parametrize("name", ["model.weights.h5", "assets/layers/a/vocabulary.txt"])
    def test_a_small_file_that_unpacks_to_a_large_one_is_refused_unread(
        self, name: str, tmp_path: Path
    ) -> None:
        path = zeros(name, 80 * 2**20)(tmp_path)
        assert path.stat().st_size < 2**20
        with pytest.raises(Refused, match=r"unpacks to 83,886,\d{3} bytes, and has .*: at most 67,108,864"):
            read_config(path, "model.keras")

    @pytest.mark.parametrize(
        ("name", "limit"), [("config.json", "33,554,432"), ("metadata.json", "1,048,576")]
    )
    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_configuration_and_metadata_have_their_own_limits(
        self, name: str, limit: str, method: int, tmp_path: Path
    ) -> None:
        path = pack(tmp_path, {"config.json": CONFIG} | {name: b" " * 40_000_000}, method)
        with pytest.raises(Refused, match=f"holds a {name} of 40,000,000 bytes, above the {limit} of any"):
            read_config(path, "model.keras")

    def test_a_member_that_is_longer_than_it_declares_is_refused(self, tmp_path: Path) -> None:
        path = pack(tmp_path, {"config.json": CONFIG + " " * 100_000}, zipfile.ZIP_DEFLATED)
        data = path.read_bytes()
        size = (len(CONFIG) + 100_000).to_bytes(4, "little")
        path.write_bytes(data.replace(size, (50).to_bytes(4, "little")))  # in both of its headers
        with pytest.raises(Refused, match=r"is a damaged \.keras file"):
            read_config(path, "model.keras")

    def test_overlapping_members_count_with_their_total_size(self, tmp_path: Path) -> None:
        path = pack(tmp_path, {"config.json": CONFIG, "model.weights.h5": bytes(7 * 2**20)})
        data = path.read_bytes()
        position, end = data.index(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
        entry = data[data.index(b"PK\x01\x02", position + 4) : end]
        copies = b"".join(entry.replace(b"model", f"mod{number:02}".encode()) for number in range(30))
        size, offset = struct.unpack_from("<2L", data, end + 12)
        tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 32, 32, size + len(copies), offset, 0)
        path.write_bytes(data[:end] + copies + tail)
        with pytest.raises(Refused, match="unpacks to 227,5"):
            read_config(path, "model.keras")

    def test_too_many_members_are_refused(self, tmp_path: Path) -> None:
        path = pack(tmp_path, {"config.json": CONFIG, **{f"assets/{number}": "" for number in range(10_000)}})
        with pytest.raises(Refused, match="is an archive of 10,001 members, above the 10,000 of any"):
            read_config(path, "model.keras")

    def test_an_oversized_list_of_members_is_not_read(self, tmp_path: Path) -> None:
        path = pack(tmp_path, {"config.json": CONFIG})
        data = bytearray(path.read_bytes())
        struct.pack_into("<L", data, data.rindex(b"PK\x05\x06") + 12, 2**31)
        path.write_bytes(data)
        with pytest.raises(Refused, match="whose list of members has 2,147,483,648 bytes"):
            read_config(path, "model.keras")

    @pytest.mark.parametrize(
        "name", ["../up.json", "/etc/passwd", "assets/../../up", "C:/up", "..\\up", "a//b"]
    )
    def test_a_member_that_leads_out_is_refused(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(Refused, match="holds a member that leads out of it"):
            read_config(pack(tmp_path, {"config.json": CONFIG, name: ""}), "model.keras")

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_two_members_of_one_name_are_refused(self, tmp_path: Path) -> None:
        path = pack(tmp_path, {"config.json": CONFIG})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("config.json", "{}")
        with pytest.raises(Refused, match=r"holds 2 members of one name, 'config\.json'"):
            read_config(path, "model.keras")

    @pytest.mark.parametrize(
        ("config", "why"),
        [
            (b"[" * 100_000, "nested too deeply"),
            (b"\xff", "is no JSON: 'utf-8' codec can't decode"),
            (b"[]", "describes no model"),
            (b"{", "is no JSON: Expecting property name"),
        ],
    )
    def test_an_invalid_configuration_is_refused(self, config: bytes, why: str, tmp_path: Path) -> None:
        with pytest.raises(Refused, match=why):
            read_config(pack(tmp_path, {"config.json": config}), "model.keras")

    @pytest.mark.parametrize(
        "check",
        [
            lambda folder: check_weights(folder / "a.weights.h5", ""),
            lambda folder: read_config(
                pack(
                    folder,
                    {"config.json": CONFIG, "model.weights.h5": (folder / "a.weights.h5").read_bytes()},
                ),
                "",
            ),
        ],
    )
    def test_arrays_that_are_declared_far_larger_than_the_file_are_refused(
        self, check: Callable[[Path], object], tmp_path: Path
    ) -> None:
        import h5py

        with h5py.File(tmp_path / "a.weights.h5", "w") as file:
            file.create_dataset("layers/dense/vars/0", (40_000_000,), "f4", compression="gzip")
        with pytest.raises(
            Refused, match=r"declares arrays of 160,000,000 bytes, and has \d,\d{3}: at most 67,108,864"
        ):
            check(tmp_path)

    def test_a_valid_file_is_read(self, tmp_path: Path) -> None:
        path = pack(tmp_path, {"metadata.json": "{}", "config.json": CONFIG, "assets/": ""})
        assert read_config(path, "model.keras") == json.loads(CONFIG)


class TestWeights:
    @pytest.mark.parametrize(
        ("data", "why"),
        [
            (b"", "is empty"),
            (b"PK\x03\x04", "is a whole model: name it with model, without architecture"),
            (
                b"not weights",
                "holds no weights, it begins with b'not weig': save them with model.save_weights(",
            ),
            (b"\x89HDF\r\n\x1a\n" + bytes(100), "holds damaged weights"),
        ],
    )
    def test_a_file_without_weights_is_refused_with_the_reason(
        self, data: bytes, why: str, tmp_path: Path
    ) -> None:
        (tmp_path / "a.weights.h5").write_bytes(data)
        with pytest.raises(Refused, match=re.escape(why)):
            check_weights(tmp_path / "a.weights.h5", "a.weights.h5")

    @pytest.mark.parametrize(
        ("attributes", "layout"),
        [
            ({}, "keras3"),
            ({"layer_names": []}, "legacy"),
            ({"layer_names0": []}, "legacy"),
            ({"model_config": ""}, "model"),
        ],
    )
    def test_the_layout_is_recognised_whatever_the_ending(
        self, attributes: dict[str, list[str] | str], layout: str, tmp_path: Path
    ) -> None:
        import h5py

        with h5py.File(tmp_path / "a", "w") as file:
            file["layers/dense/vars/0"] = np.zeros(3)
            file.attrs.update(attributes)
        assert check_weights(tmp_path / "a", "a") == layout

    def test_weights_instead_of_a_model_are_refused_with_the_reason(self, tmp_path: Path) -> None:
        import h5py

        with h5py.File(tmp_path / "a.keras", "w") as file:
            file["layers/dense/vars/0"] = np.zeros(3)
        with pytest.raises(Refused, match="holds weights without their network: name it with weights"):
            read_config(tmp_path / "a.keras", "a.keras")


def test_a_folder_is_recognised_by_its_content(tmp_path: Path) -> None:
    assert refusal_of_folder(tmp_path) is None
    (tmp_path / "config.json").touch()
    (tmp_path / "model.weights.h5").touch()
    assert "zip -0 -r ../NAME.keras ." in str(refusal_of_folder(tmp_path))
    (tmp_path / "saved_model.pb").touch()
    assert f"a SavedModel: convert it with `gradcam convert {tmp_path.name} NAME.keras`" in str(
        refusal_of_folder(tmp_path)
    )


@pytest.mark.parametrize(
    ("metadata", "version"),
    [
        ('{"keras_version": "2.15.0"}', "2.15.0"),
        ('{"keras_version": 3}', ""),
        ('{"keras_version": "2\\n2026 ERROR"}', ""),
        ("[]", ""),
        ("{", ""),
        ("[" * 90_000, ""),
    ],
)
def test_the_version_of_keras_is_read_if_it_is_valid(metadata: str, version: str, tmp_path: Path) -> None:
    assert model_file.keras_version(pack(tmp_path, {"metadata.json": metadata})) == version
    assert model_file.keras_version(pack(tmp_path, {"config.json": ""})) == ""
