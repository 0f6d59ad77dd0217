"""Datasets for tests of audits: a few images, told one by one. Many at once: `devtools.synthetic_dataset`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from devtools.synthetic_dataset import SyntheticImages, write, write_folder
from gradcam_worker.testing import MemoryStore

XY = tuple[float, float]
CENTER: XY = (0.5, 0.5)
CORNER: XY = (0.04, 0.04)
MIDDLE_BOX = (0.25, 0.25, 0.75, 0.75)  # around the centre: a quarter of the image


@dataclass(frozen=True)
class Image:
    """One image, and what the network said of it. Positions are shares of width and height."""

    predicted: int = 0
    truth: int | None = None
    heat: XY = CENTER  # the middle of the heat
    box: tuple[float, float, float, float] | None = None  # left, top, right, bottom of the object
    probability: float = 0.9
    spread: float = 0.1  # of the heat
    second: int | None = None  # the class that is explained beside the prediction
    second_heat: XY | None = None
    features: tuple[float, ...] | None = None
    carried: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    uri: str | None = None
    sha256: str | None = None

    def times(self, count: int) -> list["Image"]:
        """As many equal images; only their numbers differ."""
        return [self] * count


def images(*groups: Image | Sequence[Image]) -> SyntheticImages:
    """The images as arrays. Columns that no image says anything about are left out."""
    flat = [one for group in groups for one in ([group] if isinstance(group, Image) else group)]
    number = range(len(flat))
    names = sorted({name for one in flat for name in one.carried})
    return SyntheticImages(
        predicted=np.array([one.predicted for one in flat], np.int32),
        truth=_ints([one.truth for one in flat]),
        heat_xy=np.array([one.heat for one in flat], np.float32),
        spread=np.array([one.spread for one in flat], np.float32),
        probability=np.array([one.probability for one in flat], np.float32),
        boxes=np.array([one.box or (np.nan,) * 4 for one in flat], np.float32)
        if any(one.box for one in flat)
        else None,
        second=_ints([one.second for one in flat]),
        second_xy=np.array([one.second_heat or one.heat for one in flat], np.float32),
        features=np.array([one.features for one in flat], np.float16)
        if flat and flat[0].features is not None
        else None,
        carried={name: [one.carried.get(name) for one in flat] for name in names},
        errors=[one.error for one in flat],
        uris=[one.uri or f"s3://photos/{row}.jpg" for row, one in zip(number, flat, strict=True)],
        hashes=[one.sha256 or f"{row:064x}" for row, one in zip(number, flat, strict=True)],
    )


def _ints(values: Sequence[int | None]) -> Any:
    if all(value is None for value in values):
        return None
    return np.array([-1 if value is None else value for value in values], np.int32)


def spread_out(image: Image, count: int, *, seed: int = 0, by: float = 0.08) -> list[Image]:
    """As many images like this one, with their heat around its heat."""
    rng = np.random.default_rng(seed)
    places = np.clip(np.array(image.heat) + rng.normal(0, by, (count, 2)), 0.01, 0.99)
    return [replace(image, heat=(float(x), float(y))) for x, y in places]


def memory_dataset(*groups: Image | Sequence[Image], **options: Any) -> MemoryStore:
    """A dataset in memory; options: see `devtools.synthetic_dataset.write`."""
    store = MemoryStore()
    write(images(*groups), store.objects.__setitem__, **options)
    return store


def folder_dataset(folder: Path, *groups: Image | Sequence[Image], **options: Any) -> Path:
    """A dataset in a folder."""
    return write_folder(images(*groups), folder, **options)
