"""Labels, boxes and masks in the shapes that lists have them."""

import io
import json
import math
from typing import Any

import pytest

from gradcam_worker.backfill.inputs.known import (
    CocoBoxes,
    NoArea,
    UnreadableCell,
    parse_boxes,
    parse_classes,
    parse_mask,
    read_label_map,
)
from gradcam_worker.errors import InvalidInput
from gradcam_worker.schemas.annotations import AnnotatedBox, AnnotatedMask

MAP = {"cat": ("tabby", 282), "crane, bird": ("n02012849",), "5": (7,)}
RUNS = {"size": [2, 3], "counts": [1, 2, 3]}


@pytest.mark.parametrize(
    ("cell", "classes"),
    [
        (None, ()),
        ("", ()),
        (float("nan"), ()),
        (" tabby ", ("tabby",)),
        (282, (282,)),
        (282.0, (282,)),
        ("tabby, 282,tabby", ("tabby", "282")),
        ('"crane, bird", pier', ("n02012849", "pier")),
        ("crane, bird", ("n02012849",)),
        ('["tabby", 282]', ("tabby", 282)),
        (["cat", 5, "dog"], ("tabby", 282, 7, "dog")),
        ([], ()),
    ],
)
def test_classes_are_read_from_a_cell_and_mapped(cell: Any, classes: tuple[Any, ...]) -> None:
    assert parse_classes(cell, MAP) == classes


@pytest.mark.parametrize(
    "cell", [True, 1.5, {"a": 1}, [[1]], '["a"', '"open', "x" * 129, ["a\udc80"], ["a\n"], list(range(101))]
)
def test_what_is_no_class_is_told(cell: Any) -> None:
    with pytest.raises(UnreadableCell, match=r"^has "):
        parse_classes(cell)


