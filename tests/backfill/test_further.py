"""Columns beside the image: carried into the dataset, or what is known and asked of a row."""

import gzip
import json
import os
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import orc

from gradcam_worker.artifacts.columns import arrow_type, carried_array
from gradcam_worker.artifacts.dataset import failed_lines
from gradcam_worker.backfill.inputs.further import MAX_CELL
from gradcam_worker.backfill.inputs.open import Input, open_input
from gradcam_worker.backfill.inputs.options import InputOptions
from gradcam_worker.backfill.inputs.tables import SAMPLE_ROWS
from gradcam_worker.backfill.sharding import cut_shards
from gradcam_worker.errors import InvalidInput
from gradcam_worker.schemas.annotations import AnnotatedBox, AnnotatedMask, Annotations
from gradcam_worker.schemas.shard import Row, Shard
from gradcam_worker.schemas.work import parse
from gradcam_worker.settings import Settings
from tests.backfill.plans import plan

A, B, C = "s3://photos/a.jpg", "s3://photos/b.jpg", "s3://photos/c.jpg"
Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file, and return its path."""

    def file(name: str, content: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        return str(tmp_path / name)

    return file


def read(where: str, fixed: Any = None, **how: Any) -> tuple[list[Row], Input]:
    with open_input(where, Settings(), InputOptions(**how), fixed=fixed) as opened:
        return list(opened.rows()), opened


def carried(where: str, fixed: Any = None, **how: Any) -> tuple[dict[str, str], list[Any]]:
    rows, opened = read(where, fixed, **how)
    return opened.carried, [row.carried for row in rows]


def refused(where: str, **how: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        read(where, **how)
    return str(caught.value)


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


class TestCarried:
    def test_every_further_column_of_csv_is_carried_as_text(self, write: Write) -> None:
        where = write("a.csv", f"id,camera,image, Age ,note\n1,x100,{A},61,\n2,,{B},,\n")
        names = dict.fromkeys(("camera", "Age", "note"), "string")
        assert carried(where) == (names, [("x100", "61", None), None])

    def test_columns_are_kept_and_dropped_by_name_and_pattern(self, write: Write) -> None:
        where = write("a.csv", f"image,cam_a,Cam_b,note\n{A},1,2,3\n")
        for how, names in (
            ({"keep": ("note", "CAM_A")}, ["cam_a", "note"]),
            ({"keep": ("cam_*",)}, ["cam_a", "Cam_b"]),
            ({"drop": ("cam_*",)}, ["note"]),
            ({"keep": ("cam_*",), "drop": ("Cam_b",)}, ["cam_a"]),
            ({"drop": ("*",)}, []),
        ):
            assert list(carried(where, **how)[0]) == names
        for option in ("keep", "drop"):
            said = refused(where, **{option: ("nothing",)})
            assert f"has no column 'nothing' for --{option}-columns; it has" in said

    def test_a_name_of_the_dataset_is_refused_with_the_way_out(self, write: Write) -> None:
        where = write("a.csv", f"image,Width,note,truth_ids\n{A},1,2,3\n")
        said = refused(where)
        assert "has the columns 'Width', 'truth_ids', as the dataset itself" in said
        assert "--drop-columns Width,truth_ids" in said
        assert list(carried(where, drop=("width", "truth_ids"))[0]) == ["note"]

    def test_one_name_twice_is_refused_and_none_is_not_carried(self, write: Write) -> None:
        where = write("a.csv", f"image,a,b,A\n{A},1,2,3\n")
        assert "has columns of one name, the columns 'a', 'A'" in refused(where)
        assert "has columns of one name" in refused(write("b.csv", f"image,a,a\n{A},1,2\n"))
        where = write("c.csv", f",image,a\n0,{A},1\n")
        rows, opened = read(where)
        assert rows == [Row(uri=A, carried=("1",))]
        assert opened.notes() == ["A column without a name that can be printed is not carried."]
        Path(where).write_bytes(b"image,t\xfctel,a\n" + f"{A},x,1\n".encode())
        assert carried(where) == ({"a": "string"}, [("1",)])

    def test_fields_of_json_have_the_types_of_their_first_values(self, write: Write) -> None:
        first = {"image": A, "n": 1, "x": 1, "ok": True, "s": "a", "l": [1, 2], "m": ["a", None], "e": []}
        second = {"image": B, "n": None, "x": 0.5, "o": {"a": [1]}, "mixed": 1, "big": 2**63, "e": [0.5]}
        third = {"image": C, "mixed": "b", "l": [], "s": None, "ll": [[1]], "none": None}
        kinds, rows = carried(write("a.jsonl", lines(first, second, third)))
        assert kinds == {
            "n": "int64",
            "x": "double",
            "ok": "bool",
            "s": "string",
            "l": "list<item: int64>",
            "m": "list<item: string>",
            "e": "list<item: double>",
            "o": "string",
            "mixed": "string",
            "big": "string",
            "ll": "string",
            "none": "string",
        }
        named = [dict(zip(kinds, row, strict=True)) for row in rows]
        assert {name: value for name, value in named[0].items() if value is not None} == {
            "n": 1,
            "x": 1.0,
            "ok": True,
            "s": "a",
            "l": [1, 2],
            "m": ["a", None],
            "e": [],
        }
        assert {name: value for name, value in named[1].items() if value is not None} == {
            "x": 0.5,
            "o": '{"a": [1]}',
            "mixed": "1",
            "big": str(2**63),
            "e": [0.5],
        }
        assert named[2]["mixed"] == "b"
        assert named[2]["ll"] == "[[1]]"

    def test_a_value_that_does_not_fit_is_null_and_told(self, write: Write) -> None:
        first = [{"image": A, "n": 1, "l": [1], "ok": True, "s": "a"}] * SAMPLE_ROWS
        late = {"image": B, "n": 1.5, "l": ["a"], "ok": 0, "s": 5, "new": 1}
        long = {"image": B, "n": 2.0, "s": "x" * (MAX_CELL + 1)}
        rows, opened = read(write("a.jsonl", lines(*first, late, {**late, "n": "z"}, long)))
        assert [row.carried for row in rows[-3:]] == [
            (None, None, None, "5"),
            (None, None, None, "5"),
            (2, None, None, None),
        ]
        place = f"Line {SAMPLE_ROWS + 1}"
        assert sorted(opened.notes()) == [
            f"Column 'l': 2 values are left out, being no int64; the first in {place}: ['a']",
            f"Column 'n': 2 values are left out, being no int64; the first in {place}: 1.5",
            f"Column 'new': 2 values are left out, being not in the first rows; the first in {place}: 1",
            f"Column 'ok': 2 values are left out, being no bool; the first in {place}: 0",
            (
                f"Column 's': 1 value is left out, being longer than {MAX_CELL:,}; the first in Line "
                f"{SAMPLE_ROWS + 3}: {'x' * 200}"
            ),
        ]

    def test_types_of_an_earlier_run_count_where_they_hold_what_is_there(self, write: Write) -> None:
        where = write("a.jsonl", lines({"image": A, "n": 1, "new": 1, "none": None, "wider": 0.5, "s": 5}))
        kinds, rows = carried(
            where, {"n": "double", "gone": "bool", "none": "bool", "wider": "int64", "s": "string"}
        )
        assert kinds == {"n": "double", "new": "int64", "none": "bool", "wider": "double", "s": "string"}
        assert rows == [(1.0, 1, None, 0.5, "5")]

    def test_a_pipe_is_read_once_from_its_beginning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = [{"image": f"s3://b/{number}", "n": number} for number in range(3 * SAMPLE_ROWS)]
        packed = gzip.compress(lines(*values).encode())
        out, into = os.pipe()

        def give() -> None:
            with os.fdopen(into, "wb") as file:
                file.write(packed)

        writer = Thread(target=give)
        writer.start()
        with os.fdopen(out) as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            rows, opened = read("-")
        writer.join()
        assert [row.carried for row in rows] == [(number,) for number in range(3 * SAMPLE_ROWS)]
        assert opened.carried == {"n": "int64"}

    def test_nothing_is_carried_of_lists_without_columns(self, write: Write) -> None:
        assert carried(write("a.txt", A + "\n")) == ({}, [None])
        assert carried(write("a.jsonl", f'"{A}"\n')) == ({}, [None])


ZONE = timezone(timedelta(hours=2))
VALUES: dict[str, pa.Array] = {
    "int8": pa.array([1, None], pa.int8()),
    "uint64": pa.array([2**64 - 1, 0], pa.uint64()),
    "float": pa.array([0.5, float("nan")], pa.float32()),
    "half": pa.array([0.5, float("-inf")], pa.float16()),
    "bool": pa.array([True, None]),
    "large": pa.array(["a", "\u00fc"], pa.large_string()),
    "named": pa.array(["a", "b"]).dictionary_encode(),
    "day": pa.array([date(2031, 5, 1), None]),
    "at": pa.array([datetime(2031, 5, 1, 12, 30, 1, 5), None], pa.timestamp("us")),  # noqa: DTZ001  # none
    "zoned": pa.array([datetime(2031, 5, 1, 12, tzinfo=ZONE), None], pa.timestamp("ns", "Europe/Berlin")),
    "time": pa.array([time(12, 30, 1, 5), None], pa.time64("us")),
    "duration": pa.array([timedelta(seconds=5), None], pa.duration("ms")),
    "price": pa.array([Decimal("1.50"), None], pa.decimal128(10, 2)),
    "list": pa.array([[1, None], None], pa.list_(pa.int32())),
    "vector": pa.array([[0.5, 1], [1, 2]], pa.list_(pa.float32(), 2)),
    "object": pa.array([{"a": 1, "b": ["x"]}, None]),
}
AS_TEXT: dict[str, tuple[pa.Array, list[Any]]] = {  # what no column of JSON holds as it is
    "times": (pa.array([[date(2031, 5, 1)], None]), ['["2031-05-01"]', None]),
    "nothing": (pa.nulls(2), [None, None]),
    "map": (pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())), ['[["a", 1]]', None]),
}


class TestParquet:
    def test_columns_arrive_with_their_types_and_values(self, tmp_path: Path) -> None:
        texts = {name: array for name, (array, _) in AS_TEXT.items()}
        table = pa.table({"image": [A, B], **VALUES, **texts})
        pq.write_table(table, tmp_path / "a.parquet")
        kinds, rows = carried(str(tmp_path / "a.parquet"))
        stored = pq.read_schema(tmp_path / "a.parquet")
        assert list(kinds) == [*VALUES, *AS_TEXT]
        (shard,) = cut_shards([Row(uri=A, carried=row) for row in rows], plan(carried=kinds))
        sent = parse(json.loads(shard.to_json()))
        assert isinstance(sent, Shard)
        for place, (name, kind) in enumerate(kinds.items()):
            values = [(row.carried or ())[place] for row in sent.rows]
            if name in AS_TEXT:
                assert (kind, values) == ("string", AS_TEXT[name][1])
                continue
            expected = VALUES[name].dictionary_decode() if name == "named" else VALUES[name]
            arrived = carried_array(values, arrow_type(kind))
            assert name in {"named", "large"} or arrived.type.equals(stored.field(name).type)
            assert repr(arrived.to_pylist()) == repr(expected.to_pylist()), name

    def test_bytes_are_left_out_unless_they_are_asked_for(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [A], "jpeg": [b"\xff\xd8"], "n": [1]}), tmp_path / "a.parquet")
        rows, opened = read(str(tmp_path / "a.parquet"))
        assert rows[0].carried == (1,)
        assert opened.notes() == [
            "Not carried, because of their type: the column 'jpeg'. --keep-columns carries them."
        ]
        assert carried(str(tmp_path / "a.parquet"), keep=("jpeg",)) == ({"jpeg": "binary"}, [("/9g=",)])

    def test_text_that_is_not_utf_8_is_null_and_told(self, tmp_path: Path) -> None:
        raw = pa.array([b"a", b"\xfc"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"image": [A, B], "s": raw}), tmp_path / "a.parquet")
        rows, opened = read(str(tmp_path / "a.parquet"))
        assert [row.carried for row in rows] == [("a",), None]
        assert opened.notes() == [
            "Column 's': 1 value is left out, being not UTF-8; the first in Row 1: \\udcfc"
        ]

    def test_orc_is_read_as_well(self, tmp_path: Path) -> None:
        table = pa.table({"uri": [A, B], "n": [1, None], "day": [date(2031, 5, 1), None], "label": ["x", ""]})
        orc.write_table(table, tmp_path / "a.orc", stripe_size=1)
        rows, opened = read(str(tmp_path / "a.orc"), label="label")
        assert opened.carried == {"n": "int64", "day": "date32[day]", "label": "string"}
        assert [row.carried for row in rows] == [(1, "2031-05-01", "x"), (None, None, "")]
        assert rows[0].annotations == Annotations(labels=["x"])
        (tmp_path / "b.orc").write_bytes(b"ORC nothing")
        assert "b.orc cannot be read as ORC" in refused(str(tmp_path / "b.orc"))


class TestPacked:
    @pytest.mark.parametrize("name", ["gzip", "bz2", "zstd"])
    def test_a_packed_list_is_recognized_and_its_name_says_what_is_in_it(
        self, tmp_path: Path, name: str
    ) -> None:
        suffix = {"gzip": "gz", "bz2": "bz2", "zstd": "zst"}[name]
        path = tmp_path / f"a.csv.{suffix}"
        data = f"image,n\n{A},1\n".encode()
        with pa.CompressedOutputStream(str(path), name) as stream:
            stream.write(data)
        with open_input(str(path), Settings()) as opened:
            assert [row.carried for row in opened.rows()] == [("1",)]
            assert [row.uri for row in opened.rows()] == [A], "again"
        path.write_bytes(path.read_bytes()[:-6])
        assert "is damaged, or cannot be read" in refused(str(path))


class TestKnown:
    @pytest.mark.parametrize("option", ["label_map", "boxes"])
    def test_a_file_beside_the_list_is_told_by_its_own_name(self, write: Write, option: str) -> None:
        refusal = refused(write("a.csv", f"image,truth\n{A},cat\n"), **{option: "none.json"})
        assert refusal == "none.json cannot be read: No such file or directory."

    def test_why_a_box_is_left_out_is_told_to_the_end(self, write: Write) -> None:
        _, opened = read(write("a.csv", f'image,box\n{A},"[10, 10, -5, 4]"\n'), boxes="box")
        (note,) = opened.notes()
        assert note.endswith("with left < right and top < bottom, not [10.0, 10.0, 5.0, 14.0]")

    def test_labels_boxes_masks_and_classes_of_csv(self, write: Write) -> None:
        labels = write("map.csv", "cat,tabby\n")
        header = "image,truth,regions,mask,also,camera\n"
        boxes = '"[[1,2,3,4]]"'
        where = write("a.csv", f'{header}{A},"cat,5",{boxes},s3://m/a.png,cat,x\n{B},,,,,\n')
        how = {"label": "Truth", "boxes": "regions", "mask": "mask", "classes_from": "also"}
        rows, opened = read(where, **how, label_map=labels)
        assert (opened.annotated, opened.carried) == (True, {"truth": "string", "camera": "string"})
        box, mask = AnnotatedBox(xyxy=(1, 2, 4, 6)), AnnotatedMask(uri="s3://m/a.png")
        assert rows == [
            Row(
                uri=A,
                annotations=Annotations(labels=["tabby", "5"], boxes=[box], mask=mask),
                classes=("tabby",),
                carried=("cat,5", "x"),
            ),
            Row(uri=B),
        ]

    def test_four_columns_are_one_box(self, write: Write) -> None:
        where = write("a.csv", f"image,x1,y1,x2,y2\n{A},.1,.2,.3,.4\n{B},,,,\n{C},.1,,.3,.4\n")
        rows, opened = read(where, boxes="x1, y1,x2,y2", boxes_format="xyxy-relative")
        box = AnnotatedBox(xyxy=(0.1, 0.2, 0.3, 0.4), relative=True)
        assert [row.annotations for row in rows] == [Annotations(boxes=[box]), None, None]
        assert opened.carried == {}
        assert (
            "1 value is left out, being not readable; the first in Line 4: ['.1', None, " in opened.notes()[0]
        )

    def test_a_box_without_an_area_is_told_and_the_other_boxes_stay(self, write: Write) -> None:
        rows, opened = read(
            write("a.jsonl", lines({"image": A, "b": [[1, 1, 0, 5], [1, 2, 3, 4]]})), boxes="b"
        )
        assert rows[0].annotations == Annotations(boxes=[AnnotatedBox(xyxy=(1, 2, 4, 6))])
        assert opened.notes()[0].startswith(
            "Column 'b': 1 value is left out, being a box without an area; the first in Line 1: the box [1,"
        )

    def test_what_cannot_be_read_is_told_and_the_row_stays_but_not_what_it_asks_for(
        self, write: Write
    ) -> None:
        where = write("a.jsonl", lines({"image": A, "l": "x", "b": [1], "c": {}}, {"image": B, "c": "tabby"}))
        rows, opened = read(where, label="l", boxes="b", classes_from="c")
        assert rows[0].annotations == Annotations(labels=["x"])
        assert rows[0].problem
        assert rows[0].problem.detail == (
            "Line 1: its column 'c' has {}, which is no class: write an id, a wnid or a name."
        )
        assert rows[1].classes == ("tabby",)
        assert opened.notes()[0].startswith(
            "Column 'b': 1 value is left out, being not readable; the first in Line 1: 1, which is no box"
        )

    def test_json_and_parquet_hold_lists_and_objects(self, write: Write, tmp_path: Path) -> None:
        value = {"image": A, "objects": {"bbox": [[1, 2, 3, 4]], "category": [5]}, "label": [1, "a"]}
        known = Annotations(labels=[1, "a"], boxes=[AnnotatedBox(xyxy=(1, 2, 4, 6), label=5)])
        (row,), _ = read(write("a.jsonl", lines(value)), label="label", boxes="objects")
        assert row.annotations == known
        pq.write_table(pa.Table.from_pylist([{**value, "label": [1]}]), tmp_path / "a.parquet")
        (row,), _ = read(str(tmp_path / "a.parquet"), label="label", boxes="objects")
        assert row.annotations == Annotations(labels=[1], boxes=known.boxes)

    def test_boxes_of_a_coco_file_come_with_a_list_or_a_folder(self, write: Write, tmp_path: Path) -> None:
        coco = {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        }
        boxes = write("instances.json", json.dumps(coco))
        known = Annotations(labels=["cat"], boxes=[AnnotatedBox(xyxy=(1, 2, 4, 6), label="cat")])
        rows, opened = read(write("a.txt", f"{A}\n{B}\n"), boxes=boxes)
        assert [row.annotations for row in rows] == [known, None]
        assert opened.annotated
        assert (
            "1 value is left out, being not readable; the first in Line 2: no image of this name"
            in opened.notes()[0]
        )
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.jpg").write_bytes(b"1")
        rows, _ = read(str(tmp_path / "in"), boxes=boxes)
        assert [row.annotations for row in rows] == [known]

    @pytest.mark.parametrize("role", ["label", "mask", "boxes", "classes_from"])
    def test_a_column_that_is_not_there_is_told_before_anything_is_read(
        self, role: str, write: Write
    ) -> None:
        how: dict[str, Any] = {role: "gone"}
        for name, text in {"a.csv": f"image,x\n{A},1\n", "a.jsonl": lines({"image": A, "x": 1})}.items():
            with (
                pytest.raises(InvalidInput, match=r"has no (column|field) 'gone'"),
                open_input(write(name, text), Settings(), InputOptions(**how)),
            ):
                pass
        assert "is read as text, which has no columns for gone" in refused(write("a.txt", A), **how)

    def test_failed_rows_are_read_again_with_all_that_was_known(self, write: Write) -> None:
        known = Annotations(labels=["cat"], boxes=[AnnotatedBox(xyxy=(1, 2, 4, 6), label="cat")])
        row = Row(uri=A, id="x", annotations=known, classes=("tabby",), carried=("x100", 5))
        problem = read(write("bad.jsonl", "{}"))[0][0].problem
        (shard,) = cut_shards([row], plan(annotated=True, carried={"camera": "string", "n": "int64"}))
        where = write("failed.jsonl", failed_lines(shard, [problem]).decode())
        rows, opened = read(where)
        assert rows == [row]
        assert (opened.carried, opened.annotated) == (shard.carried, True)

    def test_a_carried_column_of_a_failed_row_is_not_taken_for_what_the_row_asks_for(
        self, write: Write
    ) -> None:
        problem = read(write("bad.jsonl", "{}"))[0][0].problem
        carried = {"classes": "string", "inputs": "string", "annotations": "string", "n": "int64"}
        (shard,) = cut_shards([Row(uri=A, carried=("tabby", "none", "two", 5))], plan(carried=carried))
        rows, opened = read(write("failed.jsonl", failed_lines(shard, [problem]).decode()))
        assert rows == [Row(uri=A, carried=(5,))]
        assert opened.carried == {"n": "int64"}

    def test_failed_rows_that_somebody_changed_are_explained_without_what_is_wrong(
        self, write: Write
    ) -> None:
        wrong: dict[str, Any] = {"annotations": {"boxes": [{"xyxy": [1]}]}, "classes": [{}]}
        value = {"image": A, "row": 0, "error": {"code": "x"}, **wrong}
        rows, opened = read(write("failed.jsonl", lines(value, {**value, "annotations": 5})))
        assert rows == [Row(uri=A), Row(uri=A)]
        assert len(opened.notes()) == 2

    def test_more_boxes_than_a_row_may_have_are_told(self, write: Write) -> None:
        rows, opened = read(write("a.jsonl", lines({"image": A, "b": [[0, 0, 1, 1]] * 1001})), boxes="b")
        assert rows == [Row(uri=A)]
        assert "being not valid" in opened.notes()[0]

    def test_annotations_and_classes_of_other_lists_are_columns(self, write: Write) -> None:
        (row,), opened = read(write("a.jsonl", lines({"image": A, "classes": ["a"], "annotations": 5})))
        assert row == Row(uri=A, carried=(["a"], 5))
        assert not opened.annotated


INVENTORY = ("Bucket", "Key", "VersionId", "IsLatest", "IsDeleteMarker", "Size", "ETag", "StorageClass")
OBJECTS = [
    ("photos", "a b+c.jpg", "v2", True, False, 10, "abc", "STANDARD"),
    ("photos", "a b+c.jpg", "v1", False, False, 9, "abb", "STANDARD"),
    ("photos", "gone.jpg", "v3", True, True, None, None, None),
    ("photos", "x/_SUCCESS", "", True, False, 0, "d", "STANDARD"),
    ("photos", "x/", "", True, False, 0, "d", "STANDARD"),
    ("photos", "x/b.jpg", "", True, False, 11, '"etag-2"', "GLACIER"),
]
QUOTE = '"'
LEFT_OUT = [
    "Skipped 1 file: hidden, or a marker such as _SUCCESS.",
    "Skipped 2 files of the inventory: not the latest version, or deleted.",
]


def _csv(value: Any) -> str:
    """A field of an inventory in CSV, in which keys are encoded as in a URL."""
    text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f'"{quote_plus(text.strip(QUOTE), safe="/")}"'


class TestInventories:
    def write(self, folder: Path, form: str) -> str:
        """An inventory with its manifest, as S3 lays it out; its path on this machine."""
        data, made = folder / "data", folder / "2031-05-01T00-00Z"
        for one in (data, made):
            one.mkdir(exist_ok=True)
        names, columns = [name.lower() for name in INVENTORY], zip(*OBJECTS, strict=True)
        table = pa.table({name: list(column) for name, column in zip(names, columns, strict=True)})
        half = len(OBJECTS) // 2
        for number, part in enumerate((table.slice(0, half), table.slice(half))):
            path = data / f"{number}.{form}"
            if form == "parquet":
                pq.write_table(part, path)
            elif form == "orc":
                orc.write_table(part, path)
            else:
                rows = [",".join(map(_csv, row.values())) for row in part.to_pylist()]
                path.write_bytes(gzip.compress("\n".join(rows).encode()))
        manifest = {
            "sourceBucket": "photos",
            "destinationBucket": "arn:aws:s3:::inventories",
            "fileFormat": {"csv": "CSV", "parquet": "Parquet", "orc": "ORC"}[form],
            "fileSchema": ", ".join(INVENTORY),
            "files": [{"key": f"photos/all/data/{number}.{form}", "size": 1} for number in range(2)],
        }
        (made / "manifest.json").write_text(json.dumps(manifest))
        return str(made / "manifest.json")

    @pytest.mark.parametrize("form", ["csv", "parquet", "orc"])
    def test_the_latest_versions_of_a_manifest_are_rows_with_their_columns(
        self, tmp_path: Path, form: str
    ) -> None:
        rows, opened = read(self.write(tmp_path, form))
        sizes = (10, 11) if form != "csv" else ("10", "11")
        assert rows == [
            Row(uri="s3://photos/a b+c.jpg", version="abc", carried=(sizes[0], "STANDARD")),
            Row(uri="s3://photos/x/b.jpg", version="etag-2", carried=(sizes[1], "GLACIER")),
        ]
        assert [name.lower() for name in opened.carried] == ["size", "storageclass"]
        assert opened.notes() == LEFT_OUT

    def test_csv_without_a_manifest_shows_its_versions_by_itself(self, write: Write) -> None:
        text = 'b,a.jpg,v1,"true","false",5\nb,a.jpg,v0,"false","false",5\nb,c.jpg,v9,true,true\n'
        rows, opened = read(write("a.csv", text), form="inventory")
        assert rows == [Row(uri="s3://b/a.jpg", version="v1")]
        assert opened.notes() == LEFT_OUT[1:]

    @pytest.mark.parametrize(
        ("manifest", "said"),
        [
            ("{}", "is no manifest of an S3 inventory (KeyError: 'fileFormat')"),
            ("[", "is no manifest of an S3 inventory"),
            (
                '{"fileFormat": "CSV", "fileSchema": "Key", "destinationBucket": "b", "files": []}',
                "without Bucket and Key",
            ),
            (
                '{"fileFormat": "ORC", "destinationBucket": "b", "files": [{"key": "x/1.orc"}]}',
                "names '1.orc', which is neither beside it, nor in data, nor in ../data",
            ),
            ('{"fileFormat": "ORC", "destinationBucket": "b", "files": []}', "it names no files"),
        ],
    )
    def test_what_is_no_manifest_is_told(self, manifest: str, said: str, write: Write) -> None:
        assert said in refused(write("manifest.json", manifest))


class TestTableFolders:
    def test_a_folder_of_spark_is_one_list_with_the_columns_of_its_folders(self, write: Write) -> None:
        write("t/_SUCCESS", "")
        write("t/day=2031-05-01/part-0.csv", f"image,n\n{A},1\n")
        write("t/day=2031-05-01/.part-0.csv.crc", "x")
        write("t/day=__HIVE_DEFAULT_PARTITION__/part-1.csv", f"n,image\n2,{B}\nbad\n")
        where = str(Path(write("t/_metadata", "")).parent)
        rows, opened = read(where)
        assert opened.carried == {"n": "string", "day": "string"}
        assert [(row.uri, row.carried) for row in rows] == [
            (A, ("1", "2031-05-01")),
            (B, ("2", None)),
            ("bad", None),
        ]
        assert rows[2].problem
        assert rows[2].problem.detail.startswith("Line 3 of day=__HIVE_DEFAULT_PARTITION__/part-1.csv: ")

    def test_parts_of_parquet_may_differ_in_their_types(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [A], "n": pa.array([1], pa.int64())}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"n": [2.0, 0.5], "image": [B, C]}), tmp_path / "b.parquet")
        rows, opened = read(str(tmp_path), form="parquet")
        assert opened.carried == {"n": "int64"}
        assert [row.carried for row in rows] == [(1,), (2,), None]
        assert (
            "1 value is left out, being no int64; the first in Row 1 of b.parquet: 0.5" in opened.notes()[0]
        )

    @pytest.mark.parametrize("form", ["parquet", "orc"])
    def test_a_column_of_nulls_in_the_first_file_has_the_type_that_it_has_in_a_later_one(
        self, form: str, tmp_path: Path
    ) -> None:
        write_table = {"parquet": pq.write_table, "orc": orc.write_table}[form]
        types = [pa.null(), pa.null(), pa.float64()] if form == "parquet" else [pa.float64()] * 3
        for uri, value, kind in zip((A, B, C), (None, None, 1.5), types, strict=True):
            table = pa.table({"image": [uri], "n": pa.array([value], kind)})
            write_table(table, str(tmp_path / f"{uri[-5]}.{form}"))
        rows, opened = read(str(tmp_path), form=form)
        assert opened.carried == {"n": "double"}
        assert [row.carried for row in rows] == [None, None, (1.5,)]

    def test_a_column_of_nulls_keeps_the_type_of_an_earlier_run_else_it_is_text(self, tmp_path: Path) -> None:
        where = str(tmp_path / "a.parquet")
        pq.write_table(pa.table({"image": [A], "n": pa.nulls(1)}), where)
        assert carried(where, {"n": "double"}) == ({"n": "double"}, [None])
        assert carried(where) == ({"n": "string"}, [None])

    def test_json_of_spark_is_json_lines(self, write: Write) -> None:
        write("t/part-0.json", lines({"image": A, "n": 1}))
        write("t/part-1.json.gz", lines({"image": B, "n": 2}))
        rows, _ = read(str(Path(write("t/_SUCCESS", "")).parent))
        assert [row.carried for row in rows] == [(1,), (2,)]

    def test_a_folder_of_images_stays_one_whatever_marks_it(self, write: Write) -> None:
        write("t/a.jpg", "1")
        rows, _ = read(str(Path(write("t/_SUCCESS", "")).parent))
        assert [row.uri.rpartition("/")[2] for row in rows] == ["a.jpg"]
