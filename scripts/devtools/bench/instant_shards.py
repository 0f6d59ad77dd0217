"""A worker whose shards are done at once: for measuring what a backfill costs beside the network and images.

    instant_shards.py

runs the worker of `gradcam worker --unsupervised`, with the settings that the environment holds. Messages,
leases, the ledger and storage are real; of each shard it writes the real file, whose rows say their numbers
and nothing else.
"""

import hashlib
import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq

from devtools.bench import simulated_network
from gradcam_worker.artifacts import dataset
from gradcam_worker.execution import shards
from gradcam_worker.execution.attempt import JobContext, JobResult, admit
from gradcam_worker.execution.services import Services
from gradcam_worker.runtime import worker_process
from gradcam_worker.schemas.shard import DATASET, Shard, data_key
from gradcam_worker.schemas.status import ManifestRef, NetworkRef
from gradcam_worker.settings import Settings

GRID = (7, 7)


def at_once(shard: Shard, services: Services, context: JobContext) -> JobResult:
    """In place of `gradcam_worker.execution.shards.run_shard`."""
    store = admit(shard, services)
    context.deadline.check("explain")
    data, key = table(shard), data_key(shard.key)
    (uri,) = store.put_many([(key, data, dataset.MEDIA_TYPE)], context.deadline)
    return JobResult(
        network=NetworkRef(name=shard.network, layer="none", weights_sha256=shard.weights_sha256),
        predictions=(),
        result=ManifestRef(manifest_uri=uri, manifest_sha256=hashlib.sha256(data).hexdigest()),
        warnings=(),
        metrics={"rows": float(len(shard.rows)), "failed": 0.0},
    )


def table(shard: Shard) -> bytes:
    """A shard's file."""
    count, columns = len(shard.rows), dataset.schema(GRID)
    values = [
        pa.array(range(shard.first, shard.first + count), pa.int64())
        if field.name == "row"
        else pa.nulls(count, field.type)
        for field in columns
    ]
    facts = {
        "schema": DATASET,
        "rows": count,
        "failed": 0,
        "codes": {},
        "grid": GRID,
        "network": {"name": shard.network, "layer": "none", "weights_sha256": shard.weights_sha256},
    }
    file = io.BytesIO()
    named = columns.with_metadata({dataset.METADATA_KEY: json.dumps(facts).encode()})
    pq.write_table(pa.Table.from_arrays(values, schema=named), file)
    return file.getvalue()


if __name__ == "__main__":
    shards.run_shard = at_once  # where `gradcam_worker.execution.handler` looks for it
    settings = Settings.from_environment()
    sys.exit(worker_process.run(settings, load=lambda row: simulated_network.load(settings, None, row)))
