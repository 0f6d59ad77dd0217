"""The requests that are queued for the device, and its responses."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.gradcam.network import Computed, InputPixels, Method
from gradcam_worker.observability import tracing
from gradcam_worker.resilience.deadline import Deadline

BULK_YIELDS_FOR_S = 5.0  # afterwards a bulk request is as urgent as others, since it occupies a thread

BatchKey = tuple[int, Method | None, int]  # id of the network, method, bit length of (classes - 1)
Finish = Callable[[], Any]  # waits for the device and returns the result of a batch


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class InferenceResponse:
    """The result of a batch, and which of its images is the caller's."""

    computed: Computed  # of the whole batch
    index: int  # of the caller's image in the batch
    waited_s: float  # from the request to the start of the batch
    computed_s: float
    batch_size: int

    @property
    def device_s(self) -> float:
        """The caller's equal share of the time that the device computed."""
        return self.computed_s / self.batch_size


@dataclass(frozen=True)
class InferenceResult:
    """An explanation, and how long it took."""

    explanation: Explanation
    waited_s: float  # from the request to the start of its batch
    computed_s: float
    batch_size: int


@dataclass(eq=False)
class InferenceRequest:
    """A request to the device. The thread that made it waits until it is complete."""

    key: BatchKey  # requests of the same key may share a batch
    begin: Callable[["list[InferenceRequest]"], Finish]  # starts a batch of requests of this key
    deadline: Deadline
    bulk: bool = False
    images: int = 1  # 0: a function that explains no image
    pixels: InputPixels | None = None
    values: NDArray[np.float32] | None = None  # of further inputs of the network
    classes: tuple[int, ...] = ()
    queued_s: float = field(default_factory=time.monotonic)
    caller: tracing.LinkTarget | None = field(default_factory=tracing.link_target)
    done: threading.Event = field(default_factory=threading.Event)
    response: Any = None
    error: BaseException | None = None
    after_batch: Callable[[], None] = field(default=_nothing)  # called when its whole batch is complete

    def started(self) -> None:
        """Note that the device computes it from now on."""

    def complete(self, response: Any = None, error: BaseException | None = None) -> None:
        """Set the response or the error, and wake the thread that waits for it."""
        self.response, self.error = response, error
        self.done.set()


@dataclass(eq=False)
class BatchQueue:
    """Requests that may share a batch."""

    max_batch_size: int
    last_batch: int  # number of its latest batch, in the order of all batches
    waiting: list[InferenceRequest] = field(default_factory=list)
    batch_s: float | None = None  # moving average of the duration of its batches

    @property
    def is_full(self) -> bool:
        """Whether its next batch needs no further request."""
        return len(self.waiting) >= self.max_batch_size

    def take(self) -> list[InferenceRequest]:
        """Remove and return the next batch: the requests that wait longest, bulk requests last."""
        self.waiting.sort(key=yields_to_urgent)
        batch, self.waiting = self.waiting[: self.max_batch_size], self.waiting[self.max_batch_size :]
        return batch


def yields_to_urgent(request: InferenceRequest) -> bool:
    """Whether urgent requests go before this one."""
    return request.bulk and time.monotonic() - request.queued_s < BULK_YIELDS_FOR_S
