"""MLflow: a finished run in the format of its file store, with the audit's figures and its report.

    mlruns/<experiment>/meta.yaml
    mlruns/<experiment>/<run>/meta.yaml, metrics/, params/, tags/, artifacts/report.json

`mlflow ui --backend-store-uri OUTPUT/mlruns` shows it. The same dataset gives the same run id.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping

from gradcam_worker.audit.exports.source import ExportSource
from gradcam_worker.audit.report import CAUSES, AuditReport

EXPERIMENT = "gradcam-audit"
FINISHED, LOCAL = 3, 4  # numbers of MLflow's file store: a run's status, and its source


def files(source: ExportSource) -> Iterator[tuple[str, bytes]]:
    """The files of the export. The limit does not count: the figures are of the whole dataset.

    Args:
        source: The dataset.

    Yields:
        Name and content of each file.
    """
    report = source.report
    text = report.to_json()
    run = hashlib.sha256(f"{source.name}\n{text}".encode()).hexdigest()[:32]
    experiment = str(int(hashlib.sha256(EXPERIMENT.encode()).hexdigest()[:15], 16))
    base, now_ms = f"mlruns/{experiment}", time.time_ns() // 1_000_000
    root = (source.output / base).as_uri()
    yield (
        f"{base}/meta.yaml",
        _yaml(
            {
                "artifact_location": root,
                "creation_time": now_ms,
                "experiment_id": experiment,
                "last_update_time": now_ms,
                "lifecycle_stage": "active",
                "name": EXPERIMENT,
            }
        ),
    )
    name = f"{report.dataset.network} {source.name}"
    yield (
        f"{base}/{run}/meta.yaml",
        _yaml(
            {
                "artifact_uri": f"{root}/{run}/artifacts",
                "end_time": now_ms,
                "entry_point_name": "",
                "experiment_id": experiment,
                "lifecycle_stage": "active",
                "run_id": run,
                "run_name": name,
                "run_uuid": run,
                "source_name": "",
                "source_type": LOCAL,
                "source_version": "",
                "start_time": now_ms,
                "status": FINISHED,
                "tags": [],
                "user_id": "gradcam",
            }
        ),
    )
    for metric, value in figures(report).items():
        yield f"{base}/{run}/metrics/{metric}", f"{now_ms} {value!r} 0\n".encode()
    facts = report.dataset
    parameters = {
        "network": facts.network,
        "layer": facts.layer,
        "weights_sha256": facts.weights_sha256 or "",
        "method": str(facts.method.get("name", "gradcam")),
        "dataset": source.name,
    }
    for parameter, told in parameters.items():
        yield f"{base}/{run}/params/{parameter}", told.encode()
    yield f"{base}/{run}/tags/mlflow.runName", name.encode()
    yield f"{base}/{run}/artifacts/report.json", text.encode()


def figures(report: AuditReport) -> dict[str, float]:
    """The figures of a report that trackers follow over time.

    Args:
        report: The report.

    Returns:
        Numbers by name: of images, and shares of those that were predicted.
    """
    facts = report.dataset
    predicted = sum(one.predicted for one in report.classes)
    found = {
        "images": float(facts.explained),
        "failed": float(facts.failed),
        "classes": float(len(report.classes)),
    }
    found["elsewhere_share"] = sum(one.elsewhere for one in report.classes) / max(predicted, 1)
    if facts.accuracy is not None:
        found["accuracy"] = facts.accuracy
    for cause in CAUSES:
        found[f"{cause}_share"] = sum(one.causes.get(cause, 0) for one in report.classes) / max(predicted, 1)
    inside = [
        (one.mean_heat_inside, one.predicted) for one in report.classes if one.mean_heat_inside is not None
    ]
    if weight := sum(count for _, count in inside):
        found["mean_heat_inside"] = sum(mean * count for mean, count in inside) / weight
    return found


def _yaml(fields: Mapping[str, object]) -> bytes:
    """Flat YAML: JSON's scalars are scalars of YAML, too."""
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()).encode()
