"""`gradcam convert`: the child process, its limits, consent, and how the new file appears."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gradcam_worker.cli.main import main
from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.operations import convert
from gradcam_worker.operations.convert import NeedsConsent, Request
from gradcam_worker.runtime import parent_watch

PHOTO = (
    Path(__file__).parents[2] / "worker" / "gradcam_worker" / "gradcam" / "data" / "photos" / "chelsea.jpg"
)


@pytest.fixture
def saved_model(tmp_path: Path) -> Path:
    """A folder that is recognised as a SavedModel, and asked about before it is loaded."""
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "saved_model.pb").touch()
    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets another program stand in for the child."""
    spawn = parent_watch.spawn

    def replace_child(program: str) -> None:
        def spawn_program(command: list[str], **options: Any) -> Any:
            return spawn([sys.executable, "-P", "-c", program, command[-1]], **options)

        monkeypatch.setattr(parent_watch, "spawn", spawn_program)

    return replace_child


WRITES = """
import json, pathlib, sys
order = json.loads(sys.argv[1])
folder = pathlib.Path(order["folder"])
(folder / "model.keras").write_bytes(b"new")
(folder / "result.json").write_text(json.dumps({"converted": {"sha256": "a"}}))
"""


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_could_run_code_is_told_before_anything_is_loaded(saved_model: Path, tmp_path: Path) -> None:
    with pytest.raises(NeedsConsent, match="is a SavedModel, whose operations and layers can"):
        convert.convert(Request(saved_model, tmp_path / "new.keras"), allow_code=False)
    assert left_in(tmp_path) == ["saved"]


def test_without_a_terminal_consent_is_an_option(
    saved_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(saved_model), str(tmp_path / "new.keras")]) == 3
    said = capsys.readouterr().err
    assert (
        "can read and write files and run code. If you trust whoever made it, convert it with --allow-code."
        in said
    )


def test_a_file_that_cannot_be_converted_is_refused_with_what_helps(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    with pytest.raises(NetworkIncompatible, match=r"a\.onnx is of ONNX, .*`onnx2tf -i a\.onnx -o made`"):
        convert.convert(Request(tmp_path / "a.onnx", tmp_path / "new.keras"), allow_code=False)


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (
            "import os, signal; print('free(): invalid size', flush=True); os.kill(os.getpid(), 6)",
            "by SIGABRT",
        ),
        ("raise SystemExit('x' * 900 + 'the cause')", "with exit code 1"),
    ],
)
def test_a_crash_of_the_child_is_told_with_the_end_of_what_it_wrote(
    program: str, told: str, stand_in: Callable[[str], None], tmp_path: Path
) -> None:
    stand_in(program)
    (tmp_path / "a.h5").touch()
    with pytest.raises(NetworkIncompatible) as refused:
        convert.convert(Request(tmp_path / "a.h5", tmp_path / "new.keras"), allow_code=False)
    assert told in str(refused.value)
    assert str(refused.value).endswith(("free(): invalid size", "the cause"))
    assert len(str(refused.value)) < 1200
    assert left_in(tmp_path) == ["a.h5"]


