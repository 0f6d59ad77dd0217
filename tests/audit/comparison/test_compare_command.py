"""The command `gradcam compare`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gradcam_worker.audit.comparison.report import ComparisonReport
from gradcam_worker.cli.main import main
from tests.audit.datasets import CORNER, MIDDLE_BOX, Image, folder_dataset


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets: a, and b, in which the heat of class 1 moved to a corner."""
    folder = tmp_path_factory.mktemp("compare")
    images = [
        Image(number % 2, truth=number % 2, box=MIDDLE_BOX, sha256=f"{number:064x}") for number in range(40)
    ]
    folder_dataset(folder / "a", images)
    moved = [replace(one, heat=CORNER) if one.predicted else one for one in images]
    folder_dataset(folder / "b", moved, network={"name": "net", "layer": "l", "weights_sha256": None})
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def test_what_moved_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a", "b"]) == 0
    told = capsys.readouterr().out
    assert "network: efficientnet_lite0 in A, net in B" in told
    assert "2 classes compared, 0 left out, 40 images in both: 1 moved" in told
    assert "0.0% of the predictions changed" in told
    assert "class_1" in told
    assert "class_0" not in told


def test_it_writes_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, metrics, log = tmp_path / "out", tmp_path / "m" / "gradcam.prom", tmp_path / "drift.jsonl"
    arguments = ["compare", "a", "b", "-o", str(out), "--metrics", str(metrics), "--log", str(log), "--json"]
    for _ in range(2):
        assert main([*arguments, "--name", "nightly", "--fail-if", "moved > 1"]) == 0
    text = (out / "comparison.json").read_text()
    report = ComparisonReport.model_validate_json(text)
    assert json.loads(capsys.readouterr().out.partition("\n}\n")[0] + "}") == json.loads(text)
    assert report.conditions[0].condition == "moved > 1"
    assert report.conditions[0].met is False
    assert 'gradcam_compare_moved{comparison="nightly"} 1.0\n' in metrics.read_text()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["comparison"] for line in lines] == ["nightly", "nightly"]
    assert lines[0]["figures"] == report.figures


def test_a_condition_that_is_met_has_an_exit_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    conditions = ["--fail-if", "moved > 9", "--fail-if", "moved > 0 or accuracy_change < 0"]
    assert main(["compare", "a", "b", *conditions]) == 7
    told = capsys.readouterr().err
    assert "--fail-if is met: moved > 0 or accuracy_change < 0" in told
    assert "moved > 9" not in told


def test_thresholds_can_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    few = [
        "--min-images",
        "5",
        "--min-effect",
        "0.1",
        "--sample",
        "15",
        "--seed",
        "3",
        "--rows",
        "true",
        "--pair",
        "none",
    ]
    assert main(["compare", "a", "b", "--min-distance", "1", "--min-inside", "1", *few, "--json"]) == 0
    report = ComparisonReport.model_validate_json(capsys.readouterr().out)
    assert report.figures["moved"] == 0
    assert report.pairing.by is None
    thresholds = report.thresholds
    assert (thresholds.min_images, thresholds.sample, thresholds.rows, thresholds.seed) == (5, 15, "true", 3)
    assert [one.tested for one in report.classes] == [15, 15]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a", "none"], "There is no dataset at"),
        (["a", "https://user:secret@host/b"], "'https://host/b' is no dataset"),
        (["a", "b", "--fail-if", "move > 3"], "there is no figure 'move' (near: moved)"),
        (["none", "none", "--fail-if", "moved"], "neither true nor false"),
        (
            ["a", "a", "--pair", "none", "--fail-if", "predictions_changed > 0"],
            "predictions_changed is not known",
        ),
    ],
)
def test_what_cannot_be_compared_is_bad_input(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *arguments]) == 3
    told = capsys.readouterr().err
    assert expected in told
    assert "secret" not in told
