"""What `gradcam compare` leaves for those who watch many comparisons: gauges and a log."""

import json
import os
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gradcam_worker.audit.comparison.compare import compare
from gradcam_worker.audit.comparison.drift import append_line, gauges, log_line, write_gauges
from gradcam_worker.audit.comparison.report import FIGURES, ComparisonReport
from gradcam_worker.errors import StorageUnavailable
from tests.audit.datasets import CORNER, Image, memory_dataset

NAME = 'nightly "v2"\\\n'


@pytest.fixture(scope="module")
def report() -> ComparisonReport:
    images = [Image(0, sha256=f"{number:064x}") for number in range(20)]
    moved = [Image(0, heat=CORNER, sha256=f"{number:064x}") for number in range(20)]
    return compare(memory_dataset(images), memory_dataset(moved))


def test_the_gauges_are_what_prometheus_reads(report: ComparisonReport) -> None:
    families = {one.name: one for one in text_string_to_metric_families(gauges(report, NAME, 1.9e9))}
    known = {f"gradcam_compare_{figure}" for figure, value in report.figures.items() if value is not None}
    others = ("class_distance", "class_moved", "timestamp_seconds")
    of_classes = {f"gradcam_compare_{name}" for name in others}
    assert families.keys() == known | of_classes
    (moved,) = families["gradcam_compare_moved"].samples
    assert (moved.labels, moved.value) == ({"comparison": NAME}, 1)
    (distance,) = families["gradcam_compare_class_distance"].samples
    assert distance.labels == {"comparison": NAME, "class_id": "0", "class_name": "class_0"}
    assert distance.value == report.classes[0].heat.change
    assert families["gradcam_compare_timestamp_seconds"].samples[0].value == 1.9e9
    assert all(one.type == "gauge" and one.documentation for one in families.values())


def test_every_figure_is_explained(report: ComparisonReport) -> None:
    assert list(report.figures) == list(FIGURES)


def test_the_file_of_gauges_appears_in_one_step(tmp_path: Path, report: ComparisonReport) -> None:
    file = tmp_path / "metrics" / "gradcam.prom"
    for at_s in (1.0, 2.0):
        write_gauges(file, gauges(report, "a", at_s))
    assert file.read_text() == gauges(report, "a", 2.0)
    assert [one.name for one in file.parent.iterdir()] == ["gradcam.prom"]


def test_a_line_of_the_log_names_what_moved(report: ComparisonReport) -> None:
    line = json.loads(json.dumps(log_line(report, "nightly", "2031-05-06T07:08:09Z")))
    assert line["schema"] == "gradcam.comparison.log/v1"
    assert line["at"] == "2031-05-06T07:08:09Z"
    assert (line["comparison"], line["paired_by"]) == ("nightly", "sha256")
    assert line["a"] == {"uri": report.a.uri, "weights_sha256": "ab" * 32}
    assert line["figures"] == report.figures
    assert [(one["id"], one["name"], one["by"]) for one in line["moved"]] == [(0, "class_0", ["heat"])]


def test_lines_that_are_appended_at_once_stay_whole(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "drift.jsonl"

    def write(writer: int) -> None:
        for number in range(20):
            append_line(file, {"writer": writer, "number": number, "padding": "x" * 5000})

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 80
    for writer in range(4):
        assert [line["number"] for line in lines if line["writer"] == writer] == list(range(20))


def test_a_line_that_a_power_cut_ended_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "drift.jsonl"
    file.write_text('{"at": 1}\n{"at"')
    append_line(file, {"at": 2})
    assert file.read_text() == '{"at": 1}\n{"at"\n{"at":2}\n'


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "drift.jsonl"
    append_line(file, {"at": 1})
    real = os.write
    monkeypatch.setattr(os, "write", lambda number, data: real(number, data[:3]))
    with pytest.raises(StorageUnavailable, match="only 3 of 9 bytes were written"):
        append_line(file, {"at": 2})
    assert file.read_text() == '{"at":1}\n'


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailable, match="could not be written"):
        append_line(tmp_path / "file" / "drift.jsonl", {})
