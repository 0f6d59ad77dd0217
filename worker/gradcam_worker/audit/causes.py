"""Where the heat of predictions lies, why they are right or wrong, and how much there is to learn."""

import math

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.audit.dataset.predictions import NONE
from gradcam_worker.audit.report import CAUSES, Cause, Thresholds

ON_OBJECT, ELSEWHERE = 1, 0  # or NONE
BY_REGIONS, BY_TYPICAL_HEAT, BY_NOTHING = 0, 1, 2
CODES: dict[Cause, int] = {cause: code for code, cause in enumerate(CAUSES)}
Z_95 = 1.96  # quantile of the normal distribution, of a two-sided interval of 95 %


def places(
    heat_inside: NDArray[np.float32],
    inside_area: NDArray[np.float32],
    at_border: NDArray[np.float32],
    agreement: NDArray[np.float32],
    thresholds: Thresholds,
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Judge where predictions look, as `Thresholds` says.

    Args:
        heat_inside: (n,) share of the heat within boxes or mask; nan: none are known.
        inside_area: (n,) their share of the image.
        at_border: (n,) share of the heat in the outer band of the image.
        agreement: (n,) with the typical heat of the class; nan: not known.
        thresholds: What counts as looking at the object.

    Returns:
        ON_OBJECT, ELSEWHERE or NONE for each; and BY_REGIONS, BY_TYPICAL_HEAT or BY_NOTHING.
    """
    by_regions = np.isfinite(heat_inside) & (inside_area <= thresholds.largest_region)
    enough = np.minimum(thresholds.inside, thresholds.over_chance * inside_area)
    is_at_border = at_border >= thresholds.at_border
    by_typical_heat = ~by_regions & (is_at_border | np.isfinite(agreement))
    is_typical = ~is_at_border & (agreement >= thresholds.agreement)
    on_object = np.where(by_regions, heat_inside >= enough, is_typical)
    place = np.where(by_regions | by_typical_heat, on_object, NONE).astype(np.int8)
    basis = np.where(by_regions, BY_REGIONS, np.where(by_typical_heat, BY_TYPICAL_HEAT, BY_NOTHING))
    return place, basis.astype(np.int8)


def causes(correct: NDArray[np.int8], place: NDArray[np.int8]) -> NDArray[np.int8]:
    """The cause of each prediction, as an index into `CAUSES`.

    Args:
        correct: (n,) 1, 0, or NONE without a label.
        place: (n,) from `places`.
    """
    known = (correct != NONE) & (place != NONE)
    right = np.where(place == ON_OBJECT, CODES["right_reason"], CODES["wrong_reason"])
    wrong = np.where(place == ON_OBJECT, CODES["wrong_on_object"], CODES["wrong_elsewhere"])
    return np.where(known, np.where(correct == 1, right, wrong), CODES["unknown"]).astype(np.int8)


def to_learn(bad: float, count: float) -> float:
    """How much there is to learn from images of which some are bad.

    That is the number of bad ones, times the lower end of the 95 % interval of their share (Wilson 1927): it
    is great where they are many, and where they are most of all; a few of a few count little.

    Args:
        bad: How many.
        count: Of how many.
    """
    if not count:
        return 0.0
    share, square = bad / count, Z_95**2
    center = share + square / (2 * count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return round(bad * max(center - half, 0) / (1 + square / count), 3)
