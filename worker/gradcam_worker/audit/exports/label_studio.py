"""Label Studio: a task for each image, with the network's answer as its prediction.

    tasks.json    tasks to import: the class as a choice, the hot region as a rectangle; labels and boxes that
                  are known as an annotation
    config.xml    the labelling interface for them

https://labelstud.io/guide/predictions
"""

from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import quoteattr

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
    images = []
    for image in source.images():
        names.add(image)
        images.append(image)
    network = source.report.dataset.network
    yield "tasks.json", as_json([_task(image, names, network) for image in images])
    yield "config.xml", _config([names.of(class_id) for class_id in names.ids()]).encode()


def _task(image: ExportedImage, names: ClassNames, network: str) -> dict[str, Any]:
    first = image.prediction
    result = [_choice("class", [names.of(first.class_id)])]
    if first.hot_box:
        result.append(_rectangle(image, "region", first.hot_box, names.of(first.class_id)))
    facts = {name: value for name, value in image.carried.items() if name != "image"}
    task: dict[str, Any] = {
        "data": {**facts, **first.metrics, "image": image.uri, "row": image.row, "overlay": first.overlay},
        "predictions": [{"model_version": network, "score": first.probability, "result": result}],
    }
    known = [_choice("class", [names.of(class_id) for class_id in image.truths])] if image.truths else []
    label = names.of(image.truths[0]) if image.truths else "object"
    known += [_rectangle(image, "region", box, label) for box in image.truth_boxes]
    return {**task, "annotations": [{"result": known}]} if known else task


def _choice(name: str, choices: list[str]) -> dict[str, Any]:
    return {"from_name": name, "to_name": "image", "type": "choices", "value": {"choices": choices}}


def _rectangle(image: ExportedImage, name: str, box: XYXY, label: str) -> dict[str, Any]:
    """A box in percent of the image, as Label Studio has it."""
    across, down = 100 / image.width, 100 / image.height
    left, top, right, bottom = box
    return {
        "from_name": name,
        "to_name": "image",
        "type": "rectanglelabels",
        "original_width": image.width,
        "original_height": image.height,
        "image_rotation": 0,
        "value": {
            "x": left * across,
            "y": top * down,
            "width": (right - left) * across,
            "height": (bottom - top) * down,
            "rotation": 0,
            "rectanglelabels": [label],
        },
    }


def _config(names: list[str]) -> str:
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in [*names, "object"])
    choices = "".join(f"    <Choice value={quoteattr(name)}/>\n" for name in names)
    return (
        '<View>\n  <Image name="image" value="$image"/>\n'
        f'  <RectangleLabels name="region" toName="image">\n{labels}  </RectangleLabels>\n'
        f'  <Choices name="class" toName="image" choice="multiple">\n{choices}  </Choices>\n</View>\n'
    )
