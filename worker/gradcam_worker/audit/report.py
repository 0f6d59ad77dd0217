"""The format of an audit's report, `gradcam.audit/v1`: what a dataset of heatmaps says about its network.

The same dataset and options always give the same report, byte for byte. Rows of the dataset are named by
`[row, index]`: the number of the image in the backfill's input, and of the class among those explained of it.
"""

import base64
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradcam_worker.schemas.model import ResponseModel

Cause = Literal["right_reason", "wrong_reason", "wrong_on_object", "wrong_elsewhere", "unknown"]
CAUSES: tuple[Cause, ...] = get_args(Cause)  # in the order in which reports list them
CAUSE_TEXTS: dict[Cause, str] = {
    "right_reason": "right for the right reason",
    "wrong_reason": "right for the wrong reason",
    "wrong_on_object": "wrong though looking at the object",
    "wrong_elsewhere": "wrong and looking elsewhere",
    "unknown": "unknown",
}
Place = Literal["on_object", "elsewhere", "unknown"]  # where a prediction's heat lies
TINY = 1e-12  # a smaller peak counts as none
RowIndex = tuple[int, int]  # the columns `row` and `index`


class DatasetFacts(ResponseModel):
    """The dataset that was audited."""

    uri: str
    rows: int  # images of the input
    explained: int  # images with heatmaps
    unpredicted: int  # of these, those of which the class that came first has no heatmap: not judged
    failed: int
    codes: dict[str, int]  # error code -> number of failed images
    explanations: int  # heatmaps: one for each image and explained class
    labelled: int  # explained images whose true class is known
    accuracy: float | None  # share of these in which a true class came first; None: no labels
    located: int  # explained images with boxes or a mask
    network: str
    layer: str
    weights_sha256: str | None
    method: dict[str, Any]
    against: tuple[int | str, ...] = ()
    grid: tuple[int, int]  # rows and columns of the heatmaps
    features: int | None = None  # channels of the target layer, of which the means are kept; None: of none
    complete: bool  # False: the backfill has not ended, and rows of its input are missing


class Basis(ResponseModel):
    """What the places of the predictions' heat were judged by, each with the number of images."""

    regions: int = 0  # by boxes or masks
    typical_heat: int = 0  # by the typical heat of the predicted class, and the border of the image
    nothing: int = 0  # too few images of the class, or a heatmap of zeros


class Thresholds(ResponseModel):
    """When a prediction counts as looking at the object.

    With boxes or a mask of at most `largest_region` of the image: where `heat_inside` is at least `inside`,
    or at least `over_chance` times the region's share of the image. Else: where `heat_at_border` is less
    than `at_border`, and the agreement with the typical heat of the class is at least `agreement`.
    """

    inside: float = Field(default=0.5, ge=0, le=1)
    over_chance: float = Field(default=2.0, ge=0)
    largest_region: float = Field(default=0.67, ge=0, le=1)
    at_border: float = Field(default=0.5, ge=0, le=1)
    agreement: float = Field(default=0.3, ge=0)
    typical_images: int = Field(default=8, ge=2)  # of which a typical heat is made, at least


class ColumnFacts(ResponseModel):
    """A column of the dataset."""

    name: str
    type: str  # Arrow's name
    carried: bool  # from the backfill's input


class HeatCells(ResponseModel):
    """A heatmap on image coordinates, row by row, one byte for each cell; 255 is its peak."""

    rows: int
    columns: int
    cells: str  # base64

    @classmethod
    def of(cls, heat: NDArray[np.floating]) -> Self:
        """Encode a heatmap (rows, columns). Where it is negative or no number, the cell is 0."""
        scaled = np.clip(np.nan_to_num(heat.astype(np.float64), posinf=1), 0, None)
        cells = np.rint(scaled / max(float(scaled.max()), TINY) * 255).astype(np.uint8)
        rows, columns = cells.shape
        return cls(rows=rows, columns=columns, cells=base64.b64encode(cells.tobytes()).decode())


class ClassReport(ResponseModel):
    """What is known of a class.

    `causes` and `examples` are of the images that are predicted as the class.
    """

    id: int
    wnid: str
    name: str
    images: int  # in which it was explained
    predicted: int  # in which it came first
    truths: int  # of which it is a true class, as far as labels are known
    right: int  # predicted and true
    missed: int  # true, and another class came first
    accuracy: float | None  # share of `truths` that were predicted; None: no labels
    precision: float | None  # share of the labelled predictions that are right; None: no labels
    probability: float | None  # mean of its probability where it was explained
    causes: dict[Cause, int]
    elsewhere: int  # predictions that do not look at the object, with or without labels
    typical_heat: HeatCells | None  # mean of its predictions, of the right ones where labels are known
    mean_heat_inside: float | None  # of its predictions
    mean_heat_at_border: float | None
    to_learn: float
    examples: dict[Cause, tuple[RowIndex, ...]] = Field(default_factory=dict)  # most confident first


