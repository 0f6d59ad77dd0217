"""FiftyOne: samples with heatmaps, labels, boxes and metrics, which FiftyOne imports as a dataset.

    metadata.json, samples.json    a `fiftyone.types.LegacyFiftyOneDataset`: plain JSON
    fields/heat/<row>.png          the heat of the most probable class on the whole image, 255 at its peak;
                                   that of the next one in fields/heat_2, and so on
    images/                        where the images are expected: copy the bucket there

The samples name their images relative to the folder, as `images/<bucket>/<key>`.
https://docs.voxel51.com/user_guide/import_datasets.html
"""

import re
from collections.abc import Iterator
from typing import Any

from gradcam_worker import extras
from gradcam_worker.audit.exports.class_names import ClassNames
from gradcam_worker.audit.exports.images import XYXY, ExportedExplanation, ExportedImage
from gradcam_worker.audit.exports.source import ExportSource, as_json

OWN = {"prediction", "hot_regions", "ground_truth", "objects", "heat"}
RESERVED = {"id", "filepath", "tags", "metadata", "media_type"} | OWN  # fields of a sample


def files(source: ExportSource) -> Iterator[tuple[str, bytes]]:
    """The files of the export.

    Args:
        source: The dataset.

    Yields:
        Name and content of each file.

    Raises:
        MissingExtra: OpenCV is not installed.
    """
    names = ClassNames()
    images = []
    for image in source.images():
        names.add(image)
        images.append(image)
        for field, one in _heats(image):
            yield _map_path(image, field), _png(one)
    yield "samples.json", as_json({"samples": [_sample(image, names) for image in images]})
    yield "metadata.json", as_json({"name": f"gradcam {source.name}", "media_type": "image"})


def _sample(image: ExportedImage, names: ClassNames) -> dict[str, Any]:
    first = image.prediction
    sample: dict[str, Any] = {
        _field(name): value
        for name, value in image.carried.items()
        if isinstance(value, str | int | float | bool)
    }
    sample |= first.metrics
    sample |= {"filepath": image.relative_path, "tags": [], "row": image.row, "uri": image.uri}
    sample["prediction"] = {
        "_cls": "Classification",
        "label": names.of(first.class_id),
        "confidence": first.probability,
    }
    for field, _ in _heats(image):
        sample[field] = {"_cls": "Heatmap", "map_path": _map_path(image, field), "range": [0, 255]}
    hot = [
        _detection(image, one.hot_box, names.of(one.class_id), one.probability) for one in image.explanations
    ]
    sample["hot_regions"] = {"_cls": "Detections", "detections": [one for one in hot if one]}
    if image.correct is not None:
        sample["correct"] = image.correct
    if image.truths:
        labels = [{"_cls": "Classification", "label": names.of(class_id)} for class_id in image.truths]
        sample["ground_truth"] = {"_cls": "Classifications", "classifications": labels}
    if image.truth_boxes:
        label = names.of(image.truths[0]) if image.truths else "object"
        boxes = [_detection(image, box, label, None) for box in image.truth_boxes]
        sample["objects"] = {"_cls": "Detections", "detections": boxes}
    return sample


def _field(name: str) -> str:
    """The field of a column: FiftyOne refuses names that have $, empty parts, or _ in front."""
    name = re.sub(r"[.$]", "_", name)
    return f"input_{name}" if name in RESERVED or name.startswith("_") else name


def _detection(
    image: ExportedImage, box: XYXY | None, label: str, confidence: float | None
) -> dict[str, Any] | None:
    """A box as shares of the image: left, top, width, height."""
    if box is None:
        return None
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    shares = [left / image.width, top / image.height, width / image.width, height / image.height]
    known = {} if confidence is None else {"confidence": confidence}
    return {"_cls": "Detection", "label": label, "bounding_box": shares, **known}


def _heats(image: ExportedImage) -> Iterator[tuple[str, ExportedExplanation]]:
    """The explanations by rank, each with the name of the field of its heatmap."""
    for number, one in enumerate(sorted(image.explanations, key=lambda one: one.rank), 1):
        yield ("heat" if number == 1 else f"heat_{number}"), one


def _map_path(image: ExportedImage, field: str) -> str:
    """Where a heatmap is: FiftyOne finds the files of a field in the folder of its name."""
    return f"fields/{field}/{image.row}.png"


def _png(one: ExportedExplanation) -> bytes:
    with extras.required("An export to FiftyOne", extras.WORKER):
        import cv2
    return cv2.imencode(".png", one.heat)[1].tobytes()
