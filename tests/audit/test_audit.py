"""`gradcam audit`: the report of a dataset."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from devtools.synthetic_dataset import decode_cells
from gradcam_worker.artifacts.dataset import DatasetLayout, read_batches, schema
from gradcam_worker.audit.dataset.row_table import read_columns
from gradcam_worker.audit.dataset.samples import Samples
from gradcam_worker.audit.exports.mlflow_run import figures
from gradcam_worker.audit.report import CAUSES, AuditReport, ClassReport, Thresholds
from gradcam_worker.audit.run import AuditOptions, audit
from gradcam_worker.cli.main import main
from gradcam_worker.errors import InvalidInput
from tests.audit.datasets import (
    CORNER,
    MIDDLE_BOX,
    Image,
    folder_dataset,
    memory_dataset,
    spread_out,
)


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


def test_a_synthetic_dataset_has_the_columns_of_a_backfill() -> None:
    one = Image(0, truth=0, box=MIDDLE_BOX, features=(1, 2), carried={"split": "train"})
    store = memory_dataset(one, one)
    (data,) = (data for name, data in store.objects.items() if name.startswith("data/"))
    layout = DatasetLayout((7, 7), annotated=True, features=2, carried={"split": "string"})
    columns = pq.read_schema(io.BytesIO(data))
    assert [(field.name, str(field.type).replace("element", "item")) for field in columns] == [
        (field.name, str(field.type)) for field in schema(layout)
    ]


@pytest.mark.parametrize("shard_rows", [2, 100])
def test_classes_are_counted(shard_rows: int) -> None:
    store = memory_dataset(Image(0, second=1).times(3), Image(1), Image(error="x"), shard_rows=shard_rows)
    report = audit(store).report
    assert (report.dataset.rows, report.dataset.explained, report.dataset.failed) == (5, 4, 1)
    assert {one.id: (one.images, one.predicted) for one in report.classes} == {0: (3, 3), 1: (4, 1)}
    assert report.classes[0].name == "class_0"
    assert AuditReport.model_validate_json(report.to_json()) == report


class TestCommand:
    CONFUSED = (
        Image(0, truth=1, box=MIDDLE_BOX).times(9),
        Image(0, truth=0, box=MIDDLE_BOX, heat=CORNER).times(2),
        Image(1, truth=1).times(3),
    )

    def test_the_report_is_written_and_printed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = folder_dataset(tmp_path / "cams", *self.CONFUSED)
        assert main(["audit", str(folder), "--json", "--inside", "0.25", "--at-border", "0.4"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert json.loads((folder / "audit" / "report.json").read_text()) == printed
        assert printed["schema"] == "gradcam.audit/v1"
        assert (printed["thresholds"]["inside"], printed["thresholds"]["at_border"]) == (0.25, 0.4)
        columns = read_columns(folder / "audit", ("row", "cause", "agreement", "file"))
        assert columns["row"].tolist() == list(range(14))
        assert columns["cause"].tolist() == [2] * 9 + [1] * 2 + [4] * 3

    def test_the_page_is_written_beside_the_report_unless_it_is_not_wanted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("GRADCAM_IMAGE_SCHEMES", "data")
        folder = folder_dataset(tmp_path / "cams", *self.CONFUSED)
        assert main(["audit", str(folder), "--no-page"]) == 0
        assert not (folder / "audit" / "index.html").exists()
        assert main(["audit", str(folder), "--image-url", "s3://photos/=https://photos.example/"]) == 0
        assert "https://photos.example/" in (folder / "audit" / "index.html").read_text()
        told = " ".join(capsys.readouterr().out.split())
        assert "shown as heatmaps only: uri_not_allowed" in told
        assert "Page: index.html" in told

    @pytest.mark.parametrize(
        "wrong",
        [["--image-url", "s3://photos/=javascript:"], ["--links-expire", "soon"], ["--pictures", "-1"]],
    )
    def test_an_option_of_the_page_that_cannot_be_is_named(self, tmp_path: Path, wrong: list[str]) -> None:
        assert main(["audit", str(tmp_path), *wrong]) == 2

    def test_what_there_is_most_to_learn_from_is_told_first(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = folder_dataset(tmp_path / "cams", *self.CONFUSED)
        assert main(["audit", str(folder), "-o", str(tmp_path / "out"), "--lines", "1"]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "14 images, 2 classes; efficientnet_lite0, layer blocks" in told
        assert "by boxes or masks: 11 images; by the typical heat of the class: 0; not: 3" in told
        assert "9 75.0 % class 1 class 0 wrong though looking at the object: 9" in told
        assert "class 0 0 2 9 0 0 0" in told
        assert "Classes with the most to learn first, 1 of 2" in told
        assert "fewer than 8 images of the class" in told
        assert (tmp_path / "out" / "report.json").exists()

    def test_without_labels_it_tells_where_heat_lies_elsewhere(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = (spread_out(Image(0), 30), Image(0, heat=CORNER).times(2))
        folder = folder_dataset(tmp_path / "cams", *images, previous_version=True, complete=False)
        assert main(["audit", str(folder)]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "no dataset.json: the backfill has not ended" in told
        assert "class images elsewhere class 0 32 2" in told
        assert "gradcam backfill --label COLUMN" in told

    def test_what_only_one_class_looks_at_is_suspect_and_every_sampled_image_is_on_the_map(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        middle = [spread_out(Image(one, truth=one, box=MIDDLE_BOX), 30, seed=one) for one in range(3)]
        corner = spread_out(Image(3, truth=3, box=MIDDLE_BOX, heat=(0.93, 0.93)), 30, by=0.01)
        folder = folder_dataset(tmp_path / "cams", *middle, corner)
        assert main(["audit", str(folder), "--no-trial", "--no-page"]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert (
            "2 possible shortcuts were not tried on the network: it was turned off. The first: class 3"
            in told
        )
        report = AuditReport.model_validate_json((folder / "audit" / "report.json").read_text())
        assert {one.class_id for one in report.suspects} == {3}
        assert {one.place for one in report.suspects} == {"background", "bottom right corner"}
        assert report.map == "rows-more.parquet"
        assert {one.class_id for one in report.clusters} == {0, 1, 2, 3}
        columns = read_columns(folder / "audit", ("x", "y", "cluster"))
        assert (columns["cluster"] >= 0).all()
        assert np.isfinite(columns["x"]).all()
        assert main(["audit", str(folder), "--no-shortcuts", "--no-page", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["map"], printed["clusters"], printed["suspects"]) == (None, [], [])

    def test_what_is_no_dataset_gets_no_folder(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["audit", str(tmp_path / "none")]) == 3
        assert "There is no dataset at" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


def class_of(report: AuditReport, class_id: int) -> ClassReport:
    (found,) = (one for one in report.classes if one.id == class_id)
    return found


class TestCauses:
    def test_with_boxes_each_image_is_judged_by_its_own(self) -> None:
        seen = Image(0, truth=0, box=MIDDLE_BOX)
        report = audit(
            memory_dataset(
                seen.times(5),
                [Image(0, truth=0, box=MIDDLE_BOX, heat=CORNER)] * 3,
                [Image(0, truth=1, box=MIDDLE_BOX)] * 2,
                [Image(0, truth=1, box=MIDDLE_BOX, heat=CORNER)] * 4,
                Image(0, box=MIDDLE_BOX),
                Image(1, truth=1, box=MIDDLE_BOX),
                shard_rows=4,
            )
        ).report
        first = class_of(report, 0)
        counts = {"right_reason": 5, "wrong_reason": 3, "wrong_on_object": 2, "wrong_elsewhere": 4}
        assert first.causes == {**counts, "unknown": 1}
        assert (first.predicted, first.right, first.truths, first.missed) == (15, 8, 8, 0)
        assert (first.accuracy, first.precision) == (1, round(8 / 14, 6))
        assert first.elsewhere == 7
        second = class_of(report, 1)
        assert (second.truths, second.missed, second.accuracy) == (7, 6, round(1 / 7, 6))
        assert report.basis.model_dump() == {"regions": 16, "typical_heat": 0, "nothing": 0}
        (confusion,) = report.confusions
        assert (confusion.truth, confusion.predicted, confusion.images) == (1, 0, 6)
        assert confusion.share == pytest.approx(6 / 7)
        assert confusion.causes["wrong_elsewhere"] == 4
        assert (report.dataset.labelled, report.dataset.located) == (15, 16)
        assert report.dataset.accuracy == round(9 / 15, 6)

    def test_an_image_with_several_true_classes_counts_once_in_the_accuracy(self) -> None:
        dataset = memory_dataset([Image(0, truth=0)] * 3, Image(1, truth=0))
        ((name, content),) = (
            (name, one) for name, one in dataset.objects.items() if name.endswith(".parquet")
        )
        table = pq.read_table(pa.BufferReader(content))
        place, sink = table.column_names.index("truth_ids"), pa.BufferOutputStream()
        several = pa.array([[0, 5, 6]] * len(table), table.schema.field("truth_ids").type)
        pq.write_table(table.set_column(place, table.schema.field("truth_ids"), several), sink)
        dataset.objects[name] = sink.getvalue().to_pybytes()
        report = audit(dataset).report
        assert (report.dataset.labelled, report.dataset.accuracy) == (4, 0.75)
        assert figures(report)["accuracy"] == 0.75

    def test_without_boxes_by_the_typical_heat_of_the_class_and_the_border(self) -> None:
        usual = spread_out(Image(0, truth=0, spread=0.15), 40)
        report = audit(
            memory_dataset(
                usual,
                Image(0, truth=0, heat=(0.85, 0.85), spread=0.08),
                Image(0, truth=1, heat=(0.5, 0.45)),
                Image(0, truth=1, heat=CORNER),
                Image(2, truth=2).times(3),
            )
        ).report
        causes = class_of(report, 0).causes
        counts = {"right_reason": 40, "wrong_reason": 1, "wrong_on_object": 1, "wrong_elsewhere": 1}
        assert causes == {**counts, "unknown": 0}
        assert class_of(report, 2).causes["unknown"] == 3, "too few images for a typical heat"
        assert report.basis.model_dump() == {"regions": 0, "typical_heat": 43, "nothing": 3}
        heat = class_of(report, 0).typical_heat
        assert heat is not None
        cells = decode_cells(heat.cells, heat.rows, heat.columns)
        assert cells[3, 3] == 255
        assert cells[0, 0] < 30

    def test_thresholds_are_in_the_report_and_decide(self) -> None:
        store = memory_dataset(Image(0, truth=0, box=(0.4, 0.4, 0.6, 0.6), spread=0.3).times(4))
        lenient = audit(store).report
        assert class_of(lenient, 0).causes["right_reason"] == 4
        strict = audit(store, AuditOptions(Thresholds(inside=0.9, over_chance=9))).report
        assert class_of(strict, 0).causes["wrong_reason"] == 4
        assert strict.thresholds.inside == 0.9

    def test_a_class_and_a_pair_with_more_to_learn_come_first(self) -> None:
        good = [Image(3, truth=3, box=MIDDLE_BOX)] * 200
        report = audit(
            memory_dataset(
                good,
                Image(4, truth=3, box=MIDDLE_BOX),
                [Image(1, truth=0, box=MIDDLE_BOX)] * 30,
                [Image(0, truth=0, box=MIDDLE_BOX)] * 10,
                [Image(2, truth=2, box=MIDDLE_BOX, heat=CORNER)] * 12,
            )
        ).report
        assert [(one.truth, one.predicted) for one in report.confusions] == [(0, 1), (3, 4)]
        assert [one.id for one in report.classes] == [1, 0, 2, 4, 3]
        ranks = [one.to_learn for one in report.classes]
        assert ranks == sorted(ranks, reverse=True)

    def test_examples_are_the_most_confident_ones(self) -> None:
        sure = [Image(0, truth=1, box=MIDDLE_BOX, probability=p) for p in (0.3, 0.9, 0.5, 0.9, 0.7)]
        report = audit(memory_dataset(sure, shard_rows=2), AuditOptions(examples=3)).report
        assert report.confusions[0].examples == ((1, 0), (3, 0), (4, 0))
        assert class_of(report, 0).examples == {"wrong_on_object": ((1, 0), (3, 0), (4, 0))}

    def test_images_of_which_the_prediction_was_not_explained_are_not_judged(self) -> None:
        store = memory_dataset(Image(0, truth=0, box=MIDDLE_BOX).times(4))
        (name,) = (name for name in store.objects if name.endswith("parquet"))
        table = pq.read_table(io.BytesIO(store.objects[name]))
        place = table.schema.get_field_index("rank")
        ranks = pa.array(np.array([1, 2, 5, 1], np.int32))
        out = io.BytesIO()
        pq.write_table(table.set_column(place, "rank", ranks), out)
        store.objects[name] = out.getvalue()
        report = audit(store).report
        assert (report.dataset.explained, report.dataset.unpredicted) == (4, 2)
        assert class_of(report, 0).predicted == 2
        assert any("Of 2 images the class that came first has no heatmap" in one for one in report.advice)


class TestReport:
    def test_it_does_not_depend_on_how_the_dataset_is_split_into_files(self) -> None:
        mixed = [
            *spread_out(Image(0, truth=0, second=1), 30),
            *spread_out(Image(1, truth=0, heat=(0.3, 0.6)), 30, seed=1),
            Image(error="image_not_found"),
            *spread_out(Image(0, truth=1, box=MIDDLE_BOX), 20, seed=2),
        ]
        reports = [audit(memory_dataset(mixed, shard_rows=size)).report for size in (7, 1000)]
        first, second = (report.model_dump(mode="json", exclude={"files"}) for report in reports)
        assert first == second
        assert audit(memory_dataset(mixed, shard_rows=7)).report.to_json() == reports[0].to_json()
        assert [(one.first, one.last) for one in reports[0].files][:2] == [(0, 6), (7, 13)]

    def test_what_is_known_of_each_record_is_in_the_order_of_the_dataset(self) -> None:
        found = audit(
            memory_dataset(
                [Image(0, truth=0, box=MIDDLE_BOX, second=1)] * 2,
                Image(error="x"),
                Image(1, truth=0, heat=CORNER, box=MIDDLE_BOX, second=0),
                shard_rows=2,
            )
        )
        assert found.causes.tolist() == [0, -1, 0, -1, 3, -1]
        assert np.isnan(found.agreement[1])

    def test_columns_of_the_input_are_listed_as_carried(self) -> None:
        report = audit(memory_dataset([Image(carried={"split": "train", "price": 2.5})] * 2)).report
        carried = {column.name: column.type for column in report.columns if column.carried}
        assert carried == {"price": "double", "split": "string"}
        assert {column.name for column in report.columns} > {"row", "heat_at_border", "split"}

    def test_a_dataset_of_the_previous_version_is_audited_by_what_it_has(self) -> None:
        store = memory_dataset(
            spread_out(Image(0), 30), [Image(0, heat=CORNER)] * 2, previous_version=True, complete=False
        )
        report = audit(store).report
        first = class_of(report, 0)
        assert first.causes == {**dict.fromkeys(CAUSES, 0), "unknown": 32}
        assert (first.elsewhere, first.accuracy, first.truths) == (2, None, 0)
        assert first.mean_heat_at_border == pytest.approx(
            class_of(
                audit(memory_dataset(spread_out(Image(0), 30), [Image(0, heat=CORNER)] * 2)).report, 0
            ).mean_heat_at_border,
            abs=1e-3,
        )
        told = " ".join(report.advice)
        for expected in ("--label COLUMN", "--boxes COLUMN", "An earlier version wrote"):
            assert expected in told
        assert class_of(report, 0).to_learn > 0

    def test_a_dataset_with_everything_needs_no_advice(self) -> None:
        store = memory_dataset(Image(0, truth=0, box=MIDDLE_BOX, features=(0.5, 1)).times(9))
        assert audit(store).report.advice == ()

    @pytest.mark.parametrize(
        ("images", "expected"),
        [
            (Image(error="image_not_found").times(3), "each of the 3 rows failed (image_not_found 3)"),
            ([], "There is no dataset at"),
        ],
    )
    def test_where_nothing_was_explained_the_reason_is_told(self, images: list[Image], expected: str) -> None:
        with pytest.raises(InvalidInput, match=re.escape(expected)):
            audit(memory_dataset(images))

    def test_fine_heatmaps_are_compared_on_a_coarser_grid(self) -> None:
        report = audit(memory_dataset(spread_out(Image(0), 10), grid=(64, 48))).report
        heat = report.classes[0].typical_heat
        assert heat is not None
        assert (heat.rows, heat.columns) == (16, 16)
        assert report.dataset.grid == (64, 48)


class TestSamples:
    def test_a_sample_has_what_single_images_need(self) -> None:
        samples = Samples()
        audit(
            memory_dataset(
                Image(0, truth=1, heat=CORNER, box=MIDDLE_BOX, features=(1, 2), second=5).times(3),
                Image(4, truth=4, features=(3, 4)),
                shard_rows=2,
            ),
            samples=samples,
        )
        ids = [one.class_id for one in samples.of_each_class()]
        first, last = samples.of_each_class()
        assert ids == [0, 4]
        assert (first.predicted, first.rows.tolist(), first.records.tolist()) == (3, [0, 1, 2], [0, 2, 4])
        assert first.features is not None
        assert first.features.tolist() == [[1, 2]] * 3
        assert first.truths.tolist() == [1] * 3
        assert first.uris[2] == "s3://photos/2.jpg"
        assert first.heat.sum((1, 2)) == pytest.approx(1, abs=1e-5)
        assert first.heat[0].argmax() == 0
        assert first.boxes[0] is not None
        assert first.boxes[0].tolist() == [[0.25, 0.25, 0.75, 0.75]]
        assert last.boxes == [None]
        assert (first.name, last.name) == ("class_0", "class_4")
