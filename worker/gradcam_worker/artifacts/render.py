"""The artifacts of one explained image, as bytes, before they are uploaded."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from gradcam_worker import __version__
from gradcam_worker.artifacts.npz import to_npz
from gradcam_worker.artifacts.warnings import result_warnings
from gradcam_worker.gradcam import report
from gradcam_worker.gradcam.classes import versus
from gradcam_worker.gradcam.decoding.decode import Decoded
from gradcam_worker.gradcam.explain import Explanation, file_name
from gradcam_worker.gradcam.imaging import animation, overlay, region, sheet
from gradcam_worker.gradcam.imaging.resize import Pixels, shrink_to_edge
from gradcam_worker.gradcam.methods import integrated
from gradcam_worker.images.prepare import DecodedImage
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.manifest import SalientRegion
from gradcam_worker.schemas.options import (
    AnimationSpec,
    ArtifactSpec,
    GridSpec,
    HeatmapSpec,
    MethodSpec,
    OverlaySpec,
    ReportSpec,
)

# threshold -> the box of each explained class, in pixels of the image; None if its heatmap is zero
Boxes = dict[float, list[region.Box | None]]


@dataclass(frozen=True)
class Source:
    """The job, or the row of a shard, that artifacts are made for, as a report describes it."""

    job_id: str
    method: MethodSpec
    created_at: datetime | None = None  # the same for all attempts, which write the same bytes
    metadata: Mapping[str, str] = field(default_factory=dict)  # the job's own names and values


@dataclass(frozen=True)
class RenderedArtifact:
    """An artifact before it is uploaded."""

    name: str  # file name
    data: bytes
    media_type: str
    kind: str
    class_index: int | None  # of the explained class that it shows; None: it shows all of them
    properties: dict[str, Any]  # width and height, or dtype and shape


@dataclass(frozen=True)
class RenderResult:
    """The artifacts of one image, and the salient regions that were found while drawing them."""

    artifacts: list[RenderedArtifact]
    salient_regions: tuple[SalientRegion | None, ...]  # per explained class; None if its heatmap is zero


def render(
    specs: Sequence[ArtifactSpec],
    image: DecodedImage,
    explanation: Explanation,
    deadline: Deadline,
    *,
    source: Source,
    ready: Callable[[RenderedArtifact], object] = lambda _: None,
) -> RenderResult:
    """Render the artifacts of a job, or of a row of a shard.

    Args:
        specs: The artifacts to make.
        image: The decoded image.
        explanation: Its heatmaps.
        deadline: By when all artifacts have to be rendered.
        source: The job or row, as a report describes it.
        ready: Is called with each artifact as soon as it is made.

    Raises:
        JobTimeout: The deadline passed.
    """
    overlays = [spec for spec in specs if isinstance(spec, OverlaySpec)]
    outlined = sorted((spec for spec in overlays if spec.box or spec.contour), key=lambda spec: not spec.box)
    # The manifest has one region per class: the first box that is drawn, else the first contour.
    manifest_spec = outlined[0] if outlined else OverlaySpec()
    boxes: Boxes = {
        spec.threshold: [] for spec in (manifest_spec, *overlays) if spec.box or spec is manifest_spec
    }
    for threshold, class_boxes in boxes.items():
        for heatmap in explanation.shown:
            deadline.check("render")
            class_boxes.append(region.hot_box(heatmap, image.decoded.size, threshold, explanation.placement))
    # Arrays first: they take no time, and are uploaded while images are drawn.
    arrays = {
        index for index, spec in enumerate(specs) if isinstance(spec, HeatmapSpec) and spec.format != "png"
    }
    made: dict[int, list[RenderedArtifact]] = {index: [] for index in range(len(specs))}
    for index in sorted(made, key=lambda index: index not in arrays):
        for artifact in _render(specs[index], image, explanation, boxes, source):
            deadline.check("render")
            made[index].append(artifact)
            ready(artifact)
    artifacts = [artifact for of_spec in made.values() for artifact in of_spec]
    threshold = manifest_spec.threshold
    regions = (box and SalientRegion(threshold=threshold, box_xyxy=box) for box in boxes[threshold])
    return RenderResult(artifacts, tuple(regions))


def _render(
    spec: ArtifactSpec,
    image: DecodedImage,
    explanation: Explanation,
    boxes: Boxes,
    source: Source,
) -> Iterator[RenderedArtifact]:
    decoded = image.decoded
    if isinstance(spec, OverlaySpec):
        yield from _overlays(spec, decoded, explanation, boxes)
    elif isinstance(spec, GridSpec):
        yield _grid(spec, decoded, explanation, source)
    elif isinstance(spec, AnimationSpec):
        yield _animation(spec, decoded, explanation)
    elif isinstance(spec, ReportSpec):
        yield _report(source, image, explanation)
    elif spec.format == "png":
        for index, (prediction, heatmap) in enumerate(
            zip(explanation.explained, explanation.shown, strict=True)
        ):
            grey = overlay.to_grey(heatmap, decoded.size, explanation.placement)
            yield _image_artifact(file_name("heatmap", prediction, "png"), grey, "png", "heatmap", index)
    else:
        properties = {"dtype": "float32", "shape": explanation.heatmaps.shape}
        media_type = f"application/x-{spec.format}"
        yield RenderedArtifact(
            f"heatmaps.{spec.format}",
            _encode_arrays(spec, explanation),
            media_type,
            "heatmap",
            None,
            properties,
        )


def _overlays(
    spec: OverlaySpec, decoded: Decoded, explanation: Explanation, boxes: Boxes
) -> Iterator[RenderedArtifact]:
    edge = min(spec.max_edge or overlay.MAX_SIDES[spec.format], overlay.MAX_SIDES[spec.format])
    pixels = shrink_to_edge(decoded.pixels, edge)
    placement = explanation.placement
    base = overlay.OverlayBase(
        pixels, alpha=spec.alpha, colormap=spec.colormap, bgr=True, placement=placement
    )
    buffer = np.empty_like(pixels)  # shared by all classes: each overlay is encoded before the next is drawn
    for index, (prediction, heatmap) in enumerate(zip(explanation.explained, explanation.shown, strict=True)):
        drawn = base.draw(heatmap, out=buffer)
        if spec.contour:
            drawn = region.draw_contour(drawn, heatmap, spec.threshold, placement)
        if spec.box and (box := boxes[spec.threshold][index]):
            drawn = region.draw_box(
                drawn, region.scale_box(box, decoded.size, (drawn.shape[0], drawn.shape[1]))
            )
        name = file_name("overlay", prediction, overlay.EXTENSIONS[spec.format])
        yield _image_artifact(name, drawn, spec.format, "overlay", index, bgr=True)


def _grid(spec: GridSpec, decoded: Decoded, explanation: Explanation, source: Source) -> RenderedArtifact:
    """Draw the image and its overlays on one sheet with a legend, at display size, whatever its own size."""
    pixels = sheet.as_tile(decoded.pixels)
    tiles = sheet.sheet(
        sheet.arrange_in_rows([("photo", pixels), *_titled_overlays(spec, pixels, explanation)])
    )
    strongest, note = _about_scale(source.method, explanation)
    rows, columns = explanation.heatmaps.shape[1:]
    facts = [
        f"map of {columns} x {rows} cells, interpolated",
        explanation.network.name,
        f"layer {explanation.layer}",
        _method_text(source.method),
        *filter(None, (_date(source),)),
        *(f"{name}: {value}" for name, value in source.metadata.items()),
    ]
    legend = sheet.Legend(overlay.colors(spec.colormap), spec.alpha, ("0", strongest), note, facts)
    figure = sheet.with_legend(tiles, legend, sheet.letter_height(max(pixels.shape[1], sheet.MIN_WIDTH)))
    return _image_artifact(f"grid.{overlay.EXTENSIONS[spec.format]}", figure, spec.format, "grid", None)


def _about_scale(method: MethodSpec, explanation: Explanation) -> tuple[str, str]:
    """What full colour stands for, and what follows from that."""
    if len(explanation.explained) == 1:
        return "strongest region", ""
    if method.normalize == "per_class" or method.name == integrated.NAME:
        note = "Each class has its own scale: colours of two classes cannot be compared."
        return "strongest region of each class", note
    return "strongest region of all classes", "One scale for all classes."


def _date(source: Source) -> str:
    """When the job was created; empty if it is not known."""
    return f"{source.created_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if source.created_at else ""


def _animation(spec: AnimationSpec, decoded: Decoded, explanation: Explanation) -> RenderedArtifact:
    pixels = animation.as_frame(decoded.pixels, spec.max_edge, len(explanation.explained))
    frames = [sheet.with_title(title, drawn) for title, drawn in _titled_overlays(spec, pixels, explanation)]
    data = animation.animate(frames, kind=spec.format, frame_s=spec.frame_s)
    properties = {"width": frames[0].shape[1], "height": frames[0].shape[0]}
    media_type = animation.MEDIA_TYPES[spec.format]
    return RenderedArtifact(f"animation.{spec.format}", data, media_type, "animation", None, properties)


def _titled_overlays(
    spec: GridSpec | AnimationSpec, pixels: Pixels, explanation: Explanation
) -> Iterator[sheet.Tile]:
    """Draw the overlay of each explained class, with its title."""
    base = overlay.OverlayBase(
        pixels, alpha=spec.alpha, colormap=spec.colormap, placement=explanation.placement
    )
    for index, heatmap in enumerate(explanation.shown):
        yield explanation.title(index), base.draw(heatmap)


def _report(source: Source, image: DecodedImage, explanation: Explanation) -> RenderedArtifact:
    record, network, method = image.record, explanation.network, source.method
    size = f"{record.width} x {record.height} pixels, {record.media_type}, {record.bytes:,} bytes"
    facts = {
        **({"Date": _date(source)} if source.created_at else {}),
        "Network": network.name,
        "Method": ", ".join(filter(None, (_method_text(method), versus(explanation.against)))),
        "Layer": explanation.layer,
        "Job": source.job_id,
        "Image": record.uri,
        "Image SHA-256": record.sha256,
        "Image size": size,
        "Weights SHA-256": network.weights_sha256 or "not known",
        "Network input": f"{network.input_size[1]} x {network.input_size[0]} pixels",
        "Preprocessing": network.preprocessing,
        "Sizing": network.sizing.describe(),
        "Normalization": method.normalize,
        "Computed with": f"{network.backend}, {network.dtype}",
        "Made by": f"gradcam-worker {__version__}",
    }
    name = "" if record.uri.startswith("data:") else record.uri.rpartition("/")[2]
    data = report.page(
        explanation,
        image.decoded.pixels,
        name=name or "image",
        facts=facts,
        metadata=source.metadata,
        method=method.name,
        normalize=method.normalize,
        warnings=[warning.model_dump(mode="json") for warning in result_warnings(record, explanation)],
    )
    return RenderedArtifact("report.html", data, "text/html; charset=utf-8", "report", None, {})


def _method_text(method: MethodSpec) -> str:
    """Name a method and the score that it explains."""
    score = {"eigencam": "", "notebook": " of the probability"}.get(method.name, f" of the {method.score}")
    details = {
        "rise": f", {method.masks} masks of {method.cells} x {method.cells} cells, seed {method.seed}",
        "occlusion": f", a square of {method.window} pixels every {method.stride} pixels",
        integrated.NAME: f", {method.steps} steps from {method.baseline}",
    }.get(method.name, "")
    return f"{method.name}{score}{details}" + (", with the mirror image" if method.flip else "")


def _image_artifact(
    name: str, pixels: Pixels, format_: str, kind: str, class_index: int | None, *, bgr: bool = False
) -> RenderedArtifact:
    properties = {"width": pixels.shape[1], "height": pixels.shape[0]}
    data = overlay.encode(pixels, format_, bgr=bgr)
    return RenderedArtifact(name, data, overlay.MEDIA_TYPES[format_], kind, class_index, properties)


def _encode_arrays(spec: HeatmapSpec, explanation: Explanation) -> bytes:
    if spec.format == "npy":
        file = io.BytesIO()
        np.save(file, explanation.heatmaps)
        return file.getvalue()
    class_ids = np.array([prediction.id for prediction in explanation.explained], np.int32)
    return to_npz(
        {
            "heatmaps": explanation.heatmaps,
            "class_ids": class_ids,
            "raw_min": explanation.raw_min,
            "raw_max": explanation.raw_max,
        }
    )
