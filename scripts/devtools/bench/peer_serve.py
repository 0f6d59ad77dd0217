"""One process of `bench peers`: told on standard input what to do, a line each, it answers a line of JSON.

    run N K      explain the first N images for their top K classes, against the clock
    keep         write the maps of the last run where `compare` looks for ours
    compare      the largest difference of the last run's maps from ours

So all libraries are loaded once, and only the one whose turn it is does anything.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from devtools.bench.timing import clock

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
PAIRS = 8  # pairs of image and class in one call, for libraries that take one class an image


class Way(Protocol):
    """A library with a network in it, ready to explain."""

    def explain(self, images: Floats, class_ids: Ids) -> Floats:
        """Prepared images (n, height, width, 3), classes of each (n, k) -> maps (n, k, rows, columns)."""

    def enlarged(self, maps: Floats) -> Floats:
        """Maps as large as the target layer's -> as large as `explain` gives them, by the library's means."""


@dataclass(frozen=True)
class Work:
    """The folder that all processes share: what ours leaves there for the others."""

    network: str
    folder: Path

    @property
    def images(self) -> Floats:
        """Preprocessed images (n, height, width, 3)."""
        return np.asarray(np.load(self.folder / "images.npy"))

    @property
    def class_ids(self) -> Ids:
        """The classes of each image, the best first (n, k)."""
        return np.asarray(np.load(self.folder / "class_ids.npy"))

    def weights(self) -> dict[str, Floats]:
        """Layer and kind -> the array as Keras keeps it, in the order of Keras's model."""
        with np.load(self.folder / "weights.npz") as saved:
            return {name: saved[name] for name in saved.files}

    def maps(self, count: int) -> Path:
        """Where our maps of the first `count` images lie, (n, k, rows, columns)."""
        return self.folder / f"maps-{count}.npy"


def serve(libraries: dict[str, Callable[[Work], Way]]) -> None:
    """Load what the command line names (library, network, folder) and do what is asked until nobody asks."""
    name, network, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # what libraries print goes elsewhere
    os.dup2(2, 1)
    work = Work(network, Path(folder))
    try:
        with redirect_stdout(sys.stderr):
            process = _Process(work, libraries[name](work))
    except Exception as error:  # noqa: BLE001  # whatever a library may raise: the others go on
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        return
    print(json.dumps({"ready": name}), file=answers)
    for line in sys.stdin:
        try:
            answer = process.do(*line.split())
        except Exception as error:  # noqa: BLE001  # likewise
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


class _Process:
    """A library at work."""

    def __init__(self, work: Work, way: Way) -> None:
        self._work, self._way = work, way
        self._images, self._class_ids = work.images, work.class_ids
        self._maps: Floats | None = None

    def do(self, command: str, *numbers: str) -> dict[str, Any]:
        """Carry out one line."""
        if command == "run":
            wall, cpu = clock(lambda: self._explain(*map(int, numbers)))
            return {"wall": wall, "cpu": cpu}
        if self._maps is None:
            message = f"{command} needs a run before it."
            raise ValueError(message)
        place = self._work.maps(len(self._maps))
        if command == "keep":
            np.save(place, self._maps)
            return {"kept": place.name}
        ours = np.load(place)
        apart = np.abs(spread(self._maps) - spread(self._way.enlarged(ours)))
        lit = int(np.count_nonzero(ours.max(axis=(2, 3))))
        return {"difference": float(apart.max()), "compared": ours.shape[0] * ours.shape[1], "lit": lit}

    def _explain(self, count: int, classes: int) -> None:
        self._maps = self._way.explain(self._images[:count], self._class_ids[:count, :classes])


def spread(maps: Floats) -> NDArray[np.float64]:
    """Maps (..., rows, columns) -> each from 0 at its least to 1 at its peak: some libraries scale so."""
    exact = np.asarray(maps, np.float64)
    least, peak = (function(exact, axis=(-2, -1), keepdims=True) for function in (np.min, np.max))
    apart = peak - least
    return np.asarray((exact - least) / np.where(apart > 0, apart, 1))


def in_pairs(explain: Callable[[Floats, Ids], Any], images: Floats, class_ids: Ids) -> Floats:
    """Every class of every image, for libraries that explain one class an image: some pairs in each call."""
    count, classes = class_ids.shape
    repeated = np.repeat(np.arange(count), classes)
    wanted = class_ids.reshape(-1)
    parts = [
        np.asarray(explain(images[repeated[first : first + PAIRS]], wanted[first : first + PAIRS]))
        for first in range(0, len(wanted), PAIRS)
    ]
    together = np.concatenate(parts)
    return together.reshape(count, classes, *together.shape[1:])
