"""What a user writes. Two type checkers read it as his project would have it, and it is run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker import AsyncGradcamClient, GradcamClient, Job
from gradcam_worker.client import AsyncJobHandle, JobHandle
from gradcam_worker.errors import GradcamError, ImageError, InvalidJob, InvalidWebhook, LedgerUnavailable
from gradcam_worker.gradcam import (
    Explained,
    Head,
    Limits,
    Method,
    Network,
    Preprocessing,
    explain_image,
    load_network,
    wrap_model,
)
from gradcam_worker.schemas.job import HeatmapSpec, ImageRef, MethodSpec, OverlaySpec, Target, Webhook
from gradcam_worker.schemas.listing import JobQuery

IMAGE = "s3://in/red.png"
HOOK = "https://app.example/hook"


def jobs() -> list[Job]:
    classes = ["blue", "green"]
    plain = Job(image=IMAGE, network="vgg16", target=Target(top_n=3))
    full = Job(
        image=ImageRef(uri=IMAGE),
        network="vgg16",
        target=Target(classes=["red", 1]),
        method=MethodSpec(name="gradcam++"),
        artifacts=[OverlaySpec(alpha=0.5), HeatmapSpec(format="npy")],
        metrics=["deletion"],
        webhooks=[Webhook(url="https://app.example/hook", events=["job.failed"])],
        metadata={"user": "42"},
        priority="low",
    )
    named = Job(image={"uri": IMAGE}, network="vgg16", target=Target(classes=classes))
    as_json = Job(image=IMAGE, network="vgg16", target={"top_n": 1}, artifacts=[{"kind": "overlay"}])
    metadata: dict[str, str] = full.metadata
    uri: str = plain.image.uri
    assert (metadata["user"], uri, plain.metadata) == ("42", IMAGE, {})
    return [plain, full, named, as_json]


def many(count: int) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        yield {"image": IMAGE, "network": "vgg16", "target": {"top_n": 1}}


def with_client(client: GradcamClient, image: Path) -> list[str]:
    ids: list[JobHandle] = client.submit_many(jobs())
    ids += client.submit_many(many(2))
    ids.append(client.submit(jobs()[0], retry_failed=True))
    ids.append(client.submit(image=IMAGE, network="vgg16", target={"top_n": 2}, priority="high"))
    ids.append(client.submit(image=IMAGE, network="vgg16", top_n=2, method="rise", artifacts=["overlay"]))
    ids.append(client.upload_and_submit(image, network="vgg16", classes=["red", 1], webhooks=[HOOK]))
    job_id: str = client.submit(image=IMAGE, network="vgg16", top_n=1, against=["blue"])
    ids.append(client.job(job_id))
    document = ids[-1].wait(timeout_s=60)
    same: set[str] = {one.status for one in ids[0].stream()} | {ids[0].status().status, ids[0].id}
    assert same == {"succeeded", ids[0]}
    assert [one.class_.name for one in ids[2].result().manifest.explanations]
    made = ids[2].result()
    links: list[tuple[str | None, str]] = [(file.class_name, file.url) for file in made.overlays]
    array: NDArray[np.float32] = made.heatmaps
    saved: list[Path] = made.save(image.parent / "saved")
    assert (len(links), array.ndim, saved[-1].name, made.report_url) == (2, 3, "manifest.json", None)
    listed = [one.id for one in client.list(status="succeeded", network="vgg16")]
    assert listed[-1] == client.list_page(JobQuery(limit=200)).jobs[-1].id
    assert not [one.trouble for one in client.workers()] + [one.name for one in client.networks()]
    ids[0].cancel()
    document = client.wait(ids[0], timeout_s=60)
    statuses: list[str] = [one.status for one in client.stream(ids[0])]
    if document.error:
        raise AssertionError(document.error.code, document.error.public_message)
    result = client.result(ids[0])
    urls = [result.urls[file.uri] for one in result.manifest.explanations for file in one.artifacts]
    names: list[str] = [one.class_.name for one in result.manifest.explanations]
    client.cancel(ids[0])
    known = client.statuses(ids)
    return [document.status, *statuses, *names, *urls, *(one.status for one in known.values())]


async def with_async_client(client: AsyncGradcamClient) -> list[str]:
    async with client:
        job_id: str = await client.submit(image=IMAGE, network="vgg16", target=Target(top_n=3))
        again = await client.submit(jobs()[0])
        job: AsyncJobHandle = await client.submit(image=IMAGE, network="vgg16", top_n=3, webhook=HOOK)
        async for document in job.stream():
            assert document.id == job
        assert [(await job.wait()).status, (await job.status()).status] == ["succeeded"] * 2
        assert (await job.result()).overlays[0].url
        assert [one.id async for one in client.list(status="succeeded")]
        assert [one.device for one in await client.workers()] == []
        assert (await client.job(job.id).cancel()).final
        ids: list[AsyncJobHandle] = await client.submit_many([*many(2)])
        uploaded: str = await client.upload_and_submit(b"pixels", network="vgg16", top_n=1)
        statuses = [document.status async for document in client.stream(job_id)]
        final = await client.wait(job_id)
        url: str = next(iter((await client.result(job_id)).urls.values()))
        known = await client.statuses([again, *ids, uploaded])
        return [final.status, *statuses, url, *(one.status for one in known.values())]


def webhook(client: GradcamClient, body: bytes, headers: dict[str, str]) -> str:
    try:
        return client.webhooks.unwrap(body, headers, ["whsec_" + "A" * 32]).data.status
    except InvalidWebhook as error:
        return error.code


def refused(client: GradcamClient) -> list[str]:
    wrong: Any = "a top of a thousand"
    try:
        client.submit_many([*many(1), {"image": IMAGE, "network": "vgg16", "target": wrong}])
    except InvalidJob as error:
        return [*error.accepted, error.code]
    except LedgerUnavailable as error:
        return [*error.accepted, *error.in_doubt]
    return []


def explained(network: Network, image: Path, pixels: NDArray[np.uint8]) -> list[str]:
    first: Explained = explain_image(network, image, top_n=3)
    names = [one.name for one in first.explained if one.probability >= 0]
    names += [one.name for one in explain_image(network, str(image), classes=["red", 1]).explained]
    other = explain_image(network, pixels, classes=names, method=Method(normalize="joint"))
    paths: list[Path] = other.save(image.parent)
    heatmap: NDArray[np.float32] = other.heatmaps[0]
    try:
        explain_image(network, b"no image", top_n=1, method="gradcam", limits=Limits(max_pixels=10_000))
    except ImageError as error:
        names.append(error.code)
    except GradcamError as error:
        names.append(error.public_message)
    return [*names, paths[0].name, str(heatmap.ndim)]


def networks(model: Any, image: Path) -> list[Explained]:  # not run: it takes TensorFlow
    known = load_network("efficientnet_lite0", precision="float32")
    how = Preprocessing("mine", std=(255.0,))
    own = wrap_model(model, preprocessing=how, labels=["benign", "malignant"], head=Head("sigmoid"))
    return [explain_image(network, image, top_n=1) for network in (known, own)]
