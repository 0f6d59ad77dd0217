"""Weights & Biases: the explanations as a table, in the format of its own files.

    explanations.table.json   a `wandb.Table`, with a row for each explained class of each image
    summary.json              the audit's figures

`wandb artifact put --type dataset OUTPUT` uploads both; `wandb.Table.from_json` reads the table.
"""

from collections.abc import Iterator
from typing import Any

from gradcam_worker.audit.exports.class_names import ClassNames
from gradcam_worker.audit.exports.images import METRICS
from gradcam_worker.audit.exports.mlflow_run import figures
from gradcam_worker.audit.exports.source import ExportSource, as_json

OWN = (
    *("row", "uri", "width", "height", "class_id", "class_name", "rank", "probability"),
    *("correct", "truths", "hot_box", "overlay"),
)


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
    carried = list(dict.fromkeys(name for image in images for name in image.carried))
    known = [name for name in METRICS if any(name in one.metrics for i in images for one in i.explanations)]
    rows: list[list[Any]] = []
    for image in images:
        truths = ", ".join(names.of(class_id) for class_id in image.truths) or None
        for one in image.explanations:
            box = ", ".join(f"{side:g}" for side in one.hot_box) if one.hot_box else None
            own = [image.row, image.uri, image.width, image.height, one.class_id, names.of(one.class_id)]
            own += [one.rank, one.probability, image.correct, truths, box, one.overlay]
            metrics = [one.metrics.get(name) for name in known]
            rows.append([*own, *metrics, *(_cell(image.carried.get(name)) for name in carried)])
    columns = [*OWN, *known, *(f"input_{name}" if name in {*OWN, *known} else name for name in carried)]
    table = {"columns": columns, "data": rows, "ncols": len(columns), "nrows": len(rows)}
    yield "explanations.table.json", as_json({"_type": "table", **table})
    yield "summary.json", as_json(figures(source.report))


def _cell(value: object) -> object:
    """A value that a cell of a table may have."""
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
