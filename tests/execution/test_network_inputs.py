"""Jobs and shards of a network that takes an age and a sex beside the image."""

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gradcam_worker.artifacts import artifacts
from gradcam_worker.errors import InvalidNetworkInput
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.execution.shards import run_shard
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.shard import Shard, data_key, failed_key
from gradcam_worker.testing import MemoryStore, TinyNetwork, fake_services
from tests.execution.test_pipeline import URI, flag, make_job
from tests.execution.test_shards import KEY, shard_of, uri
from tests.networks_with_inputs import AgedNetwork

ROW = CATALOG["efficientnet_lite0"]


class Networks:
    """A registry with the network."""

    def find(self, name: str) -> NetworkRow:
        return replace(ROW, name=name, inputs=AgedNetwork.facts.inputs)


def services(network: TinyNetwork, images: Any, **others: Any) -> Any:
    cache = ModelCache(lambda _: network, max_batch=4)
    return fake_services(images, networks=Networks(), inference=cache, **others)


def run(job: Job, network: TinyNetwork, store: MemoryStore) -> Manifest:
    run_job(job, services(network, {URI: flag()}, store=store), JobContext(Deadline(60), lambda _: None))
    (manifest,) = [data for key, data in store.objects.items() if key.endswith("manifest.json")]
    return Manifest.model_validate_json(manifest)


def test_a_job_is_explained_with_its_values_which_the_manifest_records_with_defaults() -> None:
    network, store = AgedNetwork(), MemoryStore()
    manifest = run(make_job(inputs={"age": 61}, metrics=["deletion"]), network, store)
    assert manifest.inputs == {"age": 61, "sex": "f"}
    assert '"age": 61,' in next(iter(v for k, v in store.objects.items() if "manifest" in k)).decode()
    assert {tuple(row) for one in network.seen for row in one.tolist()} == {
        tuple(np.array([0.61, 1, 0], np.float32).tolist())
    }, "in its own pass, and while it is measured"
    assert run(make_job(inputs={"age": 61, "sex": "m"}), network, MemoryStore()).predictions[0].name == "blue"


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ({}, "efficientnet_lite0 needs age"),
        ({"age": 121}, "age must lie in the range 0 to 120; it is 121"),
        ({"age": 61, "weight": 70}, "has no input 'weight'"),
        ({"age": "old"}, "age must be a number, not 'old'"),
    ],
)
def test_other_values_are_refused_before_anything_is_fetched(inputs: Any, why: str) -> None:
    context = JobContext(Deadline(60), lambda _: None)
    with pytest.raises(InvalidNetworkInput, match=why):
        run_job(make_job(inputs=inputs), services(AgedNetwork(), {}), context)
    assert context.current_stage == "check"


def test_a_network_that_takes_an_image_alone_gets_no_values() -> None:
    context = JobContext(Deadline(60), lambda _: None)
    with pytest.raises(InvalidNetworkInput, match="it takes an image alone"):
        run_job(make_job(inputs={"age": 61}), fake_services({URI: flag()}), context)


def test_a_result_of_other_inputs_is_not_taken_for_that_of_this_job() -> None:
    store = MemoryStore()
    job = make_job(inputs={"age": 61})
    manifest = run(job, AgedNetwork(), store)
    row = Networks().find(job.network)
    found = artifacts.find_manifest(store, job.id, job, manifest.input.sha256, row, Deadline(60))
    assert found is not None
    other = job.model_copy(update={"inputs": {"age": 62}})
    assert artifacts.find_manifest(store, job.id, other, None, row, Deadline(60)) is None
    age, sex = row.inputs
    changed = replace(row, inputs=(age, replace(sex, default="m")))
    assert artifacts.find_manifest(store, job.id, job, None, changed, Deadline(60)) is None


def shard(rows: list[dict[str, Any]], network: TinyNetwork, **fields: Any) -> tuple[list[Any], list[Any]]:
    """The names and probabilities of the rows that were explained, and the failed lines."""
    images = {uri(index): flag() for index in range(len(rows))}
    given = [{"uri": uri(index), "inputs": row or None} for index, row in enumerate(rows)]
    made = shard_of(images, rows=given, target={"classes": ["green"]}, **fields)
    assert isinstance(made, Shard)
    store = MemoryStore()
    context = JobContext(Deadline(60), lambda _: None)
    run_shard(made, services(network, images, store=store), context)
    table = pq.read_table(io.BytesIO(store.objects[data_key(KEY)])).to_pylist()
    failed = store.objects.get(failed_key(KEY), b"").decode().splitlines()
    return [row["probability"] for row in table if not row["error"]], [*map(json.loads, failed)]


def test_rows_of_a_shard_are_explained_with_their_own_values_and_those_of_all_rows() -> None:
    network = AgedNetwork()
    rows: list[dict[str, Any]] = [
        {"age": 10},
        {"age": 110},
        {"age": "60", "sex": "m"},
        {"age": 300},
        {},
        {"age": 20},
    ]
    explained, failed = shard(rows, network, inputs={"sex": "f"})
    assert len(explained) == 4
    assert explained[0] < explained[3] < explained[1]
    assert explained[2] < explained[0], "blue has more for m"
    codes = [(line["error"]["code"], line.get("inputs")) for line in failed]
    assert codes == [("invalid_network_input", {"age": 300}), ("invalid_network_input", None)]
    assert [len(one) for one in network.seen] == [4, 4], "groups, filled up"


def test_the_values_of_all_rows_may_be_enough() -> None:
    explained, failed = shard([{}, {}], AgedNetwork(), inputs={"age": 61})
    assert explained[0] == explained[1]
    assert not failed
