"""A network that takes an age and a sex beside the image, with known scores."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.network import GRADCAM, Computed, Method
from gradcam_worker.gradcam.network_inputs import NetworkInput
from gradcam_worker.testing import TinyNetwork

AGE = NetworkInput("age", minimum=0, maximum=120, scale=0.01)
SEX = NetworkInput("sex", "category", values=("f", "m"), default="f")


class AgedNetwork(TinyNetwork):
    """`TinyNetwork`, with a hundredth of the age added to the score of green, and 2 to that of blue for m."""

    facts = replace(TinyNetwork.facts, inputs=(AGE, SEX))

    def __init__(self) -> None:
        self.seen: list[NDArray[np.float32]] = []  # values, of each pass

    def compute(
        self,
        pixels: NDArray[np.uint8],
        wanted: NDArray[np.int32],
        method: Method = GRADCAM,
        values: NDArray[np.float32] | None = None,
    ) -> Computed:
        """See `gradcam_worker.gradcam.network.NetworkWithInputs.compute`."""
        shifted = self.scores(pixels, values)
        order = np.argsort(-shifted, axis=1, kind="stable")
        ranked = np.take_along_axis(order, np.maximum(-wanted - 1, 0), axis=1)
        computed = super().compute(pixels, np.where(wanted < 0, ranked, wanted).astype(np.int32), method)
        return replace(computed, scores=shifted)

    def begin(
        self,
        pixels: NDArray[np.uint8],
        wanted: NDArray[np.int32],
        method: Method = GRADCAM,
        values: NDArray[np.float32] | None = None,
    ) -> Callable[[], Computed]:
        """See `gradcam_worker.gradcam.network.NetworkWithInputs.begin`."""
        computed = self.compute(pixels, wanted, method, values)
        return lambda: computed

    def scores(
        self, pixels: NDArray[np.uint8], values: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """See `gradcam_worker.gradcam.network.NetworkWithInputs.scores`."""
        plain = np.asarray(self._blocks(pixels).mean((1, 2)) @ self.KERNEL, np.float32)
        if values is None:  # `TinyNetwork.compute` asks for them
            return plain
        assert values.shape == (len(pixels), 3), "a row of numbers for each image"
        self.seen.append(values.copy())
        return plain + np.stack([0 * values[:, 0], values[:, 0], 2 * values[:, 2]], axis=1)
