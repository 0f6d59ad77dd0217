"""What a job leaves in storage, under which keys. The manifest is written last.

    <output>/<job id>/overlay-<rank>-<class id>-<name>.jpg    one for each explained class
    <output>/<job id>/heatmaps.npz                            all heatmaps on the network's own grid
    <output>/<job id>/heatmap-<rank>-<class id>-<name>.png    one grey picture for each, where asked for
    <output>/<job id>/grid.jpg                                the photo and its overlays on one sheet
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
from worker.contract import (
    ArtifactWish,
    GridWish,
    HeatmapWish,
    Job,
    ManifestRef,
    OverlayWish,
    SeenClass,
    Warned,
)
from worker.deadline import Deadline
from worker.gradcam import picture
from worker.gradcam.classes import caption
from worker.gradcam.decode import Decoded
from worker.gradcam.explain import Explanation, Prediction, file_name
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


@dataclass(frozen=True)
class Rendered:
    """An artifact before it is stored. `index` is the explained class it belongs to, None for all of them."""

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


def _render(wish: ArtifactWish, decoded: Decoded, seen: Explanation) -> Iterator[Rendered]:
    if isinstance(wish, OverlayWish):
        yield from _overlays(wish, decoded, seen)
    elif isinstance(wish, GridWish):
        yield _grid(wish, decoded, seen)
    elif wish.format == "png":
        size = (decoded.pixels.shape[0], decoded.pixels.shape[1])
        for index, (explained, heatmap) in enumerate(zip(seen.explained, seen.shown, strict=True)):
            grey = picture.grey(heatmap, size)
            yield _picture(file_name("heatmap", explained, "png"), grey, "png", "heatmap", index)
    else:
        facts = {"dtype": "float32", "shape": seen.heatmaps.shape}
        media_type = f"application/x-{wish.format}"
        yield Rendered(f"heatmaps.{wish.format}", _arrays(wish, seen), media_type, "heatmap", None, facts)


def _overlays(wish: OverlayWish, decoded: Decoded, seen: Explanation) -> Iterator[Rendered]:
    photo = picture.within_edge(decoded.pixels, wish.max_edge)
    for index, (explained, heatmap) in enumerate(zip(seen.explained, seen.shown, strict=True)):
        laid = picture.overlay(photo, heatmap, alpha=wish.alpha, colormap=wish.colormap)
        name = file_name("overlay", explained, picture.EXTENSIONS[wish.format])
        yield _picture(name, laid, wish.format, "overlay", index)


def _grid(wish: GridWish, decoded: Decoded, seen: Explanation) -> Rendered:
    """The figure that the notebook drew: no larger than it is shown, whatever the photo's size."""
    photo = picture.within_edge(decoded.pixels, 2 * max(picture.TILE))
    tiles = [("photo", photo)]
    for one, heatmap in zip(seen.explained, seen.shown, strict=True):
        laid = picture.overlay(photo, heatmap, alpha=wish.alpha, colormap=wish.colormap)
        tiles.append((caption(one.id, one.name, one.probability), laid))
    sheet = picture.grid(picture.in_rows(tiles))
    return _picture(f"grid.{picture.EXTENSIONS[wish.format]}", sheet, wish.format, "grid", None)


def _picture(name: str, pixels: picture.Pixels, format_: str, kind: str, index: int | None) -> Rendered:
    facts = {"width": pixels.shape[1], "height": pixels.shape[0]}
    data = picture.encode(pixels, format_)
    return Rendered(name, data, picture.MEDIA_TYPES[format_], kind, index, facts)


def _arrays(wish: HeatmapWish, seen: Explanation) -> bytes:
    file = io.BytesIO()
    if wish.format == "npy":
        np.save(file, seen.heatmaps)
    else:
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
    made = list(zip(rendered, records, strict=True))
    explanations = []
    for index, one in enumerate(seen.explained):
        own = [
            record if each.index == index else record.model_copy(update={"index": index})
            for each, record in made
            if each.index == index or (each.index is None and each.kind == "heatmap")
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
        artifacts=tuple(record for each, record in made if each.kind == "grid"),
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
