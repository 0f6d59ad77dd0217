"""Does `gradcam compare` name what was planted, and nothing where nothing was? `scripts/compare-evidence`.

Networks are trained that differ in their seed only, and others with a watermark in a corner of one class. Any
two of the equal trainings are compared over the same images: no class may have moved. Each equal training is
compared with itself over other images. And each training with a watermark is compared with all equal ones,
over images that have the watermark: its class must be the first that is named.
"""

import itertools
import json
import sys
from dataclasses import asdict, dataclass

import click
import numpy as np

from devtools import synthetic_dataset
from devtools.planted.dataset import explain
from devtools.planted.shapes import CLASSES, SIDE, Shapes, draw, plant_of
from devtools.planted.training import EPOCHS, TRAINING_IMAGES, train, wrap
from gradcam_worker.audit.comparison.compare import ComparisonOptions, compare
from gradcam_worker.audit.comparison.report import ComparisonReport
from gradcam_worker.gradcam import Network
from gradcam_worker.testing import MemoryStore

IMAGES = 800  # that are compared
IMAGES_SEED, OTHER_SEED = 6000, 7000  # apart from those of trainings
MOST_ALARMS, LEAST_FOUND = 0.05, 0.9


@dataclass(frozen=True)
class Outcome:
    """What one comparison named.

    Attributes:
        case: `equal trainings`, `other images` or `watermark`.
        seeds: Of the two trainings.
        moved: The classes that moved, the first one first.
        planted: The class with the watermark in b.
        distance: Greatest distance of a class; of a watermark: of its class.
        effect: Likewise.
    """

    case: str
    seeds: tuple[int, int]
    moved: tuple[int, ...]
    planted: int | None
    distance: float
    effect: float

    @property
    def is_right(self) -> bool:
        """Whether the planted class was named first, or nothing where there was none."""
        return self.moved[:1] == (self.planted,) if self.planted is not None else not self.moved


def dataset(network: Network, shapes: Shapes) -> MemoryStore:
    """The dataset that a backfill would leave of these images."""
    explained = explain(network, shapes.pixels)
    images = synthetic_dataset.SyntheticImages(
        predicted=explained.predicted,
        truth=shapes.labels,
        probability=explained.probabilities,
        boxes=shapes.boxes / np.float32(SIDE),
    )
    store = MemoryStore()
    synthetic_dataset.write(images, store.objects.__setitem__, heatmaps=explained.heatmaps, size=(SIDE, SIDE))
    return store


def outcome(
    case: str, seeds: tuple[int, int], report: ComparisonReport, planted: int | None = None
) -> Outcome:
    """What a comparison named."""
    moved = tuple(one.a.id for one in report.classes if one.moved_by)
    tests = [one.heat for one in report.classes if planted in (None, one.a.id)]
    distance = max((one.change for one in tests), default=0.0)
    effect = max((one.effect for one in tests), default=0.0)
    return Outcome(case, seeds, moved, planted, distance, effect)


def examine(
    equal: list[int],
    planted: list[int],
    *,
    compared: int = IMAGES,
    images: int = TRAINING_IMAGES,
    epochs: int = EPOCHS,
) -> list[Outcome]:
    """Train the networks, and compare them.

    Args:
        equal: Seeds of the equal trainings.
        planted: Seeds of those with a watermark: see `plant_of`.
        compared: How many images are compared.
        images: How many each is trained on.
        epochs: How often.

    Returns:
        The outcome of each comparison.
    """
    outcomes, other_images = [], ComparisonOptions(pair="none")
    networks = {seed: wrap(train(seed, images=images, epochs=epochs)) for seed in equal}
    plain, others = draw(compared, IMAGES_SEED), draw(compared, OTHER_SEED)
    stores = {seed: dataset(network, plain) for seed, network in networks.items()}
    for one, other in itertools.combinations(equal, 2):
        report = compare(stores[one], stores[other])
        outcomes.append(outcome("equal trainings", (one, other), report))
    for seed, network in networks.items():
        report = compare(stores[seed], dataset(network, others), other_images)
        outcomes.append(outcome("other images", (seed, seed), report))
    for seed in planted:
        plant = plant_of("watermark", seed)
        shapes = draw(compared, IMAGES_SEED, plant)
        marked = dataset(wrap(train(seed, plant, images=images, epochs=epochs)), shapes)
        for one, network in networks.items():
            report = compare(dataset(network, shapes), marked)
            outcomes.append(outcome("watermark", (one, seed), report, plant.class_id))
    return outcomes


def in_lines(outcomes: list[Outcome]) -> list[str]:
    """A table of the cases."""
    lines = [f"{'comparison':<18}{'right':<12}{'distance':<16}{'effect':<16}{'classes named beside it'}"]
    for case in dict.fromkeys(one.case for one in outcomes):
        own = [one for one in outcomes if one.case == case]
        right = f"{sum(one.is_right for one in own)} of {len(own)}"
        spans = []
        for name in ("distance", "effect"):
            values = [getattr(one, name) for one in own]
            spans.append(f"{min(values):.2f} to {max(values):.2f}")
        further = sum(len([moved for moved in one.moved if moved != one.planted]) for one in own)
        lines.append(f"{case:<18}{right:<12}{spans[0]:<16}{spans[1]:<16}{further}")
    lines.append(f"Right: no class moved; of a watermark: its class, of {len(CLASSES)}, is named first.")
    return lines


@click.command("scripts/compare-evidence")
@click.option("--equal", default=7, show_default=True, help="Equal trainings: 7 make 21 pairs.")
@click.option("--planted", default=4, show_default=True, help="Trainings with a watermark.")
@click.option("--first-seed", default=20, show_default=True, help="Seeds 0 to 6 chose the thresholds.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
def main(equal: int, planted: int, first_seed: int, *, as_json: bool) -> None:
    """Compare equal trainings, and trainings with a watermark.

    Exit code 1: a class moved in more than one of twenty comparisons of equal trainings, or the class of a
    watermark came first in less than nine of ten.
    """
    seeds = [*range(first_seed, first_seed + equal + planted)]
    outcomes = examine(seeds[:equal], seeds[equal:])
    click.echo(json.dumps([asdict(one) for one in outcomes]) if as_json else "\n".join(in_lines(outcomes)))
    alarms = [not one.is_right for one in outcomes if one.case != "watermark"]
    found = [one.is_right for one in outcomes if one.case == "watermark"]
    sys.exit(0 if np.mean(alarms) <= MOST_ALARMS and np.mean(found) >= LEAST_FOUND else 1)


if __name__ == "__main__":
    main()
