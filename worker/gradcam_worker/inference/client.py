"""What jobs ask of loaded networks, wherever they are: in this process, or in an engine process.

`model_cache.ModelCache` answers in this process, `engine_client.EngineClient` from an engine process.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import GradcamError
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.gradcam.network import Classifier, InputPixels, Method
from gradcam_worker.inference.request import InferenceResult
from gradcam_worker.resilience.deadline import Deadline

C = TypeVar("C", bound=Classifier)
C_contra = TypeVar("C_contra", bound=Classifier, contravariant=True)


class ReservedSlot(Protocol[C_contra]):
    """A job that will submit one image."""

    def infer(
        self,
        network: C_contra,
        pixels: InputPixels,
        classes: Sequence[int],
        method: Method,
        deadline: Deadline,
        *,
        bulk: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> InferenceResult:
        """See `gradcam_worker.inference.model_cache.BatchSlot.infer`."""
        ...


class InferenceClient(Protocol[C]):
    """Loads networks, and explains images with them. Thread-safe."""

    @property
    def failure(self) -> str | None:
        """Why nothing can be computed any more in this process, or None."""
        ...

    @property
    def count(self) -> int:
        """Number of loaded networks."""
        ...

    @property
    def mean_batch_size(self) -> float:
        """Moving average of the number of images in a batch; 0 before the first one."""
        ...

    def load(self, row: NetworkRow, deadline: Deadline | None = None) -> C:
        """See `gradcam_worker.inference.model_cache.ModelCache.load`."""
        ...

    def reserve(self) -> AbstractContextManager[ReservedSlot[C]]:
        """See `gradcam_worker.inference.model_cache.ModelCache.reserve`."""
        ...

    def shard_batch_size(self, network: C) -> int:
        """See `gradcam_worker.inference.model_cache.ModelCache.shard_batch_size`."""
        ...

    def infer_many(
        self,
        network: C,
        pixels: InputPixels,
        classes: Sequence[int] | Sequence[tuple[int, ...]],
        method: Method,
        deadline: Deadline,
        *,
        alone: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> list[Explanation | GradcamError]:
        """See `gradcam_worker.inference.model_cache.ModelCache.infer_many`."""
        ...

    def scores(
        self,
        network: C,
        pixels: InputPixels,
        deadline: Deadline,
        *,
        bulk: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """See `gradcam_worker.inference.model_cache.ModelCache.scores`."""
        ...

    def measure(
        self,
        network: C,
        pixels: InputPixels,
        explanation: Explanation,
        metrics: Sequence[str],
        deadline: Deadline,
        *,
        bulk: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> Explanation:
        """See `gradcam_worker.inference.model_cache.ModelCache.measure`."""
        ...
