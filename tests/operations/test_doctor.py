import json
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from gradcam_worker.cli.main import main
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.files.weights import file_sha256
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations.doctor import (
    Finding,
    _check_gpu_memory,
    _check_storage,
    _check_weights,
    _check_workers,
    _find_workers,
    _run_check,
    run_checks,
)
from gradcam_worker.settings import Settings


def by_name(settings: Settings) -> dict[str, Finding]:
    return {finding.what: finding for finding in run_checks(settings)}


@pytest.mark.tensorflow
def test_a_worker_with_everything_is_well(settings: Settings, tmp_path: Path) -> None:
    findings = by_name(settings.model_copy(update={"output": tmp_path.as_uri()}))
    assert [name for name, finding in findings.items() if not finding.well] == []
    assert findings["ledger"].detail.endswith("0 queued, 0 running")
    assert findings["weights of efficientnet_lite0"].detail.endswith(".weights.h5")
    others = len(CATALOG) - 1
    assert f"Keras downloads the weights of {others} other networks" in findings["weights"].detail, (
        "in one finding"
    )
    assert findings["workers"].detail == "none is alive"
    assert findings["eviction"].detail.endswith("has maxmemory-policy noeviction: it evicts nothing")
    assert findings["redis replication"].detail.endswith("is a primary, with 0 replicas")
    assert len(findings) == 12
    assert (tmp_path / "health" / "probe.txt").exists()


@pytest.mark.parametrize(("expected", "well"), [(0, True), (1, False)])
def test_that_no_worker_is_alive_is_wrong_only_if_one_is_expected(
    settings: Settings, expected: int, well: bool
) -> None:
    (finding,) = _check_workers(_find_workers(settings), expected)
    assert (finding.what, finding.well) == ("workers", well)
    assert well or (finding.detail, "gradcam worker" in finding.fix) == ("0 alive, 1 expected", True)


