"""What a comparison leaves for those who watch many of them: gauges for Prometheus, and a line of a log."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from gradcam_worker.audit.comparison.report import FIGURES, ComparisonReport
from gradcam_worker.errors import StorageUnavailable
from gradcam_worker.storage.stores import FolderStore

LOG_SCHEMA = "gradcam.comparison.log/v1"
PREFIX = "gradcam_compare_"
MAX_CLASSES = 50  # with gauges of their own, and named in a line of the log


def gauges(report: ComparisonReport, name: str, at_s: float) -> str:
    """Write the figures as gauges in the text format of Prometheus.

    Args:
        report: The comparison.
        name: The value of the label `comparison`. It should stay the same for comparisons over time.
        at_s: When it was made, in seconds since the epoch.

    Returns:
        The file. Figures that are not known are left out.
    """
    labels = {"comparison": name}
    lines: list[str] = []
    for figure, value in report.figures.items():
        if value is not None:
            lines += _gauge(figure, FIGURES[figure], [(labels, value)])
    classes = report.classes[:MAX_CLASSES]
    of_class = [{**labels, "class_id": str(one.a.id), "class_name": one.name} for one in classes]
    distances = [one.heat.change for one in classes]
    moved = [float(bool(one.moved_by)) for one in classes]
    help_text = f"of the {MAX_CLASSES} classes that moved farthest"
    for figure, values, text in (
        ("class_distance", distances, f"distance of the mean heatmaps, {help_text}"),
        ("class_moved", moved, f"1 if the heat moved, else 0, {help_text}"),
    ):
        lines += _gauge(figure, text, list(zip(of_class, values, strict=True)))
    lines += _gauge("timestamp_seconds", "when the comparison was made, since the epoch", [(labels, at_s)])
    return "".join(f"{line}\n" for line in lines)


def _gauge(figure: str, text: str, samples: list[tuple[dict[str, str], float]]) -> Iterator[str]:
    if samples:
        yield f"# HELP {PREFIX}{figure} {text}"
        yield f"# TYPE {PREFIX}{figure} gauge"
    for labels, value in samples:
        shown = ",".join(f'{name}="{_escaped(label)}"' for name, label in labels.items())
        yield f"{PREFIX}{figure}{{{shown}}} {float(value)!r}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def write_gauges(path: Path, text: str) -> None:
    """Write the file of gauges in one step, so that no collector reads a part of it.

    Raises:
        StorageUnavailable: It cannot be written.
    """
    FolderStore(path.parent).put(path.name, text.encode(), "text/plain")


def log_line(report: ComparisonReport, name: str, at: str) -> dict[str, object]:
    """What a log keeps of a comparison.

    Args:
        report: The comparison.
        name: Its name.
        at: When it was made.

    Returns:
        The object of one line.
    """
    moved = [one for one in report.classes if one.moved_by]
    return {
        "schema": LOG_SCHEMA,
        "at": at,
        "comparison": name,
        "a": {"uri": report.a.uri, "weights_sha256": report.a.weights_sha256},
        "b": {"uri": report.b.uri, "weights_sha256": report.b.weights_sha256},
        "paired_by": report.pairing.by,
        "figures": report.figures,
        "moved": [
            {
                "id": one.a.id,
                "wnid": one.wnid,
                "name": one.name,
                "by": one.moved_by,
                "distance": one.heat.change,
                "heat_inside_change": one.heat_inside.change if one.heat_inside else None,
            }
            for one in moved[:MAX_CLASSES]
        ],
        "conditions": [one.model_dump() for one in report.conditions],
    }


def append_line(path: Path, line: Mapping[str, object]) -> None:
    """Append a line of JSON to a file: whole, also while others append to it; then it is on the disk.

    Args:
        path: The file; it is made if it does not exist.
        line: The object.

    Raises:
        StorageUnavailable: It cannot be written.
    """
    data = json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size and os.pread(file.fileno(), 1, size - 1) != b"\n":  # a power cut ended the last line
                data = b"\n" + data
            try:
                written = os.write(file.fileno(), data)
                if written != len(data):
                    message = f"only {written} of {len(data)} bytes were written"
                    raise OSError(message)  # noqa: TRY301  # what was written is taken back
            except OSError:
                file.truncate(size)
                raise
            os.fsync(file.fileno())
    except OSError as error:
        message = f"{path} could not be written: {error}"
        raise StorageUnavailable(message) from error
