"""What a job asks for -> its artifacts, as bytes, before they are stored."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradcam_worker import __version__
from gradcam_worker.gradcam import report
from gradcam_worker.gradcam.classes import caption
from gradcam_worker.gradcam.decoding.decode import Decoded
from gradcam_worker.gradcam.explain import Explanation, file_name
from gradcam_worker.gradcam.imaging import animation, overlay, region, sheet
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

Boxes = dict[float, list[region.Box | None]]  # by threshold: of each explained class, in the photo


@dataclass(frozen=True)
class Piece:
    """An artifact before it is stored. `index` is the explained class it belongs to, None for all of them."""

    name: str
    data: bytes
    media_type: str
    kind: str
    index: int | None
    facts: dict[str, Any]  # width and height, or dtype and shape


@dataclass(frozen=True)
class Rendered:
    """All that a job leaves behind but the manifest, and what was found out on the way."""

    pieces: list[Piece]
    hot: tuple[SalientRegion | None, ...]  # of each explained class; None where its heatmap is dark


def render(
    specs: Sequence[ArtifactSpec],
    image: DecodedImage,
    seen: Explanation,
    deadline: Deadline,
    *,
    job_id: str,
    method: MethodSpec,
) -> Rendered:
    """Everything that a job, or a row of a shard, is to leave behind, as bytes.

    Args:
        specs: What is to be made.
        image: The photo, at full size.
        seen: Its heatmaps.
        deadline: By when it has to be made.
        job_id: What a report says of the job.
        method: The same, of how the heatmaps were computed.

    Raises:
        JobTimeout: The deadline passed.
    """
    overlays = [spec for spec in specs if isinstance(spec, OverlaySpec)]
    framed = sorted((spec for spec in overlays if spec.box or spec.contour), key=lambda spec: not spec.box)
    shown = framed[0] if framed else OverlaySpec()
    boxes: Boxes = {spec.threshold: [] for spec in (shown, *overlays) if spec.box or spec is shown}
    for threshold, found in boxes.items():
        for heatmap in seen.shown:
            deadline.check("render")
            found.append(region.hot_box(heatmap, image.decoded.size, threshold))
    pieces = []
    for spec in specs:
        for piece in _render(spec, image, seen, boxes, job_id, method):
            deadline.check("render")
            pieces.append(piece)
    threshold = shown.threshold
    hot = (box and SalientRegion(threshold=threshold, box_xyxy=box) for box in boxes[threshold])
    return Rendered(pieces, tuple(hot))


def _render(
    spec: ArtifactSpec, image: DecodedImage, seen: Explanation, boxes: Boxes, job_id: str, method: MethodSpec
) -> Iterator[Piece]:
    decoded = image.decoded
    if isinstance(spec, OverlaySpec):
        yield from _overlays(spec, decoded, seen, boxes)
    elif isinstance(spec, GridSpec):
        yield _grid(spec, decoded, seen)
    elif isinstance(spec, AnimationSpec):
        yield _animation(spec, decoded, seen)
    elif isinstance(spec, ReportSpec):
        yield _report(job_id, method, image, seen)
    elif spec.format == "png":
        for index, (explained, heatmap) in enumerate(zip(seen.explained, seen.shown, strict=True)):
            grey = overlay.to_grey(heatmap, decoded.size)
            yield _picture(file_name("heatmap", explained, "png"), grey, "png", "heatmap", index)
    else:
        facts = {"dtype": "float32", "shape": seen.heatmaps.shape}
        media_type = f"application/x-{spec.format}"
        yield Piece(f"heatmaps.{spec.format}", _arrays(spec, seen), media_type, "heatmap", None, facts)


def _overlays(spec: OverlaySpec, decoded: Decoded, seen: Explanation, boxes: Boxes) -> Iterator[Piece]:
    edge = min(spec.max_edge or overlay.MAX_SIDES[spec.format], overlay.MAX_SIDES[spec.format])
    photo = overlay.shrink_to_edge(decoded.pixels, edge)
    base = overlay.OverlayBase(photo, alpha=spec.alpha, colormap=spec.colormap, bgr=True)
    whole = np.empty_like(photo)  # the same for every class: it is encoded before the next is laid
    for index, (explained, heatmap) in enumerate(zip(seen.explained, seen.shown, strict=True)):
        laid = base.draw(heatmap, out=whole)
        if spec.contour:
            laid = region.draw_contour(laid, heatmap, spec.threshold)
        if spec.box and (box := boxes[spec.threshold][index]):
            laid = region.draw_box(laid, region.scale_box(box, decoded.size, (laid.shape[0], laid.shape[1])))
        name = file_name("overlay", explained, overlay.EXTENSIONS[spec.format])
        yield _picture(name, laid, spec.format, "overlay", index, bgr=True)


def _grid(spec: GridSpec, decoded: Decoded, seen: Explanation) -> Piece:
    """The figure that the notebook drew: no larger than it is shown, whatever the photo's size."""
    photo = sheet.as_tile(decoded.pixels)
    drawn = sheet.sheet(sheet.arrange_in_rows([("photo", photo), *_titled(spec, photo, seen)]))
    return _picture(f"grid.{overlay.EXTENSIONS[spec.format]}", drawn, spec.format, "grid", None)