class Confusion(ResponseModel):
    """Images of one true class that were predicted as another."""

    truth: int
    predicted: int
    images: int
    share: float  # of all images of the true class
    causes: dict[Cause, int]
    to_learn: float
    examples: tuple[RowIndex, ...]  # most confident first; the row of the predicted class


ShortcutKind = Literal["place", "background", "spread"]
ShortcutBasis = Literal["boxes", "other_classes"]


class ClusterReport(ResponseModel):
    """Images of a class that look at the same, in a sample of its predictions."""

    class_id: int
    number: int  # of the cluster on the map
    images: int  # of the sample
    share: float  # of the sample of the class
    accuracy: float | None  # share of them that are right; None: no labels
    place: str  # where most of their heat lies
    heat_inside: float | None  # mean share of their heat within boxes or masks
    heat: HeatCells  # the mean of their heat
    examples: tuple[RowIndex, ...]  # nearest to the middle first


class SuspectReport(ResponseModel):
    """What predictions of one class look at, and those of other classes do not, apart from the object."""

    class_id: int
    kind: ShortcutKind  # `spread`: heat all over the image, where no boxes are known
    basis: ShortcutBasis  # what it was told from the object by
    place: str  # as in `top left corner`
    images: int  # of a sample of the class's predictions, that look at it
    share: float  # of that sample
    accuracy: float | None  # share of them that are right; None: no labels
    other_accuracy: float | None  # the same of the other predictions of the sample
    heat_share: float  # mean share of their heat that lies there; of `spread`: of cells it is spread over
    expected_heat_share: float  # the same in other classes
    heat: HeatCells  # the mean of their heat
    region: HeatCells | None  # which cells are the region; None: no place
    examples: tuple[RowIndex, ...]  # with the most heat there first


class ShortcutReport(SuspectReport):
    """A suspect that has an effect: masking it makes the class's probability fall.

    `effect` is the mean of both falls less the fall by masking elsewhere: see
    `gradcam_worker.audit.shortcuts.masking_trial`.
    """

    masked: int  # images that were masked
    probability: float  # mean of the class's probability before
    fall_blurred: float  # by blurring the region
    fall_filled: float  # by filling it with the mean colour
    fall_elsewhere: float
    effect: float
    confidence_interval: tuple[float, float]
    confidence: float  # of the interval, corrected for the number of suspects


class MaskingFacts(ResponseModel):
    """What was tried on the network itself."""

    suspects: int = 0
    named: int = 0
    dropped: int = 0  # without an effect
    untested: int = 0
    left_out: str | None = None  # why nothing was tried
    unread: dict[str, int] = Field(default_factory=dict)  # error code -> images that could not be read
    min_effect: float | None = None
    seed: int = 0


class DataFile(ResponseModel):
    """A Parquet file of the dataset."""

    name: str  # relative to the dataset
    rows: int  # records, of failed images too
    first: int | None  # least and greatest `row` in it
    last: int | None
    bytes: int


class AuditReport(ResponseModel):
    """`gradcam.audit/v1`: the report of `gradcam audit`."""

    schema_: Literal["gradcam.audit/v1"] = Field(default="gradcam.audit/v1", alias="schema")
    generator: str
    dataset: DatasetFacts
    basis: Basis
    advice: tuple[str, ...]  # sentences: what would make the audit say more
    thresholds: Thresholds
    columns: tuple[ColumnFacts, ...]
    classes: tuple[ClassReport, ...]  # those with the most to learn first
    confusions: tuple[Confusion, ...]  # likewise
    confusions_left_out: int = 0  # pairs with less to learn than the listed ones
    clusters: tuple[ClusterReport, ...] = ()  # of each class, the largest first
    shortcuts: tuple[ShortcutReport, ...] = ()  # those with the surest effect first
    suspects: tuple[SuspectReport, ...] = ()  # untested; the most conspicuous first
    masking: MaskingFacts = MaskingFacts()
    files: tuple[DataFile, ...]
    # Name of a Parquet file beside the report, with x, y, cluster and cause of each record of rows.parquet,
    # in its order; nan and -1: not in a sample. None: clusters were not looked for.
    map: str | None = None