def test_a_child_that_takes_too_long_is_ended(stand_in: Callable[[str], None], tmp_path: Path) -> None:
    stand_in("import time; time.sleep(600)")
    (tmp_path / "a.h5").touch()
    with pytest.raises(NetworkIncompatible, match=r"was not converted within 0 s: --timeout-s sets"):
        convert.convert(Request(tmp_path / "a.h5", tmp_path / "new.keras", timeout_s=0), allow_code=False)
    assert left_in(tmp_path) == ["a.h5"]


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from gradcam_worker.operations import convert\n"
        "spawn = convert.parent_watch.spawn\n"
        "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        "def spawn_child(command, *, log, **options):\n"
        "    return spawn([sys.executable, '-c', child], **options)\n"
        "convert.parent_watch.spawn = spawn_child\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "convert.convert(convert.Request(folder, folder / 'new.keras'), allow_code=False)\n"
    )
    command = [sys.executable, "-P", "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 30
        while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
            os.sched_yield()
    assert not Path(f"/proc/{child}").exists()


def test_the_new_file_appears_in_one_step_and_replaces_none_unless_it_is_forced(
    stand_in: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(WRITES)
    source, output = tmp_path / "a.h5", tmp_path / "sub" / "new.keras"
    source.touch()
    convert.convert(Request(source, output), allow_code=False)
    assert output.read_bytes() == b"new"
    assert left_in(output.parent) == ["new.keras"]
    output.write_bytes(b"old")
    assert main(["convert", str(source), str(output)]) == 3
    assert "new.keras exists already: --force replaces it." in capsys.readouterr().err
    with pytest.raises(NetworkIncompatible, match="exists already"):  # it appeared while the child ran
        convert.convert(Request(source, output), allow_code=False)
    assert output.read_bytes() == b"old"
    convert.convert(Request(source, output, force=True), allow_code=False)
    assert output.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["none.h5", "new.keras"], "'none.h5' does not exist"),
        (["a.h5", "new.h5"], "new.h5 must end in .keras"),
        (["a.h5", "new.keras", "--tolerance", "0"], "--tolerance"),
        (["a.h5", "new.keras", "--input-size", "2", "2"], "--input-size"),
    ],
)
def test_wrong_usage_is_told(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.h5").touch()
    assert main(["convert", *words]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_converted_model_is_explained_by_the_lines_that_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tf_keras
    from tf_keras import layers

    tf_keras.utils.set_random_seed(1)
    model = tf_keras.Sequential(
        [
            layers.InputLayer((32, 40, 3)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(4, 3, activation="relu", name="last"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, "softmax"),
        ]
    )
    monkeypatch.chdir(tmp_path)
    model.save("old.h5", save_format="h5")
    assert main(["convert", "old.h5", "tumours.keras"]) == 0
    first, second, third, _, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("tumours.keras: made of old.h5 (Keras 2.")
    assert "on 21 images (limit 0.0001)" in second
    assert third == "Explained at the layer last (30 x 38), 3 classes."
    table = tomllib.loads("\n".join(lines))["networks"]["tumours"]
    assert table["sha256"] == hashlib.sha256(Path("tumours.keras").read_bytes()).hexdigest()
    Path("networks.toml").write_text("\n".join(lines))
    monkeypatch.setenv("GRADCAM_NETWORKS", "networks.toml")
    monkeypatch.setenv("GRADCAM_CACHE_DIR", str(tmp_path / "cache"))
    words = ["--network", "tumours", "--output", "explained", "--json"]
    assert main(["explain", str(PHOTO), *words]) == 0
    explanations = json.loads(capsys.readouterr().out)[0]["manifest"]["explanations"]
    assert len(explanations) == 3


LAYERS = """
import {keras} as keras

class Doubled(keras.layers.Layer):
    def call(self, values):
        return values * 2.0

    def compute_output_shape(self, shape):
        return shape
"""


def save_with_own_layer(keras: Any, path: Path) -> None:
    """Save a model with a layer that is defined in a module of `keras`'s user."""
    own: dict[str, Any] = {"__name__": path.stem}
    exec(LAYERS.format(keras=keras.__name__), own)  # noqa: S102  # as it is imported later
    inputs = keras.Input((24, 24, 3))
    x = own["Doubled"]()(keras.layers.Conv2D(4, 3, name="last")(inputs))
    x = keras.layers.Dense(3, "softmax")(keras.layers.GlobalAveragePooling2D()(x))
    keras.Model(inputs, x).save(path)


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "library", "made", "stays"),
    [("doubled_2", "tf_keras", "from its graph", False), ("doubled_3", "keras", "layer by layer", True)],
)
def test_layers_of_ones_own_are_found_in_the_modules_that_are_named(
    name: str, library: str, made: str, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tf.keras` is the Keras that saved the file, whatever TensorFlow takes it for in the environment."""
    source, output = tmp_path / f"{name}.h5", tmp_path / "new.keras"
    save_with_own_layer(import_module(library), source)
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", str(int(library == "keras")))
    order = {"path": source, "folder": tmp_path, "input_size": None, "tolerance": 1e-4, "allow_code": True}
    unnamed, absent = (convert._answer({**order, "imports": names})["refused"] for names in ([], ["no_such"]))
    assert re.search(r"it has 'Doubled', which is no part of Keras: .*as in --import my_package", unnamed)
    assert "needs no_such (--import), which cannot be imported: Mod" in absent
    package = tmp_path / name
    package.mkdir()
    (package / "layers.py").write_text(LAYERS.format(keras="tensorflow.keras"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", str(int(library == "keras")))
    done = convert.convert(Request(source, output, imports=(f"{name}.layers", "colorsys")), allow_code=True)
    assert (done["problem"], done["classes"]) == ("", 3)
    assert done["rebuilt"].startswith(made)
    lines = "\n".join(convert.registry_lines(done, output))
    assert (f'imports = ["{name}.layers"]' in lines) == stays
