"""A submitted job's id, which has the calls for this job; and the short forms of what is submitted."""

import asyncio
import copy
import inspect
import json
import pickle
from typing import Any

import cv2
import numpy as np
import pytest

from gradcam_worker.client import AsyncGradcamClient, AsyncJobHandle, GradcamClient, JobHandle
from gradcam_worker.client.job_fields import as_job
from gradcam_worker.errors import InvalidJob, InvalidQuery
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.listing import JobQuery
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, RecordingPublisher, eager_client

RED = cv2.imencode(".png", np.full((32, 32, 3), (0, 0, 255), np.uint8))[1].tobytes()
FIELDS: dict[str, Any] = {"image": "s3://in/red.png", "network": "vgg16"}


@pytest.fixture
def client() -> GradcamClient:
    return GradcamClient(settings=Settings(), ledger=MemoryLedger(), publish=RecordingPublisher())


def test_a_handle_is_the_id_wherever_an_id_goes(client: GradcamClient) -> None:
    job = client.submit(**FIELDS, top_n=1)
    assert isinstance(job, JobHandle)
    assert (type(job.id), job.id, f"{job}", repr(job)) == (str, job, job, f"JobHandle('{job}')")
    assert {job.id: 1}[job] == 1
    assert json.loads(json.dumps([job])) == [job.id]
    assert copy.deepcopy({"job": job})["job"] is copy.copy(job) is job
    stored = pickle.loads(pickle.dumps(job))  # noqa: S301  # of this test
    assert (type(stored), stored) == (str, job.id)
    assert client.status(job) == client.job(stored).status() == job.status()


def test_a_client_says_which_workers_live_and_what_they_offer() -> None:
    ledger = MemoryLedger()
    client = GradcamClient(settings=Settings(), ledger=ledger, publish=RecordingPublisher())
    assert (client.workers(), client.networks()) == ((), ())
    report = {"device": "cpu", "running": 2, "networks": {"catalog": ["vgg16"]}}
    ledger.renew_leases("w:1", json.dumps(report), {})
    (worker,), (network,) = client.workers(), client.networks()
    assert (worker.id, worker.device, worker.running, worker.networks) == ("w:1", "cpu", 2, ("vgg16",))
    assert (network.name, network.input_size, network.imagenet, network.workers) == (
        "vgg16",
        (224, 224),
        True,
        1,
    )
    assert asyncio.run(AsyncGradcamClient(client=client).workers()) == (worker,)


def test_a_handle_has_the_calls_of_its_job(client: GradcamClient) -> None:
    eager = eager_client({"s3://in/red.png": RED})
    done, lost = eager.submit_many(
        [{**FIELDS, "top_n": 1}, {**FIELDS, "image": "s3://in/no.png", "top_n": 1}]
    )
    assert (done.wait().status, [one.status for one in done.stream()]) == ("succeeded", ["succeeded"])
    assert done.result(expires_s=60).manifest.job_id == done
    assert (lost.wait().status, lost.retry().status) == ("failed", "queued")
    assert client.submit(**FIELDS, top_n=1).cancel().status == "canceled"


def test_a_handle_for_asyncio_has_the_same_calls() -> None:
    async def app() -> None:
        async with AsyncGradcamClient(client=eager_client({"s3://in/red.png": RED})) as client:
            done = await client.submit(**FIELDS, top_n=1)
            assert isinstance(done, AsyncJobHandle)
            assert ((await done.wait()).status, (await done.status()).status) == ("succeeded", "succeeded")
            assert [one.status async for one in done.stream()] == ["succeeded"]
            assert (await done.result()).manifest.job_id == done
            assert (await client.job(done.id).cancel()).status == "succeeded"
            (lost,) = await client.submit_many([{**FIELDS, "image": "s3://in/no.png", "top_n": 1}])
            assert (await lost.retry()).status == "queued"

    asyncio.run(app())


