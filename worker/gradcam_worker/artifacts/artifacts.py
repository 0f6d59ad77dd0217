"""What a job leaves in storage, under which keys. The manifest is written last.

    <output>/<job id>/overlay-<rank>-<class id>-<name>.jpg    one for each explained class
    <output>/<job id>/heatmaps.npz                            all heatmaps on the network's own grid
    <output>/<job id>/heatmap-<rank>-<class id>-<name>.png    one grey picture for each, where asked for
    <output>/<job id>/grid.jpg                                the photo and its overlays on one sheet
    <output>/<job id>/animation.gif                           the overlays one after the other, titled
    <output>/<job id>/report.html                             one page that shows all of it by itself
    <output>/<job id>/manifest.json                           last: its presence means all is there

The same job writes the same artifacts under the same keys, whichever attempt it is: byte for byte where it is
computed in a pass over as many images. Where not, float32 numbers differ from the seventh digit on.

Nothing takes back a write that was under way when its attempt was given up: it may arrive after the next
attempt has written the same key. Then a picture can differ from the sha256 in the manifest, by those digits.
"""

import hashlib
import logging

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from gradcam_worker import __version__
from gradcam_worker.artifacts.render import Rendered
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.explain import Explanation, Prediction
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import (
    ArtifactRecord,
    ClassRef,
    ExplainedClass,
    InputRecord,
    Manifest,
    MethodRecord,
    NetworkRecord,
    SalientRegion,
)
from gradcam_worker.schemas.status import ClassScore, ManifestRef, ResultWarning
from gradcam_worker.storage.stores import Store

log = logging.getLogger("gradcam")

MANIFEST = "manifest.json"


def upload(store: Store, folder: str, rendered: Rendered, deadline: Deadline) -> list[ArtifactRecord]:
    """Store the artifacts; the records stand in the same order. Raises StorageUnavailable, JobTimeout."""
    objects = [(f"{folder}/{made.name}", made.data, made.media_type) for made in rendered.pieces]
    return [
        ArtifactRecord(
            kind=made.kind,
            uri=uri,
            media_type=made.media_type,
            bytes=len(made.data),
            sha256=hashlib.sha256(made.data).hexdigest(),
            **made.facts,
        )
        for made, uri in zip(rendered.pieces, store.put_many(objects, deadline), strict=True)
    ]


def describe(
    job: Job,
    image: InputRecord,
    seen: Explanation,
    rendered: Rendered,
    records: list[ArtifactRecord],
) -> Manifest:
    """The manifest: a function of the job, the image and the network alone, so no time, no attempt."""
    size = (image.width, image.height)
    made = list(zip(rendered.pieces, records, strict=True))
    explanations = []
    for index, one in enumerate(seen.explained):
        own = [
            record if each.index == index else record.model_copy(update={"index": index})
            for each, record in made
            if each.index == index or (each.index is None and each.kind == "heatmap")
        ]
        explanations.append(_explained(one, seen, index, size, rendered.hot[index], tuple(own)))
    facts = seen.network
    return Manifest(
        job_id=job.id,
        job_fingerprint=fingerprint(job),
        generator={"name": "gradcam-worker", "version": __version__},
        input=image,
        network=NetworkRecord(
            name=facts.name,
            layer=seen.layer,
            input_size=facts.input_size,
            preprocessing=facts.preprocessing,
            weights_sha256=facts.weights_sha256,
            backend=facts.backend,
            dtype=facts.dtype,
            head=facts.head,
        ),
        method=MethodRecord(**{**dict(job.method), "layer": seen.layer}),
        predictions=classes(seen.predictions),
        explanations=tuple(explanations),
        artifacts=tuple(record for each, record in made if each.index is None and each.kind != "heatmap"),
        warnings=warnings(image, seen),
    )


def _explained(
    one: Prediction,
    seen: Explanation,
    index: int,
    size: tuple[int, int],
    hot: SalientRegion | None,
    records: tuple[ArtifactRecord, ...],
) -> ExplainedClass:
    return ExplainedClass(
        **{"class": ClassRef(id=one.id, wnid=one.wnid, name=one.name)},
        rank=one.rank,
        probability=one.probability,
        raw_min=float(seen.raw_min[index]),
        raw_max=float(seen.raw_max[index]),
        peak_xy=peak_xy(seen.heatmaps[index], size),
        hot=hot,
        metrics=dict(seen.metrics[index]) if seen.metrics else {},
        artifacts=records,
    )


