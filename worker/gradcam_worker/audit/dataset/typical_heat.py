"""Where the heat of a class typically lies, and how far an image agrees with it.

The typical heat m of a class is the mean of the heat h of its images, each with the sum 1. The agreement of
an image is h · m / m · m, with m from all other images of the class (leave-one-out). Its mean over the images
of the class is 1; it is 0 for an image whose heat lies where the class has none. If the heat of a class lies
everywhere alike, each image agrees by 1, and none stands out. It is the measure by which saliency models are
held against the gaze of other observers (Peters et al. 2005, normalized scanpath saliency), scaled by what a
typical observer reaches instead of by the deviation over the image.
"""

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.audit.dataset.class_codes import ClassSums


class TypicalHeat:
    """The sums of the heat of each class."""

    def __init__(self) -> None:
        """No image was added yet."""
        self._sums, self._counts = ClassSums(), ClassSums()

    def add(self, codes: NDArray[np.int32], maps: NDArray[np.floating]) -> None:
        """Add images.

        Args:
            codes: (n,) of their classes; -1: none.
            maps: (n, rows, columns): of equal sums, or 0 everywhere: such are left out.
        """
        has_heat = maps.any((1, 2))
        self._sums.add(codes[has_heat], maps[has_heat])
        self._counts.add(codes[has_heat])

    def counts(self, classes: int) -> NDArray[np.float64]:
        """The number of images of each of the first `classes` classes."""
        return self._counts.of(classes)

    def mean(self, code: int) -> NDArray[np.float64] | None:
        """The typical heat of a class; None: there are no images."""
        count = self._counts.of(code + 1)[code]
        mean: NDArray[np.float64] | None = self._sums.of(code + 1)[code] / count if count else None
        return mean

    def agreement(
        self,
        codes: NDArray[np.int32],
        maps: NDArray[np.floating],
        is_part: NDArray[np.bool_],
        least_images: int,
    ) -> NDArray[np.float32]:
        """How far images agree with the typical heat of their classes.

        Args:
            codes: (n,) of the classes.
            maps: (n, rows, columns) as they were added.
            is_part: Which of the images were added: they are taken out again, each for itself.
            least_images: nan for classes of which fewer other images are known.

        Returns:
            (n,), nan where it is not known.
        """
        heat = maps.reshape(len(maps), -1).astype(np.float64)
        agreement = np.full(len(codes), np.nan)
        classes = int(codes.max(initial=-1)) + 1
        if not self._counts.of(classes).any():
            return agreement.astype(np.float32)
        sums = self._sums.of(classes).reshape(classes, -1)[codes]  # a copy
        has_heat = heat.any(1)
        own = is_part & has_heat
        others = self._counts.of(classes)[codes] - own
        sums -= np.where(own[:, None], heat, 0)
        squares = np.einsum("nc,nc->n", sums, sums)
        products = np.einsum("nc,nc->n", heat, sums) * others
        known = (others >= least_images) & has_heat & (squares > 0)
        np.divide(products, squares, out=agreement, where=known)
        return agreement.astype(np.float32)


def heat_at_border(
    maps: NDArray[np.floating], widths: NDArray[np.integer], heights: NDArray[np.integer], band: float
) -> NDArray[np.float32]:
    """The share of heat in the outer band of each image.

    Args:
        maps: (n, rows, columns) of heat on the images.
        widths: (n,) in pixels.
        heights: (n,) in pixels.
        band: Its width, as a share of the shorter side.

    Returns:
        (n,), nan where there is no heat.
    """
    shorter = band * np.minimum(widths, heights)
    inner = np.einsum(
        "nr,nrc,nc->n",
        _inner_shares(shorter / np.maximum(heights, 1), maps.shape[1]),
        maps.astype(np.float64),
        _inner_shares(shorter / np.maximum(widths, 1), maps.shape[2]),
    )
    totals = maps.sum((1, 2), dtype=np.float64)
    shares = np.full(len(maps), np.nan)
    np.divide(totals - inner, totals, out=shares, where=totals > 0)
    return shares.astype(np.float32)


def _inner_shares(band: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    """Which share of each of the cells along a side lies within the band at both ends: (n, cells)."""
    edges = np.arange(cells + 1) / cells
    overlap = np.minimum(1 - band[:, None], edges[1:]) - np.maximum(band[:, None], edges[:-1])
    shares: NDArray[np.float64] = np.clip(overlap * cells, 0, 1)
    return shares
