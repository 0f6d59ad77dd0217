"""Do the heatmaps of a network depend on its weights? The model parameter randomisation test.

Adebayo et al., arXiv 1810.03292, section 3.1: the weights are randomised from the head down, and the heatmaps
before and after are compared by Spearman's rank correlation. Near 0 is good: a heatmap that stays as it was
does not show what the network has learned.

Differences from the paper: two stages, the head alone and everything, not one for each layer; weights are
shuffled within each array, which keeps their distribution without knowledge of how they were initialised.
Only kernels are shuffled (arrays of two and more dimensions), so that normalisation keeps activations finite.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.network_input import to_input
from gradcam_worker.gradcam.network import (
    GRADCAM,
    InputPixels,
    Method,
    NetworkFacts,
    repeat_values,
    sample_values,
)

if TYPE_CHECKING:
    from gradcam_worker.gradcam.models.keras_network import KerasNetwork

Maps = NDArray[np.float32]
MIN_CELLS = 9  # of a heatmap: the rank correlation of fewer says nothing


@dataclass(frozen=True)
class Randomization:
    """How much heatmaps are as before when weights are shuffled: mean rank correlations, from -1 to 1.

    Attributes:
        head: With the kernels behind the target layer shuffled. NaN: there are none.
        everything: With all kernels shuffled.

    Either is NaN where no heatmap can be compared: it is the same everywhere, or no longer finite.
    """

    head: float
    everything: float


def sample_photos(facts: NetworkFacts) -> InputPixels:
    """The five photos of this package as inputs of a network, (5, height, width, 3)."""
    paths = sorted((DATA / "photos").glob("*.jpg"))
    photos = [decode(path.read_bytes()).pixels for path in paths]
    return np.stack([to_input(photo, facts.input_size, facts.sizing) for photo in photos])


def randomize_parameters(
    network: "KerasNetwork",
    pixels: InputPixels | None = None,
    *,
    method: Method = GRADCAM,
    seed: int = 0,
) -> Randomization:
    """Compare heatmaps with those of the same network with shuffled weights.

    The heatmaps are those of the best class of each image, before the ReLU. It costs three passes over the
    images. While it runs nothing else may use the network, whose weights are restored in any case.

    Args:
        network: From `load_network` or `wrap_model`.
        pixels: Images (n, height, width, channels), uint8, of its input size; None: `sample_photos`.
        method: How to compute the heatmaps.
        seed: Of the shuffling.

    Returns:
        The rank correlations.

    Examples:
        ```python
        score = randomize_parameters(network)
        score.everything  # near 0 or less: the heatmaps show what the network has learned
        ```
    """
    images = sample_photos(network.facts) if pixels is None else pixels
    values = repeat_values(sample_values(network.facts), len(images))
    wanted = np.full((len(images), 1), -1, np.int32)
    before = network.compute(images, wanted, method, values)

    def after(*, head_only: bool) -> float:
        with network.shuffled(method.layer, head_only=head_only, seed=seed) as count:
            if not count:
                return float("nan")
            raw = network.compute(images, before.class_ids, method, values).raw
        return mean_rank_correlation(before.raw[:, 0], raw[:, 0])

    return Randomization(after(head_only=True), after(head_only=False))


def mean_rank_correlation(one: Maps, other: Maps) -> float:
    """Spearman's rank correlation of n pairs of maps, the mean of those that have one.

    Args:
        one: (n, rows, columns).
        other: (n, rows, columns).

    Returns:
        From -1 to 1; NaN if no pair has one.
    """
    found = []
    for pair in zip(one.reshape(len(one), -1), other.reshape(len(other), -1), strict=True):
        if pair[0].size < MIN_CELLS or not all(np.isfinite(each).all() and np.ptp(each) > 0 for each in pair):
            continue
        found.append(np.corrcoef(_ranks(pair[0]), _ranks(pair[1]))[0, 1])
    return float(np.mean(found)) if found else float("nan")


def _ranks(values: Maps) -> NDArray[np.float64]:
    """Ranks from 0; equal values share their mean rank."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[index])