def peak_xy(heatmap: NDArray[np.float32], size: tuple[int, int]) -> tuple[int, int] | None:
    """The middle of the hottest cell of a heatmap (rows, columns), in pixels of an image (width, height).

    None: the heatmap is dark.
    """
    rows, columns = heatmap.shape
    row, column = divmod(int(heatmap.argmax()), columns)
    middle = (int((column + 0.5) * size[0] / columns), int((row + 0.5) * size[1] / rows))
    return middle if heatmap.any() else None


def classes(predictions: tuple[Prediction, ...]) -> tuple[ClassScore, ...]:
    """Predictions -> how they are written on the wire."""
    return tuple(ClassScore(**vars(one)) for one in predictions)


def warnings(image: InputRecord, seen: Explanation) -> tuple[ResultWarning, ...]:
    """What the reader of this explanation should know."""
    found = [ResultWarning(code="zero_heatmap", class_id=one) for one in seen.zero_heatmaps]
    if image.damage:
        found.insert(0, ResultWarning(code="image_damaged", **dict(image.damage)))
    return tuple(found)


def write_manifest(store: Store, folder: str, manifest: Manifest, deadline: Deadline) -> ManifestRef:
    """Write the manifest, last. Raises as `Store.put_many` does."""
    text = manifest.model_dump_json(indent=1).encode()
    (uri,) = store.put_many([(f"{folder}/{MANIFEST}", text, "application/json")], deadline)
    return ManifestRef(manifest_uri=uri, manifest_sha256=hashlib.sha256(text).hexdigest())


def fingerprint(job: Job) -> str:
    """Of what a job's artifacts depend on, and of nothing else: not of its id, its webhooks, its metadata."""
    asked = {"image", "network", "target", "method", "metrics", "artifacts"}
    kinds = [spec.kind for spec in job.artifacts]  # a default in each of them, and so not in the rest
    text = f"{kinds} {job.model_dump_json(include=asked, exclude_defaults=True)}"
    return hashlib.sha256(text.encode()).hexdigest()


def find_manifest(
    store: Store, folder: str, job: Job, image_sha256: str | None, row: NetworkRow, deadline: Deadline
) -> tuple[Manifest, ManifestRef] | None:
    """The manifest that an earlier attempt at this job has left: all that it names is there.

    It counts only where it was made of the same job, the same bytes of the image, and the network as `row`
    describes it now. `image_sha256` is None where the image is gone, and the job did not say which bytes it
    must be: then those that the manifest names count. What is there and is none, is of an earlier version
    that did not say, or of anything else, counts for nothing: this attempt writes its own. Raises
    StorageUnavailable, JobTimeout, and what the deadline was cancelled with.
    """
    key = f"{folder}/{MANIFEST}"
    text = store.find(key, deadline)
    if text is None:
        return None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        log.warning("%s is no manifest, and will be replaced: %s", store.uri(key), str(error)[:200])
        return None
    if other := _made_for_another(manifest, job, image_sha256, row):
        log.warning("%s is the manifest of %s, and will be replaced", store.uri(key), other)
        return None
    return manifest, ManifestRef(
        manifest_uri=store.uri(key), manifest_sha256=hashlib.sha256(text).hexdigest()
    )


def _made_for_another(manifest: Manifest, job: Job, image_sha256: str | None, row: NetworkRow) -> str | None:
    """What tells a manifest from the one that this job would leave."""
    if manifest.job_id != job.id:
        return f"job {manifest.job_id}"
    if manifest.job_fingerprint != fingerprint(job):
        return "another job of this id"
    if image_sha256 not in {None, manifest.input.sha256}:
        return f"other bytes of its image, with sha256 {manifest.input.sha256}"
    of_file = manifest.network.weights_sha256, manifest.network.preprocessing
    if row.file and of_file != (row.file.sha256, row.preprocessing.name):
        return f"another {row.name}, with weights {of_file[0]} and preprocessing {of_file[1]}"
    return None
