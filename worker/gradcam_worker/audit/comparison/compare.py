"""A comparison of two datasets: the classes whose heat moved, and the images that changed most.

1. Both datasets are read once, into arrays of bounded size: `gradcam_worker.audit.dataset.heat_table`.
2. If they are of the same images, each image is compared with itself; otherwise each class of one dataset
   with the same class of the other, as two groups of images.
3. The distance of a class's mean heatmaps, on the grid of the image, is tested by permutations, and so is the
   change of its heat inside boxes or masks. All p-values are adjusted for their number.
4. A class moved if a test of it is significant and the change is large enough to matter: with many images any
   two networks differ significantly.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradcam_worker import __version__
from gradcam_worker.artifacts.dataset import Grid
from gradcam_worker.audit.comparison.changed_images import (
    ComparedClass,
    ComparedRows,
    most_changed,
    read_changed_images,
    rounded,
)
from gradcam_worker.audit.comparison.compared_datasets import (
    ReadDataset,
    common_grid,
    differences,
    match_classes,
    open_side,
    read_both,
    remarks,
)
from gradcam_worker.audit.comparison.report import (
    FIGURES,
    ChangeTest,
    ClassComparison,
    ClassSide,
    ComparisonReport,
    ComparisonThresholds,
    LeftOutClass,
    MovedBy,
    Pairing,
    Reason,
)
from gradcam_worker.audit.dataset.heat_table import UNKNOWN, ClassNames, HeatRecords, ImageKey
from gradcam_worker.audit.dataset.statistics import ReportProgress
from gradcam_worker.audit.report import HeatCells
from gradcam_worker.audit.significance import Difference, benjamini_hochberg, permutation_test
from gradcam_worker.errors import InvalidInput
from gradcam_worker.storage.store import Store

Pair = Literal["auto", "sha256", "uri", "none"]
LEAST_SHARED = 0.5  # of the images of the smaller dataset: then `auto` compares each image with itself
MIN_PERMUTATIONS, MAX_PERMUTATIONS = 9_999, 49_999


@dataclass(frozen=True)
class ComparisonOptions:
    """What is compared, and how.

    Attributes:
        thresholds: When a class counts as moved.
        pair: What an image of one dataset is found by in the other; `none`: compare groups of images.
        across_methods: Compare the heat of different methods, too.
        images: How many of the images that changed most are listed.
    """

    thresholds: ComparisonThresholds = field(default_factory=ComparisonThresholds)
    pair: Pair = "auto"
    across_methods: bool = False
    images: int = 48


def compare(
    a: Store,
    b: Store,
    options: ComparisonOptions | None = None,
    report_progress: ReportProgress = lambda *_: None,
) -> ComparisonReport:
    """Compare two datasets.

    Args:
        a: Where the first is.
        b: Where the second is.
        options: What is compared, and how.
        report_progress: Is called after each file, and each class.

    Returns:
        The report.

    Raises:
        InvalidInput: There is no dataset, a file is damaged, or they cannot be compared.
        StorageUnavailable: A dataset cannot be read.
    """
    chosen = options or ComparisonOptions()
    thresholds = chosen.thresholds
    sides = open_side(a), open_side(b)
    grid = common_grid(*sides, across_methods=chosen.across_methods)
    sampled_by: ImageKey = "uri" if chosen.pair == "uri" else "sha256"
    read_a, read_b = read_both(sides, grid, sampled_by, report_progress)
    pairing = _choose_pairing(read_a.records, read_b.records, chosen.pair)
    matched = match_classes(
        read_a.classes, read_b.classes, same_network=read_a.facts.network == read_b.facts.network
    )
    pairs = matched.pairs
    tested, left_out = _test_classes(read_a, read_b, pairs, pairing, thresholds, report_progress)
    left_out += _unmatched(read_a, {one.id for one, _ in pairs}, matched.unclear_a, "only_in_a", thresholds)
    left_out += _unmatched(read_b, {one.id for _, one in pairs}, matched.unclear_b, "only_in_b", thresholds)
    classes = _class_comparisons(tested, grid, thresholds)
    changed = []
    if pairing.by:
        found = most_changed(tested, {one.a.id for one in classes if one.moved_by}, chosen.images)
        changed = read_changed_images((a, b), (read_a, read_b), found, pairing.by)
    return ComparisonReport(
        generator=f"gradcam-worker {__version__}",
        a=read_a.facts,
        b=read_b.facts,
        pairing=pairing,
        classes_by=matched.by,
        differences=tuple(differences(read_a.facts, read_b.facts)),
        remarks=(*remarks(read_a, read_b), *_remarks_on_images(pairing, read_a, read_b)),
        thresholds=thresholds,
        figures=_figures(read_a, read_b, pairing, pairs, classes, len(left_out)),
        classes=tuple(classes),
        left_out=tuple(sorted(left_out, key=lambda one: -one.images_a - one.images_b)),
        images=tuple(changed),
    )


def _choose_pairing(a: HeatRecords, b: HeatRecords, pair: Pair) -> Pairing:
    """Find out by what the images of one dataset are found in the other. Raises InvalidInput."""
    shared: dict[ImageKey, Pairing] = {}
    for key in ("sha256", "uri"):
        in_a, in_b = np.unique(a.images(key)), np.unique(b.images(key))
        both = len(np.intersect1d(in_a, in_b, assume_unique=True))
        shared[key] = Pairing(by=key, images_a=len(in_a), images_b=len(in_b), in_both=both)
    best = shared[pair] if pair in ("sha256", "uri") else max(shared.values(), key=lambda one: one.in_both)
    if pair in ("sha256", "uri"):
        if not best.in_both:
            message = f"No image is in both datasets by its {pair}: choose another --pair."
            raise InvalidInput(message)
        return best
    same = best.in_both >= LEAST_SHARED * max(min(best.images_a, best.images_b), 1)
    return best if same and pair == "auto" else shared["sha256"].model_copy(update={"by": None})


def _remarks_on_images(pairing: Pairing, a: ReadDataset, b: ReadDataset) -> Iterator[str]:
    if pairing.by is None:
        yield (
            f"The images are not the same ({pairing.in_both:,} are in both): what moved may be of the images "
            "as well as of the network."
        )
    elif pairing.in_both < max(pairing.images_a, pairing.images_b):
        alone = pairing.images_a - pairing.in_both, pairing.images_b - pairing.in_both
        yield f"Images that are in one dataset only are left out: {alone[0]:,} of A and {alone[1]:,} of B."
    if not (np.isfinite(a.records.heat_inside).any() and np.isfinite(b.records.heat_inside).any()):
        yield "Heat inside objects is not compared: it takes boxes or masks in both datasets."


def _selected(records: HeatRecords, thresholds: ComparisonThresholds) -> NDArray[np.bool_]:
    """Which records count for their class."""
    if thresholds.rows == "true":
        return records.is_truth
    chosen: NDArray[np.bool_] = (records.ranks == 1) | (thresholds.rows == "all")
    return chosen


def _of_class(records: HeatRecords, class_id: int) -> HeatRecords:
    """The records of a class, in order of their images; the table is sorted by class."""
    first, last = np.searchsorted(records.class_ids, [class_id, class_id + 1])
    return records.take(np.arange(first, last))


def _rows_of_class(
    a: HeatRecords, b: HeatRecords, by: ImageKey | None, thresholds: ComparisonThresholds
) -> ComparedRows:
    """Choose the records of a class that are compared."""
    counts_a, counts_b = _selected(a, thresholds), _selected(b, thresholds)
    images = int(counts_a.sum()), int(counts_b.sum())
    has_heat_a, has_heat_b = (np.asarray(one.heat.any(axis=1)) for one in (a, b))
    if by is None:
        return ComparedRows(a.take(counts_a & has_heat_a), b.take(counts_b & has_heat_b), *images)
    keys_a, index_a = np.unique(a.images(by), return_index=True)
    keys_b, index_b = np.unique(b.images(by), return_index=True)
    _, in_a, in_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    pairs_a, pairs_b = index_a[in_a], index_b[in_b]
    kept = (counts_a[pairs_a] | counts_b[pairs_b]) & has_heat_a[pairs_a] & has_heat_b[pairs_b]
    return ComparedRows(a.take(pairs_a[kept]), b.take(pairs_b[kept]), *images)


def _test_classes(
    a: ReadDataset,
    b: ReadDataset,
    pairs: Sequence[tuple[ClassNames, ClassNames]],
    pairing: Pairing,
    thresholds: ComparisonThresholds,
    report_progress: ReportProgress,
) -> tuple[list[ComparedClass], list[LeftOutClass]]:
    """Test all classes of which there are enough images."""
    left_out, chosen = [], []
    for one, other in pairs:
        rows = _rows_of_class(
            _of_class(a.records, one.id), _of_class(b.records, other.id), pairing.by, thresholds
        )
        if min(len(rows.a), len(rows.b)) < thresholds.min_images:
            left_out.append(_left_out(one, (rows.images_a, rows.images_b), "too_few_images"))
        else:
            chosen.append((one, other, rows))
    # So many that of all tests a single one that is significant can be found.
    wanted = math.ceil(2 * 2 * len(chosen) / thresholds.false_discovery_rate)
    permutations = min(max(wanted, MIN_PERMUTATIONS), MAX_PERMUTATIONS)
    tested = []
    for done, (one, other, rows) in enumerate(chosen):
        tested.append(_test_class(one, other, rows, pairing.by is not None, thresholds, permutations))
        report_progress("classes", done + 1, len(chosen))
    return tested, left_out


def _test_class(
    a: ClassNames,
    b: ClassNames,
    rows: ComparedRows,
    paired: bool,
    thresholds: ComparisonThresholds,
    permutations: int,
) -> ComparedClass:
    """Test the heat of a class, and its heat inside where enough of its images have boxes or masks.

    The tested images are those with the least digests: the records are in this order.
    """
    sample, seed = slice(thresholds.sample), [thresholds.seed, a.id]
    heat = permutation_test(
        rows.a.heat[sample].astype(np.float32),
        rows.b.heat[sample].astype(np.float32),
        paired=paired,
        seed=[*seed, 0],
        max_permutations=permutations,
    )
    known_a, known_b = np.isfinite(rows.a.heat_inside), np.isfinite(rows.b.heat_inside)
    if paired:
        known_a = known_b = known_a & known_b
    inside_a, inside_b = rows.a.heat_inside[known_a][sample], rows.b.heat_inside[known_b][sample]
    inside, change = None, 0.0
    if min(len(inside_a), len(inside_b)) >= thresholds.min_images:
        inside = permutation_test(
            inside_a[:, None],
            inside_b[:, None],
            paired=paired,
            seed=[*seed, 1],
            max_permutations=permutations,
        )
        change = float(inside_b.mean(dtype=np.float64) - inside_a.mean(dtype=np.float64))
    return ComparedClass(a, b, rows, heat, inside, change)


def _left_out(one: ClassNames, images: tuple[int, int], reason: Reason) -> LeftOutClass:
    return LeftOutClass(wnid=one.wnid, name=one.name, images_a=images[0], images_b=images[1], reason=reason)


def _unmatched(
    read: ReadDataset,
    matched: set[int],
    unclear: frozenset[int],
    side: Literal["only_in_a", "only_in_b"],
    thresholds: ComparisonThresholds,
) -> list[LeftOutClass]:
    """The classes of a dataset that the other one does not have, if any image counts for them."""
    found = []
    counts = np.unique(read.records.class_ids[_selected(read.records, thresholds)], return_counts=True)
    for class_id, images in zip(counts[0].tolist(), counts[1].tolist(), strict=True):
        if class_id not in matched:
            both = (images, 0) if side == "only_in_a" else (0, images)
            reason: Reason = "ambiguous_name" if class_id in unclear else side
            found.append(_left_out(read.classes[class_id], both, reason))
    return found


def _class_comparisons(
    tested: Sequence[ComparedClass], grid: Grid, thresholds: ComparisonThresholds
) -> list[ClassComparison]:
    """Adjust all p-values, and say which classes moved: those first, then by distance."""
    p_values = [one.heat.p for one in tested] + [one.inside.p for one in tested if one.inside]
    adjusted = benjamini_hochberg(p_values)
    of_heat, of_inside = adjusted[: len(tested)], iter(adjusted[len(tested) :])
    classes = []
    for one, q in zip(tested, of_heat, strict=True):
        heat = _test(one.heat, one.heat.distance, one.heat.by_chance, q)
        inside = None
        if one.inside:
            inside = _test(one.inside, one.inside_change, 2 * one.inside.by_chance, next(of_inside))
        moved_by: list[MovedBy] = []
        is_far = one.heat.distance >= thresholds.distance and one.heat.effect >= thresholds.effect
        if is_far and q <= thresholds.false_discovery_rate:
            moved_by.append("heat")
        if (
            inside
            and inside.q <= thresholds.false_discovery_rate
            and abs(one.inside_change) >= thresholds.inside
        ):
            moved_by.append("heat_inside")
        rows = one.rows
        classes.append(
            ClassComparison(
                wnid=one.a.wnid,
                name=one.a.name,
                tested=min(len(rows.a), len(rows.b), thresholds.sample),
                moved_by=tuple(moved_by),
                heat=heat,
                heat_inside=inside,
                a=_class_side(one.a, rows.a, rows.images_a, grid, thresholds),
                b=_class_side(one.b, rows.b, rows.images_b, grid, thresholds),
            )
        )
    return sorted(classes, key=lambda one: (not one.moved_by, -one.heat.change, one.a.id))


def _test(difference: Difference, change: float, by_chance: float, q: float) -> ChangeTest:
    return ChangeTest(
        change=rounded(change),
        by_chance=rounded(by_chance),
        effect=rounded(difference.effect),
        p=difference.p,
        q=q,
    )


def _class_side(
    names: ClassNames, rows: HeatRecords, images: int, grid: Grid, thresholds: ComparisonThresholds
) -> ClassSide:
    tested = rows.take(np.arange(min(len(rows), thresholds.sample)))
    return ClassSide(
        id=names.id,
        images=images,
        probability=rounded(float(tested.probabilities.mean(dtype=np.float64))),
        heat_inside=_mean(tested.heat_inside),
        heat_at_border=_mean(tested.heat_at_border),
        precision=_mean(_known(tested.correct)),
        heat=HeatCells.of(tested.heat.mean(axis=0, dtype=np.float64).reshape(grid)),
    )


def _known(correct: NDArray[np.int8]) -> NDArray[np.float32]:
    return np.where(correct == UNKNOWN, np.nan, correct).astype(np.float32)


def _mean(values: NDArray[np.float32]) -> float | None:
    """The mean of what is known; None: nothing is."""
    known = values[np.isfinite(values)]
    return rounded(float(known.mean(dtype=np.float64))) if len(known) else None


def _figures(
    a: ReadDataset,
    b: ReadDataset,
    pairing: Pairing,
    pairs: Sequence[tuple[ClassNames, ClassNames]],
    classes: Sequence[ClassComparison],
    left_out: int,
) -> dict[str, float | None]:
    """The figures that conditions, gauges and the log are made of."""
    distances = [one.heat.change for one in classes]
    falls = [-one.heat_inside.change for one in classes if one.heat_inside]
    figures: dict[str, float | None] = {
        "moved": sum(1 for one in classes if one.moved_by),
        "compared": len(classes),
        "left_out": left_out,
        "distance_max": max(distances, default=None),
        "distance_median": rounded(float(np.median(distances))) if distances else None,
        "heat_inside_fall_max": max(*falls, 0.0) if falls else None,
        "images_in_both": pairing.in_both,
        "predictions_changed": _predictions_changed(a, b, pairing, pairs),
    }
    for side, read in (("a", a), ("b", b)):
        first = read.records.take(read.records.ranks == 1)
        each = read.records.take(read.records.indexes == 0)  # one record of each image
        figures |= {
            f"heat_inside_{side}": _mean(first.heat_inside),
            f"heat_at_border_{side}": _mean(first.heat_at_border),
            f"accuracy_{side}": _mean(_known(each.correct)),
            f"images_{side}": read.facts.explained,
            f"failed_{side}": read.facts.failed,
        }
    for name in ("heat_inside", "heat_at_border", "accuracy"):
        before, after = figures[f"{name}_a"], figures[f"{name}_b"]
        figures[f"{name}_change"] = None if before is None or after is None else rounded(after - before)
    return {name: figures[name] for name in FIGURES}


def _predictions_changed(
    a: ReadDataset, b: ReadDataset, pairing: Pairing, pairs: Sequence[tuple[ClassNames, ClassNames]]
) -> float | None:
    """Share of the images in both whose prediction is another class; None: of none it is known."""
    if pairing.by is None:
        return None
    first_a, first_b = (read.records.take(read.records.ranks == 1) for read in (a, b))
    keys_a, index_a = np.unique(first_a.images(pairing.by), return_index=True)
    keys_b, index_b = np.unique(first_b.images(pairing.by), return_index=True)
    _, in_a, in_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    if not len(in_a):
        return None
    same = {one.id: other.id for one, other in pairs}
    in_b_terms = [same.get(class_id, UNKNOWN) for class_id in first_a.class_ids[index_a[in_a]].tolist()]
    changed = np.array(in_b_terms) != first_b.class_ids[index_b[in_b]]
    return rounded(float(changed.mean()))