@pytest.mark.parametrize(
    ("cell", "form", "boxes"),
    [
        ("[10, 20, 30, 40]", "xywh", [(10, 20, 40, 60)]),
        ("10, 20.5, 30, 40", "xyxy", [(10, 20.5, 30, 40)]),
        ([[0, 0, 1, 1], (1, 1, 2, 2)], "xywh", [(0, 0, 1, 1), (1, 1, 3, 3)]),
        ({"bbox": [1, 2, 3, 4], "category": "cat"}, "xyxy", [(1, 2, 3, 4), (1, 2, 3, 4)]),
        ({"bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "category": [1, 2]}, "xyxy", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ('{"boxes": [[1, 2, 3, 4]], "label": 1}', "xyxy", [(1, 2, 3, 4)]),
        ([{"xyxy": [1, 2, 3, 4]}], "xyxy", [(1, 2, 3, 4)]),
        ({"bbox": []}, "xyxy", []),
        ("", "xywh", []),
        (None, "xywh", []),
        ([], "xywh", []),
    ],
)
def test_boxes_are_read_in_every_usual_shape(cell: Any, form: str, boxes: list[Any]) -> None:
    assert [box.xyxy for box in parse_boxes(cell, form, MAP)] == boxes


def test_boxes_keep_their_labels_and_may_be_relative() -> None:
    cell = [{"bbox": [0.1, 0.2, 0.5, 0.5], "category": "cat"}, {"bbox": [0, 0, 1, 1], "label": 3}]
    assert parse_boxes(cell, "xyxy-relative", MAP) == [
        AnnotatedBox(xyxy=(0.1, 0.2, 0.5, 0.5), relative=True, label="tabby"),
        AnnotatedBox(xyxy=(0.1, 0.2, 0.5, 0.5), relative=True, label=282),
        AnnotatedBox(xyxy=(0, 0, 1, 1), relative=True, label=3),
    ]


@pytest.mark.parametrize(
    "cell",
    [
        *("[1, 2, 3", "1,2,3", "a,b,c,d", [1, 2, 3, "4x"], 5, [[1, 2, 3]], {"bbox": 5}, [[1, 2, None, 4]]),
        *([10, 10, -5, 5], [1, 2, float("inf"), 4], '["\\ud800", 1, 1, 1]', [{"box": None}], "[" * 100),
    ],
)
def test_what_is_no_box_is_told(cell: Any) -> None:
    with pytest.raises(UnreadableCell, match=r"^has "):
        parse_boxes(cell)


def test_a_mask_is_a_uri_or_run_lengths() -> None:
    assert parse_mask("s3://masks/a b.png") == AnnotatedMask(uri="s3://masks/a b.png")
    for cell in (RUNS, json.dumps(RUNS), {**RUNS, "counts": (1, 2, 3)}):
        assert parse_mask(cell) == AnnotatedMask(rle=RUNS)
    assert parse_mask({"size": [2, 3], "counts": b"abc"}) == AnnotatedMask(
        rle={"size": [2, 3], "counts": "abc"}
    )
    assert parse_mask({"uri": "data:image/png;base64,AA"}) == AnnotatedMask(uri="data:image/png;base64,AA")
    assert [parse_mask(cell) for cell in (None, "", " ")] == [None] * 3


@pytest.mark.parametrize(
    "cell", ["masks/a.png", "https://me:pw@h/a", 5, {"size": [2, 3]}, {"size": [2, 3], "counts": [1]}, "{"]
)
def test_what_is_no_mask_is_told_without_secrets(cell: Any) -> None:
    with pytest.raises(UnreadableCell, match=r"^has ") as caught:
        parse_mask(cell)
    assert "pw" not in str(caught.value)


def test_a_label_map_is_json_or_csv() -> None:
    written = json.dumps({"cat": ["tabby", 282], "5": 7, "dog": "n02085620"})
    expected = {"cat": ("tabby", 282), "5": (7,), "dog": ("n02085620",)}
    assert read_label_map(io.BytesIO(written.encode()), "a.json") == expected
    written = '\ufefflabel,class\ncat,"tabby,282"\n"crane, bird",n02012849\n'
    expected = {"cat": ("tabby", "282"), "crane, bird": ("n02012849",)}
    assert read_label_map(io.BytesIO(written.encode()), "a.csv") == expected


@pytest.mark.parametrize("text", ["a,b,c", "{", '{"a": {}}', b"\xff", '{"a": 1'])
def test_what_is_no_label_map_is_told_by_name(text: Any) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(InvalidInput, match=r"^map is no label map: it "):
        read_label_map(io.BytesIO(data), "map")


COCO = {
    "images": [
        {"id": 1, "file_name": "a.jpg"},
        {"id": 2, "file_name": "val/b.jpg"},
        {"id": 3, "file_name": "train/b.jpg"},
        {"id": 4, "file_name": "c d.jpg"},
    ],
    "categories": [{"id": 9, "name": "cat"}, {"id": 8, "name": "bench"}],
    "annotations": [
        {"image_id": 1, "category_id": 8, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 3]], "iscrowd": 0},
        {"image_id": 1, "category_id": 9, "bbox": [5, 5, 5, 5]},
        {"image_id": 1, "category_id": 9, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"image_id": 3, "category_id": 7, "bbox": [0, 0, 1, 1]},
        {"image_id": 3, "category_id": 7, "bbox": [5, 5, 0, 1]},
    ],
}


def test_boxes_of_a_coco_file_are_found_by_name_or_id() -> None:
    coco = CocoBoxes(io.BytesIO(json.dumps(COCO).encode()), "instances.json", MAP)
    found = coco.find("s3://photos/2031/a.jpg", None)
    assert found == [
        AnnotatedBox(xyxy=(1, 2, 4, 6), label="bench"),
        AnnotatedBox(xyxy=(5, 5, 10, 10), label="tabby"),
        AnnotatedBox(xyxy=(5, 5, 10, 10), label=282),
    ]
    assert coco.find("https://h/a.jpg?x=/b.jpg", "3") == found, "the name goes before the id"
    assert coco.find("file:///coco/train/b.jpg", None) == [AnnotatedBox(xyxy=(0, 0, 1, 1))]
    assert coco.find("file:///coco/val/b.jpg", None) == []
    assert coco.find("file:///c%20d.jpg", None) == []
    for uri in ("s3://b/b.jpg", "s3://b/xa.jpg"):  # two images have the name of the first
        with pytest.raises(UnreadableCell, match="has no image of this name"):
            coco.find(uri, None)
    assert coco.without_area == 1
    assert coco.find("s3://b/other.jpg", "1") == found


