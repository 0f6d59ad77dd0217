"""Other tools read what `gradcam audit export` writes, each with its own code, in an environment beside ours.

It needs a package index and takes minutes: `.venv/bin/pytest --large tests/devtools/test_export_readers.py`.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devtools.environments import Environment, fingerprint
from gradcam_worker.cli.main import main
from tests.audit.datasets import Image, folder_dataset

pytestmark = [pytest.mark.large, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "scripts" / "devtools" / "export_readers"
BOX = (0.25, 0.25, 0.75, 0.75)
QUIET = {"MLFLOW_ALLOW_FILE_STORE": "true", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def environment(name: str, pins: Path) -> Environment:
    """The environment with these packages; the test is skipped where they cannot be installed."""
    made = Environment(ROOT / "build" / name)
    if made.stamp != [fingerprint(pins)]:
        made.create()
        if reason := made.pip("-r", str(pins)):
            pytest.skip(f"{pins.name} cannot be installed: {reason}")
        made.keep(fingerprint(pins))
    return made


def read(made: Environment, folder: Path, *formats: str) -> dict[str, Any]:
    done = subprocess.run(
        [made.python, FOLDER / "read_all.py", folder, *formats],
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"format"')]
    return {line["format"]: line for line in lines}


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setenv("GRADCAM_OUTPUT", tmp_path.as_uri())
    dataset = folder_dataset(
        tmp_path / "dataset",
        Image(predicted=1, second=2, truth=1, box=BOX, carried={"camera": "north"}),
        Image(predicted=1, second=2, truth=3, heat=(0.1, 0.1), box=BOX, carried={"camera": "south"}),
    )

    def write(*formats: str) -> Path:
        for form in formats:
            command = ["audit", "export", str(dataset), "--to", form, "-o", str(tmp_path / form)]
            assert main(command) == 0
        return tmp_path

    return write


def test_each_tool_reads_its_export(export: Callable[..., Path]) -> None:
    made = environment("export-readers", FOLDER / "readers.txt")
    formats = ("coco", "labelstudio", "mlflow", "wandb")
    found = read(made, export(*formats), *formats)
    assert found["coco"].items() >= {"images": 2, "boxes": 4}.items()
    assert found["coco"]["classes"] == ["class_1", "class_2", "class 3"]
    assert (found["labelstudio"]["tasks"], found["labelstudio"]["valid"]) == (2, 2)
    assert found["mlflow"]["metrics"].items() >= {"images": 2, "accuracy": 0.5}.items()
    assert found["mlflow"]["artifacts"] == ["report.json"]
    assert found["wandb"]["rows"] == 4
    assert "camera" in found["wandb"]["columns"]


def test_fiftyone_imports_its_export(export: Callable[..., Path]) -> None:
    made = environment("export-fiftyone", FOLDER / "fiftyone.txt")
    found = read(made, export("fiftyone"), "fiftyone")["fiftyone"]
    assert found["labels"] == ["class_1", "class_1"]
    assert found["truths"] == ["class_1", "class 3"]
    assert found["heatmaps"] == [True, True]
    assert found["peaks"] == [255, 255]
    assert found["hot_regions"] == [2, 2]
    assert found["heat_inside"][0] > 0.9
    assert found["heat_inside"][1] < 0.1
    assert found["cameras"] == ["north", "south"]
