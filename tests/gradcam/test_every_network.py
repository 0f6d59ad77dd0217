"""Every network of the catalog is what its row says, and can be explained: see `networks`."""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from worker.gradcam.catalog import CATALOG, NetworkRow

ROWS = list(CATALOG.values())
THEIRS = [row for row in ROWS if not row.shipped]  # Keras's own
every_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
DOCUMENT = Path(__file__).parents[2] / "docs" / "NETWORKS.md"


def test_the_table_in_the_docs_is_of_these_rows() -> None:
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines[1:]]
    sides = [" x ".join(map(str, row.input_size)) for row in ROWS]
    maps = [" x ".join(map(str, row.map_size or ())) for row in ROWS]
    assert cells == [
        [
            row.name,
            side,
            row.preprocessing.name,
            f"`{row.target_layer}`",
            cells,
            f"{row.parameters:,}",
            "yes",
            "yes",
        ]
        for row, side, cells in zip(ROWS, sides, maps, strict=True)
    ]


@pytest.mark.tensorflow
@pytest.mark.parametrize("row", THEIRS, ids=[row.name for row in THEIRS])
def test_preprocessing_is_what_keras_does_for_its_weights(
    row: NetworkRow, noise: Callable[..., NDArray[np.uint8]]
) -> None:
    import keras

    from worker.gradcam.keras_network import preprocess

    builder = getattr(keras.applications, str(row.builder).split(":")[1])
    theirs = sys.modules[builder.__module__].preprocess_input
    assert inspect.isfunction(theirs)
    pixels = noise(2, 5, 4).astype(np.float32)
    assert_allclose(preprocess(pixels, row.preprocessing), theirs(pixels.copy()), atol=1e-5)


@pytest.mark.slow
@pytest.mark.tensorflow
@every_row
def test_it_is_found_by_its_graph_as_its_row_says_and_its_map_is_finite_and_not_all_zero(
    row: NetworkRow,
) -> None:
    from networks import look

    seen = look(row)
    assert seen.target_layer == row.target_layer
    assert (seen.input_size, seen.map_size) == (row.input_size, row.map_size)
    assert (seen.preprocessing, seen.parameters) == (row.preprocessing.name, row.parameters)
    assert seen.finite
    assert seen.nonzero
    assert seen.fits_its_row
