"""The format of a comparison of two datasets, `gradcam.comparison/v1`.

The same datasets and options give the same report. `a` is the dataset that was named first, `b` the other.
A change is always b minus a.
"""

from typing import Any, Literal

from pydantic import Field

from gradcam_worker.audit.dataset.heat_table import ImageKey
from gradcam_worker.audit.report import HeatCells
from gradcam_worker.schemas.model import ResponseModel

Rows = Literal["predicted", "true", "all"]  # which images count for a class
ClassKey = Literal["id", "wnid", "name"]  # what a class of one dataset is found by in the other
MovedBy = Literal["heat", "heat_inside"]
FIGURES = {  # name -> what it is; for --fail-if, the gauges and the log
    "moved": "classes whose heat moved",
    "compared": "classes that were tested",
    "left_out": "classes of either dataset that could not be tested",
    "distance_max": "greatest distance of a class's mean heatmaps",
    "distance_median": "median distance of the mean heatmaps of all tested classes",
    "heat_inside_a": "mean share of the heat inside boxes or masks, in a",
    "heat_inside_b": "the same in b",
    "heat_inside_change": "b minus a",
    "heat_inside_fall_max": "greatest fall of a class's heat inside, from a to b",
    "heat_at_border_a": "mean share of the heat at the border of images, in a",
    "heat_at_border_b": "the same in b",
    "heat_at_border_change": "b minus a",
    "accuracy_a": "share of the images with labels that are predicted right, in a",
    "accuracy_b": "the same in b",
    "accuracy_change": "b minus a",
    "images_a": "images that were explained, in a",
    "images_b": "the same in b",
    "failed_a": "images that failed, in a",
    "failed_b": "the same in b",
    "images_in_both": "images that are in both datasets",
    "predictions_changed": "share of the images in both whose prediction is another class",
}


class ComparedDataset(ResponseModel):
    """One of the two datasets."""

    uri: str
    rows: int  # images of the input
    explained: int  # images with heatmaps
    failed: int
    network: str
    layer: str
    weights_sha256: str | None
    method: dict[str, Any]
    against: tuple[int | str, ...]
    grid: tuple[int, int]
    complete: bool  # False: the backfill has not ended, and rows of its input are missing
    share: float  # of its images that were compared: less than 1 where it does not fit into memory


class Pairing(ResponseModel):
    """Which images were compared with each other."""

    by: ImageKey | None  # None: not the same images; then the classes are compared as two groups of images
    images_a: int  # different ones
    images_b: int
    in_both: int


class Difference(ResponseModel):
    """Something by which the two backfills differ."""

    what: str
    a: Any
    b: Any


class ComparisonThresholds(ResponseModel):
    """When a class counts as moved, and what is tested.

    It moved if a test of it has an adjusted p-value of at most `false_discovery_rate`, and the distance of
    its mean heatmaps is at least `distance` with an effect of at least `effect`, or the change of its heat
    inside at least `inside`.
    """

    false_discovery_rate: float = Field(default=0.05, gt=0, lt=1)
    distance: float = Field(default=0.1, ge=0, le=1)
    effect: float = Field(default=0.5, ge=0)  # 0.5: what Cohen calls medium
    inside: float = Field(default=0.15, ge=0, le=1)
    min_images: int = Field(default=10, ge=2)  # of a class, in each dataset; of pairs
    sample: int = Field(default=400, ge=2)  # images of a class that are tested, at most
    rows: Rows = "predicted"
    seed: int = Field(default=0, ge=0)


class ClassSide(ResponseModel):
    """A class in one of the datasets, in the images that were tested."""

    id: int
    images: int  # that count for the class, tested or not
    probability: float  # mean
    heat_inside: float | None  # mean; None: no boxes or masks
    heat_at_border: float | None
    precision: float | None  # share of those with labels whose prediction is right
    heat: HeatCells  # mean heatmap


class ChangeTest(ResponseModel):
    """How a class differs, and how sure that is.

    Attributes:
        change: Of the heat: the distance of the mean heatmaps, half the sum of their absolute differences:
            the share of the heat that lies elsewhere. Of the heat inside: its mean in b minus that in a.
        by_chance: The distance that would be found without any difference; of the heat inside likewise.
        effect: In standard deviations of single images; it does not grow with their number.
        p: Of the permutation test.
        q: Adjusted for the number of tests, by Benjamini and Hochberg.
    """

    change: float
    by_chance: float
    effect: float
    p: float
    q: float


class ClassComparison(ResponseModel):
    """A class that was tested."""

    wnid: str
    name: str
    tested: int  # pairs of images, or images of the smaller group
    moved_by: tuple[MovedBy, ...]  # empty: it did not move
    heat: ChangeTest
    heat_inside: ChangeTest | None
    a: ClassSide
    b: ClassSide


Reason = Literal["only_in_a", "only_in_b", "too_few_images", "ambiguous_name"]


class LeftOutClass(ResponseModel):
    """A class that was not tested."""

    wnid: str
    name: str
    images_a: int
    images_b: int
    reason: Reason


class ImageSide(ResponseModel):
    """An image in one of the datasets."""

    row: int
    index: int
    rank: int
    probability: float
    predicted: int | None  # the class that came first; None: it was not explained
    predicted_name: str | None
    heat_inside: float | None
    shown: tuple[float, float, float, float] | None  # where the heatmap lies, in pixels; None: on all of it
    heat: HeatCells


class ChangedImage(ResponseModel):
    """An image of both datasets whose heat for a class moved far."""

    uri: str
    sha256: str
    width: int
    height: int
    class_a: int
    class_name: str
    distance: float
    a: ImageSide
    b: ImageSide


class CheckedCondition(ResponseModel):
    """A condition of `--fail-if`."""

    condition: str
    met: bool


class ComparisonReport(ResponseModel):
    """`gradcam.comparison/v1`: the report of `gradcam compare`."""

    schema_: Literal["gradcam.comparison/v1"] = Field(default="gradcam.comparison/v1", alias="schema")
    generator: str
    a: ComparedDataset
    b: ComparedDataset
    pairing: Pairing
    classes_by: ClassKey
    differences: tuple[Difference, ...]
    remarks: tuple[str, ...]  # sentences: what the comparison cannot say
    thresholds: ComparisonThresholds
    figures: dict[str, float | None]  # see FIGURES; None: not known
    classes: tuple[ClassComparison, ...]  # those that moved first, and those that moved farthest
    left_out: tuple[LeftOutClass, ...]
    images: tuple[ChangedImage, ...]  # those that changed most; empty where the images are others
    conditions: tuple[CheckedCondition, ...] = ()
