"""`gradcam audit`: the report of a dataset."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gradcam_worker.artifacts.dataset import read_batches
from gradcam_worker.audit.report import AuditReport
from gradcam_worker.audit.run import audit
from gradcam_worker.cli.main import main
from tests.audit.datasets import CORNER, MIDDLE_BOX, Image, folder_dataset, memory_dataset


def test_a_synthetic_dataset_is_read_as_one_of_a_backfill(tmp_path: Path) -> None:
    corner = Image(1, truth=2, heat=CORNER, box=MIDDLE_BOX, second=2, second_heat=(0.5, 0.5))
    store = memory_dataset(corner, Image(error="image_not_found"), corner, shard_rows=2)
    assert sorted(store.objects) == [f"data/{n:08d}-{'0' * 16}.parquet" for n in (0, 1)] + ["dataset.json"]
    (first,), (second,) = (list(read_batches(store.objects[name])) for name in sorted(store.objects)[:2])
    assert first.class_ids.tolist() == second.class_ids.tolist() == [1, 2], (
        "of the image that failed, nothing"
    )
    assert first.heatmaps[0].argmax() == 0
    assert first.heatmaps[1].argmax() == 24
    record = second.record(0)
    assert (record["row"], record["correct"], record["truth_ids"], record["truth_rank"]) == (2, False, [2], 2)
    assert record["heat_inside"] < 0.01
    assert record["heat_at_border"] > 0.7
    assert record["truth_boxes"] == [[100, 75, 300, 225]]
    folder = folder_dataset(tmp_path, Image(carried={"split": "train"}), previous_version=True)
    names = pq.read_schema(next(folder.glob("data/*.parquet"))).names
    assert names[-1] == "missing"


@pytest.mark.parametrize("shard_rows", [2, 100])
def test_classes_are_counted(shard_rows: int) -> None:
    store = memory_dataset(Image(0, second=1).times(3), Image(1), Image(error="x"), shard_rows=shard_rows)
    report = audit(store)
    assert (report.dataset.rows, report.dataset.explained, report.dataset.failed) == (5, 4, 1)
    assert {one.id: (one.images, one.predicted) for one in report.classes} == {0: (3, 3), 1: (4, 1)}
    assert report.classes[0].name == "class_0"
    assert AuditReport.model_validate_json(report.to_json()) == report


def test_the_command_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_dataset(tmp_path / "cams", Image().times(4))
    assert main(["audit", str(folder), "-o", str(tmp_path / "audit"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "audit" / "report.json").read_text()) == printed
    assert printed["schema"] == "gradcam.audit/v1"
    assert np.sum([one["predicted"] for one in printed["classes"]]) == 4
