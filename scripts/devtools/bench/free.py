"""What a job needs and `bench_host` does not measure, at no cost: a network, its device, an image source."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.classes import imagenet
from gradcam_worker.gradcam.explain import explain_pixels
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method, NetworkFacts
from gradcam_worker.images.fetch import Fetched
from gradcam_worker.inference.model_cache import InferenceResult, ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef

# isort: split
# Only now: the package of the worker tells OpenCV how large a picture may be before it is loaded.
import cv2

NETWORK = "vgg16"
CELLS, CLASSES = 14, 1000  # as VGG16's
MOST = 8  # classes that can be explained
SEED = 0


class Free:
    """A network that has always computed already."""

    def __init__(self) -> None:
        """Smooth maps, since a real network's are, and scores of a thousand classes."""
        random, row = np.random.default_rng(SEED), CATALOG[NETWORK]
        self.labels = imagenet()
        self.facts = NetworkFacts(
            name=NETWORK,
            input_size=row.input_size,
            preprocessing=row.preprocessing.name,
            weights_sha256="0" * 64,
            backend="none",
            dtype="float32",
            default_layer=row.target_layer or "",
            map_size=(CELLS, CELLS),
            parameters=row.parameters or 0,
        )
        self._scores = random.normal(0, 3, (1, CLASSES)).astype(np.float32)
        noise = random.normal(0, 1, (MOST, CELLS, CELLS)).astype(np.float32)
        self._raw = np.stack([cv2.GaussianBlur(one, (0, 0), 1.5) for one in noise])[np.newaxis]
        self._order = np.argsort(-self._scores)

    def compute(self, pixels: Any, wanted: Any, method: Method = GRADCAM) -> Computed:  # noqa: ARG002
        """See `gradcam_worker.gradcam.network.Network.compute`."""
        asked = wanted.shape[1]
        class_ids = self._order[:, :asked].astype(np.int32)
        return Computed(self.facts.default_layer, self._scores, class_ids, self._raw[:, :asked])

    def begin(self, pixels: Any, wanted: Any, method: Method = GRADCAM) -> Callable[[], Computed]:
        """See `gradcam_worker.gradcam.network.Network.begin`."""
        return partial(self.compute, pixels, wanted, method)

    def scores(self, pixels: Any) -> Any:  # noqa: ARG002
        """See `gradcam_worker.gradcam.network.Network.scores`."""
        return self._scores


class Direct(ModelCache):
    """A device that is asked in the job's own thread: handing over to it is no part of this bench."""

    def explain(
        self, network: Any, pixels: Any, wish: Any, method: Method, *_: Any, **__: Any
    ) -> InferenceResult:
        """See `gradcam_worker.inference.model_cache.BatchSlot.infer`."""
        return InferenceResult(explain_pixels(network, pixels[np.newaxis], [tuple(wish)], method)[0], 0, 0, 1)

    @contextmanager
    def slot(self) -> Iterator[Any]:
        """See `gradcam_worker.inference.model_cache.ModelCache.reserve`."""
        yield self


@dataclass(frozen=True)
class Fetch:
    """One image that is there already, and whose checksum is known."""

    fetched: Fetched

    def fetch(self, image: ImageRef, deadline: Deadline, at_most: int | None = None) -> Fetched:  # noqa: ARG002
        """See `gradcam_worker.images.fetch.UriFetcher.fetch`."""
        return self.fetched
