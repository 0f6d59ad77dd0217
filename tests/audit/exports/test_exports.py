"""`gradcam audit export`: a dataset in the formats of other tools. The tools themselves read them in
tests/devtools/test_export_readers.py.
"""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import cv2
import numpy as np
import pytest

from gradcam_worker.audit.exports.export import FORMATS
from gradcam_worker.cli.datasets.export import FORMATS as OFFERED
from gradcam_worker.cli.main import main
from tests.audit.datasets import Image, folder_dataset

BOX = (0.25, 0.25, 0.75, 0.75)
IMAGES = (
    Image(predicted=1, second=2, truth=1, box=BOX, carried={"camera": "north", "id": "x"}),
    Image(predicted=1, second=2, truth=3, heat=(0.1, 0.1), box=BOX, carried={"camera": "south"}),
    Image(error="image_not_found"),
)


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GRADCAM_OUTPUT", tmp_path.as_uri())

    def export(form: str, *more: str, images: tuple[Image, ...] = IMAGES) -> Path:
        dataset = tmp_path / "dataset"
        if not dataset.exists():
            folder_dataset(dataset, *images)
        assert main(["audit", "export", str(dataset), "--to", form, "-o", str(tmp_path / form), *more]) == 0
        return tmp_path / form

    return export


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_format_is_offered_and_writes_the_same_bytes_again(exported: Any, tmp_path: Path) -> None:
    assert tuple(FORMATS) == OFFERED
    for form in ("coco", "labelstudio", "wandb", "fiftyone"):
        first = {file.name: file.read_bytes() for file in exported(form).rglob("*.json")}
        (tmp_path / form).rename(tmp_path / f"{form}-before")
        assert {file.name: file.read_bytes() for file in exported(form).rglob("*.json")} == first


@pytest.mark.parametrize("form", ["coco", "labelstudio", "wandb", "fiftyone"])
def test_exports_are_json_whatever_numbers_a_column_holds(form: str, exported: Any) -> None:
    images = (Image(predicted=1, carried={"score": math.nan}),)
    files = [*exported(form, images=images).rglob("*.json")]
    for file in files:
        json.loads(file.read_text(), parse_constant=pytest.fail)
    assert files


def test_fiftyone_gets_no_field_names_that_it_refuses(exported: Any) -> None:
    names = ("_id", "meta.camera", "$price", "prediction", "a b")
    images = (Image(predicted=1, carried=dict.fromkeys(names, "x")),)
    (sample,) = read(exported("fiftyone", images=images) / "samples.json")["samples"]
    wanted = ("input__id", "meta_camera", "input__price", "input_prediction", "a b")
    assert [sample[name] for name in wanted] == ["x"] * 5
    assert not [name for name in sample if name.startswith("_") or {*name} & {*".$"}]


def test_coco_has_the_hot_region_and_the_truth_of_each_image_as_boxes(exported: Any) -> None:
    folder = exported("coco")
    hot, truth = read(folder / "hot_boxes.json"), read(folder / "truth.json")
    assert [(one["id"], one["file_name"], one["camera"]) for one in hot["images"]] == [
        (0, "photos/0.jpg", "north"),
        (1, "photos/1.jpg", "south"),
    ]
    assert {one["id"]: one["name"] for one in hot["categories"]} == {1: "class_1", 2: "class_2", 3: "class 3"}
    assert len(hot["annotations"]) == 4
    left, top, width, height = hot["annotations"][0]["bbox"]
    image = hot["images"][0]
    assert left < image["width"] / 2 < left + width
    assert top < image["height"] / 2 < top + height
    assert hot["annotations"][0].items() >= {"category_id": 1, "image_id": 0, "rank": 1}.items()
    quarter = [image["width"] / 4, image["height"] / 4, image["width"] / 2, image["height"] / 2]
    assert [(one["category_id"], one["bbox"]) for one in truth["annotations"]] == [(1, quarter), (3, quarter)]
    assert read(folder / "results.json")[0].keys() == {"image_id", "category_id", "bbox", "score"}


