"""How far our numbers are from the same computed in other ways.

    scripts/agreement [SECTION ...] [--json] [--write]

Each section is a table of differences and shares, none of times. `--write` makes
docs/explanation/agreement.md again, for which all sections are needed: some minutes. Whether the differences
are small enough is for the tests to say, in tests/gradcam.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from devtools import ROOT, command, import_path
from devtools.agreement import every_method, pointing_game
from devtools.agreement.notebook import NotebookGradCAM, check
from devtools.agreement.randomisation import cascade, overlap, photographs, rank_correlation
from devtools.bench import report
from devtools.bench.engine import noise, prepared
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.models.loading import load_network
from gradcam_worker.gradcam.network import Method

# isort: split
# Only now: the lines above keep TensorFlow quiet while it is loaded for the first time.
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

SHIPPED, NOTEBOOKS = "efficientnet_lite0", ("vgg16", "xception")
TOP = np.arange(1, 6, dtype=np.int32)  # classes a photo
DOCUMENT = ROOT / "docs" / "explanation" / "agreement.md"
WIDTH = 110  # characters of a line
SMALL = 1e-2  # figures below are written as powers of ten
PACKAGES = ("keras", "tensorflow", "jax", "torch", "numpy")
INTRODUCTION = """\
# Agreement

How far our numbers are from the same by other ways. Each section is a table of differences and shares, none
of times; whether they are small enough is for the tests to say, in `tests/gradcam`.

    scripts/agreement            # some minutes
    scripts/agreement tape batch # some sections alone
    scripts/agreement --write    # makes this file again
    scripts/agreement --json     # for machines
