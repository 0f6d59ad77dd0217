"""The artifacts of a job in storage, and the manifest that lists them.

    <output>/<job id>/overlay-<rank>-<class id>-<name>.jpg    one per explained class
    <output>/<job id>/heatmaps.npz                            all heatmaps at the size of the network's grid
    <output>/<job id>/heatmap-<rank>-<class id>-<name>.png    one greyscale image per class, on request
    <output>/<job id>/grid.jpg                                the image and its overlays on one sheet
    <output>/<job id>/animation.gif                           the overlays in turn, each with its title
    <output>/<job id>/report.html                             one self-contained page that shows everything
    <output>/<job id>/manifest.json                           written last: if it exists, all others exist

Every attempt at a job writes the same artifacts under the same keys. They are equal byte for byte if the
attempts computed the image in batches of the same size; otherwise float32 numbers differ from the seventh
digit on.

An attempt that fails or is given up leaves what it has written: artifacts are uploaded while others are
drawn.
A write that was in progress when its attempt was given up cannot be undone. It may arrive after the next
attempt wrote the same key. Then an artifact can differ from the sha256 in the manifest, by those digits.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from gradcam_worker import __version__
from gradcam_worker.artifacts.render import RenderedArtifact, RenderResult
from gradcam_worker.artifacts.truth import Located
from gradcam_worker.artifacts.warnings import result_warnings
from gradcam_worker.gradcam import network_inputs
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.explain import Explanation, Prediction
from gradcam_worker.gradcam.localization import Localization
from gradcam_worker.gradcam.methods import masking
from gradcam_worker.gradcam.network_inputs import InputValue, NetworkInput
from gradcam_worker.gradcam.sizing import Placement
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import (
    ArtifactRecord,
    ClassRef,
    ExplainedClass,
    InputRecord,
    LocalizationRecord,
    Manifest,
    MethodRecord,
    NetworkRecord,
    SalientRegion,
    TruthRecord,
)
from gradcam_worker.schemas.options import MethodSpec
from gradcam_worker.schemas.status import ClassScore, ManifestRef
from gradcam_worker.storage.store import Object, Store
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

MANIFEST = "manifest.json"


def describe(store: Store, folder: str, rendered: RenderResult) -> list[ArtifactRecord]:
    """Describe the artifacts of a job or of a shard's row, as a manifest records them, in their order."""
    return [
        ArtifactRecord(
            kind=artifact.kind,
            uri=store.uri(f"{folder}/{artifact.name}"),
            media_type=artifact.media_type,
            bytes=len(artifact.data),
            sha256=hashlib.sha256(artifact.data).hexdigest(),
            **artifact.properties,
        )
        for artifact in rendered.artifacts
    ]


def object_of(folder: str, artifact: RenderedArtifact) -> Object:
    """Make the object of an artifact of a job, or of a shard's row."""
    return f"{folder}/{artifact.name}", artifact.data, artifact.media_type


def build_manifest(
    job: Job,
    image: InputRecord,
    explanation: Explanation,
    rendered: RenderResult,
    records: list[ArtifactRecord],
    located: Located,
) -> Manifest:
    """Describe the result of a job.

    The manifest depends on the job, the image and the network only. It holds no time and no attempt number,
    so that every attempt writes the same one.

    Args:
        job: The job.
        image: Its image.
        explanation: What was computed.
        rendered: The artifacts.
        records: What `describe` returned for them.
        located: Where the heat lies, and what is known about the image.
    """
    image_size = (image.width, image.height)
    recorded = list(zip(rendered.artifacts, records, strict=True))
    explanations = []
    for index, prediction in enumerate(explanation.explained):
        class_records = [
            record if artifact.class_index == index else record.model_copy(update={"index": index})
            for artifact, record in recorded
            if artifact.class_index == index or (artifact.class_index is None and artifact.kind == "heatmap")
        ]
        explanations.append(
            _explained_class(
                prediction,
                explanation,
                index,
                image_size,
                rendered.salient_regions[index],
                located.localizations[index],
                tuple(class_records),
            )
        )
    network = explanation.network
    return Manifest(
        job_id=job.id,
        job_fingerprint=job_fingerprint(job),
        generator={"name": "gradcam-worker", "version": __version__},
        input=image,
        network=NetworkRecord(
            name=network.name,
            layer=explanation.layer,
            input_size=network.input_size,
            preprocessing=network.preprocessing,
            weights_sha256=network.weights_sha256,
            backend=network.backend,
            dtype=network.dtype,
            head=network.head,
            sizing=network.sizing.describe(),
            shown_xyxy=shown_xyxy(explanation.placement, image),
        ),
        method=method_record(job.method, explanation),
        inputs=_inputs(network.inputs, job),
        predictions=class_scores(explanation.predictions),
        explanations=tuple(explanations),
        truth=_truth(located) if job.annotations else None,
        against=tuple(ClassRef(**label._asdict()) for label in explanation.against),
        artifacts=tuple(
            record
            for artifact, record in recorded
            if artifact.class_index is None and artifact.kind != "heatmap"
        ),
        warnings=(*result_warnings(image, explanation), *located.warnings),
    )


