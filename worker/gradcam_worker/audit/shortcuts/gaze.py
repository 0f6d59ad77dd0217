"""What the predictions of each class look at: clusters, suspects, and those that the network needs.

samples -> clusters.find_clusters -> report.clusters, and the map
        -> shortcuts.find_suspects -> masking_trial.try_suspects -> report.shortcuts
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.audit.dataset.samples import ClassSample
from gradcam_worker.audit.report import (
    AuditReport,
    ClusterReport,
    DatasetFacts,
    HeatCells,
    MaskingFacts,
    ShortcutReport,
    SuspectReport,
)
from gradcam_worker.audit.shortcuts.clusters import Cluster, GazeMap, draw_map, find_clusters
from gradcam_worker.audit.shortcuts.gaze_regions import describe_place, hot_region
from gradcam_worker.audit.shortcuts.masking_trial import (
    MIN_EFFECT,
    Effect,
    LoadPixels,
    ReportProgress,
    TrialOutcome,
    try_suspects,
)
from gradcam_worker.audit.shortcuts.suspects import Suspect, find_suspects
from gradcam_worker.errors import GradcamError
from gradcam_worker.gradcam.network import Network

EXAMPLES = 8
TURNED_OFF = "it was turned off"
BACKGROUNDS = {"background": "background", "spread": "all over the image"}


@dataclass(frozen=True)
class TrialNetwork:
    """The network of a dataset, and what reads its images.

    Attributes:
        network: With the weights of the dataset.
        load: Reads an image by URI and sha256: its pixels at the input size, and their placement.
    """

    network: Network
    load: LoadPixels


OpenNetwork = Callable[[DatasetFacts], TrialNetwork]  # raises a GradcamError that says why there is none


@dataclass(frozen=True)
class GazeOptions:
    """How to look for shortcuts.

    Attributes:
        open_network: Loads the network of the dataset; None: suspects are not tried.
        images: How many images of each suspect are masked.
        max_suspects: How many suspects are tried.
        min_effect: Of what is named, in probability.
        seed: Of every choice by chance.
    """

    open_network: OpenNetwork | None = None
    images: int = 40
    max_suspects: int = 32
    min_effect: float = MIN_EFFECT
    seed: int = 0


def add_gaze(
    report: AuditReport,
    samples: Sequence[ClassSample],
    options: GazeOptions,
    report_progress: ReportProgress = lambda *_: None,
) -> tuple[AuditReport, GazeMap]:
    """Find clusters and shortcuts, and add them to a report.

    Args:
        report: The report of the same dataset.
        samples: Images that are predicted as each class, from the pass over the dataset.
        options: How to look for shortcuts.
        report_progress: Is called after each suspect.

    Returns:
        The report, and where each image of the samples lies on the map.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    by_class = {sample.class_id: sample for sample in samples}
    clusters = find_clusters(samples, options.seed)
    suspects = find_suspects(samples)
    outcome, left_out = _try(report.dataset, suspects, samples, options, report_progress)
    facts = MaskingFacts(
        suspects=len(suspects),
        named=len(outcome.named),
        dropped=outcome.dropped,
        untested=len(outcome.untested),
        left_out=left_out,
        unread=outcome.unread,
        min_effect=options.min_effect,
        seed=options.seed,
    )
    found = report.model_copy(
        update={
            "clusters": tuple(
                _cluster(cluster, number, by_class[cluster.class_id])
                for number, cluster in enumerate(clusters)
            ),
            "shortcuts": tuple(
                _shortcut(suspect, effect, by_class[suspect.class_id]) for suspect, effect in outcome.named
            ),
            "suspects": tuple(
                SuspectReport(**_suspect(suspect, by_class[suspect.class_id])) for suspect in outcome.untested
            ),
            "masking": facts,
        }
    )
    return found, draw_map(samples, clusters)


def _try(
    dataset: DatasetFacts,
    suspects: Sequence[Suspect],
    samples: Sequence[ClassSample],
    options: GazeOptions,
    report_progress: ReportProgress,
) -> tuple[TrialOutcome, str | None]:
    """The outcome of the trial, and why there was none."""
    untested = TrialOutcome((), 0, tuple(suspects), {})
    if options.open_network is None:
        return untested, TURNED_OFF
    if not suspects:
        return untested, None
    try:
        opened = options.open_network(dataset)
    except GradcamError as error:
        return untested, str(error)
    return try_suspects(
        suspects,
        samples,
        opened.network,
        opened.load,
        max_suspects=options.max_suspects,
        images=options.images,
        min_effect=options.min_effect,
        seed=options.seed,
        report_progress=report_progress,
    ), None


def _cluster(cluster: Cluster, number: int, sample: ClassSample) -> ClusterReport:
    inside = sample.heat_inside[cluster.members]
    return ClusterReport(
        class_id=cluster.class_id,
        number=number,
        images=len(cluster.members),
        share=_rounded(cluster.share),
        accuracy=_accuracy(sample, cluster.members),
        place=describe_place(hot_region(cluster.heat)),
        heat_inside=None if np.isnan(inside).all() else _rounded(float(np.nanmean(inside))),
        heat=HeatCells.of(cluster.heat),
        examples=_examples(sample, cluster.members),
    )


def _suspect(suspect: Suspect, sample: ClassSample) -> dict[str, Any]:
    """The fields of a `SuspectReport`."""
    region, members = suspect.region, suspect.members
    there = sample.heat[members] if region is None else sample.heat[members][:, region]
    most = np.argsort(-there.reshape(len(members), -1).sum(1), kind="stable")
    return {
        "class_id": suspect.class_id,
        "kind": suspect.kind,
        "basis": suspect.basis,
        "place": BACKGROUNDS[suspect.kind] if region is None else describe_place(region),
        "images": len(members),
        "share": _rounded(len(members) / len(sample)),
        "accuracy": _accuracy(sample, members),
        "other_accuracy": _accuracy(sample, np.setdiff1d(np.arange(len(sample)), members)),
        "heat_share": _rounded(suspect.heat),
        "expected_heat_share": _rounded(suspect.expected),
        "heat": HeatCells.of(sample.heat[members].mean(0)),
        "region": None if region is None else HeatCells.of(region.astype(np.float32)),
        "examples": _examples(sample, members[most]),
    }


def _shortcut(suspect: Suspect, effect: Effect, sample: ClassSample) -> ShortcutReport:
    numbers = {name: _rounded(value) for name, value in asdict(effect).items()}
    return ShortcutReport(
        **_suspect(suspect, sample),
        masked=effect.images,
        probability=numbers["probability"],
        fall_blurred=numbers["fall_blur"],
        fall_filled=numbers["fall_mean"],
        fall_elsewhere=numbers["control"],
        effect=numbers["effect"],
        confidence_interval=(numbers["low"], numbers["high"]),
        confidence=effect.confidence,
    )


def _accuracy(sample: ClassSample, members: NDArray[np.intp]) -> float | None:
    known = sample.correct[members]
    known = known[known >= 0]
    return _rounded(float(known.mean())) if len(known) else None


def _examples(sample: ClassSample, members: NDArray[np.intp]) -> tuple[tuple[int, int], ...]:
    return tuple(
        (int(sample.rows[number]), int(sample.indices[number])) for number in members[:EXAMPLES].tolist()
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
