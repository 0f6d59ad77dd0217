"""The plan that tests of backfills begin with."""

from typing import Any

from gradcam_worker.backfill.plan import Plan

SHA = "ab" * 32


def plan(**fields: Any) -> Plan:
    defaults: dict[str, Any] = {
        "id": "0193b2a0-0000-7000-8000-000000000000",
        "input": "photos.jsonl",
        "output": "s3://results/run",
        "network": "vgg16",
        "target": {"top_n": 3},
        "shard_rows": 4,
    }
    return Plan.model_validate(defaults | fields)
