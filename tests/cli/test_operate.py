"""`gradcam networks` and `gradcam networks fetch`."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gradcam_worker.cli.main import main
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.files.weights import file_sha256

KERAS_FILE = CATALOG["vgg16"].keras_files[0]


@pytest.fixture
def own_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two networks of the operator's own; the checksum of one is wrong."""
    (tmp_path / "right.keras").write_bytes(b"0" * 2_000_000)
    (tmp_path / "wrong.keras").write_bytes(b"1")
    table = (
        '[networks.{0}]\nmodel = "{0}.keras"\nsha256 = "{1}"\npreprocessing = "unit"\ninput_size = [32, 32]\n'
    )
    sums = {"right": file_sha256(tmp_path / "right.keras"), "wrong": "0" * 64}
    (tmp_path / "networks.toml").write_text("".join(table.format(*one) for one in sums.items()))
    monkeypatch.setenv("GRADCAM_NETWORKS", str(tmp_path / "networks.toml"))
    monkeypatch.setenv("GRADCAM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return tmp_path


def fake_load(cache: Path) -> Callable[..., None]:
    """Stand in for `load`, in which Keras downloads the weights to its cache."""

    def load(*_: Any) -> None:
        (cache / "models").mkdir(parents=True)
        (cache / "models" / KERAS_FILE).write_bytes(b"2" * 1_000_000)

    return load


def test_fetched_weights_are_on_this_machine_and_each_failure_is_a_sentence(
    own_networks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gradcam_worker.runtime.service_factory.load", fake_load(own_networks / "keras"))
    names = ["vgg61", "vgg16", "efficientnet_lite0"]
    assert main(["networks", "fetch", *names, "--all-mine"]) == 1, "two of them failed"
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == f"vgg16: 1.0 MB, {own_networks}/keras/models/{KERAS_FILE}"
    assert lines[1].startswith("efficientnet_lite0: 9.8 MB, ")
    assert (
        lines[2] == f"right: 2.0 MB, {own_networks}/cache/{file_sha256(own_networks / 'right.keras')}.keras"
    )
    assert lines[3].startswith("3 of 5 networks are on this machine, 12.8 MB.")
    assert "vgg61: There is no network 'vgg61'" in shown.err
    assert f"wrong: {own_networks}/wrong.keras should have sha256 {'0' * 64}" in shown.err
    assert main(["networks", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    here = {name for name, row in rows.items() if row["here"]}
    assert here == {"vgg16", "efficientnet_lite0", "right"}
    assert main(["networks"]) == 0
    listed = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line}
    assert (listed["vgg16"], listed["vgg19"]) == ("keras", "download")
    assert (listed["right"], listed["wrong"]) == ("cached", "file")


def test_weights_on_this_machine_are_not_fetched_again(
    own_networks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gradcam_worker.runtime.service_factory.load", fake_load(own_networks / "keras"))
    for _ in range(2):  # `fake_load` would fail the second time
        assert main(["networks", "fetch", "vgg16", "right", "--json"]) == 0
        results = json.loads(capsys.readouterr().out)
        (own_networks / "right.keras").unlink(missing_ok=True)
        assert [(result["name"], result["bytes"]) for result in results] == [
            ("vgg16", 1_000_000),
            ("right", 2_000_000),
        ]


def test_weights_that_keras_stores_in_another_folder_are_an_error(
    own_networks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gradcam_worker.runtime.service_factory.load", fake_load(own_networks / "elsewhere"))
    assert main(["networks", "fetch", "vgg16"]) == 1
    assert "KERAS_HOME must name a folder that can be written to" in capsys.readouterr().err


def test_a_missing_extra_is_named_and_no_failure_of_each_network(
    own_networks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = "gradcam_worker.runtime.service_factory"
    monkeypatch.delattr(importlib.import_module(module.rpartition(".")[0]), "service_factory", raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # its import raises ModuleNotFoundError
    assert main(["networks", "fetch", "vgg16", "right"]) == 1
    shown = capsys.readouterr()
    assert f"{module} is not installed. This command needs the extra cpu" in shown.err
    assert "vgg16" not in shown.out + shown.err


def test_fetch_without_a_network_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["networks", "fetch"]) == 2
    assert "Name at least one network, or use --all-mine." in capsys.readouterr().err
    monkeypatch.delenv("GRADCAM_NETWORKS", raising=False)
    assert main(["networks", "fetch", "--all-mine"]) == 1
    assert "GRADCAM_NETWORKS names no networks of your own" in capsys.readouterr().err


def test_an_unexpected_error_of_one_network_does_not_stop_the_others(
    own_networks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any) -> None:
        message = "out of the blue"
        raise TypeError(message)

    monkeypatch.setattr("gradcam_worker.runtime.service_factory.load", load)
    assert main(["networks", "fetch", "vgg16", "right"]) == 1
    shown = capsys.readouterr()
    assert "vgg16: Unforeseen TypeError: out of the blue" in shown.err
    assert "1 of 2 networks are on this machine" in shown.out


def test_networks_are_listed_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["networks"]) == 0
    assert "block14_sepconv2_act" in capsys.readouterr().out
    assert main(["networks", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(CATALOG)
    assert {row["name"]: row["weights"] for row in rows if row["weights"] != "download"} == {
        "efficientnet_lite0": "shipped"
    }


def test_own_networks_are_listed_with_the_others_and_every_row_fits_a_terminal(
    networks_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vgg19.weights.h5").touch()
    monkeypatch.setenv("GRADCAM_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr("gradcam_worker.operations.terminal.console.out", Console(width=80))
    assert main(["networks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(CATALOG) + 2]] == [*CATALOG, "tumours"], "one line each"
    rows = {line.split()[0]: line.rstrip() for line in lines if line}
    assert rows["tumours"].split() == ["tumours", "384x320", "found", "in", "its", "graph", "s3"]
    assert rows["vgg19"].endswith(" folder")
    assert rows["s3,"] == "s3, file: a network of your own; GRADCAM_NETWORKS names the file."
    assert main(["networks", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)[-1]
    assert (row["weights"], row["sha256"]) == ("s3://models/tumours.keras", "ab" * 32)
