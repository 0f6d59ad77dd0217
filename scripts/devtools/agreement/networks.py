"""Every network of the catalog: `scripts/networks [NAME ...] [--json] [--write]`.

Each is built with seeded random weights and explains a photo. Exit code 1: a network is not what its row
says, or its map is not finite, or dark. `--write` makes docs/reference/networks.md again, for
which all are built: minutes.
"""

import argparse
import gc
import json
import sys
from dataclasses import asdict, dataclass

from devtools import ROOT
from devtools.bench.report import table
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

DOCUMENT = ROOT / "docs" / "reference" / "networks.md"
PHOTO = DATA / "photos" / "astronaut.jpg"
SEED = 0
WIDTHS = (20, 10, 7, 24, 8, 12, 4, 4)  # characters of each column
HEADINGS = ("network", "input", "preprocessing", "target layer", "map", "parameters", "finite", "non-zero")
INTRODUCTION = """\
# Networks

Every network of the catalog, built with seeded random weights, and the Grad-CAM of its best class on a photo.
*Target layer*: found in the graph, by no name: the last layer that still keeps rows and columns. It is named
in the catalog too, and the two are held to be the same. *Map*: its rows and columns. *Preprocessing*: by the
names that Keras uses (`caffe`, `tf`, `torch`; `none`: the network does it itself); `lite` is (x - 127) / 128.

`scripts/networks --write` makes this table again, in minutes; `pytest -m slow` holds it. Weights:
EfficientNet-Lite0's are shipped; the others are Keras's ImageNet weights, downloaded, or from a folder of
yours.

Your own networks need no row here: a registry file names them.
"""


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
        said = (row.input_size, row.preprocessing.name, row.target_layer, row.map_size, row.parameters)
        found = (self.input_size, self.preprocessing, self.target_layer, self.map_size, self.parameters)
        return said == found and self.finite and self.nonzero


def look(row: NetworkRow) -> Seen:
    """Build a network, explain the photo by the layer that its graph gives, and let it go again."""
    network = load_network(row, random_seed=SEED)
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


def cells(seen: Seen) -> list[str]:
    """One network's cells, in the order of the headings."""
    input_size, map_size = (" x ".join(map(str, size)) for size in (seen.input_size, seen.map_size))
    said = [seen.network, input_size, seen.preprocessing, f"`{seen.target_layer}`", map_size]
    return [*said, f"{seen.parameters:,}", *("yes" if one else "NO" for one in (seen.finite, seen.nonzero))]


def main() -> int:
    """Look at the networks that are named, or at all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "networks", nargs="*", metavar="NAME", help="of the catalog; all, where none is named"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}: needs all networks")
    asked = parser.parse_args()
    if asked.write and asked.networks:
        parser.error("--write takes no names: the table is of all networks.")
    rows = [catalog.find(name) for name in asked.networks] or list(CATALOG.values())
    seen = []
    for row in rows:
        seen.append(look(row))
        if not asked.json:
            print(" ".join(f"{cell:<{width}}" for cell, width in zip(cells(seen[-1]), WIDTHS, strict=True)))
    if asked.json:
        print(json.dumps([asdict(one) for one in seen], indent=2))
    if asked.write:
        DOCUMENT.write_text(
            INTRODUCTION + "\n" + "\n".join(table(HEADINGS, map(cells, seen))), encoding="utf-8"
        )
    wrong = [one.network for one in seen if not one.fits_its_row]
    if wrong:
        print(f"Not as their rows say, or dark: {', '.join(wrong)}.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
