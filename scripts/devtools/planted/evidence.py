"""Does the audit find what was planted, and nothing where nothing was? The command `scripts/audit-evidence`.

For each seed four networks are trained: with a watermark in a corner of one class, with stripes in the
background of one class, with the watermark in 5 % of one class, and on clean images. The images that are
audited are others than those of the training, and are planted alike. Each dataset is audited with boxes of
the shapes and without. A shortcut counts as found if it is the first that is named: its class, its corner.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from devtools.planted.dataset import write_dataset
from devtools.planted.shapes import Plant, Shapes, draw, plant_of
from devtools.planted.training import train, wrap
from gradcam_worker.audit.dataset.samples import Samples
from gradcam_worker.audit.report import AuditReport, ShortcutReport
from gradcam_worker.audit.run import audit
from gradcam_worker.audit.shortcuts.gaze import GazeOptions, TrialNetwork, add_gaze
from gradcam_worker.gradcam import Network
from gradcam_worker.storage.stores import FolderStore

IMAGES = 1600  # that are audited
AUDIT_SEED = 5000  # apart from those of trainings
RARE = 0.05
WANTED = 0.9  # of the seeds

CASES: dict[str, Callable[[int], Plant | None]] = {
    "watermark": lambda seed: plant_of("watermark", seed),
    "background": lambda seed: plant_of("background", seed),
    "watermark in 5 % of a class": lambda seed: plant_of("watermark", seed, RARE),
    "clean": lambda seed: None,  # noqa: ARG005  # as the others
}


@dataclass(frozen=True)
class Finding:
    """What the audit of one training named."""

    case: str
    seed: int
    boxes: bool
    found: bool  # the planted shortcut came first; of a clean training: nothing was named
    named: int  # shortcuts
    effect: float | None  # of the first
    low: float | None
    accuracy: float


def audit_shapes(
    network: Network, shapes: Shapes, folder: Path, *, boxes: bool, options: GazeOptions | None = None
) -> AuditReport:
    """Audit a network on images of shapes, with everything between heatmaps and report.

    Args:
        network: From `train` and `wrap`.
        shapes: The images.
        folder: For the images and the dataset.
        boxes: Whether the dataset has the boxes of the shapes.
        options: How to look for shortcuts; default: as the command does.

    Returns:
        The report.
    """
    dataset = write_dataset(folder, network, shapes, boxes=boxes)
    numbers = {file.as_uri(): index for index, file in enumerate(sorted((folder / "images").iterdir()))}
    trial = TrialNetwork(network, lambda uri, _: (shapes.pixels[numbers[uri]], None))
    samples = Samples()
    report = audit(FolderStore(dataset), samples=samples).report
    chosen = options or GazeOptions(open_network=lambda _: trial)
    return add_gaze(report, [*samples.of_each_class()], chosen)[0]


def is_planted(shortcut: ShortcutReport, plant: Plant) -> bool:
    """Whether a shortcut that was named is the one that was planted."""
    place = f"{plant.corner} corner" if plant.kind == "watermark" else shortcut.place
    is_background = shortcut.kind != "place"
    return (
        shortcut.class_id == plant.class_id
        and shortcut.place == place
        and is_background == (plant.kind == "background")
    )


def examine(case: str, seed: int, folder: Path) -> list[Finding]:
    """Train a network of a case, and audit it with boxes and without."""
    plant = CASES[case](seed)
    network = wrap(train(seed, plant))
    shapes = draw(IMAGES, AUDIT_SEED + seed, plant)
    findings = []
    for boxes in (True, False):
        report = audit_shapes(network, shapes, folder / f"{case}-{seed}-{boxes}", boxes=boxes)
        first = report.shortcuts[0] if report.shortcuts else None
        right = sum(one.right for one in report.classes)
        findings.append(
            Finding(
                case=case,
                seed=seed,
                boxes=boxes,
                found=(first is None) if plant is None else first is not None and is_planted(first, plant),
                named=len(report.shortcuts),
                effect=first.effect if first else None,
                low=first.confidence_interval[0] if first else None,
                accuracy=right / IMAGES,
            )
        )
    return findings


def in_lines(findings: list[Finding]) -> list[str]:
    """A table of the cases."""
    head = (
        f"{'training':<30}{'known':<10}{'first, of seeds':<18}{'further named':<15}{'effect, least to most'}"
    )
    lines = [head]
    for case in CASES:
        for boxes in (True, False):
            own = [one for one in findings if (one.case, one.boxes) == (case, boxes)]
            if not own:
                continue
            found = f"{sum(one.found for one in own)} of {len(own)}"
            further = sum(one.named - (one.found and case != "clean") for one in own)
            effects = [one.effect for one in own if one.effect is not None]
            span = (
                f"{min(effects):.2f} to {max(effects):.2f}, median {statistics.median(effects):.2f}"
                if effects
                else ""
            )
            lines.append(f"{case:<30}{'boxes' if boxes else 'labels':<10}{found:<18}{further:<15}{span}")
    accuracies = [one.accuracy for one in findings]
    lines.append(
        f"Accuracy of the networks on the audited images: {min(accuracies):.3f} to {max(accuracies):.3f}."
    )
    lines.append("Of a clean training, `first` counts those in which nothing was named.")
    return lines


@click.command("scripts/audit-evidence")
@click.option("--seeds", default=10, show_default=True, help="Trainings of each case.")
@click.option("--first-seed", default=30, show_default=True, help="Seeds 0 to 29 chose the rules.")
@click.option("--case", "cases", multiple=True, type=click.Choice([*CASES]), help="Default: all.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
def main(seeds: int, first_seed: int, cases: tuple[str, ...], *, as_json: bool) -> None:
    """Plant shortcuts into trainings, and audit them.

    Exit code 1: with boxes, a case was found in less than nine of ten seeds, or a clean training had any.
    """
    findings: list[Finding] = []
    for case in cases or CASES:
        for seed in range(first_seed, first_seed + seeds):
            with tempfile.TemporaryDirectory() as folder:
                findings += examine(case, seed, Path(folder))
            click.echo(f"{case}, seed {seed}: {[one.found for one in findings[-2:]]}", err=True)
    click.echo(json.dumps([asdict(one) for one in findings]) if as_json else "\n".join(in_lines(findings)))
    with_boxes = {case: [one.found for one in findings if one.case == case and one.boxes] for case in CASES}
    passed = all(
        np.mean(found) >= (1 if case == "clean" else WANTED) for case, found in with_boxes.items() if found
    )
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