"""
Floats = NDArray[np.float32]
Row = tuple[str | float | int, ...]


@dataclass(frozen=True)
class Table:
    """What one section measured."""

    title: str
    about: str
    headings: tuple[str, ...]
    rows: list[Row]


def largest(one: Any, other: Any) -> float:
    """The largest difference between two arrays."""
    return float(np.abs(np.asarray(one, np.float64) - other).max())


def heatmaps(raw: Floats) -> Floats:
    """Raw maps (..., rows, columns) -> heatmaps in [0, 1], each by its own peak."""
    flat = raw.reshape(-1, *raw.shape[-2:])
    return cam.heatmaps(flat).reshape(raw.shape)


def photos_and_classes(network: Any) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """The shipped photos, and the five classes of each that the network ranks first."""
    pixels = photographs(network.facts.input_size)
    ranked = np.tile(-TOP, (len(pixels), 1))
    return pixels, network.compute(pixels, ranked).class_ids


def notebook() -> Table:
    """Against the arithmetic of the notebook, transcribed, on its own two networks."""
    rows: list[Row] = []
    for name in NOTEBOOKS:
        network = load_network(name, random_seed=0)
        model, layer = network._model, network.facts.default_layer  # noqa: SLF001  # the same weights for both
        pixels = noise(1, network.facts.input_size)
        wanted = -TOP[np.newaxis]
        for what, method, logits, image in (
            ("on logits, preprocessed: `gradcam`", Method(), True, prepared(network, pixels)),
            ("as it was: `notebook`", Method("notebook"), False, pixels.astype(np.float32)),
        ):
            same = check(network, NotebookGradCAM(model, layer, logits=logits), pixels, image, wanted, method)
            rows.append((name, what, same["difference"], int(same["lit"])))
    return Table(
        "The notebook",
        "The notebook's arithmetic, transcribed: eager, one class after the other. Random weights, top 5 "
        "classes.",
        ("network", "compared", "largest difference of heatmaps in [0, 1]", "maps not dark"),
        rows,
    )


def tape() -> Table:
    """Against a plain gradient tape, one class of one photo at a time, the formulas in float64."""
    network = load_network(SHIPPED)
    pixels, class_ids = photos_and_classes(network)
    model = network._model  # noqa: SLF001
    both = keras.Model(model.input, [model.get_layer(network.facts.default_layer).output, model.output])
    activations, gradients = [], []
    for image, ids in zip(pixels, class_ids, strict=True):
        with tf.GradientTape(persistent=True) as recorded:
            seen, scores = both((image[np.newaxis] - np.float32(127)) / 128)
            chosen = [scores[0, int(class_id)] for class_id in ids]
        activations.append(seen.numpy())
        gradients.append(np.stack([recorded.gradient(one, seen).numpy() for one in chosen]))
    a, g = (np.concatenate(one, axis).astype(np.float64) for one, axis in ((activations, 0), (gradients, 1)))
    rows: list[Row] = []
    for name in set(cam.METHODS) - {"notebook"}:
        ours = heatmaps(network.compute(pixels, class_ids, Method(name)).raw)
        rows.append((name, largest(ours, heatmaps(cam.METHODS[name](np, a, g)))))
    return Table(
        "A plain gradient tape",
        "EfficientNet-Lite0 on the five photos, top 5 classes of each; one tape and one gradient a class.",
        ("method", "largest difference of heatmaps in [0, 1]"),
        sorted(rows),
    )


def batch() -> Table:
    """A batch against single images, and the sum of a map against its score."""
    network = load_network(SHIPPED)
    pixels, class_ids = photos_and_classes(network)
    together = network.compute(pixels, class_ids)
    alone = [network.compute(pixels[[n]], class_ids[[n]]) for n in range(len(pixels))]
    scores = np.take_along_axis(together.scores, class_ids, axis=1)
    bias = network._model.layers[-1].get_weights()[1][class_ids]  # noqa: SLF001
    peak = float(np.abs(scores).max())
    return Table(
        "Within ourselves",
        "EfficientNet-Lite0 on the five photos, top 5 classes of each.",
        ("compared", "largest difference"),
        [
            ("heatmaps, five images at once and one by one", _apart(together.raw, [x.raw for x in alone])),
            ("scores, likewise, of the largest", largest(together.scores, _stacked(alone)) / peak),
            (
                "a raw map's sum and its score less the bias, of the largest score",
                largest(together.raw.sum((2, 3)), scores - bias) / peak,
            ),
        ],
    )


def _apart(together: Floats, alone: list[Floats]) -> float:
    return largest(heatmaps(together), heatmaps(np.concatenate(alone)))


def _stacked(alone: list[Any]) -> Floats:
    return np.concatenate([one.scores for one in alone])


def backends() -> Table:
    """Against the same code on other backends of Keras, each in a process of its own."""
    ours = every_method.computed()
    rows: list[Row] = []
    for backend in filter(find_spec, ("jax", "torch")):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "computed.npz")
            program = command("agreement.every_method", path)
            subprocess.run(program, env={**os.environ, **import_path(), "KERAS_BACKEND": backend}, check=True)
            with np.load(path) as saved:
                apart = {name: largest(array, saved[name]) for name, array in ours.items()}
        kinds = ("logits", "heatmaps")
        found = [max(value for name, value in apart.items() if name.endswith(kind)) for kind in kinds]
        rows.append((f"{backend} {version(backend)}", *found, sum(name.endswith("maps") for name in ours)))
    return Table(
        "Backends",
        "TensorFlow against the other backends that are installed: EfficientNet-Lite0 and a small network "
        "with a skip connection, every method, some with the mirror image and of the probability.",
        ("backend", "largest difference of logits", "of heatmaps in [0, 1]", "passes compared"),
        rows,
    )


def precision() -> Table:
    """In fewer digits."""
    exact = load_network(SHIPPED)
    pixels, class_ids = photos_and_classes(exact)
    rows: list[Row] = []
    for name in ("mixed_bfloat16", "bfloat16"):
        fewer = load_network(SHIPPED, precision=name)
        for method in cam.METHODS:
            before, after = (one.compute(pixels, class_ids, Method(method)) for one in (exact, fewer))
            difference = np.abs(heatmaps(before.raw) - heatmaps(after.raw))
            raw = [one.raw.reshape(-1, *one.raw.shape[2:]) for one in (before, after)]
            same = int((before.scores.argmax(1) == after.scores.argmax(1)).sum())
            apart = largest(before.scores, after.scores) / float(np.abs(before.scores).max())
            figures = (float(difference.max()), float(difference.mean()), overlap(*raw))
            rows.append((name, method, *figures, f"{same} of {len(pixels)}", apart))
    return Table(
        "Precision",
        "EfficientNet-Lite0 against itself in float32: five photos, the five classes of each that float32 "
        "ranks first. IoU: of the regions above half the peak. A `counterfactual` or `notebook` map may have "
        "next to no positive value, and so change altogether by a rounding.",
        (
            "precision",
            "method",
            "largest difference",
            "mean",
            "IoU",
            "same best class",
            "scores, of the largest",
        ),
        rows,
    )


def pointing() -> Table:
    """A pointing game."""
    played = {head: pointing_game.play(head) for head in pointing_game.HEADS}
    rows: list[Row] = [
        (name, *(played[head][name] for head in pointing_game.HEADS))
        for name in played[pointing_game.HEADS[0]]
    ]
    return Table(
        "Pointing game",
        f"Small networks trained on drawn shapes; {pointing_game.PLAYED} new pictures of two shapes each, "
        "asked for both. How often the heatmap's peak lies in the box of the shape that was asked for. "
        "`chance`: blindly. `named`: pictures whose two shapes are the two best classes.",
        ("method", *(f"{head} head" for head in pointing_game.HEADS)),
        rows,
    )


def randomisation() -> Table:
    """The parameter-randomisation sanity check."""
    (_, trained), *stages = cascade(load_network(SHIPPED))
    rows: list[Row] = [
        (stage, name, overlap(trained[name], raw), rank_correlation(trained[name], raw))
        for stage, maps in stages
        for name, raw in maps.items()
    ]
    return Table(
        "Randomisation",
        "Adebayo et al., arXiv 1810.03292: the weights of EfficientNet-Lite0 are shuffled from the head "
        "down; what is left of its maps of the five photos, top 3 classes of each. Near 0 is good: a map "
        "that stays does not show what was learned. Grad-CAM++ and LayerCAM take positive gradients alone "
        "and depend less on the head; EigenCAM does not depend on it. A map that has become uniform still "
        "has the hot region's share of the picture as its IoU, about .25.",
        ("shuffled down to", "method", "IoU", "rank correlation"),
        rows,
    )


SECTIONS: dict[str, Callable[[], Table]] = {
    one.__name__: one for one in (notebook, tape, batch, backends, precision, pointing, randomisation)
}


def written(value: str | float) -> str:
    """A cell."""
    if isinstance(value, str | int):
        return str(value)
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < SMALL else f"{value:.3f}"


def markdown(table: Table) -> Iterator[str]:
    """A section of the document, line by line."""
    yield from (f"## {table.title}", "", *textwrap.wrap(table.about, WIDTH), "")
    yield from report.table(table.headings, [[*map(written, row)] for row in table.rows])


def main() -> int:
    """Measure the sections that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}: needs all sections")
    asked = parser.parse_args()
    if unknown := set(asked.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}.")
    if asked.write and asked.sections:
        parser.error("--write takes no sections: the document has them all.")
    tables = {}
    for name in asked.sections or SECTIONS:
        tables[name] = SECTIONS[name]()
        keras.utils.clear_session()
        if not asked.json:
            print("\n".join(markdown(tables[name])), flush=True)
    made_with = report.versions([name for name in PACKAGES if find_spec(name)])
    if asked.json:
        figures = {name: asdict(table) for name, table in tables.items()}
        print(json.dumps({"versions": made_with, "sections": figures}, indent=2))
    if asked.write:
        made = ", ".join(f"{name} {number}" for name, number in made_with.items())
        lines = [line for table in tables.values() for line in markdown(table)]
        DOCUMENT.write_text("\n".join([INTRODUCTION, f"Made with {made}.", "", *lines]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
