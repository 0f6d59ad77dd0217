"""What a job leaves in storage, under which keys. The manifest is written last.

    <output>/<job id>/overlay-<rank>-<class id>-<name>.jpg    one for each explained class
    <output>/<job id>/heatmaps.npz                            all heatmaps on the network's own grid
    <output>/<job id>/manifest.json                           last: its presence means all is there

The same job writes the same bytes under the same keys, whichever attempt it is.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker import __version__
from worker.contract import HeatmapWish, Job, ManifestRef, OverlayWish, SeenClass, Warned
from worker.deadline import Deadline
from worker.gradcam.decode import Decoded
from worker.gradcam.explain import Explanation, Prediction, overlay_name
from worker.gradcam.picture import encode_jpeg, overlay
from worker.manifest import (
    ArtifactRecord,
    ClassRef,
    ExplainedClass,
    InputRecord,
    Manifest,
    NetworkRecord,
)
from worker.storage import Store

MANIFEST = "manifest.json"
HEATMAPS = "heatmaps.npz"


@dataclass(frozen=True)
class Rendered:
    """An artifact before it is stored. `index` is the explained class it belongs to, None for all."""

    name: str
    data: bytes
    media_type: str
    kind: str
    index: int | None
    facts: dict[str, Any]  # width and height, or dtype and shape


def render(job: Job, decoded: Decoded, seen: Explanation, deadline: Deadline) -> list[Rendered]:
    """Everything the job wants to be left behind, as bytes. Raises JobTimeout."""
    rendered = []
    for wish in job.artifacts:
        for made in _render(wish, decoded, seen):
            deadline.check("render")
            rendered.append(made)
    return rendered


def _render(wish: OverlayWish | HeatmapWish, decoded: Decoded, seen: Explanation) -> Iterator[Rendered]:
    if isinstance(wish, HeatmapWish):
        facts = {"dtype": "float32", "shape": seen.heatmaps.shape}
        yield Rendered(HEATMAPS, _npz(seen), "application/x-npz", "heatmap", None, facts)
        return
    height, width, _ = decoded.pixels.shape
    for index, explained in enumerate(seen.explained):
        laid = overlay(decoded.pixels, seen.shown[index], alpha=wish.alpha, colormap=wish.colormap)
        facts = {"width": width, "height": height}
        name = overlay_name(explained)
        yield Rendered(name, encode_jpeg(laid), "image/jpeg", "overlay", index, facts)


def _npz(seen: Explanation) -> bytes:
    file = io.BytesIO()
    np.savez(
        file,
        heatmaps=seen.heatmaps,
        class_ids=np.array([one.id for one in seen.explained], np.int32),
        raw_min=seen.raw_min,
        raw_max=seen.raw_max,
    )
    return file.getvalue()


def upload(store: Store, folder: str, rendered: list[Rendered], deadline: Deadline) -> list[ArtifactRecord]:
    """Store the artifacts; the records stand in the same order. Raises StorageUnavailable, JobTimeout."""
    records = []
    for made in rendered:
        deadline.check("upload")
        record = ArtifactRecord(
            kind=made.kind,
            uri=store.put(f"{folder}/{made.name}", made.data, made.media_type),
            media_type=made.media_type,
            bytes=len(made.data),
            sha256=hashlib.sha256(made.data).hexdigest(),
            **made.facts,
        )
        records.append(record)
    return records


def describe(
    job: Job,
    image: InputRecord,
    seen: Explanation,
    rendered: list[Rendered],
    records: list[ArtifactRecord],
) -> Manifest:
    """The manifest: a function of the job, the image and the network alone, so no time, no attempt."""
    size = (image.width, image.height)
    explanations = []
    for index, one in enumerate(seen.explained):
        own = [
            record if made.index == index else record.model_copy(update={"index": index})
            for made, record in zip(rendered, records, strict=True)
            if made.index in {index, None}
        ]
        explanations.append(_explained(one, seen, index, size, tuple(own)))
    facts = seen.network
    return Manifest(
        job_id=job.id,
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
        ),
        method=job.method.model_copy(update={"layer": seen.layer}),
        predictions=classes(seen.predictions),
        explanations=tuple(explanations),
        warnings=warnings(seen),
    )


def _explained(
    one: Prediction,
    seen: Explanation,
    index: int,
    size: tuple[int, int],
    records: tuple[ArtifactRecord, ...],
) -> ExplainedClass:
    heatmap = seen.heatmaps[index]
    rows, columns = heatmap.shape
    row, column = divmod(int(heatmap.argmax()), columns)
    middle = (int((column + 0.5) * size[0] / columns), int((row + 0.5) * size[1] / rows))
    return ExplainedClass(
        **{"class": ClassRef(id=one.id, wnid=one.wnid, name=one.name)},
        rank=one.rank,
        probability=one.probability,
        raw_min=float(seen.raw_min[index]),
        raw_max=float(seen.raw_max[index]),
        peak_xy=middle if heatmap.any() else None,
        artifacts=records,
    )


def classes(predictions: tuple[Prediction, ...]) -> tuple[SeenClass, ...]:
    """Predictions -> how they are written on the wire."""
    return tuple(SeenClass(**vars(one)) for one in predictions)


def warnings(seen: Explanation) -> tuple[Warned, ...]:
    """What the reader of this explanation should know."""
    return tuple(Warned(code="zero_heatmap", class_id=one) for one in seen.zero_heatmaps)


def seal(store: Store, folder: str, manifest: Manifest) -> ManifestRef:
    """Write the manifest, last. Raises StorageUnavailable."""
    text = manifest.model_dump_json(indent=1).encode()
    uri = store.put(f"{folder}/{MANIFEST}", text, "application/json")
    return ManifestRef(manifest_uri=uri, manifest_sha256=hashlib.sha256(text).hexdigest())