def coco_of(*annotations: dict[str, Any], file_name: str = "a.jpg", image_id: object = 1) -> CocoBoxes:
    content = {
        "images": [{"id": image_id, "file_name": file_name}],
        "categories": [{"id": 9, "name": "cat"}],
        "annotations": annotations,
    }
    return CocoBoxes(io.BytesIO(json.dumps(content).encode()), "instances.json")


@pytest.mark.parametrize("box", [[], None])
def test_an_annotation_without_a_box_does_not_make_a_coco_file_unreadable(box: object) -> None:
    coco = coco_of({"image_id": None, "bbox": box}, {"image_id": 1, "bbox": [1, 2, 3, 4]})
    assert coco.find("s3://b/a.jpg", None) == [AnnotatedBox(xyxy=(1, 2, 4, 6))]


@pytest.mark.parametrize("bad", [[math.nan, 1, 5, 5], [1, 1, math.inf, 5], [5, 5, -1, 5]])
def test_the_other_boxes_of_an_image_stay_if_one_has_no_area(bad: list[float]) -> None:
    coco = coco_of({"image_id": 1, "bbox": bad}, {"image_id": 1, "bbox": [1, 2, 3, 4]})
    assert (coco.find("s3://b/a.jpg", None), coco.without_area) == ([AnnotatedBox(xyxy=(1, 2, 4, 6))], 1)
    left: list[NoArea] = []
    found = parse_boxes([bad, [1, 2, 3, 4]], leave_out=left.append)
    assert ([box.xyxy for box in found], len(left)) == ([(1, 2, 4, 6)], 1)


@pytest.mark.parametrize(("image_id", "of_image", "category"), [(1, "1", "9"), ("1", 1, 9), (1, 1.0, 9.0)])
def test_ids_of_a_coco_file_may_be_numbers_and_texts(
    image_id: object, of_image: object, category: object
) -> None:
    coco = coco_of({"image_id": of_image, "category_id": category, "bbox": [1, 2, 3, 4]}, image_id=image_id)
    assert coco.find("s3://b/a.jpg", None) == [AnnotatedBox(xyxy=(1, 2, 4, 6), label="cat")]
    assert coco.find("s3://b/other.jpg", "1") == coco.find("s3://b/a.jpg", None)


@pytest.mark.parametrize(
    ("file_name", "uri"),
    [
        ("images\\1\\c d.jpg", "s3://b/images/1/c d.jpg"),
        ("..\\..\\media/c.jpg", "s3://b/media/c.jpg"),
        ("./train/a.jpg", "file:///data/train/a.jpg"),
        ("s3://b/train/a%20b.jpg", "s3://b/train/a%20b.jpg"),
        ("https://h/train/a%20b.jpg?v=1", "https://h/train/a%20b.jpg?v=2"),
        ("/data/a.jpg", "file:///data/a.jpg"),
    ],
)
def test_file_names_of_a_coco_file_may_be_paths_of_windows_relative_ones_and_uris(
    file_name: str, uri: str
) -> None:
    coco = coco_of({"image_id": 1, "bbox": [1, 2, 3, 4]}, file_name=file_name)
    assert coco.find(uri, None) == [AnnotatedBox(xyxy=(1, 2, 4, 6))]
    with pytest.raises(UnreadableCell):
        coco.find(uri.replace("/a", "/x").replace("/c", "/x"), None)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"images": []}', '{"images": [{"id": 1}], "annotations": []}', "\xff"]
)
def test_what_is_no_coco_file_is_told_by_name(content: str) -> None:
    with pytest.raises(InvalidInput, match=r"^x\.json is no COCO annotation file: "):
        CocoBoxes(io.BytesIO(content.encode("latin-1")), "x.json")
