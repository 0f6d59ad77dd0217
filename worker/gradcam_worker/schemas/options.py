"""The wire: what a job may wish for: which classes, which method, which artifacts, which metrics."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, StrictInt, StringConstraints, model_validator

from gradcam_worker.schemas.model import RequestModel

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
RequestedClass = StrictInt | Annotated[str, StringConstraints(min_length=1, max_length=128)]
Alpha = Annotated[float, Field(ge=0, le=1)]  # of the colour; the rest is the photo
Edge = Annotated[int, Field(ge=16, le=32_767, strict=True)]  # pixels of the longer side, at most
Colormap = Literal["jet", "turbo", "viridis", "inferno", "magma", "plasma", "cividis", "grey"]
Metric = Literal["deletion", "insertion"]


def _no_single_class(value: object) -> object:
    if isinstance(value, str):
        message = f"classes is a list, as in [{value[:60]!r}]"
        raise ValueError(message)  # noqa: TRY004  # pydantic tells of ValueError alone
    return value


class Target(RequestModel):
    """Which classes to explain: exactly one of the two."""

    top_n: Annotated[int, Field(ge=1, le=1000, strict=True)] | None = None
    classes: Annotated[
        Annotated[tuple[RequestedClass, ...], Field(min_length=1, max_length=1000)] | None,
        BeforeValidator(_no_single_class),
    ] = None

    if TYPE_CHECKING:  # a list may be given for the tuple

        def __init__(
            self, *, top_n: int | None = None, classes: Sequence[int | str] | None = None
        ) -> None: ...

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.top_n is None) == (self.classes is None):
            given = "neither" if self.top_n is None else "both"
            message = f"exactly one of top_n and classes is needed, {given} given"
            raise ValueError(message)
        return self


class MethodSpec(RequestModel):
    """How to compute the heatmaps.

    `notebook` gives the network an image that was not preprocessed, so its predictions differ too.
    """

    name: Literal[
        "gradcam",
        "counterfactual",
        "gradcam++",
        "hirescam",
        "xgradcam",
        "layercam",
        "eigencam",
        "notebook",
    ] = "gradcam"
    layer: Name | None = None  # None: the network's own target layer; "auto": found in its graph
    score: Literal["logit", "probability"] = "logit"
    normalize: Literal["per_class", "joint", "none"] = "per_class"
    flip: bool = False  # the mean of the image's map and of its mirror image's


class OverlaySpec(RequestModel):
    """One picture a class: the heatmap laid over the photo, at the photo's size.

    `contour` outlines where the heatmap is above `threshold`, `box` frames the part of it around the peak.
    """

    kind: Literal["overlay"] = "overlay"
    format: Literal["jpeg", "png", "webp"] = "jpeg"
    alpha: Alpha = 0.4
    colormap: Colormap = "jet"
    max_edge: Edge | None = None  # None: as large as the photo
    contour: bool = False
    box: bool = False
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the heatmap's peak


class HeatmapSpec(RequestModel):
    """The heatmaps as numbers: all on the network's own grid, float32, in one npz or npy file; or, as png,
    one 8-bit grey picture a class, at the photo's size.
    """

    kind: Literal["heatmap"] = "heatmap"
    format: Literal["npz", "npy", "png"] = "npz"


class GridSpec(RequestModel):
    """One sheet: the photo and its overlays in rows of three, each with its class and probability."""

    kind: Literal["grid"] = "grid"
    format: Literal["jpeg", "png"] = "jpeg"
    alpha: Alpha = 0.4
    colormap: Colormap = "jet"


class AnimationSpec(RequestModel):
    """The overlays one after the other, each titled with its class and probability, for ever."""

    kind: Literal["animation"] = "animation"
    format: Literal["gif", "webp"] = "gif"
    alpha: Alpha = 0.4
    colormap: Colormap = "jet"
    max_edge: Edge = 640
    frame_s: Annotated[float, Field(ge=0.1, le=10)] = 1.0  # how long a class is shown


class ReportSpec(RequestModel):
    """One HTML page that needs nothing else: photo, heatmaps, predictions, facts."""

    kind: Literal["report"] = "report"
    format: Literal["html"] = "html"


ArtifactSpec = Annotated[
    OverlaySpec | HeatmapSpec | GridSpec | AnimationSpec | ReportSpec, Field(discriminator="kind")
]