def test_missing_workers_are_reported_beside_those_that_are_alive(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    well = {"device": "cpu", "since": "2026-11-01T00:00:00Z", "running": 0, "trouble": None}
    RedisLedger(settings).renew_leases("gpu-1:7", json.dumps(well), {})
    well_by_name = {finding.what: finding.well for finding in _check_workers(_find_workers(settings), 2)}
    assert well_by_name == {"workers": False, "worker gpu-1:7": True}
    assert all(finding.well for finding in _check_workers(_find_workers(settings), 1))
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("gradcam_worker.operations.doctor.importlib.util.find_spec", lambda _: None)
    assert main(["doctor", "--expect-workers", "2"]) == 1
    assert "FAIL workers: 1 alive, 2 expected" in capsys.readouterr().out


def test_the_health_of_running_workers_is_reported(settings: Settings) -> None:
    ledger = RedisLedger(settings)
    well = {"device": "NVIDIA H100", "since": "2026-11-01T00:00:00Z", "running": 3, "trouble": None}
    ledger.renew_leases("gpu-1:7", json.dumps(well), {})
    ledger.renew_leases("gpu-2:7", json.dumps({**well, "trouble": "The storage failed 3 times."}), {})
    findings = {finding.what: finding for finding in _check_workers(_find_workers(settings), 0)}
    assert findings["worker gpu-1:7"].well
    assert findings["worker gpu-1:7"].detail.startswith("NVIDIA H100, 3 jobs running, started 2026")
    assert not findings["worker gpu-2:7"].well
    assert findings["worker gpu-2:7"].detail == "The storage failed 3 times."


@pytest.mark.tensorflow
def test_a_gpu_whose_memory_others_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over doubles of nvidia-smi and pynvml: one full GPU, and one that is not."""
    from gradcam_worker.gradcam import device_memory

    gib = 2**30
    free = {
        "GPU-a": SimpleNamespace(total=24 * gib, free=20 * gib),
        "GPU-b": SimpleNamespace(total=24 * gib, free=0),
    }
    driver = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=str, nvmlDeviceGetMemoryInfo=free.__getitem__
    )
    listed = "".join(f"echo 'GPU {number}: NVIDIA L4 (UUID: {uuid})'\n" for number, uuid in enumerate(free))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{listed}")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(device_memory, "_pynvml", lambda: driver)
    well, full = _check_gpu_memory(Settings())
    assert (well.what, well.well) == ("memory of GPU 0", True)
    assert well.detail.startswith("20.0 of 24.0 GiB of the GPU are free")
    assert (full.what, full.well) == ("memory of GPU 1", False)
    assert "nvidia-smi" in full.fix
    health = {"device": "NVIDIA L4", "trouble": None, "running": 0, "since": ""}
    ill, on_cpu = {**health, "trouble": "It waits for memory."}, {**health, "device": "cpu"}
    for worker in (
        {f"{platform.node()}:a:7": ill, "elsewhere:b:7": health},
        {f"{platform.node()}:a:7": on_cpu},
    ):
        assert not [*_check_gpu_memory(Settings(), worker)][1].well
    _, filled = _check_gpu_memory(Settings(), {f"{platform.node()}:a:7": health})
    assert filled.well
    assert filled.detail.endswith(f"1 full, and on GPUs of this machine run: {platform.node()}:a:7")
    free["GPU-a"] = free["GPU-b"]
    jobs = [f"{platform.node()}:{name}:7" for name in "ab"]
    for engines, expected in (("1", "1"), False), (("1", "2"), True):
        fed = {job: {**health, "engine": {"id": one}} for job, one in zip(jobs, engines, strict=True)}
        assert [one.well for one in _check_gpu_memory(Settings(), fed)] == [expected] * 2
    assert list(_check_gpu_memory(Settings(devices="cpu"))) == []


def test_weights_that_keras_has_downloaded_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / CATALOG["vgg16"].keras_files[0]).touch()
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    findings = {finding.what: finding for finding in _check_weights(Settings(preload=("vgg16",)))}
    assert findings["weights of vgg16"].well
    assert findings["weights of vgg16"].detail.startswith(str(tmp_path))


def test_an_unexpected_error_fails_one_check_and_not_the_others(settings: Settings) -> None:
    def check(_: Settings) -> str:
        message = "out of the blue"
        raise TypeError(message)

    assert _run_check("broker", check, settings, "Fix it.").detail == "Unforeseen TypeError: out of the blue"


def test_an_unset_output_is_named_with_what_to_set() -> None:
    unset = Settings(
        s3_endpoint_url="http://127.0.0.1:1", s3_access_key_id="k", s3_secret_access_key=SecretStr("s")
    )
    finding = _check_storage(unset)
    assert not finding.well
    assert finding.detail.startswith(
        "GRADCAM_OUTPUT is not set, and its default, s3://gradcam/results, cannot"
    )
    assert finding.fix == "Set GRADCAM_OUTPUT to where results go: s3://bucket/folder or file:///folder."


@pytest.mark.tensorflow
def test_everything_that_is_missing_is_named_with_its_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))  # where nothing was downloaded
    findings = by_name(
        Settings(
            broker_url="redis://:planted@127.0.0.1:1/0",
            output=(tmp_path / "file").as_uri(),
            preload=("vgg16",),
            weights_dir=tmp_path,
        )
    )
    ill = {name: finding.fix for name, finding in findings.items() if not finding.well}
    assert ill.keys() == {"broker", "ledger", "storage", "weights of vgg16"}
    assert "GRADCAM_BROKER_URL" in ill["broker"]
    assert "a folder that the worker may write to" in ill["storage"]
    assert ill["weights of vgg16"] == (
        "`gradcam networks fetch vgg16` downloads them now, or put Keras's "
        "vgg16_weights_tf_dim_ordering_tf_kernels.h5, under that name, or vgg16.weights.h5 of your own into "
        "the folder that GRADCAM_WEIGHTS_DIR names."
    )
    assert not any("planted" in finding.detail for finding in findings.values())


def own_network(folder: Path, settings: Settings, body: str, what: str = "network own") -> Finding:
    """Return the finding about one network of the operator's own."""
    (folder / "networks.toml").write_text(f"[networks.own]\ninput_size = [32, 32]\n{body}")
    changes = {"networks": folder / "networks.toml", "cache_dir": folder / "cache"}
    own = settings.model_copy(update={**changes, "output": folder.as_uri()})
    return by_name(own)[what]


@pytest.mark.tensorflow
def test_an_own_network_is_fetched_checked_and_explained_once(
    settings: Settings, tmp_path: Path, save_model: Callable[..., str]
) -> None:
    checksum = save_model(tmp_path / "own.keras")
    body = f'model = "own.keras"\nsha256 = "{checksum}"\npreprocessing = "unit"'
    finding = own_network(tmp_path, settings, body)
    assert finding.well
    facts = "layer backbone/last 30x30, 3 classes (softmax), 127 parameters, sizing area, squash"
    assert finding.detail == facts
    randomised = own_network(tmp_path, settings, body, "parameter randomisation of own")
    assert randomised.well
    assert re.fullmatch(
        r"heatmaps stay as they are by -?\d\.\d\d with all weights shuffled, -?\d\.\d\d with those of the "
        r"head shuffled: (0 or less is good|they hardly depend on what it has learned)",
        randomised.detail,
    )
    cached = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert cached - {".openvino"} == {".keras"}
    finding = own_network(tmp_path, settings, f"{body}\nscores_only = true")
    assert finding.detail == (
        "explained by its scores alone (rise or occlusion), 3 classes (probabilities), 127 parameters, "
        "sizing area, squash"
    )


@pytest.mark.tensorflow
def test_modules_and_further_inputs_of_an_own_network_are_shown(settings: Settings, tmp_path: Path) -> None:
    import keras

    inputs = keras.Input((32, 32, 3), name="image"), keras.Input((1,), name="age")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, name="last")(inputs[0]))
    scores = keras.layers.Dense(3, "softmax")(keras.layers.Concatenate()([x, inputs[1]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # between Keras and NumPy
        keras.Model(inputs, scores).save(tmp_path / "own.keras")
    body = f"""
model = "own.keras"
sha256 = "{file_sha256(tmp_path / "own.keras")}"
preprocessing = "unit"
imports = ["json"]
[networks.own.inputs.age]
maximum = 120
"""
    finding = own_network(tmp_path, settings, body)
    assert finding.well, finding.detail
    assert "; beside the image: age (number, up to 120); with layers of json" in finding.detail
    assert (
        "describe age, as in [networks.own.inputs.age]"
        in own_network(tmp_path, settings, body.partition("imports")[0]).detail
    )


@pytest.mark.tensorflow
def test_an_own_network_of_one_unit_without_a_sigmoid_is_named_with_the_line_to_add(
    settings: Settings, tmp_path: Path
) -> None:
    import keras

    x = keras.layers.Conv2D(4, 3, name="last")(inputs := keras.Input((32, 32, 3)))
    unit = keras.layers.Dense(1, bias_initializer=keras.initializers.Constant(37.0))
    model = keras.Model(inputs, unit(keras.layers.GlobalAveragePooling2D()(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # between Keras and NumPy
        model.save(tmp_path / "own.keras")
    checksum = file_sha256(tmp_path / "own.keras")
    body = f'model = "own.keras"\nsha256 = "{checksum}"\npreprocessing = "unit"'
    finding = own_network(tmp_path, settings, body)
    assert not finding.well
    assert finding.what == "network own"
    line = 'head = {kind = "sigmoid"}'
    assert f"If it is a score, add this line to its row: {line} (" in finding.detail
    assert finding.fix.startswith(f"Correct networks.own in {tmp_path}")
    assert own_network(tmp_path, settings, f"{body}\n{line}").well


@pytest.mark.tensorflow
@pytest.mark.parametrize(("preprocessing", "warned"), [("tf", True), ("none", False)])
def test_pixels_that_are_scaled_twice_are_reported(
    preprocessing: str, warned: bool, settings: Settings, tmp_path: Path, save_model: Callable[..., str]
) -> None:
    checksum = save_model(tmp_path / "own.keras", rescales=True)
    body = f'model = "own.keras"\nsha256 = "{checksum}"\npreprocessing = "{preprocessing}"'
    finding = own_network(tmp_path, settings, body)
    assert finding.well, "it may have been trained that way"
    assert ("rescale its input, in addition to the preprocessing tf" in finding.detail) == warned


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        (
            'model = "own.keras"\nsha256 = "{0}"',
            f"weights_checksum_mismatch: .* should have sha256 {'0' * 64} but",
        ),
        ('model = "none.keras"\nsha256 = "{1}"', "weights_unavailable: .*none.keras cannot be read"),
        (
            'model = "s3://models/none.keras"\nsha256 = "{1}"',
            "weights_unavailable: s3://models/none.keras could",
        ),
        ('model = "own.keras"\nsha256 = "{1}"\ntarget_layer = "stones"', "unknown_layer: .*backbone/last"),
        ('model = "own.keras"\nsha256 = "{1}"\nlabels = ["a", "b"]', "network_incompatible: .* 3 classes"),
        ('model = "text.keras"\nsha256 = "{2}"', "network_incompatible: .* cannot be loaded as own"),
    ],
)
def test_an_own_network_that_cannot_be_used_is_named_with_the_reason(
    body: str, pattern: str, settings: Settings, tmp_path: Path, save_model: Callable[..., str]
) -> None:
    (tmp_path / "text.keras").write_text("no network")
    sums = ("0" * 64, save_model(tmp_path / "own.keras"), file_sha256(tmp_path / "text.keras"))
    nowhere = settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"})
    finding = own_network(tmp_path, nowhere, body.format(*sums) + '\npreprocessing = "unit"')
    assert not finding.well
    assert re.search(pattern, finding.detail), finding.detail
    assert finding.fix.startswith(f"Correct networks.own in {tmp_path}")


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("text", "why"), [("[networks", "it is not TOML"), ("[networks]", "There is no network 'vgg61'")]
)
def test_an_invalid_networks_file_or_preload_is_a_finding(
    text: str, why: str, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "networks.toml").write_text(text)
    changes = {"networks": tmp_path / "networks.toml", "preload": ("vgg61",), "output": tmp_path.as_uri()}
    finding = by_name(settings.model_copy(update=changes))["networks"]
    assert not finding.well
    assert why in finding.detail


@pytest.mark.tensorflow
def test_what_would_stop_a_worker_is_a_finding_with_the_settings_name(
    settings: Settings, s3_settings: dict[str, Any]
) -> None:
    changes = {**s3_settings, "output": "s3://nowhere/cams", "broker_url": f"{settings.broker_url}7777"}
    findings = by_name(settings.model_copy(update={**changes, "ledger_url": settings.broker_url}))
    ill = {name: finding.detail for name, finding in findings.items() if not finding.well}
    assert ill.keys() == {"broker", "storage"}
    assert ill["broker"].startswith("GRADCAM_BROKER_URL: ")
    assert re.match("GRADCAM_OUTPUT: .*NoSuchBucket", ill["storage"])