def method_record(method: MethodSpec, explanation: Explanation) -> MethodRecord:
    """Describe how an explanation was computed, with what the job left open.

    Args:
        method: The job's method.
        explanation: What was computed.
    """
    computed = explanation.method
    if computed is None:
        return MethodRecord(**{**dict(method), "layer": explanation.layer})
    if not masking.is_masking(computed):
        return MethodRecord(**vars(computed))
    scored_images = masking.image_count(computed, explanation.network.input_size)
    return MethodRecord(**{**vars(computed), "baseline": masking.BASELINE, "scored_images": scored_images})


def shown_xyxy(placement: Placement | None, image: InputRecord) -> tuple[float, float, float, float] | None:
    """The part of an image on which its heatmaps lie, in its pixels; None: exactly all of it."""
    if placement is None:
        return None
    left, top, right, bottom = (round(side, 3) for side in placement.box((image.height, image.width)))
    return left, top, right, bottom


def _inputs(inputs: Sequence[NetworkInput], job: Job) -> dict[str, InputValue]:
    """What a job's network takes beside the image, with defaults and constants."""
    if not inputs and not job.inputs:
        return {}
    resolved = network_inputs.resolve(inputs, job.inputs, job.network)
    return {name: network_inputs.as_given(value) for name, value in resolved.items()}


def _explained_class(
    prediction: Prediction,
    explanation: Explanation,
    index: int,
    image_size: tuple[int, int],
    salient_region: SalientRegion | None,
    localization: Localization,
    records: tuple[ArtifactRecord, ...],
) -> ExplainedClass:
    return ExplainedClass(
        **{"class": ClassRef(id=prediction.id, wnid=prediction.wnid, name=prediction.name)},
        rank=prediction.rank,
        probability=prediction.probability,
        raw_min=float(explanation.raw_min[index]),
        raw_max=float(explanation.raw_max[index]),
        peak_xy=peak_xy(explanation.heatmaps[index], image_size, explanation.placement),
        hot=salient_region,
        metrics=dict(explanation.metrics[index]) if explanation.metrics else {},
        completeness_error=(
            None if explanation.completeness_error is None else float(explanation.completeness_error[index])
        ),
        localization=LocalizationRecord(**vars(localization)),
        artifacts=records,
    )


def _truth(located: Located) -> TruthRecord:
    truth = located.truth
    classes = tuple(ClassRef(**label._asdict()) for label in located.classes)
    return TruthRecord(
        classes=None if truth.ids is None else classes,
        correct=truth.is_correct,
        rank=truth.rank,
        boxes=truth.boxes,
        mask=truth.mask,
    )


def peak_xy(
    heatmap: NDArray[np.float32], image_size: tuple[int, int], placement: Placement | None = None
) -> tuple[int, int] | None:
    """Find the center of the hottest cell of a heatmap.

    Args:
        heatmap: (rows, columns).
        image_size: Width and height of the image in pixels.
        placement: Where the heatmap lies on the image; None: on all of it.

    Returns:
        The position (x, y) in pixels of the image; None if the heatmap is zero everywhere on it.
    """
    rows, columns = heatmap.shape
    if placement:
        return _placed_peak_xy(heatmap, image_size, placement)
    row, column = divmod(int(heatmap.argmax()), columns)
    center = (int((column + 0.5) * image_size[0] / columns), int((row + 0.5) * image_size[1] / rows))
    return center if heatmap.any() else None


def _placed_peak_xy(
    heatmap: NDArray[np.float32], image_size: tuple[int, int], placement: Placement
) -> tuple[int, int] | None:
    """`peak_xy` of the cells whose centres lie on the image."""
    (rows, columns), (width, height) = heatmap.shape, image_size
    down, across = placement.visible((rows, columns))
    visible = heatmap[down, across]
    row, column = divmod(int(visible.argmax()), visible.shape[1])
    left, top, right, bottom = placement.box((height, width))
    x = left + (across.start + column + 0.5) / columns * (right - left)
    y = top + (down.start + row + 0.5) / rows * (bottom - top)
    return (min(max(int(x), 0), width - 1), min(max(int(y), 0), height - 1)) if visible.any() else None


def class_scores(predictions: tuple[Prediction, ...]) -> tuple[ClassScore, ...]:
    """Convert predictions to their form in documents."""
    return tuple(ClassScore(**vars(prediction)) for prediction in predictions)


