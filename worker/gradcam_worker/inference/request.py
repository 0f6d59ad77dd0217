"""What waits for the device, and what comes back from it."""

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

AGED_S = 5.0  # bulk that waited so long goes with the others: it holds threads that they may need

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
    """What a thread wants to be done, and waits for."""

    key: Key  # what may share a batch with it has the same
    begin: Callable[["list[InferenceRequest]"], Finish]  # a batch of such requests
    deadline: Deadline
    bulk: bool = False
    images: int = 1  # in a pass of its own; 0: what runs there explains none
    pixels: NDArray[np.uint8] | None = None
    wish: tuple[int, ...] = ()
    asked_s: float = field(default_factory=time.monotonic)
    asker: tracing.Asker | None = field(default_factory=tracing.asker)
    done: threading.Event = field(default_factory=threading.Event)
    answer: Any = None
    error: BaseException | None = None

    def end(self, answer: Any = None, error: BaseException | None = None) -> None:
        """Let the thread go that waits for it."""
        self.answer, self.error = answer, error
        self.done.set()


@dataclass(eq=False)
class BatchQueue:
    """Requests that may share a batch."""

    largest: int  # images in a batch
    served: int  # the number of its last batch among all batches
    waiting: list[InferenceRequest] = field(default_factory=list)
    pass_s: float | None = None  # how long one takes, about

    def take(self) -> list[InferenceRequest]:
        """The next batch: who waits longest, but bulk last."""
        self.waiting.sort(key=is_patient)
        batch, self.waiting = self.waiting[: self.largest], self.waiting[self.largest :]
        return batch


def is_patient(request: InferenceRequest) -> bool:
    """Whether it may wait behind others."""
    return request.bulk and time.monotonic() - request.asked_s < AGED_S
