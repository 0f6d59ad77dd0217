"""What is known about an image, as its network sees it, and where the heat of an explanation lies."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradcam_worker.artifacts.artifacts import peak_xy
from gradcam_worker.artifacts.truth import Located, Truth
from gradcam_worker.errors import AmbiguousClass, GradcamError, UnknownClass
from gradcam_worker.gradcam.classes import ClassIndex
from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.gradcam.localization import Region, localize, region_of_boxes
from gradcam_worker.gradcam.sizing import Size
from gradcam_worker.images.fetch import redact_uri
from gradcam_worker.images.masks import Mask
from gradcam_worker.schemas.annotations import AnnotatedBox, AnnotatedMask, Annotations
from gradcam_worker.schemas.status import ResultWarning

LABEL_UNKNOWN, LABEL_AMBIGUOUS = "label_unknown", "label_ambiguous"
CLASS_UNKNOWN, MASK_UNUSABLE, BOX_OUTSIDE = "class_unknown", "mask_unusable", "box_outside"


@dataclass(frozen=True)
class FoundMask:
    """The mask of an image, or why there is none."""

    mask: Mask | None = None
    problem: str | None = None


def find_mask(annotations: Annotations | None, read: Callable[[AnnotatedMask], Mask]) -> FoundMask:
    """Read the mask of an image, if it has one.

    Args:
        annotations: What is known about the image.
        read: Reads a mask, see `gradcam_worker.images.masks.read_mask`.

    Returns:
        The mask. One that cannot be used is told, since the image can be explained without.

    Raises:
        GradcamError: It cannot be read at present.
    """
    if annotations is None or annotations.mask is None:
        return FoundMask()
    try:
        return FoundMask(read(annotations.mask))
    except GradcamError as error:
        if error.retryable:
            raise
        if annotations.mask.rle is not None:
            return FoundMask(problem=str(error))
        # Whoever reads the warning may be no operator, and the message names settings, hosts and buckets.
        return FoundMask(problem=f"{error.code}: {error.public_message}")


class Labels:
    """Finds classes of a network by their names, and remembers what it found. Thread-safe."""

    def __init__(self, classes: ClassIndex) -> None:
        self.classes = classes
        self._found: dict[int | str, int | ResultWarning] = {}
        self._explained: set[str] = set()  # codes of warnings with suggestions, which are slow to find

    def find(self, names: Sequence[int | str]) -> tuple[tuple[int, ...], tuple[ResultWarning, ...]]:
        """Find classes.

        Args:
            names: Ids, wnids or names.

        Returns:
            The ids of those that the network has, without repetition; a warning for each other.
        """
        ids: dict[int, None] = {}
        warnings: dict[str, ResultWarning] = {}
        for name in names:
            if name not in self._found:
                self._found[name] = self._look_up(name)
            found = self._found[name]
            if isinstance(found, ResultWarning):
                warnings[str(name)] = found
            else:
                ids[found] = None
        return tuple(ids), tuple(warnings.values())

    def _look_up(self, name: int | str) -> int | ResultWarning:
        matches = self.classes.matches(name)
        if len(matches) == 1:
            return matches[0].id
        code, detail = LABEL_AMBIGUOUS if matches else LABEL_UNKNOWN, f"{str(name)[:200]!r}"
        if code not in self._explained:
            self._explained.add(code)
            try:
                self.classes.find(name)
            except (AmbiguousClass, UnknownClass) as error:
                detail = str(error)
        return ResultWarning(code=code, detail=detail)


def locate(
    explanation: Explanation,
    size: Size,
    annotations: Annotations | None,
    mask: FoundMask,
    labels: Labels,
) -> Located:
    """Compare an explanation with what is known about its image.

    Args:
        explanation: With its placement on the image.
        size: (height, width) of the upright image.
        annotations: What is known.
        mask: From `find_mask`.
        labels: Of the network.

    Returns:
        Where the heat lies, with the true classes of the image. If it names none, those of its boxes count.
    """
    height, width = size
    peaks = [peak_xy(heatmap, (width, height), explanation.placement) for heatmap in explanation.heatmaps]
    annotations = annotations or Annotations()
    regions, warnings = _Objects(annotations, size, mask, labels).of_each(explanation)
    localizations = localize(explanation.heatmaps, size, explanation.placement, peaks, regions)
    of_boxes = [box.label for box in annotations.boxes if box.label is not None]
    named = annotations.labels or of_boxes
    ids, unknown = labels.find(named)
    ranks = explanation.ranks
    truth = Truth(
        ids=ids if named else None,
        rank=int(ranks[[*ids]].min()) if ids and ranks is not None else None,
        boxes=tuple(in_pixels(box, size) for box in annotations.boxes) or None,
        mask=_mask_text(annotations.mask),
    )
    return Located(
        localizations, truth, [labels.classes[class_id] for class_id in ids], (*unknown, *warnings)
    )


class _Objects:
    """The object of each class in an image."""

    def __init__(self, annotations: Annotations, size: Size, mask: FoundMask, labels: Labels) -> None:
        self._boxes, self._size, self._mask, self._labels = annotations.boxes, size, mask, labels

    def of_each(self, explanation: Explanation) -> tuple[list[Region | None], list[ResultWarning]]:
        """The object of each explained class, None where none is known, and what cannot be used."""
        problem = self._mask.problem
        classes = [prediction.id for prediction in explanation.explained]
        if self._mask.mask is not None:
            try:
                region = self._mask.mask.region(self._size)
            except GradcamError as error:
                problem = str(error)
            else:
                return [region] * len(classes), []
        if problem is not None:
            return [None] * len(classes), [ResultWarning(code=MASK_UNUSABLE, detail=problem)]
        return self._of_boxes(classes)

    def _of_boxes(self, classes: Sequence[int]) -> tuple[list[Region | None], list[ResultWarning]]:
        height, width = self._size
        given = [(in_pixels(box, self._size), box.label) for box in self._boxes]
        boxes = [one for one in given if _is_on_image(one[0], self._size)]
        warnings = []
        if outside := [box for box, label in given if (box, label) not in boxes]:
            more = f", and {len(outside) - 1} more" if outside[1:] else ""
            first = ", ".join(f"{edge:g}" for edge in outside[0])
            detail = (
                f"The box [{first}]{more} (left, top, right, bottom) is outside of {width} x {height} pixels."
            )
            warnings.append(ResultWarning(code=BOX_OUTSIDE, detail=detail))
        if not boxes:
            return [None] * len(classes), warnings
        ids = [None if label is None else self._labels.find([label])[0] for _, label in boxes]
        corners = [box for box, _ in boxes]
        every = region_of_boxes(corners, self._size)
        regions: list[Region | None] = []
        for class_id in classes:
            own = [box for box, of in zip(corners, ids, strict=True) if of == (class_id,)]
            regions.append(region_of_boxes(own, self._size) if own else every)
        return regions, warnings


def _is_on_image(box: tuple[float, float, float, float], size: Size) -> bool:
    """Whether a part of the box is on the image."""
    (left, top, right, bottom), (height, width) = box, size
    return left < width and top < height and right > 0 and bottom > 0


def in_pixels(box: AnnotatedBox, size: Size) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a box in pixels of the upright image, as it was given."""
    height, width = size if box.relative else (1, 1)
    left, top, right, bottom = box.xyxy
    return left * width, top * height, right * width, bottom * height


def _mask_text(mask: AnnotatedMask | None) -> str | None:
    if mask is None:
        return None
    if mask.rle is not None:
        return json.dumps(mask.rle.model_dump(mode="json"), separators=(",", ":"))
    return redact_uri(mask.uri or "")
