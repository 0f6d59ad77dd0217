"""One attempt at a job or a shard: whether it is allowed, its context, its progress and its result."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

from gradcam_worker.errors import InvalidJob
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam import network_inputs
from gradcam_worker.observability import tracing
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import (
    ClassScore,
    ManifestRef,
    NetworkRef,
    PassState,
    ResultWarning,
    RowSearch,
    RowState,
)
from gradcam_worker.schemas.work import Work, terms_of
from gradcam_worker.storage.store import Store
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")


@dataclass(frozen=True)
class JobResult:
    """The fields of the status document of a job that succeeded."""

    network: NetworkRef
    predictions: tuple[ClassScore, ...]
    result: ManifestRef
    warnings: tuple[ResultWarning, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    rows: RowState | None = None  # of a shard's rows
    passes: PassState | None = None  # of a job whose method only needs scores


@dataclass(frozen=True)
class Progress:
    """The fields of the status document that say how far a job is."""

    stage: str  # shown to people
    rows: RowState | None = None  # of a shard's rows: what other processes need to know
    passes: PassState | None = None  # of a job whose method only needs scores


@dataclass
class JobContext:
    """One attempt at a job: its deadline, its current stage, and how long each stage took."""

    deadline: Deadline
    report_progress: Callable[[Progress], None]  # called when a stage begins
    attempt: int = 1
    created_at: datetime | None = None  # of the job, the same for all attempts
    current_stage: str = "check"
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: Callable[[Progress], None] = lambda _: None  # reports what must survive this process
    after_crash: bool = False  # a worker died while it ran this job
    row_search: RowSearch | None = None  # of a shard: state of the search for the row that killed the worker
    is_last_attempt: bool = False
    progressed: Callable[[], None] = lambda: None  # reports that the job is not stuck
    storage_fails: Callable[[], bool] = lambda: False  # whether the storage is why reads have failed

    def measured(self) -> dict[str, float]:
        """How long each stage took, and for how long the device was used, in seconds."""
        return {**self.metrics, "device_s": round(self.deadline.device_s, 6)}

    @contextmanager
    def enter_stage(self, stage: str) -> Iterator[None]:
        """Report a stage, and measure how long the block takes.

        Raises:
            JobTimeout: The deadline passed.
        """
        self.current_stage = stage
        self.deadline.check(stage)
        self.report_progress(Progress(stage))
        begun_s = time.monotonic()
        try:
            with tracing.span(stage):
                yield
        finally:
            self.metrics[f"{stage}_s"] = took_s = round(time.monotonic() - begun_s, 4)
            log.debug("job_stage_finished", stage=stage, took_s=took_s)


def admit(work: Work, services: Services) -> Store:
    """Refuse what the operator does not allow, before anything is fetched; open the output.

    Returns:
        The output.

    Raises:
        InvalidJob: The job wants more classes than are allowed.
        UnknownNetwork: No network is registered under this name.
        InvalidNetworkInput: The job gives the network other inputs than it takes.
        UriNotAllowed: A webhook's URL is not allowed.
        OutputNotAllowed: The output is not allowed.
    """
    row = services.networks.find(work.network)
    if isinstance(work, Job) and (row.inputs or work.inputs):
        network_inputs.resolve(row.inputs, work.inputs, row.name)
    class_count = work.target.top_n or len(work.target.classes or ())
    if isinstance(work, Shard):
        class_count += max(len(row.classes or ()) for row in work.rows)
    if class_count > services.max_classes:
        message = (
            f"The job asks for {class_count} classes; "
            f"at most {services.max_classes} are allowed (GRADCAM_MAX_CLASSES)."
        )
        raise InvalidJob(message)
    for webhook in terms_of(work).webhooks:
        services.webhooks.check(webhook)
    return services.stores.open(work.output)
