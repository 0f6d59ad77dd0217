"""The wire format of a job's options: classes, method, artifacts and metrics."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    StrictFloat,
    StrictInt,
    StringConstraints,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from gradcam_worker.schemas.model import RequestModel, without_defaults

Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
RequestedClass = StrictInt | Annotated[str, StringConstraints(min_length=1, max_length=128)]
Alpha = Annotated[float, Field(ge=0, le=1)]  # the weight of the colours; the rest is the weight of the image
Edge = Annotated[int, Field(ge=16, le=32_767, strict=True)]  # the maximum of the longer side, in pixels
Length = Annotated[int, Field(ge=1, le=8192, strict=True)]  # in pixels of the network's input
Colormap = Literal["jet", "turbo", "viridis", "inferno", "magma", "plasma", "cividis", "grey"]
Metric = Literal["deletion", "insertion", "confidence_drop", "confidence_increase"]
MASKING_PARAMETERS = {  # of the methods that cover parts of the image
    "rise": ("masks", "cells", "seed"),
    "occlusion": ("window", "stride"),
}
PARAMETERS = {**MASKING_PARAMETERS, "integrated_gradients": ("steps", "baseline")}
MAX_FLOAT = sys.float_info.max  # a whole number in JSON may be larger, and infinity is no number
MAX_INPUTS, MAX_INPUT_LENGTH, MAX_INPUT_NUMBERS = 64, 1024, 65_536  # of a network, beside the image


def describe_input_problem(value: object) -> str | None:
    """Describe why a value cannot be given to a network beside the image; None: it can.

    Whether the network takes it is known where the network is registered.
    """
    if isinstance(value, list | tuple):
        if len(value) > MAX_INPUT_NUMBERS:
            return f"it is a list of {len(value):,}; at most {MAX_INPUT_NUMBERS:,} numbers are allowed"
        strange = next((one for one in value if not _is_number(one)), None)
        return None if strange is None else f"it is a list with {strange!r:.40}: it must hold numbers"
    if isinstance(value, str):
        if len(value) <= MAX_INPUT_LENGTH:
            return None
        return f"it is a text of {len(value):,} characters; at most {MAX_INPUT_LENGTH:,} are allowed"
    return (
        None
        if _is_number(value)
        else f"it is {value!r:.40}: it must be a number, a text or a list of numbers"
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT


def _check_input(value: object) -> object:
    if problem := describe_input_problem(value):
        raise ValueError(problem)
    return value


InputNumber = StrictInt | StrictFloat
InputValue = Annotated[
    InputNumber
    | Annotated[str, StringConstraints(max_length=MAX_INPUT_LENGTH)]
    | Annotated[tuple[InputNumber, ...], Field(max_length=MAX_INPUT_NUMBERS)],
    BeforeValidator(_check_input),
]
Inputs = Annotated[dict[Name, InputValue], Field(max_length=MAX_INPUTS)]  # of a network, beside the image


def _refuse_single_class(value: object, info: ValidationInfo) -> object:
    if isinstance(value, str):
        message = f"{info.field_name} is a list, as in [{value[:60]!r}]"
        raise ValueError(message)  # noqa: TRY004  # pydantic reports only ValueError
    return value


Classes = Annotated[
    Annotated[tuple[RequestedClass, ...], Field(min_length=1, max_length=1000)] | None,
    BeforeValidator(_refuse_single_class),
]


class Target(RequestModel):
    """The classes to explain: exactly one of `top_n` and `classes` is needed.

    With `against`, each is explained against these classes: why it is that class and not one of them. `top_n`
    then counts the other classes only.
    """

    top_n: Annotated[int, Field(ge=1, le=1000, strict=True)] | None = None
    classes: Classes = None
    against: Classes = None

    if TYPE_CHECKING:  # type checkers accept a list for the tuple

        def __init__(
            self,
            *,
            top_n: int | None = None,
            classes: Sequence[int | str] | None = None,
            against: Sequence[int | str] | None = None,
        ) -> None: ...

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, serialize(self), ["against"])

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.top_n is None) == (self.classes is None):
            given = "neither" if self.top_n is None else "both"
            message = f"exactly one of top_n and classes is needed, {given} given"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _not_against_itself(self) -> Self:
        if both := {*(self.classes or ())} & {*(self.against or ())}:
            message = f"{min(both, key=str)!r} is both in classes and in against"
            raise ValueError(message)
        return self


DEFAULT_TOP_N = 3  # of the command line


def is_default_target(target: Mapping[str, Any]) -> bool:
    """Whether fields of a `Target` say neither how many classes are explained, nor which."""
    return target.keys().isdisjoint({"top_n", "classes"})


def default_target(target: Mapping[str, Any], classes: int | None = None) -> dict[str, Any]:
    """Fill in how many classes are explained, where nobody has said it.

    Args:
        target: Fields of a `Target`.
        classes: The number of classes of the network; None: not known here.

    Returns:
        The fields, with `top_n` or `classes`.
    """
    if not is_default_target(target):
        return dict(target)
    others = DEFAULT_TOP_N if classes is None else classes - len(set(target.get("against") or ()))
    return {**target, "top_n": max(min(DEFAULT_TOP_N, others), 1)}


MethodName = Literal[
    "gradcam",
    "counterfactual",
    "gradcam++",
    "hirescam",
    "xgradcam",
    "layercam",
    "eigencam",
    "notebook",
    "integrated_gradients",
    "rise",
    "occlusion",
]
ArtifactKind = Literal["overlay", "heatmap", "grid", "animation", "report"]
WITHOUT_LAYER = ("integrated_gradients", *MASKING_PARAMETERS)  # methods that explain no layer's activations
WITHOUT_CLASS = ("eigencam",)  # methods whose heatmap is the same for every class


class MethodSpec(RequestModel):
    """How to compute the heatmaps. Without a name, as the network is explained by default.

    That is `gradcam`, or `rise` for a network that only gives scores. `rise` and `occlusion` need nothing but
    scores: they score the image with parts of it covered by grey, `masks` + 1 times (1025 by default), or
    once for each position of the window and once more (170 times by default). The heatmaps
    of `integrated_gradients` have the size of the network's input; each of its `steps` costs a forward and a
    backward pass. With `notebook` the network gets an image that was not preprocessed, so the predictions
    differ too.
    """

    name: MethodName = "gradcam"
    layer: Name | None = None  # None: the network's default target layer; "auto": found in its graph
    score: Literal["logit", "probability"] = "logit"
    normalize: Literal["per_class", "joint", "none"] = "per_class"
    flip: bool = False  # average the heatmaps of the image and of its mirror image
    steps: Annotated[int, Field(ge=8, le=1024, strict=True)] | None = (
        None  # of integrated_gradients; None: 64
    )
    baseline: Literal["black", "grey", "blurred"] | None = None  # of integrated_gradients; None: black

    masks: Annotated[int, Field(ge=2, le=100_000, strict=True)] | None = None  # of rise; None: 1024
    cells: Annotated[int, Field(ge=2, le=64, strict=True)] | None = None  # of a mask's side, of rise; None: 7
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] | None = None  # of rise; None: 0
    window: Length | None = None  # side of the square of occlusion; None: a seventh of the shorter side
    stride: Length | None = None  # of the square of occlusion; None: half of the window

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        if not self.is_named:  # the network's default is known where the job runs
            return self
        for owner, names in PARAMETERS.items():
            for name in names:
                if owner != self.name and getattr(self, name) is not None:
                    message = f"{name} is a parameter of {owner}, not of {self.name}"
                    raise ValueError(message)
        if self.name in MASKING_PARAMETERS and (self.flip or self.layer is not None):
            given = "flip" if self.flip else "layer"
            message = f"{given} is not for {self.name}, which covers parts of the image"
            raise ValueError(message)
        if self.name == "integrated_gradients" and self.layer is not None:
            message = "layer is not for integrated_gradients, which explains the pixels"
            raise ValueError(message)
        return self

    @property
    def is_named(self) -> bool:
        """Whether the method was chosen by its name."""
        return "name" in self.model_fields_set

    @model_serializer(mode="wrap")
    def _without_what_is_open(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out parameters that are None, which earlier versions refuse, and a name that is open."""
        fields: dict[str, Any] = serialize(self)
        if not self.is_named:
            fields.pop("name", None)
        return {name: value for name, value in fields.items() if value is not None or name == "layer"}


