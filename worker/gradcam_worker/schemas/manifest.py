"""The wire format of a manifest, `gradcam.manifest/v1`: the description of a job's results in the bucket."""

from typing import Literal, Self

from pydantic import Field, model_validator

from gradcam_worker.schemas.job import JobId, Sha256
from gradcam_worker.schemas.model import ResponseModel
from gradcam_worker.schemas.options import Inputs, MethodSpec
from gradcam_worker.schemas.status import ClassScore, ResultWarning


class ArtifactRecord(ResponseModel):
    """One stored object. `index`: the slice of an array file that belongs to the class."""

    kind: str
    uri: str
    media_type: str
    bytes: int
    sha256: Sha256
    width: int | None = None
    height: int | None = None
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    index: int | None = None


class ClassRef(ResponseModel):
    """A class of the network."""

    id: int
    wnid: str
    name: str


class SalientRegion(ResponseModel):
    """The connected region around the heatmap's peak where it is at least `threshold` of the peak."""

    threshold: float
    box_xyxy: tuple[
        int, int, int, int
    ]  # left, top, right, bottom, in pixels of the image; right and bottom are exclusive


class LocalizationRecord(ResponseModel):
    """Where the heat of a class lies. What is not known is None, and all if the heatmap is zero."""

    heat_at_border: float | None = (
        None  # share in the outer band of the image, of a tenth of its shorter side
    )
    heat_inside: float | None = None  # share inside the boxes or the mask of the object
    inside_area: float | None = None  # what that would be if the heat were everywhere the same
    pointing_hit: bool | None = None  # whether the peak is inside
    iou: float | None = None  # of the region at half of the peak and the object: intersection over union


class TruthRecord(ResponseModel):
    """What is known about the image."""

    classes: tuple[ClassRef, ...] | None = None  # the true ones, those that the network has; None: no label
    correct: bool | None = None  # whether the class with the highest score is one of them
    rank: int | None = None  # the best one of them, among all classes
    boxes: tuple[tuple[float, float, float, float], ...] | None = None  # in pixels of the upright image
    mask: str | None = None  # URI without secrets, or run lengths as JSON


class ExplainedClass(ResponseModel):
    """One explained class. `peak_xy`: the center of the heatmap's highest cell, in pixels of the image."""

    class_: ClassRef = Field(alias="class")
    rank: int  # among all classes, by score
    probability: float
    raw_min: float
    raw_max: float
    peak_xy: tuple[int, int] | None
    hot: SalientRegion | None = None
    metrics: dict[str, float] = Field(default_factory=dict)  # those that were requested
    # Of integrated_gradients: how far the sum of the attributions is from the difference between the scores
    # of image and baseline, as a share of it.
    completeness_error: float | None = None
    localization: LocalizationRecord = LocalizationRecord()
    artifacts: tuple[ArtifactRecord, ...]


class DamageRecord(ResponseModel):
    """The damage of an image."""

    missing: float  # the missing share of the image, from 0 to 1; an estimate
    detail: str


class ColorRecord(ResponseModel):
    """The colours that an image had before they were converted to sRGB."""

    kind: str  # icc: an embedded profile; cicp: code points of a PNG; gamma: gAMA and cHRM of a PNG
    name: str  # the description in the profile, the four code points, or the gamma


class InputRecord(ResponseModel):
    """The image that was explained."""

    uri: str
    sha256: Sha256
    bytes: int
    media_type: str
    width: int
    height: int
    damage: DamageRecord | None = None  # None: it is undamaged
    converted_from: ColorRecord | None = None  # None: its pixels were taken as they are


class NetworkRecord(ResponseModel):
    """The network that was explained."""

    name: str
    layer: str
    input_size: tuple[int, int]
    preprocessing: str
    weights_sha256: Sha256 | None
    backend: str
    dtype: str
    head: Literal["softmax", "sigmoid", "probabilities"] = (
        "softmax"  # except for softmax, the probabilities may not sum to 1
    )
    sizing: str = "area, squash"  # how the image was brought to the input size
    shown_xyxy: tuple[float, float, float, float] | None = (
        None  # left, top, right, bottom of what the input shows of the image, in its pixels; None: all
    )


class MethodRecord(MethodSpec, ResponseModel):
    """The method and the layer of the heatmaps.

    Of a method that covers parts of the image there is no layer; `baseline` is what is covered becomes, and
    `scored_images` is what it cost: the number of images that the network scored.
    """

    baseline: str | None = None  # type: ignore[assignment]  # a document that is read, of any version
    scored_images: int | None = None

    @model_validator(mode="after")
    def _check_parameters(self) -> Self:
        """Take it as it is: it says what was computed, by any version."""
        return self


class Manifest(ResponseModel):
    """`gradcam.manifest/v1`, written last.

    Every attempt of a job writes the same manifest, except for the last digits of its numbers: their rounding
    depends on the number of images in a pass.
    """

    schema_: Literal["gradcam.manifest/v1"] = Field(default="gradcam.manifest/v1", alias="schema")
    job_id: JobId
    job_fingerprint: Sha256 | None = None  # a digest of the job's content; None: an earlier version wrote it
    generator: dict[str, str]
    input: InputRecord
    network: NetworkRecord
    method: MethodRecord
    inputs: Inputs = Field(default_factory=dict)  # beside the image: as given, or the registry's defaults
    predictions: tuple[ClassScore, ...]
    explanations: tuple[ExplainedClass, ...]
    truth: TruthRecord | None = None  # None: the job names nothing
    against: tuple[ClassRef, ...] = ()  # each is explained against these: why it is that class and not one
    artifacts: tuple[ArtifactRecord, ...] = ()  # of the whole job, not of one class
    warnings: tuple[ResultWarning, ...] = ()