def _animation(spec: AnimationSpec, decoded: Decoded, seen: Explanation) -> Piece:
    photo = animation.as_frame(decoded.pixels, spec.max_edge, len(seen.explained))
    frames = [sheet.with_title(title, laid) for title, laid in _titled(spec, photo, seen)]
    data = animation.animate(frames, kind=spec.format, frame_s=spec.frame_s)
    facts = {"width": frames[0].shape[1], "height": frames[0].shape[0]}
    media_type = animation.MEDIA_TYPES[spec.format]
    return Piece(f"animation.{spec.format}", data, media_type, "animation", None, facts)


def _titled(spec: GridSpec | AnimationSpec, photo: overlay.Pixels, seen: Explanation) -> Iterator[sheet.Tile]:
    """The overlay of each explained class, and what class that is."""
    base = overlay.OverlayBase(photo, alpha=spec.alpha, colormap=spec.colormap)
    for one, heatmap in zip(seen.explained, seen.shown, strict=True):
        yield caption(one.id, one.name, one.probability), base.draw(heatmap)


def _report(job_id: str, method: MethodSpec, photo: DecodedImage, seen: Explanation) -> Piece:
    image, network = photo.record, seen.network
    size = f"{image.width} x {image.height} pixels, {image.media_type}, {image.bytes:,} bytes"
    facts = {
        "Job": job_id,
        "Image": image.uri,
        "Image SHA-256": image.sha256,
        "Image size": size,
        "Network": network.name,
        "Weights SHA-256": network.weights_sha256 or "not known",
        "Network input": f"{network.input_size[1]} x {network.input_size[0]} pixels",
        "Preprocessing": network.preprocessing,
        "Layer": seen.layer,
        "Method": _described(method),
        "Normalization": method.normalize,
        "Computed with": f"{network.backend}, {network.dtype}",
        "Made by": f"gradcam-worker {__version__}",
    }
    name = "" if image.uri.startswith("data:") else image.uri.rpartition("/")[2]
    data = report.page(seen, photo.decoded.pixels, name=name or "image", facts=facts, method=method.name)
    return Piece("report.html", data, "text/html; charset=utf-8", "report", None, {})


def _described(method: MethodSpec) -> str:
    """A method in words, with what it really explains."""
    of = {"eigencam": "", "notebook": " of the probability"}.get(method.name, f" of the {method.score}")
    return f"{method.name}{of}" + (", with the mirror image" if method.flip else "")


def _picture(
    name: str, pixels: overlay.Pixels, format_: str, kind: str, index: int | None, *, bgr: bool = False
) -> Piece:
    facts = {"width": pixels.shape[1], "height": pixels.shape[0]}
    data = overlay.encode(pixels, format_, bgr=bgr)
    return Piece(name, data, overlay.MEDIA_TYPES[format_], kind, index, facts)


def _arrays(spec: HeatmapSpec, seen: Explanation) -> bytes:
    file = io.BytesIO()
    if spec.format == "npy":
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
