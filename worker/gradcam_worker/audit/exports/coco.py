"""COCO: the region around the peak of each heatmap as a box, and the true boxes.

    hot_boxes.json   a dataset whose annotations are the hot boxes, with `score`
    results.json     the same boxes in the format of detection results, for COCOeval
    truth.json       a dataset with the true boxes, if there are any

https://cocodataset.org/#format-data
"""

from collections.abc import Iterator
from typing import Any

from gradcam_worker.audit.exports.class_names import ClassNames
from gradcam_worker.audit.exports.images import XYXY, ExportedImage
from gradcam_worker.audit.exports.source import ExportSource, as_json


def files(source: ExportSource) -> Iterator[tuple[str, bytes]]:
    """The files of the export.

    Args:
        source: The dataset.

    Yields:
        Name and content of each file.
    """
    names = ClassNames()
    images: list[dict[str, Any]] = []
    hot: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    for image in source.images():
        names.add(image)
        images.append(_image(image))
        for one in image.explanations:
            if one.hot_box:
                facts = {"score": one.probability, "rank": one.rank, **one.metrics}
                hot.append(_annotation(len(hot) + 1, image.row, one.class_id, one.hot_box) | facts)
        # A box of several true classes is the first one's: COCO has one category for each.
        truth += [
            _annotation(len(truth) + number, image.row, image.truths[0] if image.truths else -1, box)
            for number, box in enumerate(image.truth_boxes, 1)
        ]
    categories = [
        {"id": class_id, "name": names.of(class_id), "supercategory": names.wnid(class_id)}
        for class_id in [*names.ids(), *([-1] if any(one["category_id"] == -1 for one in truth) else [])]
    ]
    info = {"description": f"Where a classifier looks: {source.name}", "version": "1"}
    common = {"info": info, "licenses": [], "images": images, "categories": categories}
    yield "hot_boxes.json", as_json({**common, "annotations": hot})
    wanted = ("image_id", "category_id", "bbox", "score")
    yield "results.json", as_json([{name: one[name] for name in wanted} for one in hot])
    if truth:
        yield "truth.json", as_json({**common, "annotations": truth})


def _image(image: ExportedImage) -> dict[str, Any]:
    return {
        **image.carried,
        "id": image.row,
        "file_name": image.relative_path.removeprefix("images/"),
        "coco_url": image.uri,
        "width": image.width,
        "height": image.height,
    }


def _annotation(number: int, image_id: int, class_id: int, box: XYXY) -> dict[str, Any]:
    left, top, right, bottom = box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": class_id,
        "bbox": [left, top, right - left, bottom - top],
        "area": (right - left) * (bottom - top),
        "iscrowd": 0,
    }
