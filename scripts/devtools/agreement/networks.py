"""Every network of the catalog, built with seeded random weights: the command `scripts/networks`."""

import gc
import json
import sys
from dataclasses import asdict, dataclass

import click

from devtools import ROOT
from devtools.agreement import weights
from devtools.agreement.weights import Weighed, weigh
from devtools.bench.report import measured, table, versions, write, written
from gradcam_worker.gradcam.models.loading import load_network

# isort: split
# Only now: the line above keeps TensorFlow quiet while it is loaded for the first time.
import keras
import numpy as np

from gradcam_worker.gradcam import catalog
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.network import Method

PAGE = ROOT / "docs" / "reference" / "networks.md"
WEIGHTS_PAGE = ROOT / "docs" / "explanation" / "agreement.md"
PHOTO = DATA / "photos" / "astronaut.jpg"
SEED = 0
HEADINGS = ("network", "input", "preprocessing", "target layer", "map", "parameters", "finite", "non-zero")


@dataclass(frozen=True)
class Seen:
    """What one network turned out to be."""

    network: str
    input_size: tuple[int, int]  # (height, width) in pixels
    preprocessing: str
    target_layer: str  # found in the graph
    map_size: tuple[int, int]  # (rows, columns)
    parameters: int
    finite: bool
    nonzero: bool

    @property
    def fits_its_row(self) -> bool:
        """Whether it is what the catalog says, and can be explained."""
        row = CATALOG[self.network]
        expected = (row.input_size, row.preprocessing.name, row.target_layer, row.map_size, row.parameters)
        built = (self.input_size, self.preprocessing, self.target_layer, self.map_size, self.parameters)
        return expected == built and self.finite and self.nonzero

    @property
    def cells(self) -> tuple[str, ...]:
        """Its cells, in the order of the headings."""
        input_size, map_size = (" x ".join(map(str, size)) for size in (self.input_size, self.map_size))
        answers = ("yes" if answer else "NO" for answer in (self.finite, self.nonzero))
        layer, parameters = f"`{self.target_layer}`", f"{self.parameters:,}"
        return self.network, input_size, self.preprocessing, layer, map_size, parameters, *answers


def look(row: NetworkRow) -> Seen:
    """Build a network, explain the photo by the layer that its graph gives, and let it go again."""
    network = load_network(row, random_seed=SEED, forward="tensorflow")
    photo = fit(decode(PHOTO.read_bytes()).pixels, row.input_size)
    computed = network.compute(photo[np.newaxis], np.array([[-1]], np.int32), Method(layer="auto"))
    facts, (rows, columns) = network.facts, computed.raw.shape[2:]
    seen = Seen(
        network=row.name,
        input_size=facts.input_size,
        preprocessing=facts.preprocessing,
        target_layer=computed.layer,
        map_size=(rows, columns),
        parameters=facts.parameters,
        finite=bool(np.isfinite(computed.raw).all()),
        nonzero=bool(computed.raw.any()),
    )
    del network
    keras.utils.clear_session()
    gc.collect()
    return seen


@click.command("scripts/networks")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--weights", "weighs", is_flag=True, help="Compare the ways in which weights come, instead.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else.")
@click.option("--write", "writes", is_flag=True, help="Write the table into its page: of all networks.")
def main(names: tuple[str, ...], *, weighs: bool, as_json: bool, writes: bool) -> None:
    """Build the networks that are named, or all (minutes), and explain a photo with each.

    Exit code 1: a network is not what its row says, or its map is not finite, or dark; with --weights, it has
    another graph or other logits in one of the ways.
    """
    if writes and names:
        message = "--write takes no names: the table is of all networks."
        raise click.UsageError(message)
    rows = [catalog.find(name) for name in names] or CATALOG.values()
    results: list[Seen] | list[Weighed]
    if weighs:
        results = [told(weigh(row)) for row in rows if not row.shipped]
        text = table(weights.HEADINGS, [one.cells for one in results])
        page, title, wrong_is = WEIGHTS_PAGE, "Weights of the catalog", "Another graph or other logits"
        wrong = [one.network for one in results if not one.agrees]
    else:
        results = [look(row) for row in rows]
        text = table(HEADINGS, [one.cells for one in results])
        page, title, wrong_is = PAGE, "The catalog", "Not as their rows say, or dark"
        wrong = [one.network for one in results if not one.fits_its_row]
    click.echo(json.dumps([asdict(one) for one in results], indent=2) if as_json else text)
    if writes:
        made_with = measured(f"with {written(versions(('keras', 'tensorflow')))}")
        write(page, title, f"{text}\n\n{made_with}")
    if wrong:
        click.echo(f"{wrong_is}: {', '.join(wrong)}.", err=True)
        sys.exit(1)


def told(one: Weighed) -> Weighed:
    """Tell on standard error what was found: all networks take half an hour."""
    click.echo(" ".join(one.cells), err=True)
    return one


if __name__ == "__main__":
    main()