def encode_manifest(store: Store, folder: str, manifest: Manifest) -> tuple[Object, ManifestRef]:
    """Make the object of a manifest, which is written when all artifacts are, and the reference to it."""
    text, key = manifest.model_dump_json(indent=1).encode(), f"{folder}/{MANIFEST}"
    reference = ManifestRef(manifest_uri=store.uri(key), manifest_sha256=hashlib.sha256(text).hexdigest())
    return (key, text, "application/json"), reference


def job_fingerprint(job: Job) -> str:
    """Compute the SHA-256 of everything in a job that its artifacts depend on.

    The id, the webhooks and the metadata do not count.
    """
    fields = {"image", "network", "target", "inputs", "annotations", "method", "metrics", "artifacts"}
    kinds = [spec.kind for spec in job.artifacts]  # `kind` is a default, which `exclude_defaults` drops
    text = f"{kinds} {job.model_dump_json(include=fields, exclude_defaults=True)}"
    return hashlib.sha256(text.encode()).hexdigest()


def find_manifest(
    store: Store,
    folder: str,
    job: Job,
    image_sha256: str | None,
    row: NetworkRow,
    deadline: Deadline,
    *,
    convert_colors: bool = True,
) -> tuple[Manifest, ManifestRef] | None:
    """Find the manifest that an earlier attempt at this job wrote. All artifacts that it names exist.

    A manifest counts only if it was made for the same job, the same bytes of the image and the same version
    of the network, with the labels and the head of its row, and if the worker treats colours as it did.
    Anything else under its key, also a manifest of an earlier version that lacks these facts, is ignored:
    this attempt writes its own manifest over it.

    Args:
        store: The job's output.
        folder: The folder of the job in the output.
        job: The job.
        image_sha256: SHA-256 of the image. None if the image is gone and the job does not name its checksum:
            then the manifest may be of any bytes.
        row: The network as it is described now.
        deadline: The job's deadline.
        convert_colors: Whether this worker converts colours. A manifest says which colours were converted,
            but not that some were left as they are.

    Returns:
        The manifest and the reference to it, or None.

    Raises:
        StorageUnavailable: The store cannot be read.
        JobTimeout: The deadline passed.
        GradcamError: The deadline was cancelled, with this error.
    """
    key = f"{folder}/{MANIFEST}"
    text = store.find(key, deadline)
    if text is None:
        return None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        log.warning("manifest_replaced", uri=store.uri(key), reason="not a manifest", error=str(error)[:200])
        return None
    mismatch = _mismatch(manifest, job, image_sha256, row)
    if manifest.input.converted_from and not convert_colors:
        mismatch = mismatch or f"its colours were converted from {manifest.input.converted_from.name}"
    if mismatch:
        log.warning("manifest_replaced", uri=store.uri(key), reason=mismatch)
        return None
    return manifest, ManifestRef(
        manifest_uri=store.uri(key), manifest_sha256=hashlib.sha256(text).hexdigest()
    )


def _mismatch(manifest: Manifest, job: Job, image_sha256: str | None, row: NetworkRow) -> str | None:
    """Describe what differs between a manifest and the one that this job would write. None: nothing."""
    if manifest.job_id != job.id:
        return f"it is of job {manifest.job_id}"
    if manifest.job_fingerprint != job_fingerprint(job):
        return "it is of a different job with this id"
    if image_sha256 not in {None, manifest.input.sha256}:
        return f"it is of an image with sha256 {manifest.input.sha256}"
    if manifest.inputs != _inputs(row.inputs, job):
        return f"it is of {row.name} with other inputs, {manifest.inputs}"
    return _network_mismatch(manifest, row)


def _network_mismatch(manifest: Manifest, row: NetworkRow) -> str | None:
    """Describe what differs between the network of a manifest and the one that there is now."""
    network = manifest.network
    version = network.weights_sha256, network.preprocessing, network.sizing
    if row.file and version != (row.file.sha256, row.preprocessing.name, row.sizing.describe()):
        return (
            f"it is of a different version of {row.name}, with weights {network.weights_sha256}, "
            f"preprocessing {network.preprocessing} and sizing {network.sizing}"
        )
    if row.head.kind not in {None, network.head}:
        return f"it is of {row.name} with the head {network.head}"
    for number, name in _names(manifest):
        if row.labels and row.labels[number : number + 1] != (name,):
            return f"it is of {row.name} with other labels: class {number} was {name!r}"
    return None


def _names(manifest: Manifest) -> Iterator[tuple[int, str]]:
    """The ids and names of all classes in a manifest."""
    for score in manifest.predictions:
        yield score.id, score.name
    for label in (*(one.class_ for one in manifest.explanations), *manifest.against):
        yield label.id, label.name