class OverlaySpec(RequestModel):
    """One image for each class: the heatmap over the job's image, in the size of the job's image.

    `contour` outlines the regions where the heatmap is above `threshold`; `box` frames the region around the
    peak.
    """

    kind: Literal["overlay"] = "overlay"
    format: Literal["jpeg", "png", "webp"] = "jpeg"
    alpha: Alpha = 0.4
    colormap: Colormap = "jet"
    max_edge: Edge | None = None  # None: the size of the image
    contour: bool = False
    box: bool = False
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5  # as a share of the heatmap's peak


class HeatmapSpec(RequestModel):
    """The heatmaps as numbers: all in one npz or npy file, float32, on the grid of the target layer; or, as
    png, one 8-bit grey image for each class, in the size of the job's image.
    """

    kind: Literal["heatmap"] = "heatmap"
    format: Literal["npz", "npy", "png"] = "npz"


class GridSpec(RequestModel):
    """One image with the job's image and all overlays in rows of three, titled with class and probability."""

    kind: Literal["grid"] = "grid"
    format: Literal["jpeg", "png"] = "jpeg"
    alpha: Alpha = 0.4
    colormap: Colormap = "jet"


class AnimationSpec(RequestModel):
    """An endless animation of the overlays, each titled with class and probability."""

    kind: Literal["animation"] = "animation"
    format: Literal["gif", "webp"] = "gif"
    alpha: Alpha = 0.4
    colormap: Colormap = "jet"
    max_edge: Edge = 640
    frame_s: Annotated[float, Field(ge=0.1, le=10)] = 1.0  # the time for each class, in seconds


class ReportSpec(RequestModel):
    """One self-contained HTML page: image, heatmaps, predictions and metadata."""

    kind: Literal["report"] = "report"
    format: Literal["html"] = "html"


ArtifactSpec = Annotated[
    OverlaySpec | HeatmapSpec | GridSpec | AnimationSpec | ReportSpec, Field(discriminator="kind")
]
