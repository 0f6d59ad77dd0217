"""One job from its image's URI to its manifest, top to bottom."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from gradcam_worker.artifacts import artifacts
from gradcam_worker.artifacts.render import render
from gradcam_worker.errors import ImageForbidden, ImageNotFound, InvalidJob
from gradcam_worker.execution.services import Services
from gradcam_worker.gradcam.network import Method
from gradcam_worker.images.prepare import fetch_image
from gradcam_worker.observability import tracing
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.shard import Work, terms_of
from gradcam_worker.schemas.status import (
    ClassScore,
    ManifestRef,
    NetworkRef,
    ResultWarning,
    RowSearch,
    RowState,
)
from gradcam_worker.storage.stores import Store

log = logging.getLogger("gradcam")


@dataclass(frozen=True)
class JobResult:
    """What goes into the status document of a job that succeeded."""

    network: NetworkRef
    predictions: tuple[ClassScore, ...]
    result: ManifestRef
    warnings: tuple[ResultWarning, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    rows: RowState | None = None  # of a shard


@dataclass(frozen=True)
class Stage:
    """Where a job is, as its status document says it."""

    stage: str  # for people
    rows: RowState | None = None  # of a shard: what other processes need to know


@dataclass
class JobContext:
    """What one attempt at a job carries along: its deadline, its stage, how long each stage took."""

    deadline: Deadline
    report_stage: Callable[[Stage], None]  # called as a stage begins
    attempt: int = 1
    current_stage: str = "check"
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: Callable[[Stage], None] = lambda _: None  # reports what must be known if this process dies
    after_crash: bool = False  # a worker died under the job
    row_search: RowSearch | None = None  # of a shard: how far the search for the row that did it had come
    is_last_attempt: bool = False  # there will be no other attempt

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Report a stage, and measure it. Raises JobTimeout where no time is left for it."""
        self.current_stage = stage
        self.deadline.check(stage)
        self.report_stage(Stage(stage))
        begun = time.monotonic()
        try:
            with tracing.span(stage):
                yield
        finally:
            self.metrics[f"{stage}_s"] = took_s = round(time.monotonic() - begun, 4)
            log.debug("%s took %.4f s", stage, took_s)


def run_job(job: Job, services: Services, context: JobContext, *, folder: str | None = None) -> JobResult:
    """Run one job.

    Args:
        job: What is asked for.
        services: Everything that it touches.
        context: Of this attempt. Its `current_stage` says where an error was raised.
        folder: Where artifacts go in the output; by default the job's id.

    Returns:
        What its status document says when it has succeeded.

    Raises:
        GradcamError: Any error of a job.
    """
    with ExitStack() as held:
        return _explain(job, services, context, held, folder or job.id)


def _explain(job: Job, services: Services, context: JobContext, held: ExitStack, folder: str) -> JobResult:
    store = admit(job, services)
    bulk = job.priority == "bulk"
    with services.model_cache.reserve() as slot:
        with context.stage("fetch"):
            find_result = partial(_find_result, job, services, context, store, folder)
            if job.image.sha256 and (done := find_result(job.image.sha256)):
                return done  # whether or not the image is still there
            try:
                fetched = held.enter_context(fetch_image(job.image, services, context.deadline))
            except (ImageNotFound, ImageForbidden):
                # No other bytes can be compared. The manifest says of which ones it was made.
                if not job.image.sha256 and (done := find_result(None)):
                    return done
                raise
            if not job.image.sha256 and (done := find_result(fetched.sha256)):
                return done
        with context.stage("decode"):
            image = held.enter_context(fetched.decode())
            record = image.record
            tracing.annotate(media_type=record.media_type, width=record.width, height=record.height)
        with context.stage("load"):
            network = services.model_cache.load(services.networks.find(job.network))  # as it is described now
            classes = network.labels.wanted(top_n=job.target.top_n, classes=job.target.classes)
        context.deadline.extend(context.metrics["load_s"])  # a download of weights is nobody's fault
        with context.stage("explain"):
            pixels = image.fit(network.facts)
            method = Method(**job.method.model_dump())
            inferred = slot.infer(network, pixels, classes, method, context.deadline, bulk=bulk)
            tracing.annotate(
                batch_size=inferred.batch_size,
                batch_wait_s=inferred.waited_s,
                computed_s=inferred.computed_s,
            )
    explanation = inferred.explanation
    if job.metrics:
        with context.stage("measure"):
            explanation = services.model_cache.measure(
                network, pixels, explanation, job.metrics, context.deadline, bulk=bulk
            )
    with context.stage("render"):
        rendered = render(
            job.artifacts, image, explanation, context.deadline, job_id=job.id, method=job.method
        )
        image.release()
    with context.stage("upload"):
        records = artifacts.upload(store, folder, rendered, context.deadline)
        manifest = artifacts.describe(job, record, explanation, rendered, records)
        result = artifacts.write_manifest(store, folder, manifest, context.deadline)
    context.metrics |= {
        "batch_wait_s": round(inferred.waited_s, 4),
        "explain_s": round(inferred.computed_s, 4),
        "batch_size": inferred.batch_size,
    }
    return _job_result(job, manifest, result)


def _find_result(
    job: Job, services: Services, context: JobContext, store: Store, folder: str, image_sha256: str | None
) -> JobResult | None:
    """The result of an earlier attempt that wrote its manifest and ended before it could say so."""
    if context.attempt == 1:
        return None
    row = services.networks.find(job.network)
    found = artifacts.find_manifest(store, folder, job, image_sha256, row, context.deadline)
    return _job_result(job, *found) if found else None


def _job_result(job: Job, manifest: Manifest, result: ManifestRef) -> JobResult:
    network = manifest.network
    return JobResult(
        network=NetworkRef(name=job.network, layer=network.layer, weights_sha256=network.weights_sha256),
        predictions=manifest.predictions,
        result=result,
        warnings=manifest.warnings,
    )


def admit(job: Work, services: Services) -> Store:
    """Refuse what the operator does not allow, before anything is fetched; open the output.

    Raises:
        InvalidJob: It asks for more classes than are allowed.
        UnknownNetwork: No such network is registered.
        UriNotAllowed: A webhook's.
        OutputNotAllowed: The output's.
    """
    services.networks.find(job.network)
    asked = job.target.top_n or len(job.target.classes or ())
    if asked > services.max_classes:
        most = f"at most {services.max_classes} are allowed (GRADCAM_MAX_CLASSES)"
        message = f"The job asks for {asked} classes; {most}."
        raise InvalidJob(message)
    for webhook in terms_of(job).webhooks:
        services.webhooks.check(webhook)
    return services.stores.open(job.output)
