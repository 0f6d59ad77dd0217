"""How far our numbers are from the same computed in other ways: the command `scripts/agreement`.

Each section is a table of differences, none of times. Whether they are small enough is for the tests to say,
in tests/gradcam.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import click

from devtools import ROOT
from devtools.agreement.notebook import NotebookGradCAM, check
from devtools.agreement.photos import photographs
from devtools.bench import report
from devtools.bench.variants import noise, prepared
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
PAGE = ROOT / "docs" / "explanation" / "agreement.md"
SMALL = 1e-2  # figures below are written as powers of ten
PACKAGES = ("keras", "tensorflow", "numpy")
Floats = NDArray[np.float32]
Row = tuple[str | float | int, ...]


@dataclass(frozen=True)
class Table:
    """What one section measured."""

    title: str
    headings: tuple[str, ...]
    rows: list[Row]


def largest(ours: Any, theirs: Any) -> float:
    """The largest difference between two arrays."""
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max())


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
            target, scores = both((image[np.newaxis] - np.float32(127)) / 128)
            chosen = [scores[0, int(class_id)] for class_id in ids]
        activations.append(target.numpy())
        gradients.append(np.stack([recorded.gradient(score, target).numpy() for score in chosen]))
    a = np.concatenate(activations).astype(np.float64)
    g = np.concatenate(gradients, axis=1).astype(np.float64)
    rows: list[Row] = []
    for name in set(cam.METHODS) - {"notebook"}:
        ours = heatmaps(network.compute(pixels, class_ids, Method(name)).raw)
        rows.append((name, largest(ours, heatmaps(cam.METHODS[name](np, a, g)))))
    return Table(
        "A plain gradient tape",
        ("method", "largest difference of heatmaps in [0, 1]"),
        sorted(rows),
    )


def batch() -> Table:
    """A batch against single images, and the sum of a map against its score."""
    network = load_network(SHIPPED)
    pixels, class_ids = photos_and_classes(network)
    together = network.compute(pixels, class_ids)
    one_by_one = [network.compute(pixels[[n]], class_ids[[n]]) for n in range(len(pixels))]
    alone = np.concatenate([computed.scores for computed in one_by_one])
    maps = heatmaps(together.raw), heatmaps(np.concatenate([computed.raw for computed in one_by_one]))
    scores = np.take_along_axis(together.scores, class_ids, axis=1)
    bias = network._model.layers[-1].get_weights()[1][class_ids]  # noqa: SLF001
    peak = float(np.abs(scores).max())
    return Table(
        "Within ourselves",
        ("compared", "largest difference"),
        [
            ("heatmaps, five images at once and one by one", largest(*maps)),
            ("scores, likewise, of the largest", largest(together.scores, alone) / peak),
            (
                "a raw map's sum and its score less the bias, of the largest score",
                largest(together.raw.sum((2, 3)), scores - bias) / peak,
            ),
        ],
    )


SECTIONS: dict[str, Callable[[], Table]] = {section.__name__: section for section in (notebook, tape, batch)}


def cell(value: str | float) -> str:
    """A value as a table shows it."""
    if isinstance(value, str | int):
        return str(value)
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < SMALL else f"{value:.3f}"


@click.command("scripts/agreement")
@click.argument("names", metavar="[SECTION]...", type=click.Choice([*SECTIONS]), nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
@click.option("--write", "writes", is_flag=True, help=f"Write the figures into {PAGE.name}.")
def main(names: tuple[str, ...], *, as_json: bool, writes: bool) -> None:
    """Compute the sections that are named, or all: some minutes."""
    made_with = report.versions(PACKAGES)
    tables = {}
    for name in names or SECTIONS:
        tables[name] = computed = SECTIONS[name]()
        keras.utils.clear_session()
        text = report.table(computed.headings, [[*map(cell, row)] for row in computed.rows])
        if not as_json:
            click.echo(f"## {computed.title}\n\n{text}\n")
        if writes:
            made = report.measured(f"with {report.written(made_with)}")
            report.write(PAGE, computed.title, f"{text}\n\n{made}")
    if as_json:
        figures = {name: asdict(computed) for name, computed in tables.items()}
        click.echo(json.dumps({"versions": made_with, "sections": figures}, indent=2))


if __name__ == "__main__":
    main()
