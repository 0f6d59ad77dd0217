"""What is queued for the device, and what comes back from it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.network import Computed, Method
from gradcam_worker.observability import tracing
from gradcam_worker.resilience.deadline import Deadline

YIELDS_FOR_S = 5.0  # bulk that waited longer is served with the others: it holds threads that they may need

Key = tuple[int, Method | None, int]  # the network's id, the method, about how many classes
Finish = Callable[[], Any]  # waits for the device


@dataclass(frozen=True)
class InferenceResponse:
    """One image's place in a pass over many, and what it took to get it."""

    computed: Computed
    index: int
    waited_s: float  # for the device
    computed_s: float
    batch_size: int


@dataclass(eq=False)
class InferenceRequest:
    """A thread's request to the device; the thread waits for its completion."""

    key: Key  # requests of the same key may share a batch
    begin: Callable[["list[InferenceRequest]"], Finish]  # a batch of such requests
    deadline: Deadline
    bulk: bool = False
    images: int = 1  # in a pass of its own; 0: what runs there explains none
    pixels: NDArray[np.uint8] | None = None
    classes: tuple[int, ...] = ()
    queued_s: float = field(default_factory=time.monotonic)
    caller: tracing.LinkTarget | None = field(default_factory=tracing.link_target)
    done: threading.Event = field(default_factory=threading.Event)
    response: Any = None
    error: BaseException | None = None

    def complete(self, response: Any = None, error: BaseException | None = None) -> None:
        """Set the result, and wake the thread that waits for it."""
        self.response, self.error = response, error
        self.done.set()


@dataclass(eq=False)
class BatchQueue:
    """Requests that may share a batch."""

    largest: int  # images in a batch
    served: int  # the number of its last batch among all batches
    waiting: list[InferenceRequest] = field(default_factory=list)
    pass_s: float | None = None  # how long one takes, about

    def take(self) -> list[InferenceRequest]:
        """Remove and return the next batch: those that wait longest, but bulk last."""
        self.waiting.sort(key=yields_to_urgent)
        batch, self.waiting = self.waiting[: self.largest], self.waiting[self.largest :]
        return batch


def yields_to_urgent(request: InferenceRequest) -> bool:
    """Whether a request lets urgent ones go first."""
    return request.bulk and time.monotonic() - request.queued_s < YIELDS_FOR_S