def test_label_studio_gets_tasks_with_the_answer_of_the_network_and_what_is_known(exported: Any) -> None:
    folder = exported("labelstudio")
    task, other = read(folder / "tasks.json")
    assert task["data"].items() >= {"image": "s3://photos/0.jpg", "row": 0, "camera": "north"}.items()
    [prediction] = task["predictions"]
    choice, region = prediction["result"]
    assert choice["value"] == {"choices": ["class_1"]}
    assert region["value"].keys() == {"x", "y", "width", "height", "rotation", "rectanglelabels"}
    assert 0 <= region["value"]["x"] < 50 < region["value"]["x"] + region["value"]["width"] <= 100
    [annotation] = other["annotations"]
    assert annotation["result"][0]["value"] == {"choices": ["class 3"]}
    config = ET.fromstring((folder / "config.xml").read_text())  # noqa: S314  # our own
    assert {one.get("name") for one in config if one.tag != "Image"} == {"region", "class"}
    assert {one.get("value") for one in config.iter("Choice")} == {"class_1", "class_2", "class 3"}


def test_fiftyone_gets_samples_with_heatmaps_on_the_whole_image(exported: Any) -> None:
    folder = exported("fiftyone")
    first, second = read(folder / "samples.json")["samples"]
    assert first["filepath"] == "images/photos/0.jpg"
    assert (first["input_id"], first["camera"], first["correct"]) == ("x", "north", True)
    assert (second["correct"], second["ground_truth"]["classifications"][0]["label"]) == (False, "class 3")
    assert first["objects"]["detections"][0]["bounding_box"] == pytest.approx([0.25, 0.25, 0.5, 0.5])
    assert first["heat_inside"] > 0.9
    assert second["heat_inside"] < 0.1
    heat: Any = cv2.imread(str(folder / second["heat"]["map_path"]), cv2.IMREAD_UNCHANGED)
    assert heat.max() == 255
    assert np.unravel_index(heat.argmax(), heat.shape) == (0, 0)
    assert len([*folder.glob("fields/*/*.png")]) == 4


def test_hugging_face_loads_the_folder(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported("huggingface")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded.num_rows == 5
    assert loaded[0]["camera"] == "north"
    assert max(loaded[0]["heatmap"]) == 1
    card = (folder / "README.md").read_text()
    assert card.startswith("---\ntask_categories:\n")
    assert "| right for the right reason | 1 |" in card
    assert "1 image failed" in card


def test_mlflow_gets_a_finished_run_with_the_figures_and_the_report(exported: Any) -> None:
    [run] = (exported("mlflow") / "mlruns").glob("*/*/")
    values = {file.name: float(file.read_text().split()[1]) for file in (run / "metrics").iterdir()}
    assert values.items() >= {"images": 2, "failed": 1, "accuracy": 0.5, "right_reason_share": 0.5}.items()
    assert read(run / "artifacts" / "report.json")["schema"] == "gradcam.audit/v1"
    assert (run / "params" / "network").read_text() == "efficientnet_lite0"


def test_weights_and_biases_gets_a_table_with_a_row_for_each_explanation(exported: Any) -> None:
    folder = exported("wandb")
    table = read(folder / "explanations.table.json")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert (table["nrows"], table["ncols"]) == (4, len(table["columns"]))
    assert [(row["row"], row["class_name"], row["camera"]) for row in rows[:2]] == [
        (0, "class_1", "north"),
        (0, "class_2", "north"),
    ]
    assert len({*table["columns"]}) == len(table["columns"])
    assert read(folder / "summary.json")["images"] == 2


def test_a_limit_is_told_and_a_folder_that_is_not_empty_is_left_alone(
    exported: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = exported("coco", "--limit", "1", "--json")
    out, err = capsys.readouterr()
    assert json.loads(out).items() >= {"format": "coco", "images": 1, "files": 3, "cut": True}.items()
    assert "more than 1 images: --limit takes more" in err
    again = ["audit", "export", str(tmp_path / "dataset"), "--to", "coco", "-o", str(folder)]
    assert main(again) == 3
    assert "is no empty folder: choose another one" in capsys.readouterr().err
    nowhere = ["audit", "export", str(tmp_path / "none"), "--to", "coco", "-o", str(tmp_path / "x")]
    assert main(nowhere) == 3


def test_a_dataset_of_the_last_version_is_exported_with_what_it_has(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("GRADCAM_OUTPUT", tmp_path.as_uri())
    dataset = folder_dataset(tmp_path / "old", *IMAGES, previous_version=True)
    for form in OFFERED:
        command = ["audit", "export", str(dataset), "--to", form, "-o", str(tmp_path / form)]
        assert main(command) == 0, form
    assert not (tmp_path / "coco" / "truth.json").exists()
    assert "correct" not in read(tmp_path / "fiftyone" / "samples.json")["samples"][0]
