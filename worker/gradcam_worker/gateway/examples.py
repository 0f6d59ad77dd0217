"""Examples of the OpenAPI document. Tests hold them to the schemas."""

from typing import Any

JOB_ID = "0197f3a2-7c41-7bd0-9a55-6f2b1c0d9e8f"
CREATED, ENDED = "2026-11-30T08:00:00.000000Z", "2026-11-30T08:00:01.250000Z"
SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
FOLDER = f"s3://results/cams/{JOB_ID}"

JOB: dict[str, Any] = {
    "image": "s3://photos/pier.jpg",
    "network": "efficientnet_lite0",
    "top_n": 2,
    "artifacts": [{"kind": "overlay"}, {"kind": "heatmap"}],
    "metadata": {"order": "4711"},
}
SUCCEEDED: dict[str, Any] = {
    "schema": "gradcam.status/v1",
    "id": JOB_ID,
    "status": "succeeded",
    "stage": None,
    "revision": 7,
    "attempt": 1,
    "max_attempts": 3,
    "created_at": CREATED,
    "queued_at": CREATED,
    "started_at": CREATED,
    "updated_at": ENDED,
    "completed_at": ENDED,
    "network": {"name": "efficientnet_lite0", "layer": "top_act", "weights_sha256": SHA256},
    "metrics": {"queue_s": 0.01, "explain_s": 0.2},
    "predictions": [
        {"rank": 1, "id": 718, "wnid": "n03933933", "name": "pier", "probability": 0.93},
        {"rank": 2, "id": 460, "wnid": "n02894605", "name": "breakwater", "probability": 0.02},
    ],
    "result": {"manifest_uri": f"{FOLDER}/manifest.json", "manifest_sha256": SHA256},
    "warnings": [],
    "error": None,
    "metadata": {"order": "4711"},
    "artifacts": [
        {
            "kind": "overlay",
            "uri": f"{FOLDER}/1-718-overlay.jpg",
            "media_type": "image/jpeg",
            "class_id": 718,
            "class_name": "pier",
        }
    ],
}
PROBLEM: dict[str, Any] = {
    "type": "urn:gradcam:problem:invalid_job",
    "title": "The message is not a job, or asks for something no job may ask for",
    "status": 422,
    "detail": "This request cannot be carried out as it was made. Trying it again does not help.",
    "public_message": "This request cannot be carried out as it was made. Trying it again does not help.",
    "code": "invalid_job",
    "retryable": False,
    "errors": [
        {
            "pointer": "#/target/top_n",
            "detail": "Input should be greater than or equal to 1 (received 0)",
        }
    ],
}
UPLOAD: dict[str, Any] = {"media_type": "image/jpeg", "bytes": 245_760}
UPLOAD_TARGET: dict[str, Any] = {
    "uri": "s3://photos/uploads/5b0f7a1e-3c7d-4e0a-9a52-0a8a3f4f7c11.jpg",
    "method": "PUT",
    "url": "https://s3.example.com/photos/uploads/5b0f7a1e-3c7d-4e0a-9a52-0a8a3f4f7c11.jpg?X-Amz-Signature=0a1b",
    "headers": {"Content-Type": "image/jpeg"},
    "expires_at": "2026-11-30T08:15:00Z",
}
NETWORKS: dict[str, Any] = {
    "networks": [
        {
            "name": "efficientnet_lite0",
            "input_size": [224, 224],
            "layer": "top_act",
            "classes": 1000,
            "imagenet": True,
            "labels": [],
            "inputs": [],
            "scores_only": False,
            "workers": 2,
        }
    ]
}
WORKERS: dict[str, Any] = {
    "workers": [
        {
            "id": "gpu-1:3f9a1c2b:41",
            "device": "NVIDIA H100",
            "since": CREATED,
            "running": 3,
            "batch": 5.5,
            "trouble": None,
            "version": "0.1.0",
            "networks": ["efficientnet_lite0"],
        }
    ]
}
BACKFILL: dict[str, Any] = {
    "input": "s3://photos/lists/2026.csv",
    "output": "s3://results/2026",
    "network": "efficientnet_lite0",
    "target": {"top_n": 3},
}
