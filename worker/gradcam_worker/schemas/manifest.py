"""What a job leaves in the bucket, described: `gradcam.manifest/v1`, written last."""

from typing import Literal

from pydantic import Field

from gradcam_worker.schemas.job import JobId, Sha256
from gradcam_worker.schemas.model import ResponseModel
from gradcam_worker.schemas.options import MethodSpec
from gradcam_worker.schemas.status import ClassScore, ResultWarning


class ArtifactRecord(ResponseModel):
    """One stored object. `index`: which slice of an array file belongs to this class."""

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
    """Where the heatmap, at the image's size, is at least `threshold` of its peak, around its peak."""

    threshold: float
    box_xyxy: tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom excluded


class ExplainedClass(ResponseModel):
    """One explained class. `peak_xy`: the middle of the hottest cell, in pixels of the image."""

    class_: ClassRef = Field(alias="class")
    rank: int  # among all classes, by score
    probability: float
    raw_min: float
    raw_max: float
    peak_xy: tuple[int, int] | None
    hot: SalientRegion | None = None
    metrics: dict[str, float] = Field(default_factory=dict)  # deletion and insertion, where asked for
    artifacts: tuple[ArtifactRecord, ...]


class DamageRecord(ResponseModel):
    """What the image lacks."""

    missing: float  # share of the image, from 0 to 1, as far as that can be told
    detail: str


class InputRecord(ResponseModel):
    """The image that was explained."""

    uri: str
    sha256: Sha256
    bytes: int
    media_type: str
    width: int
    height: int
    damage: DamageRecord | None = None  # None: it is whole


class NetworkRecord(ResponseModel):
    """The network, in full."""

    name: str
    layer: str
    input_size: tuple[int, int]
    preprocessing: str
    weights_sha256: Sha256 | None
    backend: str
    dtype: str
    head: Literal["softmax", "sigmoid", "probabilities"] = "softmax"  # but for softmax, they may not sum to 1


class MethodRecord(MethodSpec, ResponseModel):
    """How the heatmaps were computed, and at which layer."""


class Manifest(ResponseModel):
    """`gradcam.manifest/v1`, written last.

    It holds nothing that another attempt would change, but for the last digits of its numbers, which a pass
    over another number of images rounds in another way.
    """

    schema_: Literal["gradcam.manifest/v1"] = Field(default="gradcam.manifest/v1", alias="schema")
    job_id: JobId
    job_fingerprint: Sha256 | None = None  # of all that the job asked for; None: of an earlier version
    generator: dict[str, str]
    input: InputRecord
    network: NetworkRecord
    method: MethodRecord
    predictions: tuple[ClassScore, ...]
    explanations: tuple[ExplainedClass, ...]
    artifacts: tuple[ArtifactRecord, ...] = ()  # of the whole, not of one class
    warnings: tuple[ResultWarning, ...] = ()
