"""The wire format of what is known about an image: its class, boxes around its objects, or their mask.

All positions are in pixels of the upright image: of the photo as it is shown, turned by its EXIF data.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StrictInt,
    StringConstraints,
    model_serializer,
    model_validator,
)

from gradcam_worker.schemas.model import RequestModel, without_defaults
from gradcam_worker.schemas.options import RequestedClass

MAX_LABELS = 100  # of an image
MAX_BOXES = 1000
MAX_RUNS = 65_536  # of a mask as run lengths
MAX_RUNS_TEXT = 262_144  # characters of compressed run lengths
MAX_SIDE = 65_535  # of a mask, in pixels


class AnnotatedBox(RequestModel):
    """A box around an object. What lies beyond the image is cut off."""

    xyxy: tuple[float, float, float, float]
    """left, top, right, bottom in pixels of the upright image; right and bottom are excluded"""
    relative: bool = False
    """the four are shares of the image's width and height"""
    label: RequestedClass | None = None
    """the class of the object; none: it counts for every class"""

    if TYPE_CHECKING:  # type checkers accept a list for the tuple

        def __init__(
            self, *, xyxy: Sequence[float], relative: bool = False, label: int | str | None = None
        ) -> None: ...

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, serialize(self), ["relative", "label"])

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        left, top, right, bottom = self.xyxy
        if not all(map(math.isfinite, self.xyxy)) or right <= left or bottom <= top:
            message = (
                f"a box is left, top, right, bottom, with left < right and top < bottom, not {[*self.xyxy]}"
            )
            raise ValueError(message)
        return self


class RunLengths(RequestModel):
    """A mask as COCO writes it: lengths of runs of 0 and 1 in turn, beginning with 0, column by column."""

    size: tuple[StrictInt, StrictInt]
    """height and width of the mask"""
    counts: (
        Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(max_length=MAX_RUNS)]
        | Annotated[str, StringConstraints(max_length=MAX_RUNS_TEXT)]
    )
    """the lengths, or the text to which pycocotools compresses them"""

    if TYPE_CHECKING:

        def __init__(self, *, size: Sequence[int], counts: Sequence[int] | str) -> None: ...

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if not all(0 < side <= MAX_SIDE for side in self.size):
            message = f"size is [height, width], each from 1 to {MAX_SIDE}, not {[*self.size]}"
            raise ValueError(message)
        height, width = self.size
        if not isinstance(self.counts, str) and sum(self.counts) != height * width:
            message = f"the runs of a mask of {height} x {width} must sum to {height * width:,}, not "
            message += f"{sum(self.counts):,}"
            raise ValueError(message)
        return self


class AnnotatedMask(RequestModel):
    """The pixels of the object: a picture, or run lengths. Exactly one of both is needed."""

    uri: Annotated[str, StringConstraints(min_length=1, max_length=2_000_000)] | None = None
    """of a picture: what is not 0 is the object; fetched as the image is"""
    rle: RunLengths | None = None

    if TYPE_CHECKING:

        def __init__(
            self, *, uri: str | None = None, rle: RunLengths | dict[str, Any] | None = None
        ) -> None: ...

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, serialize(self), ["uri", "rle"])

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.uri is None) == (self.rle is None):
            given = "neither" if self.uri is None else "both"
            message = f"exactly one of uri and rle is needed, {given} given"
            raise ValueError(message)
        return self


class Annotations(RequestModel):
    """What is known about an image. With it, a result says whether the network looks at the object."""

    labels: Annotated[tuple[RequestedClass, ...], Field(max_length=MAX_LABELS)] = ()
    """the true classes: ids, wnids or names"""
    boxes: Annotated[tuple[AnnotatedBox, ...], Field(max_length=MAX_BOXES)] = ()
    """of boxes with labels those of the explained class count for it, where there are any, else all"""
    mask: AnnotatedMask | None = None
    """counts instead of boxes where both are given"""

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            labels: Sequence[int | str] = ...,
            boxes: Sequence[AnnotatedBox | dict[str, Any]] = ...,
            mask: AnnotatedMask | dict[str, Any] | None = ...,
        ) -> None: ...

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, serialize(self), ["labels", "boxes", "mask"])
