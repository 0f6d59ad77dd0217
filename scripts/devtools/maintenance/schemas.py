"""Write the JSON schemas of the wire contract to deploy/schemas/ again."""

import json
import sys

from devtools import ROOT
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.model import RequestModel
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import StatusDocument, StatusEvent

FOLDER = ROOT / "deploy" / "schemas"
MODELS: dict[str, type[RequestModel]] = {
    "job.v1.json": Job,
    "status.v1.json": StatusDocument,
    "manifest.v1.json": Manifest,
    "event.v1.json": StatusEvent,
    "shard.v1.json": Shard,
    "backfill.v1.json": Plan,
}


def texts() -> dict[str, str]:
    """Each file's name and what belongs into it."""
    return {
        name: json.dumps(model.model_json_schema(by_alias=True), indent=2, sort_keys=True) + "\n"
        for name, model in MODELS.items()
    }


def main(arguments: list[str]) -> int:
    """Write the files; with --check, only say which are not as they should be."""
    there = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    stale = [name for name, text in texts().items() if there.get(name) != text]
    if "--check" in arguments:
        for name in stale:
            print(f"deploy/schemas/{name} is not what the models say: run scripts/schemas.", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        (FOLDER / name).write_text(text)
    print(f"{len(MODELS)} schemas in deploy/schemas, {len(stale)} of them changed.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