@pytest.mark.parametrize("client", [GradcamClient, AsyncGradcamClient])
def test_a_notebook_is_shown_every_field_by_its_name(client: Any) -> None:
    named = {*Job.model_fields} - {"schema_"} | {"schema", "top_n", "classes", "against", "webhook"}
    assert {*inspect.signature(client.submit).parameters} == named | {"self", "job", "retry_failed"}
    assert {*inspect.signature(client.upload_and_submit).parameters} == named | {"self", "to", "retry_failed"}
    assert [*inspect.signature(client().submit).parameters][:5] == [
        "job",
        "retry_failed",
        "image",
        "network",
        "top_n",
    ]


@pytest.mark.parametrize(
    ("short", "wire"),
    [
        ({"top_n": 3}, {"target": {"top_n": 3}}),
        ({"classes": ["tabby", 5]}, {"target": {"classes": ["tabby", 5]}}),
        ({"top_n": 2, "against": [7]}, {"target": {"top_n": 2, "against": [7]}}),
        ({"top_n": 1, "method": "rise"}, {"target": {"top_n": 1}, "method": {"name": "rise"}}),
        (
            {"top_n": 1, "artifacts": ["report", {"kind": "overlay", "alpha": 1}]},
            {"target": {"top_n": 1}, "artifacts": [{"kind": "report"}, {"kind": "overlay", "alpha": 1}]},
        ),
        (
            {"top_n": 1, "webhook": "https://app.example/"},
            {"target": {"top_n": 1}, "webhooks": [{"url": "https://app.example/"}]},
        ),
        (
            {"top_n": 1, "webhooks": ("https://a.example/", {"url": "https://b.example/"})},
            {
                "target": {"top_n": 1},
                "webhooks": [{"url": "https://a.example/"}, {"url": "https://b.example/"}],
            },
        ),
    ],
)
def test_a_short_form_is_the_same_job(short: dict[str, Any], wire: dict[str, Any]) -> None:
    assert as_job({**FIELDS, **short}).fingerprint() == Job.parse({**FIELDS, **wire}).fingerprint()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "target: exactly one of top_n and classes is needed, neither given"),
        ({"top_n": 3, "classes": ["tabby"]}, "exactly one of top_n and classes is needed, both given"),
        ({"top_n": 3, "target": {"top_n": 3}}, "Give target, or top_n beside the other fields, not both"),
        ({"top_n": "3"}, "target.top_n"),
        ({"classes": "tabby"}, r"classes is a list, as in \['tabby'\]"),
        ({"top_n": 1, "method": "gradcm"}, "method.name"),
        ({"top_n": 1, "artifacts": ["overly"]}, "artifacts.0"),
        ({"top_n": 1, "artifacts": "overlay"}, "artifacts"),
        ({"top_n": 1, "webhook": "https://a.example", "webhooks": []}, "Give webhook, or a list of webhooks"),
        ({"top_n": 1, "top_m": 1}, r"top_m: unknown field\. Did you mean top_n\?$"),
        ({"top_n": 1, "priorty": "low", "metdata": {}}, r"Did you mean priority, metadata\?$"),
        ({"top_n": 1, "qqq": 1}, r"qqq: unknown field\.$"),
    ],
)
def test_a_wrong_short_form_is_refused_by_its_name(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidJob, match=why):
        as_job({**FIELDS, **fields})


def test_what_is_no_dictionary_is_told_as_before(client: GradcamClient) -> None:
    strange: Any = ["s3://in/red.png"]
    with pytest.raises(InvalidJob, match="This is not a job"):
        client.submit(strange)


def test_jobs_are_listed_by_their_labels_page_by_page(client: GradcamClient) -> None:
    ids = [client.submit(**FIELDS, top_n=1, metadata={"n": str(n % 2)}) for n in range(205)]
    client.cancel(ids[0])
    assert [one.id for one in client.list()] == ids[::-1]
    assert [one.id for one in client.list(label="n=0", status="canceled")] == [ids[0]]
    page = client.list_page(JobQuery(limit=2))
    assert [one.id for one in page.jobs] == ids[:-3:-1]
    with pytest.raises(InvalidQuery, match="label"):
        client.list(label="n")
    paged: dict[str, Any] = {"limit": 2}
    with pytest.raises(InvalidQuery, match="list_page takes a limit"):
        client.list(**paged)

    async def app() -> list[str]:
        return [one.id async for one in AsyncGradcamClient(client=client).list(network="vgg16")]

    assert asyncio.run(app()) == ids[::-1]
